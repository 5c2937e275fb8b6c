"""The torch operators: their contract with autograd, torch.compile and torch.export."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from layer import LayerCase
from lora_mux import ops
from lora_mux.core.pool import RankRows
from lora_mux.core.slots import SLOT_BITS
from lora_mux.kernels import tensors
from lora_mux.kernels.pairs import pairs_of
from lora_mux.ops import operators, plan_in_torch, reference
from lora_mux.ops.operands import Trained
from problem import Problem

OPS: Any = torch.ops.lora_mux


def plan_of(problem: Problem, block_m: int = 16) -> tensors.Plan:
    batch = problem.index, problem.weight, problem.live, len(problem.rank)
    return tensors.Plan(*OPS.plan(*batch, block_m))


def trained_in(problem: Problem, plan: tensors.Plan) -> Trained:
    """All adapters of a problem but the second, with parameters of their values."""
    parameters: list[Tensor] = []
    owners: list[int] = []
    slots = [s for s in range(len(problem.rank)) if s != 1 and problem.rank[s]]
    for number, slot in enumerate(slots):
        first, end = int(problem.offset[slot]), int(problem.offset[slot] + problem.rank[slot])
        biased = problem.constant is not None and bool(problem.constant[end - 1])
        A = problem.A_rows[first : end - biased, : problem.K].clone()
        B = problem.B_rows[first : end - biased, : problem.N].T.clone()
        bias = [problem.B_rows[end - 1, : problem.N].clone()] if biased else []
        parameters += [t.requires_grad_() for t in (A, B, *bias)]
        owners += [number] * (2 + biased)
    chosen = torch.tensor(slots, dtype=torch.int32)
    return Trained(parameters, owners, chosen, *pairs_of(plan.slots, chosen, len(problem.rank)))


def finite(problem: Problem) -> Problem:
    """Without the NaN between adapters, which tells on kernels but not in a real pool."""
    problem.A_rows.nan_to_num_(0.0)
    problem.B_rows.nan_to_num_(0.0)
    return problem


PROBLEMS = {
    "mixed": Problem(),
    "biased": Problem(ranks=(4, 17), biased=(0,), J=2),
    "zero rows": Problem(rows=0),
    "one place": Problem(J=1),
    "half": Problem(dtype=torch.bfloat16),
}


def test_schemas_are_made_of_the_tuples() -> None:
    """What callers rely on: the order of the arguments, their types and their defaults."""
    rows = "Tensor A_rows, Tensor B_rows, Tensor? constant, Tensor offset, Tensor rank, Tensor"
    plan = "Tensor slots, Tensor strength, Tensor union, Tensor length, Tensor place, Tensor state"
    how = "SymInt max_rank, bool batch_invariant=False, bool? triton=None, bool fused=True"
    trained = "Tensor[]? parameters=None, int[]? owners=None, Tensor? trained=None, Tensor? pair="
    shared = f"{rows} scaling, {plan}, Tensor counters, {how}, {trained}None, Tensor? start=None"
    assert shared == operators.SHARED
    schema = str(OPS.add_lora.default._schema)
    assert schema == f"lora_mux::add_lora(Tensor y, Tensor x, {shared}) -> Tensor"
    assert operators.ADD_LORA == tuple(a.name for a in OPS.add_lora.default._schema.arguments)
    assert str(OPS.plan.default._schema).endswith(f"-> ({plan}, Tensor counters)")


def test_kernels_and_core_mean_the_same() -> None:
    """Neither imports the other."""
    assert tensors.Pool._fields == RankRows._fields
    assert (1 << SLOT_BITS) - 1 == tensors.SLOT_MASK


# opcheck of torch 2.14 copies what has a gradient and makes fakes of the copies, which are no
# leaves. torch hides its own warning of that, but not where a warning is an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", PROBLEMS)
class TestContract:
    """opcheck: schema, fakes, autograd and AOT dispatch of each operator."""

    def check(self, operator: Any, *arguments: Any) -> None:
        results = torch.library.opcheck(operator, arguments)
        assert set(results.values()) == {"SUCCESS"}

    def test_plan(self, name: str) -> None:
        problem = PROBLEMS[name]
        arguments = problem.index, problem.weight, problem.live, len(problem.rank), 16
        self.check(OPS.plan.default, *arguments)

    def test_add_lora(self, name: str) -> None:
        problem = finite(PROBLEMS[name])
        plan = plan_of(problem)
        for grad in (False, True):
            followed = problem.y, problem.x, plan.strength
            y, x, strength = (t.clone().requires_grad_(grad) for t in followed)
            arguments = *problem.pool, *plan._replace(strength=strength), 24
            self.check(OPS.add_lora.default, y, x, *arguments)

    def test_linear(self, name: str) -> None:
        problem = finite(PROBLEMS[name])
        W = torch.randn(problem.N, problem.K).to(problem.dtype)
        for bias in (None, W[:, 0].clone()):
            arguments = *problem.pool, *plan_of(problem), 24
            self.check(OPS.linear.default, problem.x, W, bias, *arguments)

    def test_add_lora_in_place(self, name: str) -> None:
        problem = finite(PROBLEMS[name])
        y = problem.y.clone()
        self.check(OPS.add_lora_.default, y, problem.x, *problem.pool, *plan_of(problem), 24)

    def test_linear_with_gradients(self, name: str) -> None:
        problem = finite(PROBLEMS[name])
        plan = plan_of(problem)
        followed = problem.x, torch.randn(problem.N, problem.K).to(problem.dtype), plan.strength
        x, W, strength = (t.clone().requires_grad_() for t in followed)
        arguments = *problem.pool, *plan._replace(strength=strength), 24
        self.check(OPS.linear.default, x, W, W.detach()[:, 0].clone(), *arguments)

    def test_what_is_trained(self, name: str) -> None:
        problem = finite(PROBLEMS[name])
        plan = plan_of(problem)
        trained = trained_in(problem, plan)
        how = 24, False, None, False
        self.check(OPS.add_lora.default, problem.y, problem.x, *problem.pool, *plan, *how, *trained)
        without = [p.detach() for p in trained.parameters or ()]
        arguments = *problem.pool, *plan, *how, *trained._replace(parameters=without)
        self.check(OPS.weight_gradient.default, problem.y, problem.x, *arguments)

    def test_strength_gradient(self, name: str) -> None:
        problem = finite(PROBLEMS[name])
        arguments = problem.y, problem.x, *problem.pool, *plan_of(problem), 24
        self.check(OPS.strength_gradient.default, *arguments)


@pytest.mark.parametrize("triton", [False, pytest.param(True, marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("size", [0, 3, 65535, 65536])
def test_plan_takes_any_table_of_live_handles(size: int, triton: bool) -> None:
    """Other engines have few slots: what is beyond their table has no tenant; -1 is the base."""
    live = torch.full((size,), -1, dtype=torch.int32)
    live[: min(size, 3)] = torch.tensor([0, -1, 2 | 5 << 16], dtype=torch.int32)[:size]
    index = torch.tensor([[0, -1], [2 | 5 << 16, 0], [-1, -1], [1, 0], [65535, -1], [2, -1]])
    made = OPS.plan(index, torch.ones(6, 2), live, 3, 16, triton)
    whole = torch.cat([live, torch.full((65536 - size,), -1, dtype=torch.int32)])
    plan = tensors.Plan(*made)
    alive = (whole[index & 65535] == index) & (index >= 0)
    assert torch.equal(plan.slots.long(), torch.where(alive, index & 65535, -1))
    dead = (~alive & (index != -1)).any(1)
    states = torch.where(alive.any(1), tensors.SELECTS, tensors.BASE)
    assert torch.equal(plan.state.long(), torch.where(dead, tensors.DEAD, states))


@pytest.mark.parametrize("triton", [False, pytest.param(True, marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("name", [n for n in PROBLEMS if n != "half"])
def test_values_of_either_implementation(name: str, triton: bool) -> None:
    problem = finite(PROBLEMS[name])
    plan = OPS.plan(problem.index, problem.weight, problem.live, len(problem.rank), 16, triton)
    arguments = *problem.pool, *plan, problem.max_rank, False, triton
    problem.check(OPS.add_lora(problem.y, problem.x, *arguments))
    y = problem.y.clone()
    OPS.add_lora_(y, problem.x, *arguments)
    problem.check(y)


def test_fp64_gradients_numerically() -> None:
    problem = finite(Problem(rows=4, K=5, N=6, ranks=(2, 3), J=2))
    plan = plan_of(problem)
    pool = [t.double() if t.is_floating_point() else t for t in problem.pool]

    def run(y: Tensor, x: Tensor, strength: Tensor) -> Tensor:
        made: Tensor = OPS.add_lora(y, x, *pool, *plan._replace(strength=strength), 3)
        return made

    inputs = [t.double().requires_grad_() for t in (problem.y, problem.x, plan.strength)]
    assert torch.autograd.gradcheck(run, inputs)


def test_fp64_gradients_of_the_whole_layer_numerically() -> None:
    problem = finite(Problem(rows=4, K=5, N=6, ranks=(2, 3), J=2))
    plan = plan_of(problem)
    pool = [t.double() if t.is_floating_point() else t for t in problem.pool]

    def run(x: Tensor, W: Tensor, bias: Tensor, strength: Tensor) -> Tensor:
        made: Tensor = OPS.linear(x, W, bias, *pool, *plan._replace(strength=strength), 3)
        return made

    given = problem.x, torch.randn(6, 5), torch.randn(6), plan.strength
    assert torch.autograd.gradcheck(run, [t.double().requires_grad_() for t in given])


@pytest.mark.parametrize("triton", [False, pytest.param(True, marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("ranks", [(4, 17, 8), (2, 1, 40)], ids=str)
def test_weight_gradients(ranks: tuple[int, ...], triton: bool) -> None:
    """Against autograd through one adapter after the other, in fp64; biases as well."""
    problem = finite(Problem(ranks=ranks, biased=(0,), J=2))
    arguments = problem.index, problem.weight, problem.live, len(problem.rank), 16, triton
    plan = tensors.Plan(*OPS.plan(*arguments))
    trained = trained_in(problem, plan)
    dy = torch.randn(problem.x.shape[0], problem.N)
    shared = *problem.pool, *plan, problem.max_rank, False, triton, False, *trained
    have = trained.split(*OPS.weight_gradient(dy, problem.x, *shared))
    x, leaves = (
        problem.x.double(),
        [p.detach().double().requires_grad_() for p in trained.parameters],
    )
    y = torch.zeros(len(x), problem.N, dtype=torch.float64)
    for number, (A, B, *bias) in Trained(leaves, trained.owners).factors:
        slot = int(trained.trained[number])
        gain = torch.where(plan.slots == slot, problem.weight.double(), 0.0).sum(1, keepdim=True)
        y = y + gain * problem.scaling[slot].double() * (x @ A.T @ B.T + sum(bias))
    wants = torch.autograd.grad(y, leaves, dy.double())
    for got, want in zip(have, wants, strict=True):
        assert (got.double() - want).abs().max() <= 3e-6 * want.abs().max()


def test_dead_handles_are_nan_without_kernels_too() -> None:
    problem = finite(Problem(rows=3))
    problem.index[1, 0] = 12345
    y = OPS.add_lora(problem.y, problem.x, *problem.pool, *plan_of(problem), problem.max_rank)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_reference_and_operators_agree_on_strength() -> None:
    slots = torch.tensor([[1, 1, 0], [-1, 2, 2], [0, 1, 0]])
    weight = torch.tensor([[1.0, 2.0, 4.0], [float("nan"), 1.0, 2.0], [1.0, 2.0, 3.0]])
    want = [[3.0, 0.0, 4.0], [0.0, 3.0, 0.0], [4.0, 2.0, 0.0]]
    assert plan_in_torch.strength_of(slots, weight).tolist() == want


def counted(compiled_frames: list[Any]) -> Callable[..., Any]:
    """A backend that counts the graphs it is given."""

    def backend(graph: Any, inputs: Any) -> Any:
        compiled_frames.append(graph)
        return graph.forward

    return backend


class TestCompile:
    """fullgraph, and no new graph when routing, weights or adapters change."""

    @pytest.fixture(autouse=True)
    def fresh(self) -> None:
        torch._dynamo.reset()

    def case(self) -> LayerCase:
        case = LayerCase(ranks=(4, 9, 2), size=(24, 40))
        case.layer.reserve(adapters=6, rank=9)
        return case

    @pytest.mark.parametrize("grad", [False, True])
    def test_one_graph_for_every_routing_and_adapter(self, grad: bool) -> None:
        case, graphs = self.case(), []
        compiled = torch.compile(case.layer, fullgraph=True, backend=counted(graphs))
        handles = torch.tensor([*case.handles, -1])
        with torch.set_grad_enabled(grad):
            for step in range(6):
                x, index = case.x(5), handles[torch.randint(0, len(handles), (5, 2))]
                routing = lora_mux.Routing(index, torch.randn(5, 2))
                torch.testing.assert_close(compiled(x, routing), case.layer(x, routing))
                if step == 2:
                    case.layer.remove_adapter("a1")
                    new = case.layer.add_adapter(
                        "n", torch.randn(7, 24), torch.randn(40, 7), alpha=3
                    )
                    handles = torch.tensor([case.handles[0], new, case.handles[2], -1])
        assert len(graphs) == 1

    def test_row_counts_share_a_dynamic_graph(self) -> None:
        case, graphs = self.case(), []
        compiled = torch.compile(case.layer, fullgraph=True, dynamic=True, backend=counted(graphs))
        for rows in (5, 8, 3, 20):
            x = case.x(rows)
            routing = lora_mux.Routing(torch.tensor(case.handles)[torch.arange(rows) % 3][:, None])
            with torch.no_grad():
                torch.testing.assert_close(compiled(x, routing), case.layer(x, routing))
        assert len(graphs) == 1

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
    def test_inductor_forward_and_backward(self) -> None:
        case = self.case()
        compiled = torch.compile(case.layer, fullgraph=True)
        index = torch.tensor(case.handles)[torch.tensor([[0, 1], [2, 2], [1, 0]])]
        found = []
        x0, w0 = case.x(3), torch.randn(3, 2)
        for layer in (compiled, case.layer):
            x, weight = x0.clone().requires_grad_(), w0.clone().requires_grad_()
            y = layer(x, lora_mux.Routing(index, weight))
            y.square().sum().backward()
            found.append((y.detach(), x.grad, weight.grad))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)

    def test_a_dead_handle_is_nan_and_flagged(self) -> None:
        case = self.case()
        compiled = torch.compile(case.layer, fullgraph=True, backend="aot_eager")
        routing = lora_mux.Routing(torch.tensor([[case.handles[0]], [99]]))
        with torch.no_grad():
            y = compiled(case.x(2), routing)
        assert y[1].isnan().all() and y[0].isfinite().all()
        with pytest.raises(lora_mux.LoraMuxError, match="NaN: 1"):
            routing.check()


class Exported(nn.Module):
    """A pool and what a serving loop would export around it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        for name, tensor in zip(RankRows._fields, problem.pool, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("live", problem.live)
        self.max_rank = problem.max_rank

    def forward(self, y: Tensor, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        plan = OPS.plan(index, weight, self.live, self.rank.shape[0], 16)
        pool = (getattr(self, name) for name in RankRows._fields)
        added: Tensor = OPS.add_lora(y, x, *pool, *plan, self.max_rank)
        return added


def test_export() -> None:
    problem = finite(Problem(rows=6))
    rows = torch.export.Dim("rows", min=2, max=1024)
    arguments = problem.y, problem.x, problem.index, problem.weight
    program = torch.export.export(
        Exported(problem), arguments, dynamic_shapes=[{0: rows}] * len(arguments)
    )
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"lora_mux.plan.default", "lora_mux.add_lora.default"} <= targets
    for rows_now in (6, 11):
        other = finite(Problem(rows=rows_now, seed=0))
        other.x, other.y = torch.randn(rows_now, 33), torch.randn(rows_now, 41)
        got = program.module()(other.y, other.x, other.index, other.weight)
        other.check(got)


def test_settings_are_kept_by_copies() -> None:
    layer = lora_mux.MuxLinear(nn.Linear(2, 2), backend="reference", batch_invariant=True)
    assert layer.mux_settings == ops.Settings("reference", True)
    assert reference.Plan._fields == ("slots", "selects", "strength")


@pytest.mark.usefixtures("mended", "quiet")
@pytest.mark.parametrize("triton", [False, pytest.param(True, marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("block", [8, 5])  # of the latter the kernels make a copy
class TestColumns:
    """A pool of an engine's, B [slots, N, R], gives what the same one row by row gives."""

    def both(self, block: int) -> tuple[Problem, RankRows, RankRows]:
        problem = finite(Problem(rows=20, ranks=(block, 3, block), by_columns=block))
        by_columns = RankRows(*problem.pool)
        assert by_columns.B_rows.shape == (3, problem.N, block)
        return problem, by_columns, by_columns._replace(B_rows=problem.B_rows)

    def test_values(self, block: int, triton: bool) -> None:
        problem, by_columns, _ = self.both(block)
        how = *plan_of(problem), block, False, triton
        problem.check(OPS.add_lora(problem.y, problem.x, *by_columns, *how))
        W = torch.eye(problem.N, problem.K)
        got = OPS.linear(problem.x, W, None, *by_columns, *how)
        problem.y = problem.x @ W.T
        problem.check(got)

    def test_gradients(self, block: int, triton: bool) -> None:
        problem, *pools = self.both(block)
        found = []
        for rows in pools:
            plan = plan_of(problem)
            x, strength = problem.x.clone().requires_grad_(), plan.strength.requires_grad_()
            y = OPS.add_lora(problem.y, x, *rows, *plan, block, False, triton)
            found.append(torch.autograd.grad(y.square().sum(), (x, strength)))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)
            assert want.any()
