"""A pass keeps the rows that it began with, whatever happens meanwhile."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from integers import VALUES, Asked, Squares, X, answer, attached
from lora_mux.errors import DetachedError, RoutingError, UnknownAdapterError


def in_thread(act: Callable[[], Any]) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def between_layers(model: Squares, act: Callable[[], Any]) -> None:
    """In the next pass, act() runs when the first layer is done."""

    def once(*_: Any) -> None:
        hook.remove()
        act()

    hook = model.first.register_forward_hook(once)


@pytest.mark.parametrize("memory", [None, "64KiB"], ids=["all resident", "bounded"])
class TestInTheMiddle:
    """What happens between two layers counts from the next pass on."""

    @pytest.mark.parametrize("how", ["set_adapter", "remove", "replace", "block", "pass"])
    @pytest.mark.parametrize("rows", ["block", "sticky", "call"])
    def test_another_thread(self, how: str, rows: str, memory: str | None) -> None:
        model, mux = attached(memory=memory)
        who, given = Asked(model), ["a"] if rows == "call" else None
        pair = torch.ones(1, 1), torch.full((1, 1), 9.0)

        def block() -> None:
            with mux.route(["b"]), torch.no_grad():
                assert float(model(X)) == answer("b")

        acts: dict[str, Callable[[], Any]] = {
            "set_adapter": lambda: mux.set_adapter("b"),
            "remove": lambda: mux.remove("a"),
            "replace": lambda: mux._adapters.publish(
                {
                    "a": mux._adapters.prepare_weights(
                        {path: lora_mux.core.LoraWeights(*pair, 1.0) for path in mux.targets},
                        "test",
                    )
                },
                replace=True,
            ),
            "block": block,
            "pass": lambda: Asked(model)(rows=["c"]),
        }
        if rows == "sticky":
            mux.set_adapter("a")
        with mux.route(["a"]) if rows == "block" else mux.disable_adapter():
            if rows == "sticky":
                pass
            between_layers(model, lambda: in_thread(acts[how]))
            if rows != "sticky":
                assert who(rows=given) == "a"
        if rows == "sticky":
            assert who() == "a"
        mux.set_adapter(None)
        assert who() is None

    def test_a_removed_adapter_is_gone_after_the_pass(self, memory: str | None) -> None:
        """In layers that see other numbers of rows as well."""

        class Pooled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1)

            def forward(self, x: Tensor) -> Tensor:
                hidden = self.first(x)
                between()
                return self.second(hidden.mean(1))  # type: ignore[no-any-return]

        between: Callable[[], Any] = lambda: None  # noqa: E731
        model = Pooled()
        mux = lora_mux.attach(model, memory=memory)
        weights = {"first": (torch.ones(1, 2), torch.ones(2, 1)), "second": (torch.ones(1, 2),) * 2}
        weights["second"] = torch.ones(1, 2), torch.ones(1, 1)
        mux.add_adapter("a", weights, alpha=1)
        x = torch.randn(2, 3, 2)
        with torch.no_grad(), mux.route(["a", None]):
            want = model(x)
            between = lambda: in_thread(lambda: mux.remove("a"))  # noqa: E731
            assert torch.equal(model(x), want)
            between = lambda: None  # noqa: E731
            with pytest.raises(UnknownAdapterError):
                model(x)


class TestGenerate:
    def test_it_keeps_its_rows_when_its_block_ends(self) -> None:
        """A stream whose client has hung up, beside the next tenant's block."""
        model, mux = attached()
        who = Asked(model)
        between, go, got = threading.Event(), threading.Event(), []

        def pause() -> None:
            between.set()
            go.wait(20)

        def generate() -> None:
            with torch.no_grad():
                got.append(float(model.generate(X, pause)))

        with mux.route(["a"]):
            thread = threading.Thread(target=generate)
            thread.start()
            assert between.wait(20)
        with mux.route(["b"]):
            mux.set_adapter("c")
            assert who() == "b"
            go.set()
            thread.join(20)
        assert got == [answer("a")]
        assert who() == "c"

    def test_two_that_overlap_leave_nothing_behind(self) -> None:
        """Afterwards a batch that repeats its samples is refused again."""
        model, mux = attached()
        mux.set_adapter("a")
        pauses = [(threading.Event(), threading.Event()) for _ in range(2)]
        got: list[float] = []

        def generate(i: int) -> None:
            between, go = pauses[i]
            with torch.no_grad():
                got.append(float(model.generate(X, lambda: (between.set(), go.wait(20)))))

        threads = [threading.Thread(target=generate, args=(i,)) for i in range(2)]
        for thread, (between, _) in zip(threads, pauses, strict=True):
            thread.start()
            assert between.wait(20)
        mux.set_adapter("b")
        for thread, (_, go) in zip(threads, pauses, strict=True):
            go.set()
            thread.join(20)
        assert got == [answer("a")] * 2
        with mux.route(["a", "b"]), pytest.raises(RoutingError, match="per sample of the batch"):
            model(torch.ones(4, 1))


