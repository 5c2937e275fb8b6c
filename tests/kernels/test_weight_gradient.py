"""The gradients of rank rows in Triton's interpreter: values against fp64, bits, and addresses."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gradients import DTYPES, SMALL, Batch, drawn
from interpreter import Memory
from lora_mux.kernels import launch, launch_gradient, pairs
from lora_mux.kernels.config import GradientConfig
from problem import NAN, Problem, each

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("mended", "quiet", "poisoned")]


@pytest.mark.parametrize("seed", range(24))
def test_drawn_batches(seed: int) -> None:
    """Values, and each adapter's bits: as with its own rows alone, packed, in any places."""
    batch, config = drawn(seed)
    got = batch.run(config)
    batch.check(got)
    for slot, part in zip(batch.trained, batch.split_by_adapter(got), strict=True):
        alone = batch.of_rows(batch.rows_of(slot), [slot])
        assert torch.equal(alone.run(config), part)


@pytest.mark.slow
def test_many_drawn_batches() -> None:
    for seed in range(100, 700):
        test_drawn_batches(seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("highest", [16, 20, 40])
def test_chosen_configs(dtype: torch.dtype, batch_invariant: bool, highest: int) -> None:
    slots = torch.tensor([[0, 1], [2, -1], [-1, -1], [1, 1]]).repeat(25, 1)
    batch = Batch(slots, [8, highest, 3], [1, 0], dtype=dtype)
    batch.check(batch.run(config=None, batch_invariant=batch_invariant))


def test_batch_invariance() -> None:
    """Alone or with others, which have higher ranks; in other places, and under another number."""
    slots = torch.rand(90, 6).argsort(1)[:, :2]
    slots[torch.rand(90) < 0.2] = -1
    ranks = [16, 40, 7, 8, 1, 24]
    batch = Batch(slots, ranks, [3, 5, 0, 1], columns=48, dtype=torch.bfloat16)
    how: dict[str, Any] = {"config": None, "batch_invariant": True}
    parts = batch.split_by_adapter(batch.run(**how))
    for slot, part in zip(batch.trained, parts, strict=True):
        own = batch.of_rows(batch.rows_of(slot), [2, slot])  # 2 is not trained: its u is NaN
        own.slots, own.u, own.gain = own.slots.flip(1), own.u.flip(1), own.gain.flip(1)
        assert torch.equal(own.run(**how)[ranks[2] :], part)


def test_two_runs_are_equal() -> None:
    batch, config = drawn(4)
    assert torch.equal(batch.run(config), batch.run(config))


def test_more_adapters_than_others_can() -> None:
    """1,100 of them, where a common way of batching ends at 1,023; every tenth has no rows."""
    slots = torch.arange(1100)[torch.arange(1100) % 10 > 0][:, None].flip(0)
    batch = Batch(slots, [1, 3] * 550, range(1100), columns=16)
    got = batch.run(config=None)
    batch.check(got)
    empty = batch.split_by_adapter(got)[::10]
    assert not torch.cat(empty).any()


class TestLayers:
    """What differs between layers that share a pass's pairs."""

    def test_adapters_that_a_layer_does_not_have(self) -> None:
        batch, config = drawn(2, trained=[4, 1, 3])
        whole = batch.split_by_adapter(batch.run(config))
        got = batch.run(config, ranks=[batch.numbered[2], batch.numbered[0]])
        assert torch.equal(got, torch.cat([whole[2], whole[0]]))

    def test_nothing_is_trained(self) -> None:
        batch, config = drawn(2, trained=[])
        assert batch.run(config).shape == (0, batch.columns)

    @pytest.mark.parametrize("shape", [(0, 2), (5, 0)])
    def test_no_rows_and_no_places(self, shape: tuple[int, int]) -> None:
        batch = Batch(torch.zeros(shape), [4, 20], [1, 0])
        assert torch.equal(batch.run(), torch.zeros(24, batch.columns))

    def test_nobody_selects_what_is_trained(self) -> None:
        batch = Batch(torch.tensor([[2, -1]] * 20), [4, 20, 3], [1, 0])
        assert torch.equal(batch.run(), torch.zeros(24, batch.columns))

    @pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, group=1)], ids=str)
    def test_constant_rank_rows(self, config: GradientConfig) -> None:
        """Last rows of an adapter, here also alone in a block of 16, get 0 whatever u holds."""
        batch = Batch(torch.tensor([[0, 1]] * 20), [17, 4], [0, 1])
        whole = batch.run(config)
        batch.u[:, 0, 16] = NAN
        got = batch.run(config, constant=[1, 0])
        assert torch.equal(got[16], torch.zeros(batch.columns))
        assert torch.equal(got[:16], whole[:16]) and torch.equal(got[17:], whole[17:])

    def test_without_gains(self) -> None:
        batch, config = drawn(5)
        given = batch.run(config, gain=None)
        batch.gain = torch.ones_like(batch.gain)
        assert torch.equal(given, batch.run(config))

    def test_a_gain_of_zero_and_of_another_type(self) -> None:
        batch, config = drawn(5)
        batch.gain = batch.gain.double()
        batch.gain[::2] = 0
        batch.check(batch.run(config))

    def test_rows_with_a_stride(self) -> None:
        batch, config = drawn(7, columns=48)
        wide = torch.full((2 * len(batch.v), 70), NAN, dtype=batch.dtype)
        wide[::2, 5:53] = batch.v
        packed, batch.v = batch.run(config), wide[::2, 5:53]
        assert torch.equal(batch.run(config), packed)

    def test_a_u_that_overflows_is_infinite_not_nan(self) -> None:
        batch = Batch(torch.zeros(1, 1), [1], [0], dtype=torch.float16)
        batch.u[:], batch.v[:], batch.gain[:] = 1e5, 1.0, 1.0
        assert batch.run().isinf().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_after_plan_and_shrink(dtype: torch.dtype) -> None:
    """dA and dB of a layer with a bias, against autograd of the formula in fp64."""
    problem = Problem(
        **{"rows": 40, "K": 70, "N": 36, "ranks": (5, 20, 16, 3), "J": 2, "biased": (1,)},
        **{"dtype": dtype, "select": each([[0, 1], [1, 2], [3, 0], [-1, -1], [1, 1]] * 8)},
    )
    dy, trained = torch.randn(40, 36).to(dtype), [1, 0]
    config = problem.choose()
    plan, pool = problem.plan(config.block_m), problem.pool
    found = pairs.pairs_of(plan.slots, torch.tensor(trained, dtype=torch.int32), 4)
    gain = plan.strength * problem.scaling[plan.slots.clamp(min=0)]
    ranks, x = [(0, 20), (1, 5)], problem.x
    turned = pool._replace(A_rows=pool.B_rows, B_rows=pool.A_rows, constant=None)
    h, g = (x.new_empty(launch.h_shape(plan, 20, config), dtype=torch.float32) for _ in "AB")
    launch.shrink(x, h, plan, pool, config, weighted=False)
    launch.shrink(dy, g, plan, turned, config, weighted=False)
    of_A = launch_gradient.weight_gradient(g, x, gain, found, ranks, constant=[1, 0])
    of_B = launch_gradient.weight_gradient(h, dy, gain, found, ranks)

    x, dy = x.double(), dy.double()
    for slot, dA, dB in zip(trained, of_A.split([20, 5]), of_B.split([20, 5]), strict=True):
        rows = slice(int(problem.offset[slot]), int(problem.offset[slot]) + problem.ranks[slot])
        A, B = (t[rows].double().requires_grad_() for t in (pool.A_rows[:, :70], pool.B_rows))
        constant = problem.constant[rows]
        weight = torch.where(plan.slots == slot, problem.weight.double(), 0.0)
        weight = weight.sum(1, keepdim=True) * float(problem.scaling[slot])
        y = weight * (torch.where(constant, 1.0, x @ A.T) @ B[:, :36])
        for got, want in zip((dA, dB), torch.autograd.grad(y, (A, B), dy), strict=True):
            want = want[:, : got.shape[1]]
            most = (torch.finfo(dtype).eps ** 2 * 4 if dtype != torch.float32 else 0) + 1e-5
            assert (got.double() - want).abs().max() <= most * want.abs().max()
        assert not dA[constant].any()


