"""plan, shrink and expand in Triton's interpreter: values against fp64, and every memory access."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interpreter import Memory
from problem import CASES, Problem, each

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("mended", "quiet", "poisoned")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# The dtype does not matter to how windows and places are walked, and these take seconds each in
# fp32, where a program of shrink takes one rank block at a time instead of four.
LONG = {"union of two windows", "many places", "rank 512"}
CASES_BY_DTYPE = [(n, d) for n in CASES for d in DTYPES if n not in LONG or d == torch.bfloat16]


@pytest.mark.parametrize(("name", "dtype"), CASES_BY_DTYPE, ids=str)
def test_values(name: str, dtype: torch.dtype) -> None:
    problem = dataclasses.replace(CASES[name], dtype=dtype)
    problem.check(problem.run())


# fp32 has no tiles of 64 rows.
TILES = [(m, d) for m in (16, 32, 64) for d in DTYPES if m < 64 or d != torch.float32]


@pytest.mark.parametrize(("block_m", "dtype"), TILES, ids=str)
@pytest.mark.parametrize("split_k", [1, 2, 8])
def test_every_tile_size_and_split(block_m: int, split_k: int, dtype: torch.dtype) -> None:
    problem = Problem(rows=20, K=150, N=50, ranks=(5, 20, 16), dtype=dtype)
    problem.check(problem.run(block_m, split_k=split_k, block_k=16))


@pytest.mark.parametrize(
    ("block_m", "how"),
    [
        (16, {"expand_group": 8, "block_n": 128}),
        (64, {"expand_group": 1, "block_n": 32, "walk": 3}),
        (16, {"expand_group": 2, "block_n": 16, "walk": 4}),
    ],
    ids=str,
)
def test_many_columns_of_a_program(block_m: int, how: dict[str, int]) -> None:
    """As wide layers have them: all at once, or one block after the other, past the last column."""
    problem = Problem(rows=20, K=40, N=140, ranks=(5, 40, 16), dtype=torch.bfloat16)
    memory = Memory(**{k: v for k, v in vars(problem).items() if isinstance(v, Tensor)})
    with memory.of_launches():
        problem.check(problem.run(block_m, **how))
    assert not memory.errors


def test_programs_that_take_several_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of two processors four programs share ten rank blocks."""
    from lora_mux.kernels import launch
    from lora_mux.kernels.config import Architecture

    monkeypatch.setattr(launch, "architecture", lambda _: Architecture("wgmma", 2, 232448))
    problem = Problem(rows=3, ranks=(100, 40), select=each([[0, 1], [1, -1], [-1, -1]]))
    problem.check(problem.run(split_k=1))


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_drawn(data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=6))
    problem = Problem(
        rows=data.draw(st.integers(0, 20)),
        K=data.draw(st.integers(1, 150)),
        N=data.draw(st.integers(1, 100)),
        ranks=ranks,
        J=data.draw(st.integers(1, 5)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        biased=[slot for slot, rank in enumerate(ranks) if rank and data.draw(st.booleans())],
        seed=data.draw(st.integers(0, 10**6)),
    )
    problem.check(problem.run())


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=1500, deadline=None)
def test_many_drawn(data: st.DataObject) -> None:
    test_drawn.hypothesis.inner_test(data)  # type: ignore[attr-defined]


class TestViews:
    """Strides that callers may have."""

    def test_rows_of_x_with_a_stride(self) -> None:
        problem = Problem(rows=6)
        problem.x = torch.randn(12, 50)[::2, 5:38]
        problem.check(problem.run())

    def test_y_inside_a_wider_tensor_stays_inside(self) -> None:
        problem = Problem(rows=6)
        wide = torch.full((6, 60), 7.0)
        wide[:, 9:50] = problem.y
        before, problem.y = problem.y, wide[:, 9:50]
        clone = Tensor.clone
        problem.y.clone = lambda: problem.y  # type: ignore[method-assign]  # run() adds in place
        got = clone(problem.run())
        assert (wide[:, :9] == 7).all() and (wide[:, 50:] == 7).all()
        problem.y = before
        problem.check(got)

    def test_expanded_index_and_weight(self) -> None:
        """set_adapter's single row, for every row of the batch, without a copy."""
        problem = Problem(rows=6, select=lambda p: torch.tensor([[2, 4]]).repeat(6, 1))
        problem.weight = torch.tensor([[0.5, -2.0]]).expand(6, 2)
        problem.index = problem.index[:1].expand(6, 2)
        problem.check(problem.run())

    def test_transposed_index_of_int32(self) -> None:
        problem = Problem(rows=6)
        problem.index = problem.index.int().T.contiguous().T
        problem.check(problem.run())

    def test_half_weights(self) -> None:
        problem = Problem()
        problem.weight = problem.weight.half()
        problem.check(problem.run())


