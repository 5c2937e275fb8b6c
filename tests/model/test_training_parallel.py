"""Adapters that are trained in two processes whose base DDP or FSDP2 has wrapped."""

from typing import Any

import pytest
import torch
import wrapped_parallel
from torch import Tensor, nn
from wrapped_parallel import HEAD, NAMES, ROWS, STEPS, TARGETS, WAYS

from two_processes import answers_of_two, data


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two processes has."""
    return answers_of_two(wrapped_parallel, tmp_path_factory.mktemp("two"), 120)


class Plain:
    """The same adapters and head in one process, as tensors that torch trains, by the formula."""

    def __init__(self) -> None:
        self.net = wrapped_parallel.Net()
        self.leaves: dict[str, Tensor] = {}
        for name in NAMES:
            for path, pair in wrapped_parallel.factors(name).items():
                for side, values in zip("AB", pair, strict=True):
                    key = f"{name} base_model.model.{path}.lora_{side}.weight"
                    self.leaves[key] = values.requires_grad_()
        head = self.net.get_submodule(HEAD).requires_grad_(True)
        self.leaves |= {f"head {key}": p for key, p in head.named_parameters()}

    def answer(self, rank: int, x: Tensor) -> Tensor:
        found = []
        for h, entry in zip(x, ROWS[rank], strict=True):
            chosen = entry if isinstance(entry, dict) else {entry: 1.0} if entry else {}
            for i, layer in enumerate(self.net.body):
                path = f"body.{i}"
                y = layer(h)
                for name, weight in chosen.items() if path in TARGETS else ():
                    A, B = (
                        self.leaves[f"{name} base_model.model.{path}.lora_{s}.weight"] for s in "AB"
                    )
                    y = y + weight * (B @ (A @ h))  # alpha / r is 1
                h = y
            found.append(h)
        return torch.stack(found)

    def gradients(self, rank: int) -> dict[str, Tensor | None]:
        for leaf in self.leaves.values():
            leaf.grad = None
        self.answer(rank, data(rank)).square().sum().backward()
        return {key: leaf.grad for key, leaf in self.leaves.items()}


def expected(head: bool) -> dict[str, Any]:
    plain = Plain()
    named = {k: leaf for k, leaf in plain.leaves.items() if head or not k.startswith("head")}
    optimizer = torch.optim.AdamW(named.values(), lr=0.01)
    steps = []
    for _ in range(STEPS):
        own = [plain.gradients(rank) for rank in range(2)]
        for key, leaf in named.items():
            there = [g for one in own if (g := one[key]) is not None]
            leaf.grad = torch.stack(there).mean(0)  # over those that had rows of it
        steps.append({key: leaf.grad.clone() for key, leaf in named.items()})
        optimizer.step()
    with torch.no_grad():
        answer = plain.answer(0, data(0))
    return {"gradients": steps, "learnt": named, "answer": answer}


@pytest.mark.parametrize("way", WAYS)
def test_as_in_one_process(way: str, two: list[Any]) -> None:
    """Gradients, what is learnt, and what is served then."""
    want = expected(WAYS[way]["head"])
    for found in two:
        have = found[way]
        assert have["learnt"].keys() == want["learnt"].keys()
        for step, wanted in zip(have["gradients"], want["gradients"], strict=True):
            for key, gradient in wanted.items():
                torch.testing.assert_close(step[key], gradient, rtol=1e-9, atol=1e-11)
        for key, value in want["learnt"].items():
            torch.testing.assert_close(have["learnt"][key], value.detach(), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(have["answer"], want["answer"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("way", WAYS)
def test_all_stay_equal(way: str, two: list[Any]) -> None:
    """Bit for bit: what a process serves does not depend on which one it is."""
    first, second = (found[way]["learnt"] for found in two)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_process_may_have_adapters_of_its_own(two: list[Any]) -> None:
    """DDP copies buffers from the first process to all, and must leave those of adapters alone."""
    for found in two:
        before, wrapped, compiled = found["own"]
        assert torch.equal(before, wrapped)
        torch.testing.assert_close(before, compiled, rtol=1e-12, atol=1e-12)  # in another form
    assert not torch.allclose(two[0]["own"][0], two[1]["own"][0])


@pytest.mark.parametrize("order", wrapped_parallel.ORDERS)
def test_ddp_around_a_parent_is_refused_or_right(order: str, two: list[Any]) -> None:
    """It has copied the first process's pools over the other's: no pass may go on with them."""
    for found in two:
        before, *refused = found[order, False]
        assert isinstance(before, Tensor) and refused
        assert all(isinstance(m, str) and "wrap the attached model" in m for m in refused)
        own, *wrapped = found[order, True]
        assert torch.equal(own, before) and all(torch.equal(own, y) for y in wrapped)


def test_ddp_without_anything_of_its_own_is_refused(two: list[Any]) -> None:
    """By torch itself, before anything happens: reduce_gradients() is all that is needed."""
    for found in two:
        assert "doesn't have any parameter that requires a gradient" in found["refusal"]


def test_the_head_was_trained() -> None:
    """What is compared above is no standstill."""
    before = wrapped_parallel.Net().get_submodule(HEAD)
    assert isinstance(before, nn.Linear)
    learnt = expected(True)["learnt"]["head weight"]
    assert float((learnt - before.weight).detach().abs().max()) > 0.01