class TestPairs:
    def test_the_example(self) -> None:
        slots = torch.tensor([[3, 7], [-1, -1], [7, 7], [5, 3]], dtype=torch.int32)
        found = pairs.pairs_of(slots, torch.tensor([7, 3], dtype=torch.int32), 8)
        assert found.pair.tolist() == [1, 4, 0, 7, 2, 3, 5, 6]
        assert found.start.tolist() == [0, 2, 4]
        assert found.pair.dtype == found.start.dtype == torch.int32

    @pytest.mark.parametrize("seed", range(20))
    def test_drawn(self, seed: int) -> None:
        batch, _ = drawn(seed)
        J, found = batch.slots.shape[1], batch.pairs
        starts, pair = found.start.tolist(), found.pair.tolist()
        assert sorted(pair) == list(range(batch.slots.numel()))
        for slot, begin, end in zip(batch.trained, starts[:-1], starts[1:], strict=True):
            assert pair[begin:end] == [m * J + j for m, j, _ in batch.first_places([slot])]
        assert starts[0] == 0

    def test_no_values_are_asked_for(self) -> None:
        """On fake tensors a sync raises."""
        with FakeTensorMode():
            slots = torch.empty(70, 4, dtype=torch.int32)
            found = pairs.pairs_of(slots, torch.empty(3, dtype=torch.int32), 64)
        assert found.pair.shape == (280,) and found.start.shape == (4,)

    def test_items(self) -> None:
        items, rows = pairs.items_of([(4, 40), (0, 0), (2, 32)], 2, [1, 0, 0])
        assert rows == 72
        assert items.tolist() == [[4, 0, 0, 40, 39], [4, 32, 32, 8, 7], [2, 0, 40, 32, 32]]

    def test_items_are_copied_to_the_device_once(self) -> None:
        cpu = torch.device("cpu")
        items = pairs.items_on(cpu, [(0, 8)], 1)
        assert pairs.items_on(cpu, [(0, 8)], 1) is items
        assert pairs.items_on(cpu, [(0, 8)], 1, [1]) is not items

    def test_a_graphs_items_stay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        items = torch.zeros(1, 5, dtype=torch.int32)
        kept: dict[int, Tensor] = {}
        monkeypatch.setattr(pairs, "_kept", lambda *_: items)
        monkeypatch.setattr(pairs, "_CAPTURED", kept)
        for captures in (False, True):
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=captures: c)
            pairs.items_on(torch.device("cuda", 0), [(0, 8)], 1)
            assert list(kept.values()) == [items] * captures


class TestMemory:
    """Every address that the kernels touch."""

    @pytest.mark.parametrize("seed", range(6))
    def test_no_access_outside_no_race_no_atomic(self, seed: int) -> None:
        batch, config = drawn(seed)
        memory = Memory()
        with memory.of_launches():
            batch.run(config)
        assert not memory.errors
        assert not any(kind == "atomic" for kind, _ in memory.bytes)

    def test_traffic_is_exact(self) -> None:
        """v: the adapters' own rows, once for each group of rank blocks; one part for few rows."""
        slots = torch.tensor([[0, 1], [1, -1], [2, -1], [-1, -1]]).repeat(5, 1)
        batch = Batch(slots, [40, 8, 16], [0, 1], columns=32)
        memory = Memory()
        with memory.of_launches():
            batch.run(dataclasses.replace(SMALL, split=4))
        assert memory.bytes["load", "v"] == (2 * 5 + 10) * 32 * 4
        assert memory.bytes["load", "u"] == (5 * 48 + 10 * 16) * 4
        assert memory.bytes["load", "gain"] == (2 * 5 + 10) * 4
        # "out" is the result of reduce, which comes last, and its parts, all of which fit a plane.
        assert memory.bytes["load", "part"] == 48 * 32 * 4