class TestIsolation:
    """A row depends on its own x, adapters and weights, and on nothing else."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_neighbours_inputs(self, dtype: torch.dtype) -> None:
        problem = Problem(rows=6, dtype=dtype, ranks=(4, 20, 3))
        clean = problem.run()
        rest = [1, 2, 4]
        for row, value in ((0, float("nan")), (3, float("inf")), (5, -float("inf"))):
            problem.x[row] = value
        assert torch.equal(problem.run()[rest], clean[rest])

    def test_neighbours_weights(self) -> None:
        problem = Problem(rows=4, select=each([[0, 1]] * 4))
        clean = problem.run()
        problem.weight[1] = float("inf")
        got = problem.run()
        assert torch.equal(got[[0, 2, 3]], clean[[0, 2, 3]])

    def test_weights_of_places_that_select_nothing(self) -> None:
        problem = Problem(rows=2, select=each([[1, -1], [-1, 2]]))
        clean = problem.run()
        problem.weight[0, 1] = problem.weight[1, 0] = float("nan")
        assert torch.equal(problem.run(), clean)

    def test_another_rows_adapter_that_overflows(self) -> None:
        problem = Problem(rows=3, ranks=(2, 3), select=each([[0], [1], [-1]]))
        clean = problem.run()
        problem.A_rows[problem.offset[1] : problem.offset[1] + 3] = 3e38
        problem.A_rows[:, problem.K :] = 0
        got = problem.run()
        assert torch.equal(got[[0, 2]], clean[[0, 2]]) and not got[1].isfinite().any()

    @pytest.mark.parametrize(
        ("dtype", "weight"),
        [(torch.bfloat16, 3e38), (torch.float16, 3e38), (torch.float16, 1e4)],  # 1e4: only in fp16
        ids=str,
    )
    def test_an_h_that_overflows_is_infinite_not_nan(
        self, dtype: torch.dtype, weight: float
    ) -> None:
        problem = Problem(rows=1, ranks=(1,), K=16, N=16, select=each([[0]]), dtype=dtype)
        problem.weight[:] = weight
        problem.x[:], problem.A_rows[1], problem.B_rows[1] = 3.0, 3.0, 1.0
        assert problem.run().isinf().all()

    def test_handles_that_are_not_alive(self) -> None:
        handles = [5, 1 << 16, 65535, 1 << 20, 2**31 - 1, -2, -(2**31), 2**62, 2**32]
        others = [[0, 1], [-1, -1], [4, 2]]
        problem = Problem(rows=12, select=each([*others, *[[2, -1]] * len(handles)]))
        clean = problem.run()
        problem.index[3:, 1] = torch.tensor(handles)
        got = problem.run()
        assert got[3:].isnan().all()
        assert torch.equal(got[:3], clean[:3])

    def test_a_freed_handle(self) -> None:
        problem = Problem(rows=2, select=each([[0, 1], [2, -1]]))
        problem.live[2] += 1 << 16  # the slot's next tenant
        got = problem.run()
        assert got[1].isnan().all() and got[0].isfinite().all()

    def test_a_dead_handle_where_no_adapter_is(self) -> None:
        problem = Problem(rows=3, ranks=(0,), select=each([[-1], [-1], [0]]))
        problem.index[1] = 77
        got = problem.run()
        assert got[1].isnan().all() and torch.equal(got[[0, 2]], problem.y[[0, 2]])

    def test_base_rows_keep_minus_zero(self) -> None:
        problem = Problem(rows=3, select=each([[1, 2], [-1, -1], [3, -1]]))
        problem.y[:] = -0.0
        got = problem.run()
        assert got[1].signbit().all() and got[2].signbit().all()


class TestBatchInvariance:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_row_has_the_same_bits_in_any_batch(self, dtype: torch.dtype) -> None:
        big = Problem(rows=34, K=150, N=40, ranks=(5, 40, 16), dtype=dtype)
        whole = big.run(batch_invariant=True)
        for rows in ([0], [33], [3, 30], list(range(33, 5, -1))):
            part = dataclasses.replace(big, rows=len(rows))
            part.x, part.y = big.x[rows], big.y[rows]
            part.index, part.weight = big.index[rows], big.weight[rows]
            assert torch.equal(part.run(batch_invariant=True), whole[rows])

    def test_its_config_does_not_know_the_rows(self) -> None:
        from lora_mux.kernels.config import Architecture, choose

        machine = Architecture("wgmma", 132, 232448)
        chosen = {choose(m, 4096, 1024, 2, machine, batch_invariant=True) for m in (1, 64, 9999)}
        assert len(chosen) == 1


# 64 rows where they are more than 16; and some that are fewer, which leave most of a tile empty.
PLANS = [
    (name, block_m)
    for name, case in CASES.items()
    for block_m in (16, 64)
    if block_m == 16 or case.rows > 16 or name in ("mixed", "zero rows", "no places", "zipf")
]


@pytest.mark.parametrize(("name", "block_m"), PLANS)
def test_plan_is_that_of_torch(name: str, block_m: int) -> None:
    """The kernel against sets and loops, and against plan_in_torch, which other devices use."""
    from lora_mux.ops import plan_in_torch

    problem = CASES[name]
    plan = problem.plan(block_m)
    batch = problem.index, problem.weight, problem.live, len(problem.rank)
    other = plan_in_torch.plan(*batch, block_m)
    want = torch.where(problem.index < 0, -1, problem.index & 0xFFFF)
    assert torch.equal(plan.slots.long(), want) and torch.equal(other.slots, plan.slots)
    assert torch.equal(other.state, plan.state)
    assert torch.equal(other.counters, plan.counters) and not plan.counters.any()
    for t in range(-(-len(want) // block_m)):
        rows = want[t * block_m : (t + 1) * block_m]
        chosen = sorted(set(rows[rows >= 0].tolist()))
        U = len(chosen)
        for made in (plan, other):
            assert made.union[t, : made.length[t]].tolist() == chosen
        assert torch.equal(plan.place[t, :U], other.place[t, :U])
        for m, row in enumerate(rows.tolist() + [[]] * (block_m - len(rows))):
            firsts = [row.index(slot) if slot in row else -1 for slot in chosen]
            assert plan.place[t, :U, m].tolist() == firsts
            for slot, first in zip(chosen, firsts, strict=True):
                if first >= 0:
                    weights = problem.weight[t * block_m + m].tolist()
                    total = sum(w for w, s in zip(weights, row, strict=True) if s == slot)
                    for made in (plan, other):
                        assert abs(float(made.strength[t * block_m + m, first]) - total) < 1e-5


@pytest.mark.parametrize("block_m", [16, 64])
def test_the_shapes_of_a_plan_are_those_of_every_maker(block_m: int) -> None:
    """The kernel's, torch's and the fake operator's: compiled graphs rely on the last."""
    from lora_mux.kernels.tensors import empty_plan
    from lora_mux.ops import plan_in_torch

    problem = Problem(rows=21)
    batch = problem.index, problem.weight, problem.live, len(problem.rank)
    fake = empty_plan(problem.index, problem.weight, len(problem.rank), block_m)
    for made in (problem.plan(block_m), plan_in_torch.plan(*batch, block_m)):
        for name, tensor in made._asdict().items():
            empty = getattr(fake, name)
            assert (tensor.shape, tensor.dtype) == (empty.shape, empty.dtype), name


