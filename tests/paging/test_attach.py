"""A paged model computes what the resident one does, bit for bit, whatever happens in between."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from paging_models import ON_CPU, WIDTH, Block, Net, make, page, quantize_linears, specs_of, tokens
from tuckaway.config import QuantizationConfig
from tuckaway.errors import ChecksumError, PagingError, StoreError
from tuckaway.paging import (
    PageHomes,
    attach,
    is_paged,
    paging_of,
    plan_pages,
)
from tuckaway.tensor import QuantizedTensor


@pytest.fixture(params=list(ON_CPU))
def device_map(request):
    return ON_CPU[request.param]


@pytest.fixture
def want():
    with torch.no_grad():
        return make()(tokens())


def in_turn(model):
    return [p.unit.name for p in paging_of(model).pager.pages if p.turns or p.users]


def check_idle(model):
    """Nothing is in use, and every paged tensor is on the meta device."""
    assert in_turn(model) == []
    for name, parameter in model.named_parameters():
        assert (parameter.device.type == "meta") == is_paged(model, name), name


@pytest.mark.parametrize("slots", [1, 2, 3, 50])
def test_it_computes_what_the_resident_model_does(tmp_path, device_map, want, slots):
    model = page(make(), device_map, tmp_path, slots=slots)
    check_idle(model)
    for _ in range(4):
        with torch.no_grad():
            assert torch.equal(model(tokens()), want)
        check_idle(model)
    pager = paging_of(model).pager
    assert len(pager.slots.all) <= slots + ("blocks.3.up" in device_map)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_quantized_models_too(tmp_path, device_map, format):
    config = QuantizationConfig(format=format, compute_dtype=None)
    resident = quantize_linears(make(), config)
    model = page(quantize_linears(make(), config), device_map, tmp_path)
    weight = model.blocks[0].up.weight
    assert isinstance(weight, QuantizedTensor)
    assert isinstance(weight, nn.Parameter)
    assert (weight.format, weight.shape, weight.device.type) == (format, (2 * WIDTH, WIDTH), "meta")
    for seed in range(3):
        with torch.no_grad():
            assert torch.equal(model(tokens(seed)), resident(tokens(seed)))
    check_idle(model)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_mode_after_every_other(tmp_path, device_map, want, mode):
    model = page(make(), device_map, tmp_path)
    for other in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            assert torch.equal(model(tokens()), want)
        with other():
            assert torch.equal(model(tokens()), want)


def test_blocks_in_any_order(tmp_path, device_map):
    resident, model = make(), page(make(), device_map, tmp_path)
    orders = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 0, 1, 0], [2], [], [1, 2, 1, 2, 3, 3, 3], [4, 0, 4, 0]]
    with torch.no_grad():
        for order in orders * 2:
            resident.order = model.order = order
            for _ in range(3):
                assert torch.equal(model(tokens()), resident(tokens())), order
    check_idle(model)


def test_a_block_used_under_two_names(tmp_path, device_map):
    def build():
        model = make(blocks=2)
        model.blocks.extend([model.blocks[0], model.blocks[1], model.blocks[0]])
        return model

    resident, model = build(), page(build(), device_map, tmp_path)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(tokens()), resident(tokens()))


def test_tensors_shared_between_blocks(tmp_path, device_map):
    def build():
        model = make()
        model.blocks[2].up.weight = model.blocks[0].up.weight
        model.blocks[4].down.bias = model.norm.bias
        return model

    resident, model = build(), page(build(), device_map, tmp_path)
    assert model.blocks[2].up.weight is model.blocks[0].up.weight
    assert model.head.weight is model.embedding.weight
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(tokens()), resident(tokens()))
    check_idle(model)


def test_ties_hold_while_a_page_is_in(tmp_path):
    model = page(make(), {"": "disk"}, tmp_path)
    seen = []
    model.head.register_forward_hook(lambda *_: seen.append(model.head.weight is model.embedding.weight))
    model.head.register_forward_pre_hook(lambda *_: seen.append(model.head.weight is model.embedding.weight))
    with torch.no_grad():
        model(tokens())
    assert seen == [True, True]


class Failing(Block):
    """Raises when told to."""

    failure: BaseException | None = None

    def forward(self, x):
        hidden = super().forward(x)
        if self.failure is not None:
            raise self.failure
        return hidden


@pytest.mark.parametrize("where", [0, 3])
def test_an_exception_in_a_block_leaves_nothing_in_use(tmp_path, device_map, want, where):
    def build():
        model = make()
        model.blocks[where].__class__ = Failing
        return model

    model = page(build(), device_map, tmp_path)
    with torch.no_grad():
        for _ in range(3):
            model.blocks[where].failure = KeyError("here")
            with pytest.raises(KeyError, match="here"):
                model(tokens())
            check_idle(model)
            model.blocks[where].failure = None
            assert torch.equal(model(tokens()), want)


def test_an_interrupt_in_a_block_is_made_good_at_the_next_forward(tmp_path, device_map, want):
    model = make()
    model.blocks[2].__class__ = Failing
    model = page(model, device_map, tmp_path)
    with torch.no_grad():
        for _ in range(3):
            model.blocks[2].failure = KeyboardInterrupt()
            with pytest.raises(KeyboardInterrupt):
                model(tokens())
            model.blocks[2].failure = None
            assert torch.equal(model(tokens()), want)
            check_idle(model)


def test_an_exception_in_somebody_elses_hook(tmp_path, want):
    model = page(make(), {"": "disk"}, tmp_path)

    def fail(*_):
        raise ValueError("theirs")

    with torch.no_grad():
        for register in (model.blocks[1].register_forward_hook, model.blocks[1].register_forward_pre_hook):
            handle = register(fail)
            with pytest.raises(ValueError, match="theirs"):
                model(tokens())
            handle.remove()
            check_idle(model)
        assert torch.equal(model(tokens()), want)


class Recursive(nn.Module):
    """Calls itself, and a block between."""

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.randn(WIDTH))
        self.inner = nn.ModuleList([Block(), Block()])

    def forward(self, x, depth=2):
        x = self.inner[depth % 2](x + self.own)
        return self(x, depth - 1) * self.own if depth else x


def test_nested_forwards(tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([Recursive(), Recursive()])

        def forward(self, x):
            return self.parts[1](self.parts[0](x))

    x = torch.randn(2, WIDTH)
    with torch.no_grad():
        want = make(Outer)(x)
        for device_map in (
            {"": "disk"},
            {"": "disk", "parts.0.inner": "cpu"},
            {"": "cpu", "parts.0.inner.0": "disk", "parts.1.inner.1.up": "disk"},
        ):
            model = page(make(Outer), device_map, tmp_path / str(len(device_map)), slots=1)
            for _ in range(3):
                assert torch.equal(model(x), want)
            check_idle(model)


class Mixture(nn.Module):
    """Each call uses other experts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x, chosen):
        return sum(self.experts[i](x) for i in chosen)


