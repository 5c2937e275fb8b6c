"""Plans for the operators: the rows of a batch in tiles, whose index is read on their device.

In eager mode torch's dispatcher takes some tens of microseconds for the twenty arguments of an
operator, and Triton as long for those of a kernel. Where nobody looks on (`forms.plain`), and
autograd follows nothing, plans do without both: what was launched is kept by its case, which is all
that tiles and compiled variants depend on, and launched again with other pointers.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..core import AnyPool, Pool, RankRows, to_device
from ..kernels.tensors import ALIGNMENT, BASE
from . import on_triton, operators
from .forms import plain, tracked
from .operands import How, Trained

if TYPE_CHECKING:
    from ..kernels.ready import PlanNow


class TrainedHere(NamedTuple):
    """The adapters of a batch that are trained, and which rows select them; see Trained."""

    slots: tuple[int, ...]  # [T]
    trained: Tensor  # the same as a tensor
    pair: Tensor
    start: Tensor

    @classmethod
    def of(cls, slots: tuple[int, ...], plan: operators.Plan, capacity: int) -> "TrainedHere":
        """Those of a plan, without a sync."""
        from ..kernels.pairs import pairs_of

        (trained,) = to_device([torch.tensor(slots, dtype=torch.int32)], plan.slots.device)
        return cls(slots, trained, *pairs_of(plan.slots, trained, capacity))

    def of_layer(self, pool: AnyPool) -> Trained:
        """What a layer trains of them."""
        owned = [
            (number, parameter)
            for number, slot in enumerate(self.slots)
            if slot in pool.masters
            for parameter in pool.masters[slot].parameters
        ]
        if not owned:
            return Trained()
        owners, parameters = map(list, zip(*owned, strict=True))
        return Trained(parameters, owners, self.trained, self.pair, self.start)


class TiledPlan(NamedTuple):
    """A plan for layers whose adapters are added to what the base layer answers."""

    tensors: operators.Plan
    batch_invariant: bool
    triton: bool
    trained: TrainedHere | None = None
    used: Collection[int] | None = None  # at least all slots that it selects; None = not known

    @property
    def slots(self) -> Tensor:
        """slots [M, J] of `tensors`."""
        return self.tensors.slots

    @property
    def strength(self) -> Tensor:
        """strength [M, J] of `tensors`."""
        return self.tensors.strength

    def with_strength(self, strength: Tensor) -> "TiledPlan":
        """The plan with another tensor of equal values there."""
        return self._replace(tensors=self.tensors._replace(strength=strength))

    @property
    def selecting(self) -> Tensor:
        """[M, 1] bool: the rows that select an adapter, alive or not."""
        return (self.tensors.state != BASE)[:, None]

    def touches(self, pool: AnyPool) -> bool:
        """True: only the device knows the slots."""
        return True

    def add(self, y: Tensor, x: Tensor, pool: AnyPool, owned: bool) -> Tensor:
        """y [..., N] plus the adapters' part for x [..., K]; see forms.Plan."""
        arguments = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), *self._shared(pool)
        trained = self._trained_in(pool)
        followed = tracked(y, x, self.tensors.strength, *(trained.parameters or ()))
        if owned and not followed and y.is_contiguous():
            torch.ops.lora_mux.add_lora_(*arguments)
            return y
        added: Tensor = torch.ops.lora_mux.add_lora(*arguments, *trained)
        return added.reshape(y.shape)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, pool: Pool) -> Tensor:
        """y [..., N] = x W^T + bias + the adapters' part, for x [..., K]: one node for autograd.

        Its gradient of x is made in place, by dy W. A base layer beside it would cost a tensor of
        zeros, one of the adapters' part and a sum: 3 times the traffic.
        """
        arguments = x.reshape(-1, x.shape[-1]), weight, bias, *self._shared(pool)
        y: Tensor = torch.ops.lora_mux.linear(*arguments, *self._trained_in(pool))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def follows(self, x: Tensor, pool: AnyPool) -> bool:
        """Whether autograd follows what the adapters add to a layer."""
        return tracked(x, self.tensors.strength, *(self._trained_in(pool).parameters or ()))

    def _shared(self, pool: AnyPool) -> tuple[Any, ...]:
        how = How(pool.max_rank, self.batch_invariant, self.triton, fused=False)
        return *pool.rows, *self.tensors, *how

    def _trained_in(self, pool: AnyPool) -> Trained:
        return Trained() if self.trained is None else self.trained.of_layer(pool)