class TestMemory:
    """Every address that the kernels touch, and how many bytes that is."""

    @pytest.mark.parametrize("name", CASES)
    def test_no_access_outside_no_race(self, name: str) -> None:
        problem = dataclasses.replace(CASES[name], dtype=torch.bfloat16)
        _, memory = self.watched(problem, split_k=2)
        assert not memory.errors

    def test_handles_that_are_not_alive_reach_nothing(self) -> None:
        problem = Problem(rows=4, select=each([[0, 1], [2, -1], [-1, -1], [4, 2]]), J=2)
        problem.index[:, 1] = torch.tensor([1 << 16, 65535, -(2**40), 2**62])
        _, memory = self.watched(problem, judged=False)
        assert not memory.errors

    def test_traffic_is_exact(self) -> None:
        """A and B: the selected adapters' own rank rows, once for each tile; y: once."""
        rows, K, N, block_m = 40, 96, 64, 16
        ranks = (5, 16, 40, 8)
        problem = Problem(rows=rows, K=K, N=N, ranks=ranks, J=2, select=self.skewed)
        chosen, memory = self.watched(problem)
        slots = torch.where(problem.index < 0, -1, problem.index & 0xFFFF)
        tiles = [set(t[t >= 0].tolist()) for t in slots.split(block_m)]
        union_ranks = [sum(ranks[s] for s in tile) for tile in tiles]
        blocks = [sum(-(-ranks[s] // 16) for s in tile) for tile in tiles]
        groups = [-(-b // chosen.shrink_group) for b in blocks]
        assert memory.bytes["load", "A_rows"] == sum(union_ranks) * K * 4
        assert memory.bytes["load", "B_rows"] == sum(union_ranks) * N * 4
        row_counts = [min(block_m, rows - t * block_m) for t in range(len(tiles))]
        x_rows = sum(g * m for g, m in zip(groups, row_counts, strict=True))
        assert memory.bytes["load", "x"] == x_rows * K * 4
        selecting = int((slots >= 0).any(1).sum())
        assert memory.bytes["load", "y"] == memory.bytes["store", "y"] == selecting * N * 4

    @staticmethod
    def skewed(problem: Problem) -> Tensor:
        """The first tile selects all, the second one adapter, the third nothing but one row."""
        slots = torch.full((40, 2), -1)
        slots[:16] = torch.tensor([[0, 2], [1, 3], [3, -1], [-1, -1]]).repeat(4, 1)
        slots[16:32, 0] = 1
        slots[39, 1] = 2
        return slots

    @staticmethod
    def watched(problem: Problem, judged: bool = True, **replaced: Any) -> tuple[Any, Memory]:
        """problem.run() with every kernel watched; (config, memory)."""
        from lora_mux.kernels import launch

        seen: dict[str, Any] = {}
        memory = Memory(**{k: v for k, v in vars(problem).items() if isinstance(v, Tensor)})
        expand = launch.expand

        def remember(*arguments: Any) -> None:
            seen["config"] = arguments[-1]
            expand(*arguments)

        with memory.of_launches(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "expand", remember)
            got = problem.run(**replaced)
        assert not any(kind == "atomic" for kind, _ in memory.bytes)
        if judged:
            problem.check(got)
        return seen.get("config"), memory


class TestColumns:
    """B as vLLM and SGLang keep it: [slots, N, R], the ranks of a column side by side."""

    @pytest.mark.parametrize("ranks", [8, 16, 24, 64])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_values(self, ranks: int, dtype: torch.dtype) -> None:
        mixed = (ranks, 1, 0, ranks - 3)
        problem = Problem(rows=20, N=50, ranks=mixed, dtype=dtype, by_columns=ranks)
        memory = Memory(**{k: v for k, v in vars(problem).items() if isinstance(v, Tensor)})
        with memory.of_launches():
            problem.check(problem.run())
        assert not memory.errors

    @pytest.mark.parametrize(("block_m", "walk"), [(16, 1), (64, 3)])
    def test_many_columns_of_a_program(self, block_m: int, walk: int) -> None:
        problem = Problem(rows=70, N=300, ranks=(16, 9), dtype=torch.bfloat16, by_columns=16)
        problem.check(problem.run(block_m, block_n=64, walk=walk))
