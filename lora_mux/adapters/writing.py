"""The pools of an attached model: what fits them, and how they are written while others read."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from ..checkpoints import PackedTensors, StoredAdapter
from ..core import LoraWeights, Pool, Slots, Stream, has_streams, synchronized
from ..errors import AdapterError
from ..layers import MuxLinear, cut_and_check, cut_and_check_shapes, follow_materialised
from ..routes import Router


class WrittenPools:
    """What changes of the adapters have in common. One lock serialises them."""

    def __init__(self, layers: dict[str, MuxLinear], slots: Slots, router: Router) -> None:
        self._layers = layers  # the Mux's own
        self._pools = {path: layer.mux_pool for path, layer in layers.items()}
        self._slots = slots
        self._router = router

    @property
    def _lock(self) -> AbstractContextManager[bool]:
        return self._router.changes

    def _touched_layers(
        self, weights: Mapping[str, LoraWeights], source: str
    ) -> dict[str, MuxLinear]:
        """The layers that an adapter touches, ready to hold it."""
        if not weights:
            raise AdapterError(f"`{source}` must hold at least one target, got none")
        unknown = [path for path in weights if path not in self._layers]
        if unknown:
            raise AdapterError(
                f"`{source}`: {unknown[0]!r} must be a target of the attached model, but is not "
                f"({len(unknown)} of {len(weights)} paths are not); attach with targets that cover "
                "it"
            )
        self._follow_materialised()
        return {path: layer for path, layer in self._layers.items() if path in weights}

    def _cut_shapes(self, stored: StoredAdapter) -> dict[str, LoraWeights]:
        """Path -> checked factors without values, as the pool is to hold them."""
        shapes = stored.shapes()
        return {
            path: cut_and_check_shapes(
                layer.mux_pool, layer.mux_kind, shapes[path], f"{stored.source}[{path!r}]"
            )
            for path, layer in self._touched_layers(shapes, stored.source).items()
        }

    def _cut(self, weights: Mapping[str, LoraWeights], source: str) -> dict[str, LoraWeights]:
        """Path -> checked factors, as the pool is to hold them."""
        return {
            path: cut_and_check(
                layer.mux_pool, layer.mux_kind, weights[path], f"{source}[{path!r}]"
            )
            for path, layer in self._touched_layers(weights, source).items()
        }

    @synchronized
    def _follow_materialised(self) -> None:
        for layer in self._layers.values():
            follow_materialised(layer)

    def _devices(self) -> set[torch.device]:
        return {pool.A_rows.device for pool in self._pools.values()}

    def _on_gpu(self) -> bool:
        """Whether a pool is on a GPU, so that copies from pinned memory pay off."""
        return any(map(has_streams, self._devices()))

    def _read(self, stored: StoredAdapter) -> PackedTensors:
        """An adapter's values, checked."""
        values = stored.read(self._on_gpu())
        for path, part in stored.weights(values).items():
            pool = self._pools[path]
            # Otherwise they are known to be finite, since they were read or handed over.
            widest = max(torch.finfo(tensor.dtype).max for tensor in (part.A, part.B))
            computed = part.bias is not None or part.gain is not None
            if torch.finfo(pool.A_rows.dtype).max < widest or computed:
                part.check_values(pool.A_rows.dtype, f"{stored.source}[{path!r}]")
        return values

    def _parts(
        self, weights: Mapping[torch.device, Mapping[str, LoraWeights]]
    ) -> Iterator[tuple[Pool, LoraWeights | None]]:
        """Each pool with what it is to hold of an adapter, whose weights are on every device."""
        for path, layer in self._layers.items():
            part = weights[layer.mux_pool.A_rows.device].get(path)
            if part is not None and layer.mux_kind is not None:
                part = layer.mux_kind.cut(part, path)
            yield layer.mux_pool, part

    def _stream(self, device: torch.device) -> Stream:
        """The stream on which the pools of a device are written."""
        return torch.cuda.current_stream(device) if has_streams(device) else None

    @contextmanager
    def _writing(self, slots: Iterable[int] | None = None) -> Iterator[None]:
        """Inside, pools and tables are written, as far as they concern these slots; None = all."""
        concerned = None if slots is None else frozenset(slots)
        with ExitStack() as stack:
            for device in self._devices():
                stream, order = self._stream(device), self._router.order
                stack.enter_context(order.writing(device, stream, concerned))
                if has_streams(device):
                    self._slots.live(device)  # made before anybody reads it
            yield

    @contextmanager
    def _growing(self, slots: Iterable[int] = ()) -> Iterator[None]:
        """As `_writing`, where pools may grow: who reads the old buffers goes on doing so."""
        before = [(pool, pool._buffers.copy()) for pool in self._pools.values()]
        with self._writing(slots):
            yield
        for pool, buffers in before:
            for name, buffer in buffers.items():
                if buffer is not None and buffer is not pool._buffers[name]:
                    self._router.order.keep(buffer)
