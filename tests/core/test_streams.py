"""Copies to a device: one transfer, whose parts are tensors as any others."""

import pytest
import torch
from torch import Tensor

from lora_mux.core import streams

CPU = torch.device("cpu")


def test_parts_of_a_copy_begin_where_tensors_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """At multiples of 16 bytes: kernels are compiled once more for any other address."""
    monkeypatch.setattr(streams, "WITH_STREAMS", {"cpu"})
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    given = [torch.arange(3)[:, None], torch.tensor([[True, False]]), torch.rand(3, 5)]
    copies = streams.to_device(given, CPU)
    for tensor, copy in zip(given, copies, strict=True):
        assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype
        assert copy.data_ptr() % 16 == 0 and copy.data_ptr() != tensor.data_ptr()
