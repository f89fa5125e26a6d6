"""Paging to an accelerator: side streams, pinned memory, graphs. Every result is the resident model's, bit for bit.

What holds on a CPU too is in ``tests/paging/test_devices.py``, which runs on both.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from paging_models import WIDE, Block, Net, make, maps, page, specs_of, tokens, wide_net
from tuckaway.errors import PagingError, StoreError
from tuckaway.paging import CapturedStep, PageHomes, paging_of, plan_pages
from tuckaway.paging import arena as arena_module

pytestmark = pytest.mark.gpu

WIDTH, MAPS = WIDE, maps(0)


def build(format=None):
    return wide_net(format, "cuda")


def paged(tmp_path, device_map, format=None, **options):
    return page(build(format), device_map, tmp_path, execution_device=0, **options)


@pytest.fixture(params=list(MAPS))
def device_map(request):
    return MAPS[request.param]


def test_a_slot_is_not_overwritten_while_a_slow_product_reads_it(tmp_path):
    model, resident = paged(tmp_path, MAPS["cpu"], slots=1), build().to("cuda")
    x = tokens().to("cuda")

    def slow(module, args):
        torch.cuda._sleep(5_000_000)  # some 3 ms before the block's first product

    for either in (model, resident):
        for block in either.blocks:
            block.register_forward_pre_hook(slow)
    with torch.no_grad():
        want = resident(x)
        for _ in range(5):
            assert torch.equal(model(x), want)


def test_forwards_on_several_streams(tmp_path):
    model, resident = paged(tmp_path, MAPS["cpu"]), build().to("cuda")
    inputs = [tokens(seed).to("cuda") for seed in range(3)]
    with torch.no_grad():
        wants = [resident(x) for x in inputs]
        torch.accelerator.synchronize()
        streams = [torch.cuda.Stream() for _ in inputs]
        results = []
        for _ in range(10):
            for stream, x, want in zip(streams, inputs, wants, strict=True):
                with torch.cuda.stream(stream):
                    results.append((model(x), want))
    torch.accelerator.synchronize()
    assert all(torch.equal(got, want) for got, want in results)


def test_memory_on_the_device_is_what_was_planned(tmp_path):
    x = tokens().to("cuda")
    with torch.no_grad():
        build().to("cuda")(x)  # the matrix library's workspace comes with the first product of a process
        model = paged(tmp_path, MAPS["cpu"])
        gc.collect()
        torch.accelerator.synchronize()
        before = torch.cuda.memory_allocated()
        model(x)
    torch.accelerator.synchronize()
    paging = paging_of(model)
    assert paging.pager.nbytes == paging.plan.device_nbytes(2)
    assert torch.cuda.memory_allocated() - before <= paging.plan.device_nbytes(2) + 2**22


def test_the_arena_is_pinned_and_exact(tmp_path):
    model = paged(tmp_path, MAPS["cpu"])
    arena = paging_of(model).homes.arena
    assert arena.pinned
    assert arena.buffer.untyped_storage().nbytes() == paging_of(model).plan.arena_nbytes
    assert arena.page(3).is_pinned()
    address, page_ = arena.buffer.data_ptr(), arena.page(0)
    paging_of(model).close()
    assert page_.data_ptr() == address
    assert not page_.is_pinned()


def test_unpinned_memory_is_slower_but_right(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(arena_module, "_register", lambda *_: False)
    with caplog.at_level("WARNING", logger="tuckaway"):
        model = paged(tmp_path, MAPS["mixed"])
    assert "could not pin" in caplog.text
    resident, x = build().to("cuda"), tokens().to("cuda")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), resident(x))


@pytest.mark.parametrize("slots", [1, 2])
def test_unpinned_memory_in_a_captured_step(tmp_path, monkeypatch, slots):
    monkeypatch.setattr(arena_module, "_register", lambda *_: False)
    model = paged(tmp_path, MAPS["mixed"], "nf4", slots=slots)
    resident, x = build("nf4").to("cuda"), tokens().to("cuda")
    step = CapturedStep(model, lambda: model(x))
    with torch.no_grad():
        for seed in range(4):
            x.copy_(tokens(seed).to("cuda"))
            assert torch.equal(step(), resident(x))


def test_an_old_model_found_by_the_collector_does_no_harm_to_a_capture(tmp_path):
    resident, x = build("nf4").to("cuda"), tokens().to("cuda")
    old, model = paged(tmp_path / "old", MAPS["mixed"]), paged(tmp_path / "new", MAPS["cpu"], "nf4")
    with torch.no_grad():
        old(x)
        model(x)
        gc.collect()
        old.itself = [old]  # what only the collector finds
        arena = weakref.ref(paging_of(old).homes.arena)
        del old

        def run():
            gc.collect()
            assert arena() is None
            return model(x)

        graph, out = captured(run)
        graph.replay()
        assert torch.equal(out, resident(x))


def test_a_dropped_model_leaves_no_copy_behind(tmp_path):
    """Its slots' memory goes to others at once: a copy still on its way would write into theirs."""
    x = tokens().to("cuda")
    for _ in range(5):
        model = paged(tmp_path, MAPS["cpu"])
        with torch.no_grad():
            model(x)
        del model
        gc.collect()
        others = [torch.zeros(2**22, dtype=torch.uint8, device="cuda") for _ in range(8)]
        torch.accelerator.synchronize()
        assert not any(bool(other.any()) for other in others)