def test_only_the_experts_that_are_used_are_brought_in(tmp_path):
    resident, model = make(Mixture), page(make(Mixture), {"": "disk"}, tmp_path)
    x = torch.randn(2, WIDTH)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(20):
            chosen = torch.randperm(6, generator=generator)[:2].tolist()
            assert torch.equal(model(x, chosen), resident(x, chosen))
    check_idle(model)


def test_threads(tmp_path, device_map):
    resident, model = make(), page(make(), device_map, tmp_path)
    with torch.no_grad():
        want = [resident(tokens(seed)) for seed in range(4)]
    failures = []

    def work(seed):
        try:
            for _ in range(15):
                with torch.no_grad():
                    assert torch.equal(model(tokens(seed)), want[seed])
                with torch.enable_grad():
                    assert torch.equal(model(tokens(seed)), want[seed])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    check_idle(model)


# Gradients


class Adapted(Net):
    """With something to train before, in and after the frozen blocks."""

    def __init__(self, checkpointed=None, **options):
        super().__init__(**options)
        self.checkpointed = checkpointed
        self.first = nn.Parameter(torch.zeros(WIDTH))
        self.last = nn.Linear(WIDTH, 3)
        for block in self.blocks:
            block.adapter = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.first
        for block in self.blocks:
            if self.checkpointed is None:
                x = block(x) + block.adapter(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointed) + block.adapter(x)
        return self.last(self.norm(x))


def trainable(model):
    model.first.requires_grad_()
    model.last.requires_grad_()
    for block in model.blocks:
        block.adapter.requires_grad_()
    return model


def is_trained(name):
    return name.startswith(("first", "last")) or ".adapter." in name


