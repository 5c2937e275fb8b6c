"""The pools of an attached model: what fits them, and how they are written while others read.

What is trained reaches them here: all that has changed at once, because on a GPU the host's share
decides. Published one by one, 64 adapters of a single layer took an H100 20 to 48 ms.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoints import PackedTensors, StoredAdapter
from ..core import (
    LoraWeights,
    Masters,
    Pool,
    Slots,
    Stream,
    has_streams,
    reading,
    synchronized,
    to_device,
)
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


class Learnt(NamedTuple):
    """What is trained of one adapter in one layer."""

    pool: Pool
    slot: int
    masters: Masters


# Elements that are rounded beside the pools at once, at up to 17 bytes each on a GPU.
AT_ONCE = 1 << 22


def current_streams(pools: Iterable[Pool]) -> dict[torch.device, Stream]:
    """The stream that is current on each device of pools that has streams."""
    devices = {pool.A_rows.device for pool in pools}
    return {d: torch.cuda.current_stream(d) for d in devices if has_streams(d)}


@torch.inference_mode(False)
@torch.no_grad()
def publish(
    learnt: Iterable[Learnt],
    readers: Mapping[torch.device, Stream],
    writers: Collection[Stream],
) -> None:
    """Round masters into the rank rows of their pools, inside of `_writing` for their slots.

    Where one has values that are not finite in its pool's dtype, its rank rows become zeros, and
    its scaling NaN: 0 x NaN is NaN in others' rows.

    Args:
        learnt: those of one pool one after the other.
        readers: by device, the stream that reads the masters: that of whoever has changed them
            last, and may do so again at once.
        writers: other streams on which optimizers step.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Learnt]] = {}
    for one in learnt:
        rows = one.pool.A_rows
        alike.setdefault((rows.device, rows.dtype), []).append(one)
    for (device, _), those in alike.items():
        if device.type == "cpu" and not has_streams(device):
            _publish_on_host(those)
            continue
        for part in _parts(those):
            _publish_on_device(part, device, readers.get(device), writers)


def _parts(learnt: Sequence[Learnt]) -> Iterator[list[Learnt]]:
    """Those that are rounded at once."""
    part: list[Learnt] = []
    elements = 0
    for one in learnt:
        if part and elements + _elements(one) > AT_ONCE:
            yield part
            part, elements = [], 0
        part.append(one)
        elements += _elements(one)
    yield part


def _elements(one: Learnt) -> int:
    return sum(parameter.numel() for parameter in one.masters.parameters)


def _held(learnt: Iterable[Learnt]) -> list[list[Tensor]]:
    """The rank rows of each in its pool."""
    held: list[list[Tensor]] = []
    for pool, those in itertools.groupby(learnt, lambda one: one.pool):
        held += pool.held([one.slot for one in those])
    return held


def _publish_on_host(learnt: Sequence[Learnt]) -> None:
    held = _held(learnt)
    flat = [rows for views in held for rows in views]
    torch._foreach_copy_(flat, [rows for one in learnt for rows in one.masters.rows])
    # Norms take half of the time of extremes. Of large values they overflow: those are looked at.
    finite = iter(torch.stack(torch._foreach_norm(flat)).isfinite().tolist())
    for one, views in zip(learnt, held, strict=True):
        scaling = one.masters.scaling
        if not all([next(finite) or bool(rows.isfinite().all()) for rows in views]):
            torch._foreach_zero_(views)
            scaling = math.nan
        one.pool.rescale(one.slot, scaling)


def _publish_on_device(
    learnt: Sequence[Learnt],
    device: torch.device,
    reader: Stream,
    writers: Collection[Stream],
) -> None:
    """Without a sync, and with as many launches for all as for one; but for two in each pool."""
    dtype, scaling = learnt[0].pool.A_rows.dtype, learnt[0].pool.scaling.dtype
    sizes = [*map(_elements, learnt)]
    with reading(device, reader, writers):
        rows = [rows for one in learnt for rows in one.masters.rows]
        slots, lengths, scalings = to_device(
            [
                torch.tensor([one.slot for one in learnt]),
                torch.tensor(sizes),
                torch.tensor([one.masters.scaling for one in learnt], dtype=scaling),
            ],
            device,
        )
        rounded: Tensor = torch._C._nn.flatten_dense_tensors(rows).to(dtype)
        # 0 for a finite value and NaN for another one: so is the norm of as many as there are.
        lost = torch.stack(torch._foreach_norm(torch.split(rounded - rounded, sizes)))
        scalings = scalings + lost
        whose = lost.isnan().repeat_interleave(lengths, output_size=len(rounded))
        rounded.masked_fill_(whose, 0.0)
    if reader is not None:
        writer = torch.cuda.current_stream(device)
        if writer != reader:
            writer.wait_stream(reader)
            for tensor in (rounded, slots, scalings):
                tensor.record_stream(writer)
    flat = [view for views in _held(learnt) for view in views]
    torch._foreach_copy_(flat, torch._C._nn.unflatten_dense_tensors(rounded, flat))
    start = 0
    for pool, those in itertools.groupby(learnt, lambda one: one.pool):
        end = start + len(list(those))
        pool.scaling.data.index_copy_(0, slots[start:end], scalings[start:end])
        start = end