def test_a_forward_is_captured_in_a_graph(tmp_path):
    resident, model = build("nf4"), paged(tmp_path, MAPS["cpu"], "nf4")
    x = tokens().to("cuda")
    with torch.no_grad():
        for _ in range(3):
            model(x)
        torch.accelerator.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        for seed in range(4):
            x.copy_(tokens(seed).to("cuda"))
            graph.replay()
            eager = model(x)  # between replays: graphs have slots of their own
            want = resident(x)
            torch.accelerator.synchronize()
            assert torch.equal(out, want)
            assert torch.equal(eager, want)


ORDERS = [None, [7, 6, 5, 4, 3, 2, 1, 0], [0, 0, 3, 0], [2, 5], [1]]


def captured(run):
    graph = torch.cuda.CUDAGraph()
    torch.accelerator.synchronize()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_graphs_of_any_order_replayed_in_turn(tmp_path, slots):
    """Each has slots of its own and brings everything in itself, whatever ran before it."""
    resident, model = build("nf4"), paged(tmp_path, MAPS["cpu"], "nf4", slots=slots)
    x = tokens().to("cuda")
    graphs = []
    with torch.no_grad():
        for order in ORDERS:
            model.order = order
            for _ in range(2):
                model(x)
            graphs.append((*captured(lambda: model(x)), order))
        for seed in range(6):
            x.copy_(tokens(seed).to("cuda"))
            for graph, out, order in graphs:
                resident.order = model.order = order
                graph.replay()
                eager, want = model(x), resident(x)
                assert torch.equal(out, want), order
                assert torch.equal(eager, want), order


def test_a_forward_that_was_never_run_is_captured(tmp_path):
    """Nothing is known of its order: the guess is the model's own."""
    resident, model, x = build(), paged(tmp_path, MAPS["cpu"]), tokens().to("cuda")
    resident.to("cuda")
    with torch.no_grad():
        want = resident(x)  # brings up cuBLAS
        model.order = resident.order = [3, 1, 4]
        graph, out = captured(lambda: model(x))
        graph.replay()
        assert torch.equal(out, resident(x))
        assert not torch.equal(out, want)


def test_blocks_are_captured_without_the_model_around_them(tmp_path):
    resident, model = build("nf4"), paged(tmp_path, MAPS["cpu"], "nf4")
    x = torch.randn(4, WIDTH, device="cuda", dtype=torch.bfloat16)

    def blocks(of):
        y = x
        for block in of.blocks:
            y = block(y)
        return y

    with torch.no_grad():
        blocks(model)
        graph, out = captured(lambda: blocks(model))
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(out, blocks(resident))


def test_gradients_are_captured(tmp_path):
    resident, model = build("nf4"), paged(tmp_path, MAPS["cpu"], "nf4")
    x = torch.ones(4, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def gradient(of):
        y = x
        for block in of.blocks:
            y = block(y)
        return torch.autograd.grad(y.float().square().sum(), x)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            gradient(model)
            gradient(resident)
    torch.accelerator.synchronize()
    graph, out = captured(lambda: gradient(model))
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
        graph.replay()
        assert torch.equal(out, gradient(resident))


def test_a_compiled_paged_model_is_captured(tmp_path):
    resident, model = build("nf4"), paged(tmp_path, MAPS["cpu"], "nf4")
    compiled, x = torch.compile(model, backend="aot_eager"), tokens().to("cuda")
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(x), resident(x))
        graph, out = captured(lambda: compiled(x))
        for seed in range(3):
            x.copy_(tokens(seed).to("cuda"))
            graph.replay()
            assert torch.equal(out, resident(x))


def test_disk_pages_are_not_captured_in_one_graph(tmp_path):
    model, x = paged(tmp_path, MAPS["disk"]), tokens().to("cuda")
    with torch.no_grad():
        model(x)
        paging_of(model).pager.settle()  # what is read ahead would disturb any capture
        torch.accelerator.synchronize()
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(PagingError, match="CapturedStep"), torch.cuda.graph(graph):
            model(x)
        torch.accelerator.synchronize()
        assert torch.isfinite(model(x).float()).all()


