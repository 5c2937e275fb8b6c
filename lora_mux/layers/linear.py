"""MuxLinear: a linear layer of any make whose rows choose their own adapters."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import ops
from ..core import LoraWeights, Pool, Routing, Slots, host_may_read, slot_of
from ..errors import ArgumentTypeError, InputError, TargetError
from ..routes import Place, Router
from . import sharding
from .gains import rescaling, with_gain
from .handed_in import LastPlan, hold_to_backward, spread
from .kinds import Embedding, Kind, frozen_weight, fusable_weight
from .storing import check_reservation, check_room, cut_and_check, scaling_from, write
from .targets import Target, check_target, device_of, dtype_of

STAND_ALONE = Place("")


class MuxLinear(nn.Module):
    """A linear layer with a pool of LoRA adapters; every row of a batch selects its own subset.

        y[m] = base(x[m]) + sum_j weight[m, j] * scaling[i] * B[i] (A[i] x[m]),  i = index[m, j]

    `MuxLinear(linear)` is a new module of the linear's own class and of this one. It shares the
    linear's parameters, which stay as they are, and calls the linear's own forward, so that any
    layer that maps [..., in_features] to [..., out_features] works, quantised ones included. So do
    embeddings and convolutions, which are linear maps of one-hot rows and of patches.
    A batch that selects no adapter gets the base's tensor untouched; rows that select none keep
    every bit in a mixed batch.

    Args:
        linear: nn.Linear, transformers' Conv1D, or a layer with in_features and out_features;
            nn.Embedding; nn.Conv1d, nn.Conv2d or nn.Conv3d.
        backend: "auto" (Triton on CUDA and ROCm, batched products on the CPU, the reference
            elsewhere), "triton" or "reference".
        batch_invariant: with Triton, what the adapters add to a row has the same bits whatever
            batch the row comes in; costs speed for many rows.
        fused: on NVIDIA GPUs, for a 16-bit nn.Linear of sizes that are multiples of 8, without
            gradients, base and adapters in one launch: True wherever that can be, False nowhere,
            "auto" where a table of measurements says that it is faster (none is shipped yet). The
            base's part of a mixed batch is then that kernel's, rounded like any other order of
            summing.

    Raises:
        TargetError: no such layer, or one that is split, dilated or normed in a way that is not
            supported.
        BackendError: a backend that does not exist or cannot run.

    Examples:
        >>> import torch, lora_mux
        >>> layer = lora_mux.MuxLinear(torch.nn.Linear(8, 4))
        >>> sql = layer.add_adapter("sql", A=torch.ones(2, 8), B=torch.ones(4, 2), alpha=2)
        >>> y = layer(torch.ones(3, 8), lora_mux.Routing(torch.tensor([[sql], [-1], [sql]])))
        >>> (y - layer(torch.ones(3, 8)))[:, 0].tolist()
        [16.0, 0.0, 16.0]
    """

    weight: Tensor  # of nn.Linear; other bases may have none, or one of another kind
    bias: Tensor | None
    mux_pool: Pool
    mux_slots: Slots
    mux_router: Router | None  # of the model that the layer is attached in; None = stand-alone
    mux_place: Place  # in that model
    mux_settings: ops.Settings
    mux_kind: Kind | None  # what the layer is, if not a whole linear layer
    mux_patched: Callable[..., Tensor] | None = None  # the forward that was on the instance
    mux_owns_output: bool  # the base's forward returns a tensor that is nobody else's
    mux_last: LastPlan | None  # of the routings handed in on the CPU
    mux_last_method: tuple[object, ops.Method] | None = None  # of those handed in; ops.like of x

    def __new__(
        cls,
        linear: nn.Module | None = None,
        *,
        backend: ops.Backend = "auto",
        batch_invariant: bool = False,
        fused: ops.Fused = "auto",
    ) -> "MuxLinear":
        if linear is None:  # DataParallel and the strict export of torch 2.6 ask for a bare module
            return object.__new__(cls)
        check_target(linear, "linear")
        twin = object.__new__(mux_class(type(linear)))  # type: ignore[arg-type]
        # The registries are copied, so that a buffer or hook of one is not one of the other.
        twin.__dict__.update(
            {k: v.copy() if isinstance(v, dict | set) else v for k, v in vars(linear).items()}
        )
        return twin

    def __init__(
        self,
        linear: nn.Module,
        *,
        backend: ops.Backend = "auto",
        batch_invariant: bool = False,
        fused: ops.Fused = "auto",
    ) -> None:
        settings = ops.Settings(backend, batch_invariant, fused)
        target = check_target(linear, "linear")
        dtype = dtype_of(linear, torch.get_default_dtype())
        self.mux_equip(target, Slots(), None, settings, dtype)

    def mux_equip(
        self,
        target: Target,
        slots: Slots,
        router: Router | None,
        settings: ops.Settings,
        dtype: torch.dtype,
    ) -> None:
        """Give a layer that has become a MuxLinear its empty pool."""
        patched = vars(self).get("forward")
        if patched is not None:  # it would hide the class's forward, and the adapters with it
            # Past nn.Module's own setattr, which would register a forward that is a module.
            vars(self).update(mux_patched=patched, mux_owns_output=False)
            del vars(self)["forward"]
            if isinstance(target.kind, sharding.Shard):
                sharding.reinstall(self, patched)
        self.mux_pool = Pool(*target.sizes, dtype, device_of(self))
        self.mux_slots = slots
        self.mux_router = router
        self.mux_place = STAND_ALONE
        self.mux_settings = settings
        self.mux_kind = target.kind
        self.mux_last = self.mux_last_method = None
        self._follow_device()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MuxLinear":
        """Move or cast; what the layer reads beside its own tensors goes along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow_device()
        return self

    def _follow_device(self) -> None:
        """Make now what the first forward would make otherwise: it may be one that is traced."""
        device = self.mux_pool.A_rows.device
        if device.type == "meta":
            return
        self.mux_slots.live(device)
        if self.mux_router is not None:
            self.mux_router.follow_device(self.mux_pool)

    def forward(self, x: Tensor, routing: Routing | None = None, **kwargs: Any) -> Tensor:
        """y [..., out_features] for x [..., in_features].

        Args:
            x: [..., in_features]. Of an embedding, ids [...]; of a convolution, [samples,
                in_channels, *sizes].
            routing: one row per row of x (x.shape[:-1] flattened; each id, and each place of a
                convolution's output, is a row), or per sample (x.shape[0], for rows of at least
                two dimensions). None: the route of the attached model, else base.

        Raises:
            InputError: x is no input of such a layer.
            RoutingError: the routing's rows fit neither the rows nor the samples of x.
            UnknownAdapterError: the index holds a handle whose adapter is not there. On a GPU the
                row's output becomes NaN instead, and routing.check() raises.
            BackendError: Triton was asked for by name, and cannot run on x.
        """
        kind = self.mux_kind
        if kind is not None and self._is_idle(routing):  # its rows may be dear
            return self.mux_base(x, **kwargs)
        here = x if kind is None else kind.local(x)
        plan = self._plan(here, routing, fusable=not kwargs)
        if plan is None:
            return self.mux_base(x, **kwargs)
        y = self._with_adapters(x, here, plan, kwargs)
        if not is_compiling() and y.grad_fn is not None:
            hold_to_backward(y.grad_fn, self._pool, plan)
        return y

    def _with_adapters(
        self, x: Tensor, here: Tensor, plan: ops.AnyPlan, kwargs: dict[str, Any]
    ) -> Tensor:
        """What base and adapters answer; `here` are the rows of x."""
        kind, pool = self.mux_kind, self._pool
        if isinstance(plan, ops.FusedPlan):
            return plan.linear(x, self.weight, self.bias, pool)
        if isinstance(plan, ops.WHOLE):
            if self.training and self.mux_slots.dropout:
                here = ops.dropped(here, self.mux_slots.dropout_of_rows(plan.slots))
            elif not kwargs and (weight := frozen_weight(self, x, plan)) is not None:
                return plan.linear(x, weight, self.bias, pool)
        y = self.mux_base(x, **kwargs)
        added = rescaling(plan, pool, self) if pool.has_gains else plan
        if kind is None:
            return added.add(y, here, pool, self.mux_owns_output)
        return kind.add(added, y, here, pool, self._parameters.get("weight"))

    def mux_base(self, x: Tensor, **kwargs: Any) -> Tensor:
        """What the layer computes without adapters."""
        # Transformers' closure around a shard calls this forward; any other computes the base part.
        patched = None if isinstance(self.mux_kind, sharding.Shard) else self.mux_patched
        y: Tensor = (patched or super().forward)(x, **kwargs)
        return y

    def _is_idle(self, routing: Routing | None) -> bool:
        """Whether it is plain that nothing is to be added."""
        router = self.mux_router
        if routing is not None:
            return False
        if router is None or router.now() is None:
            return True
        return not is_compiling() and not self._pool.spans  # which a graph would guard

    @property
    def _pool(self) -> Pool:
        # nn.Module's own look-up takes 10 us where the base has emptied the caches: see ops/cpu.
        return self._modules["mux_pool"]  # type: ignore[return-value]

    def _plan(self, x: Tensor, routing: Routing | None, fusable: bool) -> ops.AnyPlan | None:
        """The plan for x; None = nothing to add."""
        if routing is not None:
            return self._plan_of(x, routing, fusable)
        router = self.mux_router
        now = None if router is None else router.now()
        if router is None or now is None:
            return None
        self._check_input(x)
        weight, pool = fusable_weight(self, x) if fusable else None, self._pool
        return router.plan(now, x, pool, weight, self.mux_place)

    def _plan_of(self, x: Tensor, routing: Routing, fusable: bool) -> ops.AnyPlan | None:
        """The plan of a routing that was handed in."""
        if not isinstance(routing, Routing):
            raise ArgumentTypeError(
                f"`routing` must be a lora_mux.Routing or None, got {type(routing).__name__}"
            )
        if self.mux_router is not None and self.mux_router.disabled:
            return None
        slots = self.mux_slots
        if self.mux_router is not None and not is_compiling():
            self.mux_router.passes.handed_in(x.device)
        last = None if is_compiling() or slots.trains else self.mux_last
        if last is not None and last.serves(x, routing, slots.suspensions):
            return last.plan  # for which x and routing were checked
        self._check_input(x)
        whole = slots.with_companions(routing, "routing")
        each = spread(whole, x)
        gate = routing.weight.requires_grad
        weight = fusable_weight(self, x) if fusable and not gate else None
        method = self._method(x, each.rows, weight)
        used = None
        if not (method.on_host or is_compiling()) and host_may_read(whole.index):
            used = {slot_of(handle) for handle in whole.index.flatten().tolist() if handle >= 0}
        if each.index.device != x.device:
            slots.resolve(routing.index)  # on the host, where it raises
            each = each.to(x.device)
        plan = ops.plan(each, slots, method, used=used)
        followed = gate or method.trained  # such a plan is not kept alive
        if method.form == "cpu" and not followed:
            self.mux_last = LastPlan.of(x, routing, slots.suspensions, plan)
        return plan

    def _method(self, x: Tensor, rows: int, weight: Tensor | None) -> ops.Method:
        """ops.method, which need not choose again for an input like the last one."""
        pool = self._pool
        trained = self.mux_slots.trains
        case = self.mux_settings, x, rows, pool, None if trained else weight, trained
        if is_compiling():
            return ops.method(*case)
        like, last = (ops.like(x, pool, weight), trained), self.mux_last_method
        if last is None or last[0] != like:
            last = self.mux_last_method = like, ops.method(*case)
        return last[1]

    def _check_input(self, x: Tensor) -> None:
        width = self._pool.in_features
        numbers = isinstance(self.mux_kind, Embedding)  # of one-hot rows
        if x.ndim == 0 or x.shape[-1] != (1 if numbers else width):
            raise InputError(f"`x` must have shape [..., in_features={width}], got {list(x.shape)}")

    def extra_repr(self) -> str:
        """The linear's own, then how many adapters are here and their rank rows."""
        spans = self.mux_pool.spans.values()
        ours = f"adapters={len(spans)}, rank_rows={sum(span.rows for span in spans)}"
        return ", ".join(filter(None, (super().extra_repr(), ours)))

    @property
    def adapters(self) -> Mapping[str, int]:
        """The loaded adapters: name -> handle."""
        return self.mux_slots.handles

    def add_adapter(
        self,
        name: str,
        A: Tensor,
        B: Tensor,
        *,
        alpha: float | None = None,
        scaling: float | None = None,
        bias: Tensor | None = None,
        magnitude: Tensor | None = None,
    ) -> int:
        """Copy an adapter into the pool; returns its handle, to be put into an index tensor.

        Args:
            name: any new str other than `"__base__"`.
            A: [r, in_features], any floating dtype; stored in the layer's own. Of an embedding
                [r, num_embeddings], of a convolution [r, in_channels, *kernel].
            B: [out_features, r]; of a convolution also [out_channels, r / groups, 1, ...].
            alpha: scaling = alpha / r. Give alpha or scaling, not both.
            scaling: the factor itself.
            bias: [out_features], a bias on B (PEFT's lora_bias), scaled like the rest.
            magnitude: [out_features], of DoRA: with g = magnitude / ||W + scaling * B A||, of rows
                and as of now, a weight w adds w * ((g - 1) * (W x) + g * scaling * B (A x)).

        Raises:
            AdapterError: a name in use, factors that do not fit, or that DoRA cannot have here.
            ArgumentTypeError: something of the wrong type.
        """
        self._refuse_attached("add_adapter")
        self.mux_slots.check_new(name)
        follow_materialised(self)
        given = LoraWeights(A, B, scaling_from(alpha, scaling, A), bias)
        if magnitude is not None:
            given = with_gain(self, given, magnitude, self.mux_pool.A_rows.dtype, "adapter")
        weights = cut_and_check(self.mux_pool, self.mux_kind, given, "adapter")
        self._mend()
        check_room(self.mux_slots, self.mux_pool, weights, "adapter")
        handle = self.mux_slots.allot()
        write(self.mux_slots, handle, [(self.mux_pool, weights)])
        self.mux_slots.make_live(handle)
        self.mux_slots.bind(name, handle)
        return handle

    def reserve(self, adapters: int, rank: int) -> None:
        """Make room for that many adapters of up to that rank, so that buffers stay in place.

        What a captured CUDA graph reads cannot grow: reserve before capturing. A bias counts as
        one more rank, and so does DoRA's magnitude.
        """
        self._refuse_attached("reserve")
        check_reservation(self.mux_slots, adapters, rank)
        follow_materialised(self)
        self.mux_slots.capacity = max(self.mux_slots.capacity, adapters)
        self.mux_pool.reserve(adapters * rank, self.mux_slots.capacity, rank)

    def remove_adapter(self, name: str) -> None:
        """Free an adapter's rank rows. Its handle raises from now on, and never means another."""
        self._refuse_attached("remove_adapter")
        self._mend()
        handle = self.mux_slots.unbind(name)
        self.mux_pool.erase([slot_of(handle)])
        self.mux_slots.free(handle)

    def _mend(self) -> None:
        """Undo what a change has left that was interrupted, at whatever line."""
        slots = self.mux_slots
        slots.mend()
        named = set(slots.handles.values())
        self.mux_pool.mend({slot_of(handle) for handle in named})
        for handle in slots.tenants - named:
            slots.free(handle)

    def _refuse_attached(self, method: str) -> None:
        if self.mux_router is not None:
            raise TargetError(
                f"`{method}`: this layer belongs to an attached model, whose adapters span all "
                f"its layers; use the Mux that attach() returned"
            )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle and deepcopy rebuild it from the linear's.
        return _rebuild, (type(self).__bases__[1],), self.__dict__.copy()


def _rebuild(linear_class: type[nn.Module]) -> MuxLinear:
    return object.__new__(mux_class(linear_class))  # type: ignore[arg-type]


@functools.cache
def mux_class(linear_class: Any) -> type[MuxLinear]:
    """The class of MuxLinears over `linear_class`: both, with MuxLinear's forward in front."""
    name = f"Mux{linear_class.__name__}"
    # F.linear's result is new; what another forward returns may be anybody's.
    owns = linear_class.forward is nn.Linear.forward
    return type(name, (MuxLinear, linear_class), {"__module__": __name__, "mux_owns_output": owns})


def follow_materialised(layer: MuxLinear) -> None:
    """Take the pool off the meta device once the layer has left it.

    to_empty() moves both; load_state_dict(assign=True) only what is in the state_dict.
    """
    pool = layer.mux_pool
    if pool.A_rows.is_meta:
        device = device_of(layer)
        if device.type == "meta":
            return
        pool.to_empty(device=device)  # nothing was lost: such a pool holds no adapter
    layer._follow_device()
    if pool.fixed is not None and not pool.runs.capacity:
        pool.fix(pool.fixed)
