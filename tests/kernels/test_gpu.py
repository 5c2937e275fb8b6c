"""On a real GPU (python -m pytest tests -m gpu): the values again, and what only a device shows."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from lora_mux import Routing, ops
from problem import CASES, FusedProblem, Problem

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CUDA = torch.device("cuda")


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


class TestFused:
    """The fused kernel, whose programs wait for one another."""

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    @pytest.mark.parametrize("rows", [1, 16, 17, 33, 64, 100, 128, 129, 184, 185, 1000])
    def test_sizes_of_a_model(self, rows: int, dtype: torch.dtype) -> None:
        """Every form; and twenty launches on one plan, whose counters must be zero between."""
        for N in (1024, 4096):
            problem = FusedProblem(
                rows=rows, K=4096, N=N, ranks=(8, 16, 64, 33, 128), J=2, dtype=dtype, device="cuda"
            )
            problem.check(problem.run(shrinks=rows <= 184, times=20))

    @pytest.mark.parametrize("name", [name for name in CASES if CASES[name].rows])
    def test_named_cases(self, name: str) -> None:
        fields = {
            f.name: getattr(CASES[name], f.name) for f in dataclasses.fields(Problem) if f.init
        }
        if name != "no places":
            problem = FusedProblem(**fields | {"device": "cuda", "dtype": torch.bfloat16})
            problem.check(problem.run(times=2))

    def test_two_streams_at_once(self) -> None:
        """Launches that overlap."""
        problem = FusedProblem(
            rows=32, K=4096, N=28672, ranks=(16,) * 64, J=1, dtype=torch.bfloat16, device="cuda"
        )
        expected = problem.run()
        streams: list[Any] = [torch.cuda.Stream() for _ in range(4)]
        torch.cuda.synchronize()
        for _ in range(10):
            found = []
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append(problem.run(times=5))
            torch.cuda.synchronize()
            assert all(torch.equal(y, expected) for y in found)

    def test_more_programs_than_the_machine_holds(self) -> None:
        """Most base programs can not even start before those of shrink are done."""
        problem = FusedProblem(
            rows=128, K=512, N=65536, ranks=(64,) * 100, J=1, dtype=torch.bfloat16, device="cuda"
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

    def close(self, got: Tensor, want: Tensor) -> None:
        assert float((got - want).float().norm()) <= 1e-2 * float(want.float().norm())

    def routing(self, layer: lora_mux.MuxLinear, rows: int) -> Routing:
        handles = torch.tensor([*layer.adapters.values(), -1], device=CUDA)
        index = handles[torch.randint(0, len(handles), (rows, 2), device=CUDA)]
        return Routing(index, torch.rand(rows, 2, device=CUDA))

    def test_auto_is_triton(self, layer: lora_mux.MuxLinear) -> None:
        x, routing = torch.randn(9, 256, device=CUDA).bfloat16(), self.routing(layer, 9)
        with torch.no_grad():
            self.close(layer(x, routing), self.reference(layer)(x, routing))
        assert routing.last_pass.row_states is not None

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
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                layer(x, Routing(routing.index + 0, routing.weight + 0))
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_gradients(self, layer: lora_mux.MuxLinear) -> None:
        x0, routing = torch.randn(9, 256, device=CUDA).bfloat16(), self.routing(layer, 9)
        found = []
        for one in (layer, self.reference(layer)):
            x, weight = x0.clone().requires_grad_(), routing.weight.clone().requires_grad_()
            one(x, Routing(routing.index, weight)).float().square().sum().backward()
            found.append((x.grad, weight.grad))
        for got, want in zip(*found, strict=True):
            self.close(got, want)

    def test_autocast(self, layer: lora_mux.MuxLinear) -> None:
        layer = layer.float()
        x, routing = torch.randn(9, 256, device=CUDA), self.routing(layer, 9)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            got, want = layer(x, routing), self.reference(layer)(x, routing)
        assert got.dtype == torch.bfloat16
        self.close(got, want)

    def test_compiles_into_one_graph(self, layer: lora_mux.MuxLinear) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                x = torch.randn(9, 256, device=CUDA).bfloat16()
                routing = self.routing(layer, 9)
                self.close(compiled(x, routing), layer(x, routing))

    def test_a_graph_replays_after_everything_that_may_change(
        self, layer: lora_mux.MuxLinear
    ) -> None:
        x, routing = torch.randn(9, 256, device=CUDA).bfloat16(), self.routing(layer, 9)
        with torch.no_grad():
            layer(x, routing)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
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
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **{"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
            **{"pad_token_id": 0},
        )
        model = transformers.LlamaForCausalLM(config).to(CUDA, torch.float32).eval()
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
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
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