@pytest.mark.parametrize("home", ["disk", "cpu"])
@pytest.mark.parametrize("checkpointed", [None, True, False])
@pytest.mark.parametrize("format", [None, "nf4"])
def test_training_on_top_of_paged_weights(tmp_path, home, checkpointed, format):
    def build():
        model = make(Adapted, checkpointed=checkpointed)
        if format:
            for block in model.blocks:
                quantize_linears(block.up, QuantizationConfig(format=format, compute_dtype=None))
        return trainable(model)

    def train(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for step in range(3):
            loss = model(tokens(step)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    losses, weights = train(build())
    model = page(build(), {"": home}, tmp_path, leave=is_trained)
    got_losses, got_weights = train(model)
    assert all(torch.equal(a, b) for a, b in zip(losses, got_losses, strict=True))
    assert weights.keys() == got_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, got_weights[name]), name
    check_idle(model)


def test_gradients_with_respect_to_the_input(tmp_path, device_map):
    def gradient(model):
        x = torch.randn(2, WIDTH, requires_grad=True, generator=torch.Generator().manual_seed(1))
        y = x
        for block in model.blocks:
            y = block(y)
        y.sum().backward()
        return x.grad

    model = page(make(), device_map, tmp_path)
    for _ in range(2):
        assert torch.equal(gradient(model), gradient(make()))


def test_two_graphs_are_alive_at_once(tmp_path, device_map):
    def gradients(model):
        inputs = [torch.full((2, WIDTH), float(i), requires_grad=True) for i in range(3)]
        outputs = []
        for x in inputs:
            for block in model.blocks:
                x = block(x)
            outputs.append(x)
        for y in reversed(outputs):
            y.sum().backward()
        return [x.grad for x in inputs]

    model = page(make(), device_map, tmp_path)
    for a, b in zip(gradients(model), gradients(make()), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_that_would_be_lost_is_an_error(tmp_path):
    model = make().requires_grad_()
    model = page(model, {"": "disk"}, tmp_path)
    assert model.norm.weight.requires_grad
    loss = model(tokens()).sum()
    with pytest.raises(PagingError, match="would lose its gradient"):
        loss.backward()
    model.requires_grad_(False)
    assert not model(tokens()).requires_grad
    check_idle(model)


def test_weights_that_want_gradients_do_not_hinder_inference(tmp_path, want):
    model = page(make().requires_grad_(), {"": "disk"}, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(tokens()), want)
    assert torch.equal(model(tokens()).detach(), want)


# Buffers


def test_buffers_can_be_paged(tmp_path, device_map):
    def build():
        model = make()
        for i, block in enumerate(model.blocks):
            block.scale.fill_(i + 0.5)
        return model

    resident = build()
    model = page(build(), device_map, tmp_path, offload_buffers=True)
    assert model.blocks[0].scale.device.type == "meta"
    assert not isinstance(model.blocks[0].scale, nn.Parameter)
    with torch.no_grad():
        assert torch.equal(model(tokens()), resident(tokens()))
    assert "blocks.0.scale" in model.state_dict()


# What a paged model refuses


def test_a_move_to_where_it_executes_changes_nothing(tmp_path):
    model = page(make(), {"": "disk"}, tmp_path)
    assert model.to("cpu") is model
    assert model.to(torch.device("cpu"), non_blocking=True) is model
    around = nn.Sequential(model)
    around.to("cpu")  # through _apply: torch never asks the module below for its own `to`
    assert any(p.is_meta for p in model.parameters())
    for wrong in (lambda: around.to("meta"), around.half, lambda: around.to(torch.float64)):
        with pytest.raises(PagingError, match="materialize"):
            wrong()


@pytest.mark.parametrize("move", [lambda m: m.to("meta"), lambda m: m.cuda(), lambda m: m.half(), lambda m: m.float(),
                                  lambda m: m.cpu(), lambda m: m.to(torch.float64), lambda m: m.double()])  # fmt: skip
def test_it_cannot_be_moved_or_converted(tmp_path, want, move):
    model = page(make(), {"": "disk"}, tmp_path)
    with pytest.raises(PagingError, match="materialize"):
        move(model)
    with torch.no_grad():
        assert torch.equal(model(tokens()), want)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_it_cannot_be_copied(tmp_path, duplicate):
    model = page(make(), {"": "disk"}, tmp_path)
    for part in (model, model.blocks, model.blocks[0]):
        with pytest.raises(PagingError, match="cannot be copied"):
            duplicate(part)


def test_it_is_not_paged_twice(tmp_path):
    model = page(make(), {"": "disk"}, tmp_path)
    plan = paging_of(model).plan
    with pytest.raises(PagingError, match="paged already"):
        attach(model, plan, PageHomes(plan, None, None))


def test_resident_tensors_without_a_value_are_named():
    with torch.device("meta"):
        model = Net()
    plan = plan_pages(model, specs_of(model), {"": "cpu"}, execution_device="cpu")
    with pytest.raises(PagingError, match=r"'position' is to be resident and has no value"):
        attach(model, plan)
    assert paging_of(model) is None


def test_an_incomplete_store_is_not_attached(tmp_path):
    model = make()
    plan = plan_pages(model, specs_of(model), {"": "disk"}, execution_device="cpu")
    homes = PageHomes.create(plan, offload_folder=tmp_path / "x")
    with pytest.raises(StoreError, match="was not written"):
        attach(model, plan, homes)
    assert paging_of(model) is None
    homes.abort()
    assert list(tmp_path.iterdir()) == []


# Faults


def test_damage_surfaces_in_the_forward(tmp_path, want):
    model = page(make(), {"": "disk"}, tmp_path, fingerprint="m")
    with torch.no_grad():
        assert torch.equal(model(tokens()), want)
        for slot in paging_of(model).pager.slots.all:
            slot.fill.settle()
        data = bytearray((tmp_path / "pages.bin").read_bytes())
        sound = bytes(data)
        at = paging_of(model).plan.page_of("blocks.3.up.weight").index
        data[4096 * 1 + 9] ^= 1
        data[paging_of(model).homes.store._starts[at] + 300] ^= 1
        (tmp_path / "pages.bin").write_bytes(data)
        for _ in range(3):
            with pytest.raises(ChecksumError, match="changed on disk"):
                model(tokens())
            assert in_turn(model) == []
        for slot in paging_of(model).pager.slots.all:
            slot.fill.settle()  # what is read ahead would find half a file
        (tmp_path / "pages.bin").write_bytes(sound)
        assert torch.equal(model(tokens()), want)
    check_idle(model)


# State


def test_state_dict_has_the_same_names(tmp_path):
    model = page(make(), {"": "disk"}, tmp_path)
    assert list(model.state_dict()) == list(make().state_dict())


def test_what_replaces_a_paged_tensor_is_kept(tmp_path, device_map):
    resident, model = make(), page(make(), device_map, tmp_path)
    with torch.no_grad():
        model(tokens())
        for either in (resident, model):
            either.blocks[1].up.weight = nn.Parameter(torch.ones(2 * WIDTH, WIDTH), requires_grad=False)
            either.blocks[2] = make(Block, seed=9)
        for _ in range(2):
            assert torch.equal(model(tokens()), resident(tokens()))
    assert model.blocks[1].up.weight.device.type == "cpu"


# Ending


def test_a_dropped_model_lets_go_of_everything(tmp_path):
    before = set(threading.enumerate())
    model = page(make(), {"": "disk"}, tmp_path, fingerprint="m")
    with torch.no_grad():
        model(tokens())
    paging = weakref.ref(paging_of(model))
    del model
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # a page that is being read ahead ends first
        gc.collect()
        if paging() is None and set(threading.enumerate()) <= before:
            break
        time.sleep(0.01)
    else:
        pytest.fail("a thread or the model's paging is still there")
    assert not (tmp_path / "tuckaway.lock").exists()


def test_a_store_is_used_again(tmp_path, want):
    page(make(), {"": "disk"}, tmp_path, fingerprint="m")
    written = (tmp_path / "pages.bin").stat().st_mtime_ns
    models = [page(make(), {"": "disk"}, tmp_path, fingerprint="m") for _ in range(2)]
    for model in models:
        assert paging_of(model).homes.reusable
        with torch.no_grad():
            assert torch.equal(model(tokens()), want)
    assert (tmp_path / "pages.bin").stat().st_mtime_ns == written


def test_page_turns_are_quick(tmp_path):
    """4,000 turns, each with two binds of six tensors: 40 us each is what a page of a decoder layer may cost."""
    model = page(make(blocks=8), {"": "cpu"})
    x = torch.zeros(1, WIDTH)
    pager = paging_of(model).pager
    pages = pager.pages
    with torch.no_grad():
        model.blocks[0](x)
        start = time.thread_time()
        for _ in range(500):
            for one in pages[2:10]:
                pager.release(pager.bring_in(one))
        each = (time.thread_time() - start) / 4000
    assert each < 1e-3, f"{each * 1e6:.0f} us"
