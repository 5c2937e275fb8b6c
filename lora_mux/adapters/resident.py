"""The adapters of an attached model, all of them resident."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from ..checkpoints import StoredAdapter, copy_to_host
from ..core import LoraWeights, Slots, slot_of, synchronized
from ..layers import MuxLinear, check_reservation, check_room, follow_materialised, write
from ..routes import Route, Router
from .changes import Change, Claims, Prepared, Promise, Promises
from .memory import MemoryReport, report_memory
from .trained_adapter import TrainedAdapter
from .training import Training
from .writing import WrittenPools

AnyRoute = TypeVar("AnyRoute", bound=Route | None)
Result = TypeVar("Result")


class Adapters(WrittenPools):
    """Every loaded adapter is resident, and the pools grow with them.

    One lock serialises changes. Forward passes do not take it: adapters that they may still ask for
    (`Router.reachable`) stay where they are, and are freed later.

    An adapter is prepared first, under a handle that nobody knows. Publishing it is one step. What
    an interrupt leaves of a change, at whatever line it comes, is mended by `_mend`.
    """

    def __init__(self, layers: dict[str, MuxLinear], slots: Slots, router: Router) -> None:
        super().__init__(layers, slots, router)
        self._pinned: set[int] = set()  # handles; nothing needs a pin where all are resident
        # Handles without a name: of adapters that are being prepared, still in use, or promised.
        self._nameless: set[int] = set()
        self._claims = Claims()
        self._promises = Promises()
        self._binding: dict[str, int] = {}  # names that are being given, all of them or none
        self._change = Change(self._mend)
        self.training = Training(layers, self._pools, slots, router, self._writing)

    @synchronized
    def settle(self) -> None:
        """Before a copy is made: everything is in order, and the current stream waits for it."""
        self._change.recover()
        self.training.publish_changed()
        for handle, learnt in self.training.learnt():  # a copy trains nothing, and goes on with it
            self._learnt(handle, learnt)
        self._router.order.copied()

    @synchronized
    def include(self, path: str, layer: MuxLinear) -> None:
        """Let one more layer carry adapters; those that are loaded leave it alone."""
        self._change.recover()
        layer.mux_pool.reserve(0, self._slots.capacity, 0)
        self._pools[path] = layer.mux_pool
        self._layers[path] = layer

    def prepare(self, stored: StoredAdapter) -> Prepared:
        """Read an adapter, and bring it to its place."""
        self._cut_shapes(stored)  # which raises before anything is read
        weights = stored.weights(stored.read(False))
        prepared = self.prepare_weights(weights, stored.source, stored.saved)
        self.training.keep(prepared.handle, stored)
        return prepared

    def prepare_weights(
        self,
        weights: Mapping[str, LoraWeights],
        source: str,
        saved: StoredAdapter | None = None,
    ) -> Prepared:
        """Bring an adapter to its place.

        Everything is checked before anything is written, and a failure leaves nothing behind.

        Args:
            weights: path -> factors.
            source: what error messages call them.
            saved: the modules that it saved, which become its companion.
        """
        cut = self._cut(weights, source)
        if saved is None:
            prepared = self._placed(cut, source)
        else:
            modules = self._cut(saved.weights(saved.read(False)), saved.source)
            prepared = self._placed(cut, source, modules, saved.digest)
        self.training.note(prepared.handle, weights)
        return prepared

    @synchronized
    def _placed(
        self,
        cut: Mapping[str, LoraWeights],
        source: str,
        saved: Mapping[str, LoraWeights] = MappingProxyType({}),
        digest: bytes = b"",
    ) -> Prepared:
        self._change.recover()
        with self._change:
            self._free_unused()

            def hold() -> int:
                held = self._written(saved, source)
                with self._writing([slot_of(held)]):
                    self._slots.make_live(held)
                return held

            companion = self._slots.companions.of_modules(saved, digest, hold) if saved else None
            handle = self._written(cut, source)
            if companion is not None:
                self._slots.accompany(handle, companion)
            return self._claimed(handle)

    def _written(self, cut: Mapping[str, LoraWeights], source: str) -> int:
        """A new handle, whose rank rows are in their places."""
        for path, part in cut.items():
            check_room(self._slots, self._pools[path], part, f"{source}[{path!r}]")
        handle = self._slots.allot()
        parts = ((pool, cut.get(path)) for path, pool in self._pools.items())
        with self._growing([slot_of(handle)]):
            write(self._slots, handle, parts)
        return handle

    def _claimed(self, handle: int) -> Prepared:
        prepared = self._claims[handle] = Prepared(handle)
        self._nameless.add(handle)
        return prepared

    @synchronized
    def publish(self, prepared: Mapping[str, Prepared], replace: bool = False) -> dict[str, int]:
        """Give prepared adapters their names, all or none; returns name -> handle.

        Args:
            prepared: by name.
            replace: the names may be those of loaded adapters.
        """
        self._change.recover()
        self._check_names(prepared, replace)
        handles = {name: one.handle for name, one in prepared.items()}
        with self._change:
            with self._writing(map(slot_of, handles.values())):
                for handle in handles.values():
                    self._slots.make_live(handle)
            self._bind(handles)
        return handles

    @synchronized
    def abandon(self, prepared: Iterable[Prepared]) -> None:
        """Take prepared adapters away again, those that got no name."""
        self._change.recover()
        for one in prepared:
            self._claims.pop(one.handle, None)
        with self._change:
            self._free_unused()

    def _check_names(self, prepared: Mapping[str, Prepared], replace: bool) -> None:
        for name, new in prepared.items():
            self._slots.check_new(name, replace)
            old, sticky = self._slots.get(name), self._router.sticky.route
            if old is not None and sticky is not None and self._router.is_sticky(old):
                sticky.with_replaced(old, new.handle, self._slots)  # which raises

    @synchronized
    def remove(self, name: str) -> None:
        """Forget a name. Its handle is dead from now on."""
        self._change.recover()
        self._slots.lookup([name])
        with self._change:
            self._unbind(name)

    def _unbind(self, name: str) -> None:
        handle = self._slots.lookup([name])[name]
        with self._writing([slot_of(handle)]):
            promised = handle in self._promises.handles
            self._nameless.add(self._slots.unbind(name, promised))
        self._pinned.discard(handle)
        self._end_training(handle)  # after it: before, an interrupt would lose what was learnt
        self._free_unused()

    @synchronized
    def resident(
        self,
        make: Callable[[], AnyRoute],
        publish: Callable[[AnyRoute], Result],
        leaving: bool = False,
    ) -> Result:
        """Put a new route in force, whose adapters are resident and stay.

        Nothing else changes meanwhile. Afterwards the route itself keeps its adapters where they
        are, as long as it is in force.

        Args:
            make: makes the route. It is called with the lock held, so that names mean the same when
                the route is put in force.
            publish: puts it in force.
            leaving: the route that the new one replaces is not used any more.

        Returns:
            What `publish` returns.
        """
        self._change.recover()
        return publish(make())

    @synchronized
    def promise(self, find: Callable[[], Sequence[Collection[int]]]) -> list[Promise]:
        """Promise adapters: they can be held as long as the promise lives, whatever names mean.

        Args:
            find: returns the handles for each promise. It is called with the lock held, so that
                none of them goes before it is promised.

        Raises:
            PoolCapacityError: those of one promise can never be resident together.
        """
        self._change.recover()
        promises = [Promise(frozenset(handles)) for handles in find()]
        self._promises.update(promises)
        return promises

    @property
    def has_promises(self) -> bool:
        """Whether any adapter is promised."""
        return bool(self._promises.handles)

    def hold(self, handles: Collection[int]) -> Promise:
        """Make promised adapters resident, and keep them so while the new promise lives."""
        return Promise(frozenset(handles))

    def prefetch(self, names: Iterable[str]) -> None:
        """Make adapters resident, together."""
        self._slots.lookup(list(names))

    def pin(self, name: str) -> None:
        """Make an adapter resident, and keep it so."""
        self._slots.lookup([name])

    def unpin(self, name: str) -> None:
        """Let an adapter make room for others again."""
        self._slots.lookup([name])

    @synchronized
    def reserve(self, adapters: int, rank: int) -> None:
        """Make room in every layer for that many adapters of up to that rank."""
        self._change.recover()
        check_reservation(self._slots, adapters, rank)
        with self._change, self._growing():
            self._slots.capacity = max(self._slots.capacity, adapters)
            for layer in self._layers.values():
                follow_materialised(layer)
                pool = layer.mux_pool
                # Bounded pools have all their rank rows from the beginning.
                rank_rows = adapters * rank if pool.fixed is None else 0
                pool.reserve(rank_rows, self._slots.capacity, rank)

    @synchronized
    def values(self, name: str) -> dict[str, LoraWeights]:
        """Path -> the factors of an adapter as they are now, as exactly as they are known.

        Raises:
            TrainingError: it is more than LoRA on linear layers; or nobody has the exact values.
        """
        self.outline(name)  # which raises
        handle = self._slots.lookup([name])[name]
        if handle in self.training.handles:
            return self.training.of(name).weights
        return self._exact(handle, name)

    def _exact(self, handle: int, name: str) -> dict[str, LoraWeights]:
        return self.training.exact(handle, name)

    @synchronized
    def outline(self, name: str) -> dict[str, LoraWeights]:
        """Path -> the factors of an adapter, for their shapes and scalings; see `values`."""
        self._change.recover()
        handle = self._slots.lookup([name])[name]
        parts = self._parts_of(handle)
        self.training.check(handle, name, parts)
        return parts

    def _parts_of(self, handle: int) -> dict[str, LoraWeights]:
        return self.training.in_pools(handle)

    @synchronized
    def train(
        self, name: str, weights: Mapping[str, LoraWeights], dropout: float | None
    ) -> TrainedAdapter:
        """Begin to train an adapter, from these values; what is trained of it already."""
        self._change.recover()
        handle = self._slots.lookup([name])[name]
        with self._change:
            return self.training.begin(handle, name, weights, dropout)

    @synchronized
    def freeze(self, name: str) -> None:
        """End the training of an adapter, and go on with what it has learnt."""
        self._change.recover()
        handle, trained = self._slots.lookup([name])[name], self.training.of(name)
        self.training.publish([handle])
        with self._change:
            self._learnt(handle, copy_to_host("what was learnt", trained.weights, False))
            self.training.end(handle)

    def _end_training(self, handle: int) -> None:
        """Of an adapter that goes. Those it is promised to go on with what the pools hold."""
        if handle in self.training.handles and handle in self._promises.handles:
            held = copy_to_host("what was learnt", self.training.copied(handle), False)
            self._learnt(handle, held)
        self.training.end(handle)

    def _learnt(self, handle: int, stored: StoredAdapter) -> None:
        """Note the values of an adapter, now that they are others."""
        self.training.keep(handle, stored, always=True)

    @synchronized
    def memory(self) -> MemoryReport:
        """How much memory the pools and the adapters take."""
        self._change.recover()
        with self._change:
            self._free_unused()
        return report_memory(self._pools, self._slots, self._pinned, self._nameless)

    def _bind(self, handles: dict[str, int]) -> None:
        """Give live adapters their names, and free those that had them."""
        self._binding = handles  # from here on it happens, even if an interrupt comes
        self._finish_binding()
        self._free_unused()

    def _finish_binding(self) -> None:
        for name, handle in self._binding.items():
            before = self._slots.bind(name, handle)
            if before is not None and before != handle:
                self._end_training(before)
                self._nameless.add(before)
                self._pinned.discard(before)
                self._router.replace_sticky(before, handle)
        # A new set. In one that has held thousands, Python looks for the few through the room of
        # all: 50 us of each route, where 5,000 adapters were loaded at once.
        self._nameless = self._nameless.difference(self._binding.values())
        self._binding = {}

    def _mend(self) -> None:
        """Put in order what an interrupt has left. It may itself be interrupted, and begin again.

        What has begun to be published is published; all else that was begun is undone.
        """
        self._finish_binding()
        with self._writing():
            self._mend_pools()
        self._router.mend_sticky()
        self._free_unused()

    def _mend_pools(self) -> None:
        self._slots.mend()
        named = set(self._slots.handles.values())
        self._nameless = self._slots.tenants - named - self._slots.companions.handles
        self._pinned &= named
        self.training.mend(named)
        kept = {slot_of(handle) for handle in self._slots.tenants if self._is_whole(handle)}
        for pool in self._pools.values():
            pool.mend(kept)

    def _is_whole(self, handle: int) -> bool:
        """Whether the rank rows of a handle are all there, or may be in use."""
        return True

    def _given_up(self) -> set[int]:
        """The handles without a name that nobody prepares and nobody was promised."""
        return self._nameless - self._claims.alive() - self._promises.handles

    def _free_unused(self) -> None:
        """Free the adapters without a name that no forward pass uses any more."""
        while self._nameless:  # companions that nobody has any more come after their adapters
            reachable, in_use = self._router.reachable(), self._router.in_use()
            unused = []
            for handle in self._given_up():
                # A pass that begins now cannot use a handle that is not live, or was removed.
                users = reachable if self._slots.may_be_routed(handle) else in_use
                if users is not None and handle not in users:
                    unused.append(handle)
            if not unused:
                return
            self._free(unused)

    def _free(self, handles: Iterable[int]) -> None:
        """Free the slots and the rank rows of adapters without a name."""
        concerned = self._slots.companions.beside(handles)
        with self._writing(map(slot_of, concerned)):
            self._erase(handles)
            for handle in handles:
                companion = self._slots.free(handle)
                self._nameless.discard(handle)
                self.training.forget(handle)
                if companion is not None:
                    self._nameless.add(companion)

    def _erase(self, handles: Iterable[int]) -> None:
        slots = [slot_of(handle) for handle in handles]
        for pool in self._pools.values():
            pool.erase(slots)
