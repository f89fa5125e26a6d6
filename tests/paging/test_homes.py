from __future__ import annotations

import dataclasses

import pytest
import torch

from paging_models import make, quantize_linears, specs_of
from tuckaway.config import QuantizationConfig
from tuckaway.errors import StoreError, StoreStale
from tuckaway.paging import PageHomes, plan_pages
from tuckaway.paging import homes as module
from tuckaway.tensor import QuantizedTensor, quantize

MAP = {"": "cpu", "blocks": "disk"}


def plan_of(model, **changes):
    specs = {
        name: dataclasses.replace(spec, layout=dataclasses.replace(spec.layout, **changes))
        if spec.layout
        else spec
        for name, spec in specs_of(model).items()
    }
    return plan_pages(model, specs, MAP, execution_device="cpu", page_cpu=True)


@pytest.fixture
def model():
    return quantize_linears(make(), QuantizationConfig(nested=True))


def filled(model, folder, fingerprint="m", **options):
    plan = plan_of(model)
    homes = PageHomes.create(plan, offload_folder=folder, fingerprint=fingerprint, **options)
    for name, parameter in model.named_parameters():
        homes.put(name, parameter)
    homes.commit()
    return homes


def plain(tensor):
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def test_what_is_put_is_read_under_every_name(tmp_path, model):
    homes = filled(model, tmp_path)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found = homes.plan.specs[name].build(homes.read(name))
        assert type(found) is type(parameter)
        assert torch.equal(plain(found), plain(parameter)), name
    assert homes.home_of("head.weight") == "cpu"
    assert homes.home_of("blocks.0.up.bias") == "disk"
    assert homes.home_of("blocks.0.scale") is None
    with pytest.raises(KeyError, match="in no page"):
        homes.read("blocks.0.scale")
    homes.close()


def test_tensors_are_written_component_by_component(tmp_path, model):
    plan = plan_of(model)
    homes = PageHomes.create(plan, offload_folder=tmp_path)
    for name, parameter in model.named_parameters():
        parts = parameter.components if isinstance(parameter, QuantizedTensor) else {"": parameter.detach()}
        for component, part in parts.items():
            if homes.home_of(name) == "disk":
                homes.write(name, component, part)
            else:
                homes.views(name)[component].copy_(part)
    homes.commit()
    assert torch.equal(homes.read("embedding.weight")[""], model.embedding.weight)
    assert torch.equal(homes.read("blocks.4.up.weight")["codes"], model.blocks[4].up.weight.codes)
    homes.close()


def test_what_does_not_fit_is_refused(tmp_path, model):
    homes = PageHomes.create(plan_of(model), offload_folder=tmp_path)
    with pytest.raises(ValueError, match=r"\[32\] torch.float32 in its page, not \[3\]"):
        homes.put("norm.weight", torch.ones(3))
    with pytest.raises(ValueError, match=r"not \[32\] torch.float16"):
        homes.write("blocks.0.norm.weight", "", torch.ones(32, dtype=torch.float16))
    with pytest.raises(ValueError, match="another format"):
        homes.put("blocks.0.up.weight", torch.ones(64, 32))
    with pytest.raises(ValueError, match="another format"):
        homes.put("blocks.0.up.weight", quantize(torch.ones(64, 32), QuantizationConfig(format="fp4")))
    with pytest.raises(ValueError, match="write it"):
        homes.views("blocks.0.norm.weight")
    with pytest.raises(ValueError, match="fill its views"):
        homes.write("norm.weight", "", torch.ones(32))
    homes.abort()
    assert list(tmp_path.iterdir()) == []


def test_the_formats_are_part_of_a_stores_identity(tmp_path, model):
    filled(model, tmp_path).close()
    again = PageHomes.create(plan_of(model), offload_folder=tmp_path, fingerprint="m")
    assert again.reusable
    again.close()
    # how products are computed changes no byte
    other = PageHomes.create(
        plan_of(model, compute_dtype=torch.float16), offload_folder=tmp_path, fingerprint="m"
    )
    assert other.reusable
    other.close()
    with pytest.raises(StoreStale):  # the same shapes and dtypes, other codes
        PageHomes.create(plan_of(model, format="fp4"), offload_folder=tmp_path, fingerprint="m")
    with pytest.raises(StoreStale):
        PageHomes.create(plan_of(model), offload_folder=tmp_path, fingerprint="other weights")


def test_disk_pages_need_a_folder(model):
    with pytest.raises(StoreError, match=r"5 pages go to the disk \('blocks.0', .*pass offload_folder"):
        PageHomes.create(plan_of(model))


def test_a_plan_without_pages_needs_nothing():
    model = make()
    plan = plan_pages(model, specs_of(model), {"": "cpu"}, execution_device="cpu")
    homes = PageHomes.create(plan)
    assert homes.arena is homes.store is None
    assert not homes.reusable
    homes.pin()
    homes.commit()
    homes.close()


def test_memory_that_cannot_be_had_leaves_no_store(tmp_path, model, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(module, "Arena", fail)
    with pytest.raises(MemoryError):
        PageHomes.create(plan_of(model), offload_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_arena_is_as_big_as_planned(tmp_path, model):
    homes = filled(model, tmp_path)
    assert homes.arena.nbytes == homes.plan.arena_nbytes
    assert homes.store.nbytes == homes.plan.store_nbytes == (tmp_path / "pages.bin").stat().st_size
    homes.close()


def test_a_fixed_part_of_the_disk_pages_stays_in_memory(tmp_path, model):
    plan = plan_of(model)
    extents = [unit.layout.extent for unit in plan.homed("disk")]
    homes = filled(model, tmp_path, disk_cache_bytes=2 * extents[0] + 4095)
    plan = homes.plan
    kept = [unit for unit in plan.homed("disk") if homes.kept(unit) is not None]
    assert kept == list(plan.homed("disk")[:2])
    assert homes.cache.nbytes == 2 * extents[0]
    assert homes.in_memory(kept[0]) is None
    homes.kept(kept[0]).fill_(7)
    assert homes.keep(kept[0]).eq(7).all()
    assert homes.in_memory(kept[0]).numel() == kept[0].layout.nbytes
    name = kept[0].tensors[0]
    homes.replace(name, getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]))
    assert homes.in_memory(kept[0]) is None
    homes.close()
