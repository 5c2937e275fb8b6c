"""Attributes that are computed when they are first read."""

from lora_mux.core import computed_once


class Adder:
    def __init__(self) -> None:
        self.runs = 0

    @computed_once
    def total(self) -> int:
        """The sum."""
        self.runs += 1
        return 40 + self.runs


def test_once_for_each_object() -> None:
    first, second = Adder(), Adder()
    assert first.total == first.total == second.total == 41
    assert first.runs == second.runs == 1


def test_a_class_has_the_docstring() -> None:
    """As help() and builders of documentation ask for it."""
    assert Adder.total.__doc__ == "The sum."