class EagerPlan(NamedTuple):
    """A TiledPlan for Triton that was made in eager mode, and that autograd does not follow."""

    now: "PlanNow"
    batch_invariant: bool
    used: Collection[int] | None = None  # as in TiledPlan

    @property
    def tiled(self) -> TiledPlan:
        """The same for operators."""
        return TiledPlan(self.now.tensors, self.batch_invariant, True)

    @property
    def slots(self) -> Tensor:
        """slots [M, J]."""
        return self.now.tensors.slots

    @property
    def strength(self) -> Tensor:
        """strength [M, J]."""
        return self.now.tensors.strength

    def with_strength(self, strength: Tensor) -> TiledPlan:
        """The plan with another tensor of equal values there."""
        return self.tiled.with_strength(strength)

    @property
    def selecting(self) -> Tensor:
        """[M, 1] bool: the rows that select an adapter, alive or not."""
        return self.tiled.selecting

    def touches(self, pool: AnyPool) -> bool:
        """True: only the device knows the slots."""
        return True

    def add(self, y: Tensor, x: Tensor, pool: AnyPool, owned: bool) -> Tensor:
        """y [..., N] plus the adapters' part for x [..., K]; see forms.Plan."""
        if not (owned and plain(y, x) and not tracked(y, x) and y.is_contiguous()):
            return self.tiled.add(y, x, pool, owned)
        now, rows = self.now, _rows_now(pool)
        case = (
            *(now.case, self.batch_invariant, pool.max_rank, *_kinds(rows)),
            *(y.shape, y.dtype, y.get_device(), x.shape, x.stride(), x.dtype, x.get_device()),
        )
        pointers = _pointers(rows)
        again = _again(case, y.data_ptr() | x.data_ptr(), pointers, now)
        if again is not None:
            again(y, x, now, pointers)
            return y
        flat = x.reshape(-1, x.shape[-1])
        how = How(pool.max_rank, self.batch_invariant, True)
        made = on_triton.add_(y.view(-1, y.shape[-1]), flat, rows, now.tensors, how)
        if flat.data_ptr() == x.data_ptr():  # else it is a copy
            _keep(case, made, y.data_ptr() | x.data_ptr(), pointers)
        return y

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, pool: Pool) -> Tensor:
        """The whole layer for autograd; see TiledPlan."""
        return self.tiled.linear(x, weight, bias, pool)

    def follows(self, x: Tensor, pool: AnyPool) -> bool:
        """Whether autograd follows what the adapters add to a layer."""
        return tracked(x)


class FusedPlan(NamedTuple):
    """A plan for layers that are computed whole, base and adapters, in one launch."""

    tensors: operators.Plan | None  # None = those of `now`
    now: "PlanNow | None" = None  # of a plan that was made in eager mode

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, pool: Pool) -> Tensor:
        """y [..., N] = x W^T + bias + the adapters' part, for x [..., K] without gradients."""
        now, tensors = self.now, self.tensors
        if now is not None and plain(x, x) and not tracked(x, weight, bias):
            made = _linear_now(now, x, weight, bias, pool)
            if made is not None:
                return made
        if tensors is None:
            assert now is not None
            tensors = now.tensors
        batch_invariant, triton = False, True
        y: Tensor = torch.ops.lora_mux.linear(
            *(x.reshape(-1, x.shape[-1]), weight, bias, *pool.rows, *tensors),
            *(pool.max_rank, batch_invariant, triton),
        )
        return y.reshape(*x.shape[:-1], y.shape[-1])


