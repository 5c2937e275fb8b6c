"""The fused kernel in Triton's interpreter: values against fp64, its counters, every access."""

import dataclasses
from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_mux
from interpreter import Memory, note_launches, waiting_first
from layer import ROUTINGS, LayerCase
from lora_mux import Routing
from lora_mux.errors import BackendError
from lora_mux.kernels import launch
from lora_mux.kernels.config import FUSED_ROWS
from lora_mux.ops import dispatch, operators
from problem import CASES, FusedProblem, each

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("mended", "quiet", "poisoned")]

DTYPES = [torch.float16, torch.bfloat16]
FUSED = {
    name: FusedProblem(
        **{f.name: getattr(case, f.name) for f in dataclasses.fields(case) if f.init},
    )
    for name, case in CASES.items()
    if 0 < case.rows <= FUSED_ROWS and name not in ("no places", "rank 512", "many places")
}
# Its 70 rank blocks would be as many programs.
GROUPS = {"union of two windows": {"shrink_group": 4}}


@pytest.mark.parametrize("name", FUSED)
def test_values(name: str) -> None:
    """fp32, which the layer leaves to separate launches, has the strictest budget."""
    problem = FUSED[name]
    problem.check(problem.run(times=2 if name == "mixed" else 1, **GROUPS.get(name, {})))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_dtypes_and_a_bias(bias: bool, dtype: torch.dtype) -> None:
    problem = FusedProblem(rows=20, K=150, N=90, ranks=(5, 40, 16), bias=bias, dtype=dtype)
    problem.check(problem.run())


@pytest.mark.parametrize(
    "how",
    [
        {"block_n": 16, "block_k": 16},
        {"block_n": 16, "split_k": 4},
        {"block_n": 32, "shrink_group": 4, "expand_group": 4},
        {"block_m": 64, "block_n": 128, "expand_group": 1},
    ],
    ids=str,
)
def test_every_way_to_cut_it(how: dict[str, int]) -> None:
    problem = FusedProblem(rows=30, K=70, N=70, ranks=(5, 20, 16))
    problem.check(problem.run(**how))


@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_drawn(data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=6))
    problem = FusedProblem(
        rows=data.draw(st.integers(1, FUSED_ROWS)),
        K=data.draw(st.integers(1, 150)),
        N=data.draw(st.integers(1, 100)),
        ranks=ranks,
        J=data.draw(st.integers(1, 5)),
        dtype=data.draw(st.sampled_from([torch.float32, *DTYPES])),
        biased=[slot for slot, rank in enumerate(ranks) if rank and data.draw(st.booleans())],
        seed=data.draw(st.integers(0, 10**6)),
        bias=data.draw(st.booleans()),
    )
    problem.check(problem.run())


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=600, deadline=None)
def test_many_drawn(data: st.DataObject) -> None:
    test_drawn.hypothesis.inner_test(data)  # type: ignore[attr-defined]


def test_a_view_of_the_weight() -> None:
    problem = FusedProblem(K=32, N=41)
    problem.W = torch.randn(60, 50)[4:45, 9:41]
    problem.check(problem.run())