def test_disk_pages_that_stay_in_memory_are_captured(tmp_path):
    resident, x = build("nf4"), tokens().to("cuda")
    model = paged(tmp_path, MAPS["disk"], "nf4", disk_cache_bytes=2**30)
    with torch.no_grad():
        for _ in range(2):
            model(x)
        paging_of(model).pager.settle()
        graph, out = captured(lambda: model(x))
        for seed in range(3):
            x.copy_(tokens(seed).to("cuda"))
            graph.replay()
            assert torch.equal(out, resident(x))


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("format", [None, "nf4"])
def test_a_captured_step(tmp_path, device_map, format, slots):
    resident, model = build(format).to("cuda"), paged(tmp_path, device_map, format, slots=slots)
    x = tokens().to("cuda")
    with torch.no_grad():
        for order in ORDERS[:3] if slots == 2 else ORDERS[:1]:
            resident.order = model.order = order
            step = CapturedStep(model, lambda: model(x))
            for seed in range(6):
                x.copy_(tokens(seed).to("cuda"))
                out, want = step(), resident(x)
                if seed % 3 == 2:
                    assert torch.equal(model(x), want), order
                assert torch.equal(out, want), (order, seed)


def test_a_captured_step_sees_a_weight_that_was_replaced(tmp_path, device_map):
    resident, model = build().to("cuda"), paged(tmp_path, device_map)
    x = tokens().to("cuda")
    with torch.no_grad():
        step = CapturedStep(model, lambda: model(x))
        assert torch.equal(step(), resident(x))
        resident.blocks[1].up.weight.mul_(2)
        paging_of(model).pager.settle()
        paging_of(model).write("blocks.1.up.weight", resident.blocks[1].up.weight)
        for _ in range(2):
            assert torch.equal(step(), resident(x))


def test_a_step_that_cannot_be_captured_leaves_the_model_usable(tmp_path, device_map):
    resident, model = build().to("cuda"), paged(tmp_path, device_map)
    x = tokens().to("cuda")
    capturing = torch.cuda.is_current_stream_capturing

    def step():
        out = model(x)
        if capturing():
            raise KeyError("in the step")
        return out

    with torch.no_grad():
        with pytest.raises(KeyError, match="in the step"):
            CapturedStep(model, step)
        torch.accelerator.synchronize()
        assert torch.equal(model(x), resident(x))
        assert torch.equal(CapturedStep(model, lambda: model(x))(), resident(x))


def test_a_page_that_cannot_be_read_is_read_again_at_the_next_step(tmp_path, monkeypatch):
    resident, model = build().to("cuda"), paged(tmp_path, MAPS["disk"])
    x = tokens().to("cuda")
    with torch.no_grad():
        step = CapturedStep(model, lambda: model(x))
        step()
        reader = paging_of(model).homes.store.reader
        monkeypatch.setattr(reader, "read", lambda *_, **__: (_ for _ in ()).throw(StoreError("lost")))
        with pytest.raises(StoreError, match="lost"):
            [step() for _ in range(3)]
        monkeypatch.undo()
        for _ in range(2):
            assert torch.equal(step(), resident(x))


def test_copies_reach_the_bus(tmp_path):
    """12 pages of 34 MB with little to compute: at least half of what plain copies of the arena reach."""
    model = Net.__new__(Net)
    torch.nn.Module.__init__(model)
    model.blocks = torch.nn.ModuleList(make(Block, width=2048).to(torch.bfloat16) for _ in range(12))
    model.forward = lambda x: x
    specs = specs_of(model)
    plan = plan_pages(model, specs, {"": "cpu"}, execution_device=0)
    homes = PageHomes.create(plan)
    homes.pin()
    sources = [homes.arena.page(index) for index in range(12)]
    target = torch.empty_like(sources[0], device="cuda")
    plain = min(_seconds(lambda: [target.copy_(s, non_blocking=True) for s in sources]) for _ in range(3))
    homes.close()
    model = page(model, {"": "cpu"}, execution_device=0)
    x = torch.zeros(1, 2048, device="cuda", dtype=torch.bfloat16)

    def forward():
        with torch.no_grad():
            for block in model.blocks:
                block(x)

    reached = min(_seconds(forward) for _ in range(5))  # others may be on the machine for a while
    assert reached < 2 * plain, (
        f"{plan.arena_nbytes / reached / 1e9:.1f} of {plan.arena_nbytes / plain / 1e9:.1f} GB/s"
    )


def _seconds(work, times=5):
    work()
    torch.accelerator.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    end.record()
    torch.accelerator.synchronize()
    return start.elapsed_time(end) / 1e3 / times
