"""Copies to a device, where one runs, and what waits for all of its streams."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from cuda_streams import CUDA, Cuda, Stream, cuda_streams
from lora_mux.core import streams
from oracle import Adapter, forward

CPU = torch.device("cpu")


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    """Fails a test in which anything races."""
    with cuda_streams() as made:
        yield made


def test_parts_of_a_copy_begin_where_tensors_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """At multiples of 16 bytes: kernels are compiled once more for any other address."""
    monkeypatch.setattr(streams, "WITH_STREAMS", {"cpu"})
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    given = [torch.arange(3)[:, None], torch.tensor([[True, False]]), torch.rand(3, 5)]
    copies = streams.to_device(given, CPU)
    for tensor, copy in zip(given, copies, strict=True):
        assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype
        assert copy.data_ptr() % 16 == 0 and copy.data_ptr() != tensor.data_ptr()


def test_a_site_is_the_stream_that_is_current_on_its_own_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current = {0: 70, 1: 71}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", current.get, raising=False)
    for index, stream in current.items():
        device = torch.device("cuda", index)
        assert streams.site_on(device) == (device, stream)
    assert streams.site_on(CPU) == (CPU, 0)


def test_a_layer_that_moves_while_streams_read_it(cuda: Cuda) -> None:
    """A cast reads and writes on the current stream, for which the others wait only here."""
    layer, adapter = lora_mux.MuxLinear(nn.Linear(12, 10)), Adapter(*a_pair(), 0.5)
    handle = layer.add_adapter("a", adapter.A, adapter.B, scaling=0.5)
    index = CUDA.put(torch.tensor([[handle]]))

    def run(x: Tensor) -> Tensor:
        with CUDA.stream(Stream()), torch.no_grad():
            return layer(x, lora_mux.Routing(index))

    CUDA.synchronize()
    x = torch.randn(1, 12)
    run(x)
    layer.double()
    torch.testing.assert_close(run(x.double()), forward(layer, x, [[(adapter, 1.0)]]))


def test_a_check_waits_for_the_pass_whatever_stream_it_is_on(cuda: Cuda) -> None:
    layer = lora_mux.MuxLinear(nn.Linear(12, 10))
    gone = layer.add_adapter("a", *a_pair(), scaling=1)
    layer.remove_adapter("a")
    routing = lora_mux.Routing(CUDA.put(torch.tensor([[-1], [gone]])))
    routing.check()  # of no pass yet
    CUDA.synchronize()
    with CUDA.stream(Stream()), torch.no_grad():
        assert layer(torch.randn(2, 12), routing).isnan().any(1).tolist() == [False, True]
    with pytest.raises(lora_mux.errors.UnknownAdapterError, match="1 of 2 rows did not.* NaN: 1"):
        routing.check()


def a_pair() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 12), torch.randn(10, 2)


def test_a_device_without_streams_is_read_as_it_is() -> None:
    with streams.reading(CPU, None, []):
        pass