def test_what_is_asked_for_in_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of 128 bytes of each rank row of the selected adapters, for each 64 columns.

    By NVIDIA's assembly, which no interpreter runs: here it notes the addresses.
    """
    asked: list[Tensor] = []

    def assembly(text: str, registers: str, pointers: list[Any], **how: Any) -> None:
        assert text.startswith("prefetch.global.L2 [$1];") and how["is_pure"] is False
        asked.append(torch.from_numpy(pointers[0].handle.data.copy()))

    plain = launch.launched

    def launched(*given: Any, **named: Any) -> Any:
        return plain(*given, **named | ({"PREFETCHES": True} if "PREFETCHES" in named else {}))

    monkeypatch.setattr(tl, "inline_asm_elementwise", assembly)
    monkeypatch.setattr(launch, "launched", launched)
    # Of 1, 2 and 2 blocks of rank rows; the first slot is not selected.
    select = each([[1, -1], [3, 4], [1, 4]])
    ranks = 3, 5, 0, 24, 17
    problem = FusedProblem(rows=3, N=200, ranks=ranks, select=select, dtype=torch.float16)
    problem.check(problem.run(block_n=128, expand_group=8))
    B = problem.B_rows
    assert B.shape[1] == 208 and len(asked) == 4  # two tiles of two lines each
    rows = [problem.offset[slot] + r for slot in (1, 3, 4) for r in range(ranks[slot])]
    for number, addresses in enumerate(asked):
        column = min(64 * number, 207)
        want = {B[row, column].data_ptr() for row in rows}
        # Where there is no row, the first of the pool, which nothing waits for.
        assert set(addresses.tolist()) == want | {B[0, column].data_ptr()}


class TestIsolation:
    def test_neighbours_inputs(self) -> None:
        problem = FusedProblem(rows=6, ranks=(4, 20, 3), dtype=torch.bfloat16)
        clean = problem.run()
        for row, value in ((0, float("nan")), (3, float("inf"))):
            problem.x[row] = value
            got = problem.run()
            rest = [m for m in range(6) if m not in (0, 3)]
            assert torch.equal(got[rest], clean[rest]) and not got[row].isfinite().any()

    def test_handles_that_are_not_alive(self) -> None:
        handles = [5, 1 << 16, -2, 2**62]
        others = [[0, 1], [-1, -1], [4, 2]]
        problem = FusedProblem(rows=7, select=each([*others, *[[2, -1]] * len(handles)]))
        clean = problem.run()
        problem.index[3:, 1] = torch.tensor(handles)
        got = problem.run()
        assert got[3:].isnan().all()
        assert torch.equal(got[:3], clean[:3])

    def test_a_dead_handle_where_no_adapter_is(self) -> None:
        problem = FusedProblem(rows=3, ranks=(0,), select=each([[-1], [-1], [0]]))
        problem.index[1] = 77
        got = problem.run()
        assert got[1].isnan().all() and got[[0, 2]].isfinite().all()


class TestWaiting:
    """Programs of shrink are the first, and nobody goes on before the last of them is done."""

    ONES = (
        FusedProblem(rows=20, K=32, N=70, ranks=(5, 20, 16), dtype=torch.bfloat16),
        FusedProblem(rows=3, K=40, N=20, ranks=(20, 3, 1), J=2),
    )

    @pytest.mark.parametrize("split_k", [1, 2])
    @pytest.mark.parametrize("n", range(len(ONES)))
    def test_any_order_of_programs_gives_the_same_bits(self, n: int, split_k: int) -> None:
        problem = self.ONES[n]
        how: dict[str, Any] = {"block_n": 32, "block_k": 16, "split_k": split_k}
        expected = problem.run(**how)
        problem.check(expected)
        memory = Memory(**{k: v for k, v in vars(problem).items() if isinstance(v, Tensor)})
        with waiting_first(), memory.of_launches():
            got = problem.run(times=2, **how)
        assert torch.equal(got, expected) and not memory.errors

    def test_programs_of_shrink_are_the_first(self) -> None:
        """Hardware starts programs in their order: none waits for one that can not start."""
        problem = self.ONES[0]
        memory = Memory()
        with memory.of_launches():
            problem.run(block_n=32)
        shrinks, bases = memory.programs["store", "h"], memory.programs["load", "W"]
        assert shrinks and not shrinks & bases
        assert max(shrinks) < min(bases)
        assert memory.programs["atomic", "counters"] == set(range(max(bases) + 1))

    def test_a_tile_without_adapters_does_not_wait(self) -> None:
        problem = FusedProblem(rows=3, select=each([[-1], [-1], [-1]]))
        memory = Memory()
        with memory.of_launches():
            problem.check(problem.run())
        programs = len(memory.programs["atomic", "counters"])
        adds = programs + len(memory.programs["atomic", "counters"] - memory.programs["load", "W"])
        assert memory.bytes["atomic", "counters"] == 4 * adds


class TestMemory:
    @pytest.mark.parametrize("name", FUSED)
    def test_no_access_outside_no_race(self, name: str) -> None:
        problem = dataclasses.replace(FUSED[name], dtype=torch.bfloat16)
        memory = Memory(**{k: v for k, v in vars(problem).items() if isinstance(v, Tensor)})
        with memory.of_launches():
            got = problem.run(split_k=2, **GROUPS.get(name, {}))
        problem.check(got)
        assert not memory.errors

    def test_traffic_is_exact(self) -> None:
        """W, A, B and y once each: A and B the selected adapters' own rank rows."""
        rows, K, N, ranks = 20, 96, 64, (5, 16, 40, 8)
        chosen = each([[0, 2], [-1, -1], [2, -1], [0, 0]] * 5)
        problem = FusedProblem(rows=rows, K=K, N=N, ranks=ranks, J=2, select=chosen)
        memory = Memory(A_rows=problem.A_rows, B_rows=problem.B_rows)
        with memory.of_launches():
            problem.check(problem.run(block_n=64))
        union = ranks[0] + ranks[2]
        assert memory.bytes["load", "W"] == N * K * 4
        assert memory.bytes["load", "A_rows"] == union * K * 4
        assert memory.bytes["load", "B_rows"] == union * N * 4
        assert memory.bytes["store", "y"] == rows * N * 4
        assert memory.bytes["load", "y"] == 0


