"""Adapters that are being trained, and when their values reach the pools.

What has changed is rounded into the pools when the next forward pass begins, so that every pass has
one state of each adapter.
"""

import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..checkpoints import StoredAdapter, copy_to_host
from ..core import (
    LoraWeights,
    Masters,
    Pool,
    Slots,
    is_capturing,
    is_finite,
    slot_of,
)
from ..errors import RoutingBusyError, TrainingError
from ..layers import MuxLinear
from ..routes import Router
from .trained_adapter import TrainedAdapter, follow_optimizers
from .writing import Learnt, current_streams, publish

PATIENCE = 60.0  # seconds that a publish waits for the passes of other threads


class Training:
    """The adapters of a model that are trained, by handle."""

    def __init__(
        self,
        layers: Mapping[str, MuxLinear],
        pools: Mapping[str, Pool],
        slots: Slots,
        router: Router,
        writing: Callable[[Iterable[int]], AbstractContextManager[None]],
    ) -> None:
        self._layers = layers
        self._pools = pools
        self._slots = slots
        self._router = router
        self._writing = writing
        self._trained: dict[int, TrainedAdapter] = {}
        self._published: dict[int, list[int]] = {}  # TrainedAdapter.mux_state then
        # Of adapters whose values the pools do not hold exactly; None = nobody has them.
        self._origins: dict[int, StoredAdapter | None] = {}
        self.dropouts: dict[int, float] = {}  # by handle, of the adapters that were made with one

    @property
    def handles(self) -> Collection[int]:
        """Those of the adapters that are trained."""
        return self._trained.keys()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_trained": {}, "_published": {}}  # a copy trains nothing

    @property
    def all(self) -> list[TrainedAdapter]:
        """What is trained, in order."""
        return list(self._trained.values())

    def note(self, handle: int, weights: Mapping[str, LoraWeights]) -> None:
        """An adapter was loaded from these values: note whether the pools have rounded them."""
        for path, part in weights.items():
            dtype = self._pools[path].A_rows.dtype
            if any(torch.promote_types(t.dtype, dtype) != dtype for t in part.tensors().values()):
                self._origins[handle] = None
                return

    def keep(self, handle: int, stored: StoredAdapter, always: bool = False) -> None:
        """Note where the exact values of an adapter are, if the pools do not hold them."""
        if always or handle in self._origins:
            self._origins[handle] = stored

    def forget(self, handle: int) -> None:
        """An adapter is gone."""
        self._origins.pop(handle, None)
        self.dropouts.pop(handle, None)

    def check(self, handle: int, name: str, parts: Mapping[str, LoraWeights]) -> None:
        """Refuse an adapter that is more than LoRA on linear layers.

        Args:
            handle: of the adapter.
            name: of the adapter.
            parts: path -> its factors, which need no values.

        Raises:
            TrainingError: it is.
        """
        more = "saved modules as a whole" if handle in self._slots.companions else ""
        for path, part in parts.items():
            if self._layers[path].mux_kind is not None:
                more = f"a part for {path!r}, which is no whole linear layer"
            elif part.gain is not None:
                more = f"DoRA at {path!r}"
        if more:
            raise TrainingError(
                f"`name` {name!r} must be an adapter of LoRA on linear layers, got one with "
                f"{more}; train and save that by PEFT"
            )

    def exact(self, handle: int, name: str) -> dict[str, LoraWeights]:
        """Path -> the factors of a resident adapter, in the dtype that they were given in.

        Raises:
            TrainingError: nobody has them.
        """
        slot = slot_of(handle)
        spans = [span for pool in self._pools.values() if (span := pool.span(slot)) is not None]
        if handle not in self._origins and not any(span.cast for span in spans):
            return self.copied(handle)
        stored = self._origins.get(handle)
        if stored is None:
            raise TrainingError(
                f"`name` {name!r} must be an adapter whose exact values are known, got one of "
                "tensors that the model's dtype has rounded; train(name, weights={path: (A, B)}) "
                "begins with the tensors, and load(name, folder, replace=True) reads a file again"
            )
        return stored.weights(stored.read(False))

    def copied(self, handle: int) -> dict[str, LoraWeights]:
        """Path -> copies of the factors of an adapter as the pools hold them."""
        slots, order = [slot_of(handle)], self._router.order
        order.routed(slots)  # the current stream waits for who wrote them
        copies = {path: part.cloned() for path, part in self.in_pools(handle).items()}
        order.left(slots)  # and who writes there next waits for it
        return copies

    def in_pools(self, handle: int) -> dict[str, LoraWeights]:
        """Path -> the factors of an adapter as the pools hold them; not copies."""
        slot, found = slot_of(handle), {}
        for path, pool in self._pools.items():
            span = pool.span(slot)
            if span is not None:
                held = slice(span.offset, span.offset + span.rank - span.bias)
                A, B = pool.A_rows[held, : pool.in_features], pool.B_rows[held, : pool.out_features]
                bias = pool.B_rows[held.stop, : pool.out_features] if span.bias else None
                gain = pool.B_rows[held.stop] if span.gain else None  # whose value nobody reads
                found[path] = LoraWeights(A, B.T, span.scaling, bias, gain)
        return found

    def begin(
        self, handle: int, name: str, weights: Mapping[str, LoraWeights], rate: float | None
    ) -> TrainedAdapter:
        """Train a resident adapter, from values of its own shapes.

        Of one that is trained already, what it has learnt stays, and the dropout may change.
        """
        self.dropouts[handle] = self.dropouts.get(handle, 0.0) if rate is None else rate
        if handle in self._trained:
            self._follow_dropout(handle, self._trained[handle])
            return self._trained[handle]
        self._router.passes.before = self.publish_changed
        follow_optimizers()
        slot = slot_of(handle)
        masters = {  # in the model's order, as PEFT's: optimizers know parameters by their numbers
            path: Masters.of(weights[path], pool.A_rows.device)
            for path, pool in self._pools.items()
            if path in weights
        }
        follow = functools.partial(self._follow_dropout, handle)
        trained = self._trained[handle] = TrainedAdapter(name, masters, follow)
        for path, one in masters.items():
            self._pools[path].masters[slot] = one
        trained.train()
        self._slots.trained = *self._slots.trained, slot  # from now on, passes have its gradients
        return trained

    def _follow_dropout(self, handle: int, trained: TrainedAdapter) -> None:
        """Drop as a module in its present mode does, unless its training has ended."""
        if self._trained.get(handle) is not trained:  # the slot may be another tenant's
            return
        rate = self.dropouts[handle] if trained.training else 0.0
        if rate:
            self._slots.dropout[slot_of(handle)] = rate
        else:
            self._slots.dropout.pop(slot_of(handle), None)

    def of(self, name: str) -> TrainedAdapter:
        """What is trained of an adapter.

        Raises:
            TrainingError: nothing is.
        """
        handle = self._slots.lookup([name])[name]
        if handle not in self._trained:
            raise TrainingError(
                f"`name` must be an adapter that is trained, got {name!r}; call train({name!r})"
            )
        return self._trained[handle]

    def learnt(self) -> Iterator[tuple[int, StoredAdapter]]:
        """The adapters that are trained, as they are now; but for those that have diverged."""
        for handle, trained in self._trained.items():
            if self._unfit(trained) is None:
                yield handle, copy_to_host("what was learnt", trained.weights, False)

    def _unfit(self, trained: TrainedAdapter) -> str | None:
        """A layer whose pool cannot hold its values, which are not finite there."""
        for path, part in trained.weights.items():
            dtype = self._pools[path].A_rows.dtype
            if not all(is_finite(tensor, dtype) for tensor in part.tensors().values()):
                return path
        return None

    def check_finite(self, name: str) -> None:
        """Refuse values that a pool cannot hold: brought back into one, they would reach others.

        Raises:
            TrainingError: nothing is trained of the adapter, or its values are such.
        """
        path = self._unfit(self.of(name))
        if path is not None:
            raise TrainingError(
                f"`name` {name!r} must have values that are finite in the model's "
                f"{self._pools[path].A_rows.dtype}, got others at {path!r}; give load_state_dict() "
                "those before it diverged, or remove() the adapter"
            )

    def end(self, handle: int) -> None:
        """Let the pools keep what they have; the parameters belong to nobody from now on."""
        slot = slot_of(handle)
        self._slots.trained = tuple(other for other in self._slots.trained if other != slot)
        self._slots.dropout.pop(slot, None)
        for pool in self._pools.values():
            pool.masters.pop(slot, None)
        self._trained.pop(handle, None)
        self._published.pop(handle, None)

    def mend(self, named: Collection[int]) -> None:
        """End what an interrupt has left half begun or ended, and what has no name any more."""
        for handle in [*self._trained]:
            if handle not in named or slot_of(handle) not in self._slots.trained:
                self.end(handle)

    def publish_changed(self) -> None:
        """Before a pass begins: let the pools have what optimizers and users have changed."""
        if not self._slots.trained:
            return
        changed = {
            handle: state
            for handle, trained in list(self._trained.items())
            if (state := trained.mux_state) != self._published.get(handle)
        }
        if changed:
            self.publish(changed)

    def publish(self, handles: Collection[int]) -> None:
        """Let the pools have the present values of adapters, whether they seem changed or not.

        One that does not is not taken for changed by a backward that is still to come.

        Raises:
            TrainingError: a CUDA graph is being captured, which would do so at each replay.
            RoutingBusyError: passes of other threads, which use them, do not end.
        """
        if any(map(is_capturing, {pool.A_rows.device for pool in self._pools.values()})):
            names = [one.mux_name for h in handles if (one := self._trained.get(h)) is not None]
            raise TrainingError(
                "what is trained must not have changed between the pass before a CUDA graph is "
                f"captured and the capture, got {', '.join(map(repr, names))}, whose new values "
                "would come again at each replay; call publish() for each before capturing"
            )
        end = time.monotonic() + PATIENCE
        while True:
            with self._router.changes:
                if not self._router.passes.use_any(handles):
                    self._write(handles)
                    return
            if time.monotonic() > end:
                raise RoutingBusyError(
                    "what was learnt must reach the pools between passes, got passes of other "
                    f"threads that have used the adapters for {PATIENCE:.0f} s"
                )
            time.sleep(0.0005)

    def _write(self, handles: Collection[int]) -> None:
        # But for those whose training has just ended.
        found = {h: one for h in handles if (one := self._trained.get(h)) is not None}
        states = {handle: self._begin_to_write(handle, one) for handle, one in found.items()}
        learnt = [
            Learnt(pool, slot_of(handle), one.mux_masters[path])
            for path, pool in self._pools.items()
            for handle, one in found.items()
            if path in one.mux_masters
        ]
        readers = current_streams(one.pool for one in learnt)
        with self._writing(map(slot_of, found)):
            publish(learnt, readers, {s: None for one in found.values() for s in one.mux_streams})
        self._published.update(states)

    def _begin_to_write(self, handle: int, trained: TrainedAdapter) -> list[int]:
        """Let backwards that are still to come know of what has changed; returns its state."""
        pools, state = [self._pools[path] for path in trained.mux_masters], trained.mux_state
        begun = [0] * len(state)  # of parameters that nobody has changed
        before = self._published.get(handle, begun)
        if before == state:
            return state
        # Graphs of torch.compile see changes by torch's counters alone. Those of before the
        # training know no parameters.
        if before == begun:
            torch.autograd.graph.increment_version([pool.A_rows for pool in pools])
        if before[:-1] == state[:-1]:
            torch.autograd.graph.increment_version(trained.mux_parameters)
            state = trained.mux_state
        for pool in pools:
            pool.learn(slot_of(handle))
        return state