class TestInterrupted:
    """torch does not call the hooks at the end of a pass that a BaseException ends."""

    def test_in_a_thread_that_is_gone(self) -> None:
        model, mux = attached()
        who = Asked(model)

        def interrupt() -> None:
            raise KeyboardInterrupt

        def interrupted() -> None:
            with mux.route(["a"]), pytest.raises(KeyboardInterrupt):
                model(X)

        between_layers(model, interrupt)
        in_thread(interrupted)
        assert who() is None
        with mux.route(["b"]):
            assert who() == "b"
        mux.set_adapter("c")
        assert who() == "c"
        mux.detach()

    def test_in_this_thread(self) -> None:
        model, mux = attached()
        who = Asked(model)

        def interrupt() -> None:
            raise KeyboardInterrupt

        between_layers(model, interrupt)
        with pytest.raises(KeyboardInterrupt), mux.route(["a"]):
            model(X)
        assert who() is None
        mux.detach()

    @pytest.mark.parametrize("rows", ["block", "sticky"])
    def test_layers_that_are_called_by_themselves_afterwards(self, rows: str) -> None:
        model, mux = attached()

        def interrupt() -> None:
            raise KeyboardInterrupt

        between_layers(model, interrupt)
        mux.set_adapter("a")
        with (
            pytest.raises(KeyboardInterrupt),
            mux.route(["b"]) if rows == "block" else nullcontext(),
        ):
            model(X)
        if rows == "sticky":
            mux.set_adapter("c")
        with torch.no_grad():
            assert float(model.first(X)) == 1 + VALUES["a" if rows == "block" else "c"]


@pytest.mark.parametrize("rows", [[None, None], ["__base__"], [], [None] * 5], ids=str)
@pytest.mark.parametrize("samples", [3, 4])
def test_rows_of_the_base_model_are_counted_too(rows: list[Any], samples: int) -> None:
    model, mux = attached()
    with mux.route(rows), pytest.raises(RoutingError, match=f"per sample of the batch .{samples}"):
        model(torch.ones(samples, 1))
    with pytest.raises(RoutingError, match="per sample of the batch"):
        model(torch.ones(samples, 1), adapter_names=rows)


def test_a_block_of_a_mux_that_was_detached() -> None:
    model, mux = attached()
    old, block, disabled = mux.adapters["a"], mux.route(["a"]), mux.disable_adapter()
    mux.detach()
    again = lora_mux.attach(model)
    pair = torch.ones(1, 1), torch.ones(1, 1)
    again.add_adapter("b", {path: pair for path in again.targets}, alpha=1)
    for made_before in (block, disabled):
        with pytest.raises(DetachedError, match="attach"), made_before:
            pass
    with pytest.raises(UnknownAdapterError):  # its number never means another adapter
        again.route(torch.tensor([[old]]))
    assert Asked(model)() is None and set(VALUES) - set(again.adapters) == {"a", "c", "d"}
