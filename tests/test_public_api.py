"""The public names, and that each is documented and typed."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import lora_mux

PUBLIC = [
    "LoraMuxError",
    "Mux",
    "MuxLinear",
    "Routing",
    "__version__",
    "attach",
    "attach_peft",
    "compose",
    "detach",
    "errors",
    "format_row",
    "mean_by_adapter",
    "parse_row",
]
METHODS = {
    "Mux": [
        *(
            "active_adapters",
            "adapters",
            "add_adapter",
            "call",
            "create",
            "detach",
            "disable_adapter",
            "freeze",
            "load",
            "load_many",
            "memory",
            "model",
            "of",
            "pin",
            "prefetch",
            "publish",
        ),
        *("reduce_gradients", "remove", "reserve", "route", "route_tokens", "save"),
        *("set_adapter", "set_route", "targets", "train", "trained", "unpin"),
    ],
    "MuxLinear": [
        *("adapters", "add_adapter", "extra_repr", "forward", "remove_adapter", "reserve"),
    ],
    "Routing": ["check", "expand_rows", "repeat_interleave", "rows", "tile", "to"],
}


def test_names() -> None:
    assert sorted(lora_mux.__all__) == PUBLIC
    assert all(hasattr(lora_mux, name) for name in PUBLIC)


@pytest.mark.parametrize("name", METHODS)
def test_members(name: str) -> None:
    ours = [c for c in getattr(lora_mux, name).__mro__ if c.__module__.startswith("lora_mux.")]
    kinds = (Callable, property, classmethod)  # a classmethod itself is not callable
    members = [m for c in ours for m, v in vars(c).items() if isinstance(v, kinds)]
    # mux_ marks what a layer has of ours beside the names of its linear.
    assert sorted(m for m in members if not m.startswith(("_", "mux_"))) == METHODS[name]


def documented() -> dict[str, Any]:
    found: dict[str, Any] = {"lora_mux": lora_mux, "attach": lora_mux.attach}
    found |= {"attach_peft": lora_mux.attach_peft, "detach": lora_mux.detach}
    found |= {"mean_by_adapter": lora_mux.mean_by_adapter}
    found |= {name: x for name, x in vars(lora_mux.errors).items() if inspect.isclass(x)}
    for name, members in METHODS.items():
        owner = getattr(lora_mux, name)
        found[name] = owner
        found |= {f"{name}.{member}": getattr(owner, member) for member in members}
    return found


@pytest.mark.parametrize("name", documented())
def test_everything_public_has_a_docstring(name: str) -> None:
    words = (documented()[name].__doc__ or "").split()
    assert len(words) >= 3


def test_the_error_tree_is_as_drawn() -> None:
    """The docstring of errors draws the tree: every class, with its second base."""
    classes = {
        name: cls
        for name, cls in vars(lora_mux.errors).items()
        if inspect.isclass(cls) and cls is not lora_mux.LoraMuxError
    }
    drawn = [line.split("-- ")[1].split() for line in _tree() if "-- " in line]
    assert {name: base.strip("()") for name, base, *_ in drawn} == {
        name: cls.__bases__[1].__name__ for name, cls in classes.items()
    }
    assert all(cls.__bases__[0] is lora_mux.LoraMuxError for cls in classes.values())


def _tree() -> list[str]:
    return (lora_mux.errors.__doc__ or "").splitlines()