class TestLayer:
    """MuxLinear and attach with fused=True."""

    HOW: Any = {
        **{"backend": "triton", "fused": True, "dtype": torch.bfloat16},
        **{"ranks": (1, 5, 24, 17), "size": (32, 48)},  # two rank blocks, two blocks of columns
    }

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", ROUTINGS)
    def test_values(self, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        case = LayerCase(**self.HOW | {"dtype": dtype})
        names = note_launches(monkeypatch)
        with torch.no_grad():
            case.check(case.x(4), torch.tensor(ROUTINGS[name]))
        assert names == ["plan", "fused"]

    @pytest.mark.parametrize("rows", [FUSED_ROWS, FUSED_ROWS + 1])
    def test_more_rows_are_computed_apart(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        case = LayerCase(**self.HOW | {"ranks": (3, 20)})
        names = note_launches(monkeypatch)
        with torch.no_grad():
            case.check(case.x(rows), torch.randint(-1, 2, (rows, 2)))
        one = rows == FUSED_ROWS
        assert names == (["plan", "fused"] if one else ["plan", "shrink", "expand"])

    @pytest.mark.parametrize("block_m", [16, 32])
    def test_the_operator_takes_a_plan_of_any_tiles(
        self, block_m: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        problem = FusedProblem(rows=10, K=64, N=80, ranks=(8, 20), dtype=torch.bfloat16)
        names = note_launches(monkeypatch)
        routing = problem.index, problem.weight, problem.live, len(problem.ranks)
        plan = operators.Plan(*torch.ops.lora_mux.plan(*routing, block_m, True))
        problem.counters = plan.counters
        shared = *problem.pool, *plan, problem.max_rank, False, True
        got = torch.ops.lora_mux.linear(problem.x, problem.W, problem.b, *shared)
        if block_m == 16:
            problem.check(got)
            assert names[1:] == ["fused"]
        else:
            base = nn.functional.linear(problem.x, problem.W, problem.b)
            assert torch.equal(got, torch.ops.lora_mux.add_lora(base, problem.x, *shared))
            assert "fused" not in names

    def test_rows_of_x_with_an_odd_stride(self) -> None:
        case = LayerCase(**self.HOW)
        with torch.no_grad():
            case.check(torch.randn(4, 35).bfloat16()[:, 2:34], torch.tensor(ROUTINGS["subsets"]))

    def test_without_a_routing_it_is_the_base_bit_for_bit(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = LayerCase(**self.HOW)
        names = note_launches(monkeypatch)
        x = case.x(2, 3)
        with torch.no_grad():
            assert torch.equal(case.layer(x), case.linear(x))
        assert not names

    def test_shapes_of_x(self) -> None:
        case = LayerCase(**self.HOW)
        for shape in ((), (2, 3), (0,), (2, 0)):
            x = case.x(*shape)
            with torch.no_grad():
                y = case.check(x, torch.arange(x[..., 0].numel())[:, None] % 4)
            assert y.shape == (*shape, 48)

    def test_what_autograd_follows_is_computed_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = LayerCase(**self.HOW)
        names = note_launches(monkeypatch)
        index = torch.tensor(ROUTINGS["subsets"])
        case.check(case.x(4), index)
        case.linear.requires_grad_(False)
        case.check(case.x(4).requires_grad_(), index)
        case.check(case.x(4), index, torch.rand(index.shape, requires_grad=True))
        assert "fused" not in names
        case.check(case.x(4), index)
        assert names[-1] == "fused"

    @pytest.mark.parametrize(
        "what", ["fp32", "odd", "parametrised", "wrapped", "patched", "subclass", "autocast"]
    )
    def test_other_bases_are_computed_apart(
        self, what: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Wrapped(nn.Parameter):
            """As a quantised weight, of which only its own forward knows what it means."""

        class Doubled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * 2

        dtype = torch.float32 if what == "fp32" else torch.bfloat16
        N = 20 if what == "odd" else 24
        linear = (Doubled if what == "subclass" else nn.Linear)(16, N).to(dtype)
        if what == "parametrised":
            nn.utils.parametrizations.weight_norm(linear)
        if what == "wrapped":
            linear.weight = Wrapped(linear.weight.detach(), requires_grad=False)
        if what == "patched":
            own = linear.forward
            linear.forward = lambda x: own(x) * 2  # type: ignore[method-assign]
        # Of the pool, where the weight does not tell it: as in a model whose others are bf16.
        monkeypatch.setattr(torch, "get_default_dtype", lambda: dtype)
        layer = lora_mux.MuxLinear(linear, backend="triton", fused=True)
        a = layer.add_adapter("a", torch.randn(3, 16), torch.randn(N, 3), alpha=3)
        names = note_launches(monkeypatch)
        x = torch.randn(2, 16).to(dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
            y = layer(x, Routing(torch.tensor([[a], [-1]])))
            base = linear(x)
        assert torch.equal(y[1], base[1]) and not torch.equal(y[0], base[0])
        assert "expand" in names and "fused" not in names

    def test_an_attached_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The layers share one plan, and so its counters."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 40)).bfloat16()
        mux = lora_mux.attach(model, backend="triton", fused=True)
        factors = {
            name: {
                path: (torch.randn(r, k) / 6, torch.randn(n, r))
                for path, k, n in (("0", 24, 32), ("2", 32, 40))
            }
            for name, r in (("a", 4), ("b", 17))
        }
        for name, weights in factors.items():
            mux.add_adapter(name, weights, scaling=0.5)
        x = torch.randn(3, 24).bfloat16()
        names = note_launches(monkeypatch)
        with torch.no_grad(), mux.route([("a", "b"), None, {"b": 2.0}]):
            y = model(x)
        assert names == ["plan", "fused", "fused"]
        mux.detach()
        exact, want = model.double(), []
        for row, chosen in zip(x.double(), ({"a": 1, "b": 1}, {}, {"b": 2.0}), strict=True):
            for i in (0, 2):
                out = exact[i](row)
                for name, weight in chosen.items():
                    A, B = (t.bfloat16().double() for t in factors[name][str(i)])
                    out = out + weight * 0.5 * (B @ (A @ row))
                row = out.tanh() if i == 0 else out
            want.append(row)
        truth = torch.stack(want)
        # Two layers in bf16, and tanh between.
        assert (y.double() - truth).abs().max() <= 4 * 2**-8 * truth.abs().max()

    def test_compiled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = LayerCase(**self.HOW)
        compiled = torch.compile(case.layer, fullgraph=True, backend="aot_eager")
        names = note_launches(monkeypatch)
        x = case.x(4)
        for name in ("subsets", "single"):
            index = torch.tensor([*case.handles, -1])[torch.tensor(ROUTINGS[name])]
            with torch.no_grad():
                assert torch.equal(compiled(x, Routing(index)), case.layer(x, Routing(index)))
        assert names == ["plan", "fused"] * 4

    def test_more_streams_than_counters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lora_mux.kernels import launch

        case = LayerCase(**self.HOW)
        names = note_launches(monkeypatch)
        monkeypatch.setattr(launch, "_STREAMS", dict.fromkeys(range(-launch.STREAMS, 0), 0))
        with torch.no_grad():
            case.check(case.x(4), torch.tensor(ROUTINGS["subsets"]))
        assert names == ["plan", "shrink", "expand"]

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ({"fused": "yes"}, "`fused` must be 'auto', True or False, got 'yes'"),
            ({"fused": True, "batch_invariant": True}, "batch_invariant=True, got True"),
            ({"fused": True, "backend": "reference"}, "backend='reference', got True"),
        ],
        ids=str,
    )
    def test_refusals(self, how: Any, message: str) -> None:
        with pytest.raises(BackendError, match=message):
            lora_mux.MuxLinear(nn.Linear(4, 4), **how)
        with pytest.raises(BackendError, match=message):
            lora_mux.attach(nn.Sequential(nn.Linear(4, 4)), **how)

    def test_on_rocm_it_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lora_mux.kernels import launch

        monkeypatch.setattr(launch, "FUSES", False)
        with pytest.raises(BackendError, match="`fused` must be 'auto' or False on ROCm"):
            lora_mux.MuxLinear(nn.Linear(4, 4), backend="triton", fused=True)

    def test_without_triton_it_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dispatch, "_triton_problem", lambda: "3.6 or newer, got 3.1")
        with pytest.raises(BackendError, match=r"`fused` True needs triton .* got 3.1"):
            lora_mux.MuxLinear(nn.Linear(4, 4), fused=True)