def _linear_now(
    now: "PlanNow", x: Tensor, weight: Tensor, bias: Tensor | None, pool: Pool
) -> Tensor | None:
    """FusedPlan.linear for tensors that are `forms.plain`; None = there is no launch to make."""
    from ..kernels import launch

    rows, device = _rows_now(pool), x.device
    stream = launch.stream_number(device)
    added = None if bias is None else (bias.stride(), bias.dtype, bias.get_device())
    case = (
        *(now.case, stream, pool.max_rank, *_kinds(rows), x.shape, x.stride(), x.dtype, device),
        *(weight.shape, weight.stride(), weight.dtype, weight.get_device(), added),
    )
    pointers = _pointers(rows)
    own = x.data_ptr() | weight.data_ptr() | (0 if bias is None else bias.data_ptr())
    again = _again(case, own, pointers, now)
    if again is not None:
        y: Tensor = again(x, weight, bias, now, pointers)
        return y
    flat, how = x.reshape(-1, x.shape[-1]), How(pool.max_rank, False, True)
    made = on_triton.linear(flat, weight, bias, rows, now.tensors, how)
    if made is None:
        return None
    y, again = made
    y = y.view(*x.shape[:-1], y.shape[-1])
    if again is not None and flat.data_ptr() == x.data_ptr():
        _keep(case, again._replace(y_shape=tuple(y.shape)), own, pointers)
    return y


# What launches a case again; see kernels/src/ready.py.
_AGAIN: dict[object, Any] = {}
MOST_CASES = 4096  # each kind of layer is one for each number of rows


def plan_now(index: Tensor, weight: Tensor, live: Tensor, capacity: int, block_m: int) -> "PlanNow":
    """The operator plan by Triton, for tensors that are `forms.plain`."""
    case = (
        *(index.shape, index.stride(), index.dtype, index.get_device(), capacity, block_m),
        *(weight.stride(), weight.dtype, weight.get_device(), live.get_device()),
    )
    pointers = index.data_ptr(), weight.data_ptr(), live.data_ptr()
    again = _AGAIN.get(case)
    if again is not None and _aligned(0, pointers) and not again.watched():
        now: PlanNow = again(index, weight, live)
        return now
    from ..kernels import launch, ready

    given = on_triton.computable(weight)
    made, again = launch.plan_and_again(index, given, live, capacity, block_m)
    _keep(case, again, 0, pointers)
    return ready.PlanNow.of(made)


def _again(case: object, own: int, pointers: tuple[int, ...], plan: Any) -> Any:
    """What launches a case again, for these pointers; None = launch by Triton."""
    if _aligned(own, pointers) and not plan.watched():
        return _AGAIN.get(case)
    return None


def _keep(case: object, again: Any, own: int, pointers: tuple[int, ...]) -> None:
    """Keep what was launched, if it is right for later tensors of the case."""
    if again is not None and _aligned(own, pointers):
        if len(_AGAIN) >= MOST_CASES:
            _AGAIN.clear()
        _AGAIN[case] = again


def _aligned(own: int, pointers: tuple[int, ...]) -> bool:
    for pointer in pointers:
        own |= pointer
    return not own & (ALIGNMENT - 1)


def _rows_now(pool: AnyPool) -> RankRows:
    """pool.rows, without nn.Module's own look-ups, which take a microsecond each."""
    A, B, constant, offset, rank, scaling, *_ = pool._buffers.values()  # registered in this order
    return RankRows(A, B, constant, offset, rank, scaling)  # type: ignore[arg-type]


def _pointers(rows: RankRows) -> tuple[int, ...]:
    A, B, constant, offset, rank, scaling = rows
    assert constant is not None  # as in any layer's pool
    return (
        *(A.data_ptr(), B.data_ptr(), constant.data_ptr()),
        *(offset.data_ptr(), rank.data_ptr(), scaling.data_ptr()),
    )


def _kinds(rows: RankRows) -> tuple[object, ...]:
    """What variants depend on; a pool's other dtypes never change."""
    A, B, scaling = rows.A_rows, rows.B_rows, rows.scaling
    stored = A.stride(), A.dtype, A.get_device(), B.stride(), B.dtype
    return *stored, scaling.dtype, scaling.shape  # as many slots
