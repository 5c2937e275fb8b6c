"""On a real GPU (python -m pytest tests -m gpu): the values again, and what only a device shows."""

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from gradients import Batch
from lora_mux import Routing, ops
from lora_mux.kernels import launch_gradient, pairs
from lora_mux.kernels.config import FUSED_ROWS
from lora_mux.measure.timing import no_syncs
from problem import CASES, FusedProblem, Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("no_old_graphs"),
    # Said once in each thread that has computed by Triton alone before, as autograd's may have.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA"),
]
# The compiler warns of its own affairs, as of TF32 that it may not use. What dynamo says is ours.
compiled = pytest.mark.filterwarnings("default", "error:Dynamo")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CUDA = torch.device("cuda")


@contextlib.contextmanager
def captured(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """torch.cuda.graph, after which other tests can run even if the capture fails.

    Then torch leaves its stream current, and goes on allocating memory for the graph.
    """
    torch.cuda.synchronize()
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    except BaseException:
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # where the capture itself has ended well
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise


def on_gpu(problem: Problem, **changes: Any) -> Problem:
    return dataclasses.replace(problem, device="cuda", **changes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_named_cases(name: str, dtype: torch.dtype) -> None:
    problem = on_gpu(CASES[name], dtype=dtype)
    problem.check(problem.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 33, 64, 65, 200, 513, 1100])
def test_sizes_of_a_model(rows: int, dtype: torch.dtype) -> None:
    """Every tile size and K split, in fp32 without TF32: the budget would show it."""
    problem = Problem(
        rows=rows, K=4096, N=1024, ranks=(8, 16, 64, 33, 128), J=2, dtype=dtype, device="cuda"
    )
    problem.check(problem.run())


@pytest.mark.parametrize("rows", [1, 33, 300])
@pytest.mark.parametrize("ranks", [8, 16, 24, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns(dtype: torch.dtype, ranks: int, rows: int) -> None:
    """B as engines keep it."""
    sizes = {"rows": rows, "K": 256, "N": 1000, "ranks": [ranks, 3] * 4, "by_columns": ranks}
    problem = on_gpu(Problem(**sizes), dtype=dtype)
    problem.check(problem.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_run(dtype: torch.dtype) -> None:
    problem = Problem(rows=200, K=4096, N=512, ranks=(16, 64, 5), dtype=dtype, device="cuda")
    first = problem.run()
    for _ in range(20):
        assert torch.equal(problem.run(), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariance(dtype: torch.dtype) -> None:
    big = Problem(rows=300, K=4096, N=512, ranks=(16, 64, 5, 40), dtype=dtype, device="cuda")
    whole = big.run(batch_invariant=True)
    for rows in ([0], [299, 3], list(range(40, 140))):
        part = dataclasses.replace(big, rows=len(rows))
        part.x, part.y = big.x[rows], big.y[rows]
        part.index, part.weight = big.index[rows], big.weight[rows]
        assert torch.equal(part.run(batch_invariant=True), whole[rows])


def test_more_than_2_to_the_31_elements() -> None:
    rows, N = 70_000, 32_768
    problem = Problem(rows=3, K=64, N=N, ranks=(16,), J=1, dtype=torch.bfloat16, device="cuda")
    many = dataclasses.replace(problem)
    repeat = torch.arange(rows, device=CUDA) % 3
    many.rows, many.x, many.y = rows, problem.x[repeat], problem.y[repeat]
    many.index, many.weight = problem.index[repeat], problem.weight[repeat]
    got = many.run()
    assert got.numel() > 2**31
    problem.check(got[:3])
    assert torch.equal(got[-3:], got[:3].roll(-(rows % 3), 0))


class TestWeightGradient:
    """Rows that select two adapters each, some of them trained; what is not theirs is NaN."""

    RANKS = (16, 40, 7, 24, 130)

    def batch(self, trained: list[int], dtype: torch.dtype, columns: int = 1024) -> Batch:
        slots = torch.rand(700, len(self.RANKS)).argsort(1)[:, :2]
        slots[torch.rand(700) < 0.2] = -1
        return Batch(slots, self.RANKS, trained, columns=columns, parts=2, dtype=dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("batch_invariant", [False, True])
    @pytest.mark.parametrize(
        ("trained", "columns"), [([0], 4096), ([3, 2], 1024), ([4, 0, 1], 1024), ([1, 0], 999)]
    )
    def test_values(
        self, trained: list[int], columns: int, batch_invariant: bool, dtype: torch.dtype
    ) -> None:
        batch = self.batch(trained, dtype, columns)
        there = batch.to("cuda")
        got = there.run(config=None, batch_invariant=batch_invariant)
        batch.check(got.cpu())
        assert torch.equal(there.run(config=None, batch_invariant=batch_invariant), got)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_batch_invariance(self, dtype: torch.dtype) -> None:
        """Alone, packed, in other places and without neighbours of higher ranks: the same bits."""
        batch = self.batch([4, 0, 1], dtype)
        how: dict[str, Any] = {"config": None, "batch_invariant": True}
        parts = batch.split_by_adapter(batch.to("cuda").run(**how))
        for slot, part in zip(batch.trained, parts, strict=True):
            alone = batch.of_rows(batch.rows_of(slot), [slot])
            alone.slots, alone.u, alone.gain = (
                t.flip(1).contiguous() for t in (alone.slots, alone.u, alone.gain)
            )
            assert torch.equal(alone.to("cuda").run(**how), part)

    def test_a_captured_graph_replays_right(self) -> None:
        """After a first call, which copies what the host knows; from then on nothing waits."""
        batches = [self.batch([3, 1], torch.bfloat16) for _ in range(2)]
        there = batches[0].to("cuda")
        trained = torch.tensor(there.trained, dtype=torch.int32, device=CUDA)

        def run() -> Tensor:
            found = pairs.pairs_of(there.slots, trained, len(there.ranks))
            return launch_gradient.weight_gradient(
                there.u, there.v, there.gain, found, there.numbered
            )

        run()
        with no_syncs():
            run()
        graph = torch.cuda.CUDAGraph()
        with captured(graph):
            got = run()
        for batch in batches[::-1]:
            for name in ("slots", "u", "v", "gain"):
                getattr(there, name).copy_(getattr(batch, name))
            graph.replay()
            batch.check(got.cpu())


class TestFused:
    """The fused kernel, whose programs wait for one another."""

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    @pytest.mark.parametrize("rows", [1, 5, 16, 17, 32])
    def test_sizes_of_a_model(self, rows: int, dtype: torch.dtype) -> None:
        """Twenty launches on one plan, whose counters must be zero between."""
        for N in (1024, 4096, 28672):
            problem = FusedProblem(
                rows=rows, K=4096, N=N, ranks=(8, 16, 64, 33, 128), J=2, dtype=dtype, device="cuda"
            )
            problem.check(problem.run(times=20))

    @pytest.mark.parametrize("name", [name for name in CASES if 0 < CASES[name].rows <= FUSED_ROWS])
    def test_named_cases(self, name: str) -> None:
        fields = {
            f.name: getattr(CASES[name], f.name) for f in dataclasses.fields(Problem) if f.init
        }
        if name != "no places":
            problem = FusedProblem(**fields | {"device": "cuda", "dtype": torch.bfloat16})
            problem.check(problem.run(times=2))

    @pytest.mark.parametrize("N", [2048, 28672])
    def test_four_streams_at_once(self, N: int) -> None:
        """Launches on one plan that overlap; the smaller ones fit the machine side by side."""
        problem = FusedProblem(
            rows=32, K=4096, N=N, ranks=(16,) * 64, J=1, dtype=torch.bfloat16, device="cuda"
        )
        launched = problem.prepared()
        expected = launched()
        streams: list[Any] = [torch.cuda.Stream() for _ in range(4)]
        for _ in range(2):  # the first time allocates memory, which may wait
            go = torch.cuda.Event()
            torch.cuda._sleep(50_000_000)  # about 30 ms, in which the host gets ahead
            go.record()
            for stream in streams:
                stream.wait_event(go)
            found = []
            for _ in range(20):
                for stream in streams:
                    with torch.cuda.stream(stream):
                        found.append(launched())
            torch.cuda.synchronize()
            assert all(torch.equal(y, expected) for y in found)
            problem.check_beside(expected)

    def test_more_programs_than_the_machine_holds(self) -> None:
        """Most base programs cannot even start before those of shrink are done."""
        problem = FusedProblem(
            rows=32, K=512, N=65536, ranks=(64,) * 100, J=1, dtype=torch.bfloat16, device="cuda"
        )
        problem.check(problem.run(block_n=16, times=3))


class TestLayer:
    @pytest.fixture(params=[False, True], ids=["separate", "fused"])
    def layer(self, request: pytest.FixtureRequest) -> lora_mux.MuxLinear:
        torch.manual_seed(0)
        linear = nn.Linear(256, 512, device=CUDA, dtype=torch.bfloat16)
        layer = lora_mux.MuxLinear(linear, fused=request.param)
        layer.reserve(adapters=6, rank=64)
        for name, rank in (("a", 8), ("b", 64), ("c", 17)):
            layer.add_adapter(name, torch.randn(rank, 256) / 16, torch.randn(512, rank), alpha=4)
        return layer

    def reference(self, layer: lora_mux.MuxLinear) -> lora_mux.MuxLinear:
        twin = copy.deepcopy(layer)
        twin.mux_settings = ops.Settings("reference")
        return twin

    def close(self, got: Tensor, want: Tensor, limit: float = 1e-2) -> None:
        assert float((got - want).float().norm()) <= limit * float(want.float().norm())

    def routing(self, layer: lora_mux.MuxLinear, rows: int) -> Routing:
        handles = torch.tensor([*layer.adapters.values(), -1], device=CUDA)
        index = handles[torch.randint(0, len(handles), (rows, 2), device=CUDA)]
        return Routing(index, torch.rand(rows, 2, device=CUDA))

    def test_auto_is_triton(self, layer: lora_mux.MuxLinear) -> None:
        x, routing = torch.randn(9, 256, device=CUDA).bfloat16(), self.routing(layer, 9)
        with torch.no_grad():
            self.close(layer(x, routing), self.reference(layer)(x, routing))
        assert routing.last_pass.row_states is not None

    def test_inputs_that_begin_anywhere(self, layer: lora_mux.MuxLinear) -> None:
        """What was compiled for aligned pointers is not launched with others."""
        numbers = torch.randn(9 * 256 + 8, device=CUDA).bfloat16()
        routing, reference = self.routing(layer, 9), self.reference(layer)
        with torch.no_grad():
            for start in (0, 8, 1, 0, 3, 8):
                x = numbers[start : start + 9 * 256].view(9, 256)
                self.close(layer(x, routing), reference(x, routing))

    def test_a_host_index_raises_on_the_host(self, layer: lora_mux.MuxLinear) -> None:
        x = torch.randn(1, 256, device=CUDA).bfloat16()
        with pytest.raises(lora_mux.LoraMuxError, match="never given out"):
            layer(x, Routing(torch.tensor([[99]])))

    def test_dead_handles(self, layer: lora_mux.MuxLinear) -> None:
        x, routing = torch.randn(9, 256, device=CUDA).bfloat16(), self.routing(layer, 9)
        routing.index[4, 1] = 2**40 + 5
        with torch.no_grad():
            y = layer(x, routing)
        assert y[4].isnan().all() and int(y.isnan().any(1).sum()) == 1
        with pytest.raises(lora_mux.LoraMuxError, match="NaN: 4$"):
            routing.check()

    def test_nothing_syncs(self, layer: lora_mux.MuxLinear) -> None:
        x, routing = torch.randn(9, 256, device=CUDA).bfloat16(), self.routing(layer, 9)
        with torch.no_grad():
            layer(x, routing)
            again = Routing(routing.index + 0, routing.weight + 0)
            torch.cuda.synchronize()
            with no_syncs():
                layer(x, again)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_gradients(self, dtype: torch.dtype, layer: lora_mux.MuxLinear) -> None:
        layer = layer.to(dtype)
        x0, routing = torch.randn(9, 256, device=CUDA).to(dtype), self.routing(layer, 9)
        found = []
        for one in (layer, self.reference(layer)):
            x, weight = x0.clone().requires_grad_(), routing.weight.clone().requires_grad_()
            y = one(x, Routing(routing.index, weight))
            y.float().square().sum().backward()
            found.append((y.detach(), x.grad, weight.grad))
        limit = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
        for got, want in zip(*found, strict=True):
            self.close(got, want, limit)

    def test_autocast(self, layer: lora_mux.MuxLinear) -> None:
        layer = layer.float()
        x, routing = torch.randn(9, 256, device=CUDA), self.routing(layer, 9)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            got, want = layer(x, routing), self.reference(layer)(x, routing)
        assert got.dtype == torch.bfloat16
        self.close(got, want)

    @compiled
    def test_compiles_into_one_graph(self, layer: lora_mux.MuxLinear) -> None:
        run = torch.compile(layer, fullgraph=True)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                x = torch.randn(9, 256, device=CUDA).bfloat16()
                routing = self.routing(layer, 9)
                self.close(run(x, routing), layer(x, routing))

    @compiled
    def test_compiled_gradients(self, layer: lora_mux.MuxLinear) -> None:
        x0, routing = torch.randn(9, 256, device=CUDA).bfloat16(), self.routing(layer, 9)
        found = []
        for run in (torch.compile(layer, fullgraph=True), layer):
            x, weight = x0.clone().requires_grad_(), routing.weight.clone().requires_grad_()
            run(x, Routing(routing.index, weight)).float().square().sum().backward()
            found.append((x.grad, weight.grad))
        for got, want in zip(*found, strict=True):
            self.close(got, want, 2e-2)

    def test_a_graph_replays_after_everything_that_may_change(
        self, layer: lora_mux.MuxLinear
    ) -> None:
        x, routing = torch.randn(9, 256, device=CUDA).bfloat16(), self.routing(layer, 9)
        with torch.no_grad():
            layer(x, routing)
            graph = torch.cuda.CUDAGraph()
            with captured(graph):
                y = layer(x, routing)
            reference = self.reference(layer)

            def check() -> None:
                graph.replay()
                self.close(y, reference(x, routing))

            check()
            routing.index.copy_(self.routing(layer, 9).index)
            routing.weight.copy_(torch.randn(9, 2))
            check()
            A, B = torch.randn(64, 256) / 16, torch.randn(512, 64)
            for one in (layer, reference):
                handle = one.add_adapter("d", A, B, alpha=8)
                one.remove_adapter("a")
            routing.index.copy_(self.routing(layer, 9).index)
            routing.index[0, 0] = handle
            check()
            routing.index[3, 0] = 0  # "a", which is gone
            graph.replay()
            assert y[3].isnan().all() and int(y.isnan().any(1).sum()) == 1
            with pytest.raises(lora_mux.errors.PoolCapacityError):
                layer.add_adapter("e", torch.ones(65, 256), torch.ones(512, 65), alpha=1)


class TestModel:
    @pytest.fixture
    def attached(self) -> Iterator[tuple[Any, lora_mux.Mux]]:
        pytest.importorskip("transformers")
        with warnings.catch_warnings():  # of what it imports
            warnings.simplefilter("ignore")
            from transformers import LlamaConfig, LlamaForCausalLM
        config = LlamaConfig(
            **{"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
            **{"pad_token_id": 0},
        )
        model = LlamaForCausalLM(config).to(CUDA, torch.float32).eval()
        mux = lora_mux.attach(model)
        for seed, name in enumerate(("a", "b")):
            torch.manual_seed(seed)
            weights = {}
            for path in mux.targets:
                layer = model.get_submodule(path)
                K, N = layer.in_features, layer.out_features
                weights[path] = (torch.randn(8, K) / K**0.5, torch.randn(N, 8) / 4)
            mux.add_adapter(name, weights, alpha=4)
        yield model, mux

    def test_generate_is_that_of_the_reference(self, attached: Any) -> None:
        model, mux = attached
        ids = torch.randint(1, 255, (4, 7), device=CUDA)
        how = {"max_new_tokens": 12, "do_sample": False, "num_beams": 2}
        rows = ["a", None, ("a", "b"), {"a": 0.4, "b": 1.0}]
        with mux.route(rows):
            got = model.generate(ids, **how)
        mux._router.settings = ops.Settings("reference")
        with mux.route(rows):
            want = model.generate(ids, **how)
        assert torch.equal(got, want)

    def test_a_graph_of_the_model_follows_the_route(self, attached: Any) -> None:
        model, mux = attached
        ids = torch.randint(1, 255, (3, 5), device=CUDA)
        mux.set_route(["a", "b", ("a", "b")])
        with torch.no_grad():
            model(ids, use_cache=False)
            graph = torch.cuda.CUDAGraph()
            with captured(graph):
                logits = model(ids, use_cache=False).logits
            for rows in (["b", None, "a"], [{"a": 2.0}, {"b": -1.0, "a": 1.0}, None]):
                mux.set_route(rows)
                graph.replay()
                want = model(ids, use_cache=False).logits
                torch.testing.assert_close(logits, want, rtol=1e-3, atol=1e-3)
            with mux.disable_adapter():
                graph.replay()
                base = model(ids, use_cache=False).logits
                torch.testing.assert_close(logits, base, rtol=1e-3, atol=1e-3)
            mux.set_route(["a", "b"])
            graph.replay()
            assert logits.isnan().all()

    @pytest.mark.parametrize("shape", [(2, 2), (2, 5, 2)], ids=["for samples", "for tokens"])
    def test_a_graph_follows_an_index_on_the_device(self, shape: Any, attached: Any) -> None:
        model, mux = attached
        ids = torch.randint(1, 255, (2, 5), device=CUDA)
        handles = torch.tensor([*mux.adapters.values(), -1], device=CUDA)

        def route() -> None:
            index = handles[torch.randint(0, len(handles), shape, device=CUDA)]
            mux.set_route(index, torch.rand(shape, device=CUDA))

        route()
        with torch.no_grad():
            model(ids, use_cache=False)
            graph = torch.cuda.CUDAGraph()
            with captured(graph):
                logits = model(ids, use_cache=False).logits
            for _ in range(3):
                route()
                graph.replay()
                want = model(ids, use_cache=False).logits
                torch.testing.assert_close(logits, want, rtol=1e-3, atol=1e-3)

    def rows(self, mux: lora_mux.Mux) -> list[Any]:
        a, b = mux.adapters.values()
        return [
            ["a", None, ("a", "b")],
            [{"b": 0.5}, {"b": -1.0, "a": 2.0}, "a"],
            torch.tensor([[a, b], [b, -1], [-1, -1]], device=CUDA),
            [None, None, None],
        ]

    @compiled
    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_one_compiled_graph_for_every_route(self, mode: str, attached: Any) -> None:
        """With "reduce-overhead" the third pass and all after it replay a CUDA graph."""
        model, mux = attached
        ids = torch.randint(1, 255, (3, 5), device=CUDA)
        run = torch.compile(model, fullgraph=True, mode=mode)

        def check() -> None:
            got = run(ids, use_cache=False).logits.clone()
            want = model(ids, use_cache=False).logits
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)

        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            for rows in self.rows(mux) * 2:
                with mux.route(rows):
                    check()
            for adapter in ("a", ["b", "a"], None):
                mux.set_adapter(adapter)
                check()

    @compiled
    def test_export(self, attached: Any) -> None:
        """An exported program keeps the rows that it was made with."""
        model, mux = attached
        x = torch.randn(3, 128, device=CUDA)
        mlp = model.model.layers[0].mlp
        with torch.no_grad():
            for rows in self.rows(mux):
                with mux.route(rows):
                    want = mlp(x)
                    program = torch.export.export(mlp, (x,), strict=False).module()
                torch.testing.assert_close(program(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("fused", [False, True])
def test_on_another_gpu_than_the_current_one(fused: bool) -> None:
    layers = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        linear = nn.Linear(256, 512, dtype=torch.bfloat16).to(device)
        layer = lora_mux.MuxLinear(linear, fused=fused)
        layer.add_adapter("a", torch.randn(8, 256) / 16, torch.randn(512, 8), alpha=4)
        layers.append(layer)
    x, index = torch.randn(9, 256).bfloat16(), torch.arange(9)[:, None] % 2 - 1
    with torch.no_grad():
        first, second = (
            layer(x.to(on), Routing(index.to(on)))
            for layer, on in zip(layers, ("cuda:0", "cuda:1"), strict=True)
        )
    assert torch.equal(first.cpu(), second.cpu()) and torch.cuda.current_device() == 0
