"""Routings are compared by value, whatever way their numbers lie in memory."""

import pytest
import torch
from torch import Tensor

from lora_mux.core.routing import Routing, value_of
from lora_mux.errors import RoutingError

INDEX = torch.tensor([[3], [0], [3], [-1]])
# The same numbers; several are views that torch calls contiguous, though their strides are not.
LAYOUTS: dict[str, Tensor] = {
    "plain": INDEX.clone(),
    "a row, transposed": INDEX.T.clone().T,
    "a column": torch.cat([INDEX, INDEX + 1], 1)[:, :1],
    "every other row": INDEX.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_however_the_numbers_lie(name: str, dtype: torch.dtype) -> None:
    index = LAYOUTS[name]
    weight = (index + 0.5).to(dtype)
    weight = weight.T.clone().T if name == "a row, transposed" else weight
    value = value_of(Routing(INDEX, (INDEX + 0.5).to(dtype)))
    assert value_of(Routing(index, weight)) == value
    assert value_of(Routing(index + 1, weight)) != value
    assert value_of(Routing(index, weight + 1)) != value


def test_of_one_row_and_of_none() -> None:
    one = Routing(torch.tensor([[2, 3, 4]])[:, 1:2], torch.ones(1, 3)[:, 1:2])
    assert value_of(one) == value_of(Routing(torch.tensor([[3]]), torch.ones(1, 1)))
    assert value_of(one) != value_of(Routing(torch.tensor([[3], [3]]), torch.ones(2, 1)))
    none = torch.empty(0, 1, dtype=torch.int64)
    assert value_of(Routing(none, torch.empty(0, 1))) == value_of(Routing(none, torch.empty(0, 1)))


def test_what_the_host_may_not_read_equals_nothing() -> None:
    there = Routing(INDEX.to("meta"), torch.ones(4, 1, device="meta"))
    assert value_of(there) != value_of(there)


def test_weights_that_are_elsewhere_are_refused() -> None:
    with pytest.raises(RoutingError, match="on index's device cpu, got meta"):
        Routing(INDEX, torch.ones(4, 1, device="meta"))
