"""Adapters that are trained: rows, states and ends, on each backend."""

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from interrupts import interrupted
from torch import Tensor, nn
from trained_layers import BACKENDS, Layers

import lora_mux
from lora_mux.errors import AdapterError, PoolCapacityError, TrainingError


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


@pytest.mark.parametrize("backend", BACKENDS)
class TestRows:
    def test_what_is_absent_keeps_none(self, backend: str) -> None:
        layers = Layers(backend=backend)
        a, b = layers.mux.train("a"), layers.mux.train("b")
        layers.run(["a", None, "c"], torch.randn(3, 24)).sum().backward()
        assert all(g is not None and g.abs().sum() > 0 for g in gradients(a))
        assert gradients(b) == [None] * 4

    def test_serving_rows_keep_every_bit(self, backend: str) -> None:
        layers, rows = Layers(backend=backend), ["a", None, "c", "b", ("b", "c")]
        x = torch.randn(5, 24)
        with torch.no_grad():
            want = layers.run(rows, x)
        layers.mux.train("a")
        y = layers.run(rows, x)
        assert y.requires_grad and torch.equal(y, want)

    def test_nan_of_a_neighbour(self, backend: str) -> None:
        """In its weights, in its rows of x, and in what comes back."""
        layers, rows = Layers(backend=backend), ["a", "b", "a", None, "b"]
        a, b = layers.mux.train("a"), layers.mux.train("b")
        x, upstream = torch.randn(5, 24), torch.randn(5, 20)
        layers.run(rows, x).backward(upstream)
        want = [g.clone() for g in gradients(a) if g is not None]
        bad = torch.tensor([1, 3, 4])
        for spoil in ("x", "upstream", "weights"):
            a.zero_grad(), b.zero_grad()
            x2, upstream2 = x.clone(), upstream.clone()
            if spoil == "x":
                x2[bad] = float("nan")
            if spoil != "weights":
                upstream2[bad] = float("nan")
            else:
                with torch.no_grad():
                    next(b.parameters())[0, 0] = float("inf")
            y = layers.run(rows, x2)
            y.backward(upstream2)
            assert y[[0, 2]].isfinite().all()
            for have, whole in zip(gradients(a), want, strict=True):
                assert have is not None
                torch.testing.assert_close(have, whole, rtol=1e-5, atol=1e-6)
        assert y[[1, 4]].isnan().all() and y[3].isfinite().all()

    def test_frozen_first_layer_and_no_gradient_of_x(self, backend: str) -> None:
        """x needs no gradient, and the parameters do all the same."""
        layers = Layers(backend=backend)
        a = layers.mux.train("a")
        x = torch.randn(2, 24)
        y = layers.run(["a", "a"], x)
        assert y.requires_grad
        y.sum().backward()
        assert all(g is not None for g in gradients(a))

    def test_several_in_a_row(self, backend: str) -> None:
        """With weights, a bias and others beside them, against a merged layer."""
        layers = Layers(torch.float64 if backend != "triton" else torch.float32, backend=backend)
        dtype = next(layers.model.parameters()).dtype
        a, b = layers.mux.train("a"), layers.mux.train("b")
        rows = [{"a": 0.5, "b": -2.0}, {"c": 3.0, "b": 1.5}, "a", None]
        x = torch.randn(4, 24, dtype=dtype, requires_grad=True)
        upstream = torch.randn(4, 20, dtype=dtype)
        layers.run(rows, x).backward(upstream)

        factors = {n: layers.mux.trained[n].weights for n in ("a", "b")}
        with torch.no_grad():
            layers.mux.train("c")
            factors["c"] = layers.mux.trained["c"].weights
        leaves = {
            (n, p, side): getattr(w, side).detach().clone().requires_grad_()
            for n, parts in factors.items()
            for p, w in parts.items()
            for side in "AB"
        }
        given = x.detach().clone().requires_grad_()
        out = []
        for m, entry in enumerate(rows):
            chosen = entry if isinstance(entry, dict) else {entry: 1.0} if entry else {}
            h = given[m]
            for path, layer in (("0", layers.model[0]), ("2", layers.model[2])):
                low = nn.functional.linear(h, layer.weight, layer.bias)
                for n, w in chosen.items():
                    A, B = leaves[n, path, "A"], leaves[n, path, "B"]
                    low = low + w * factors[n][path].scaling * (B.to(h) @ (A.to(h) @ h))
                h = torch.tanh(low) if path == "0" else low
            out.append(h)
        torch.stack(out).backward(upstream)
        tolerance = 1e-9 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(x.grad, given.grad, rtol=tolerance, atol=tolerance)
        for n, module in (("a", a), ("b", b)):
            wants = [leaves[n, p, side].grad for p in ("0", "2") for side in "AB"]
            for have, want in zip(gradients(module), wants, strict=True):
                torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)

    def test_others_come_and_go_before_backward(self, backend: str) -> None:
        layers = Layers(backend=backend)
        a, x = layers.mux.train("a"), torch.randn(3, 24)
        rows = ["a", None, "c"]
        layers.run(rows, x).sum().backward()
        want = [g.clone() for g in gradients(a) if g is not None]
        a.zero_grad()
        y = layers.run(rows, x)
        layers.mux.remove("b")
        for r in (9, 40):  # which lets the pools grow
            layers.mux.add_adapter(f"new{r}", layers.drawn(r), alpha=8)
        y.sum().backward()
        assert all(map(torch.equal, want, [g for g in gradients(a) if g is not None]))

    @pytest.mark.parametrize("fused", [False, True])
    def test_own_change_before_backward_is_refused(self, backend: str, fused: bool) -> None:
        layers = Layers(backend=backend)
        a, b = layers.mux.train("a"), layers.mux.train("b")
        optimizers = [torch.optim.SGD(t.parameters(), lr=0.1, fused=fused) for t in (a, b)]
        x = torch.randn(2, 24)
        layers.run(["a", "b"], x).sum().backward()
        y = layers.run(["a", "a"], x)
        optimizers[1].step()  # of another one
        layers.run(["b", "b"], x)
        y.sum().backward()
        y = layers.run(["a", "a"], x)
        optimizers[0].step()
        if fused:  # which torch does not see before the new values are in the pools
            layers.run(["b", "a"], x)
        with pytest.raises(TrainingError, match="run backward\\(\\) before the step"):
            y.sum().backward()


def test_a_bias_is_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10)).double().requires_grad_(False)
    options: Any = {"target_modules": ["0"], "lora_bias": True, "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=3, lora_alpha=6, **options)
        tuned: Any = peft.get_peft_model(copy.deepcopy(model), config)
        tuned.save_pretrained(tmp_path)
    mux = lora_mux.attach(model)
    mux.load("a", tmp_path)
    a, x = mux.train("a"), torch.randn(4, 12).double()
    with mux.route(["a", None, "a", "a"]):
        y = model(x)
    y.sum().backward()
    tuned(x[[0, 2, 3]]).sum().backward()
    want = {n.replace(".default", ""): p.grad for n, p in tuned.named_parameters()}
    assert len(list(a.parameters())) == 3
    for key, p in a.named_parameters():
        torch.testing.assert_close(p.grad, want[key], rtol=1e-9, atol=1e-9)


class TestState:
    """What becomes of an adapter while it is trained."""

    def test_publishing(self) -> None:
        """Each way of changing parameters is in force at the next pass; data needs publish()."""
        layers, x = Layers(), torch.randn(1, 24)
        a = layers.mux.train("a")
        one = next(a.parameters())

        def answer() -> Tensor:
            with torch.no_grad():
                return layers.run(["a"], x)

        seen = [answer()]
        with torch.no_grad():
            one.mul_(2.0)
        seen.append(answer())
        one.data.mul_(2.0)
        assert torch.equal(answer(), seen[-1])
        layers.mux.publish("a")
        seen.append(answer())
        a.load_state_dict({k: v * 3 for k, v in a.state_dict().items()})
        seen.append(answer())
        for i, y in enumerate(seen):
            assert not any(torch.allclose(y, other) for other in seen[:i])
        layers.mux.freeze("a")
        assert torch.equal(answer(), seen[-1])

    @pytest.mark.parametrize("memory", [None, "20KiB"])
    def test_freezing(self, memory: Any) -> None:
        """What was learnt stays, also through an eviction."""
        layers, x = Layers(memory=memory), torch.randn(2, 24)
        a = layers.mux.train("a")
        assert layers.mux.train("a") is a and list(layers.mux.trained) == ["a"]
        with torch.no_grad():
            for p in a.parameters():
                p.add_(0.5)
            want = layers.run(["a", None], x)
        layers.mux.freeze("a")
        assert not layers.mux.trained
        with pytest.raises(TrainingError, match="train\\('a'\\)"):
            layers.mux.freeze("a")
        with torch.no_grad():
            for p in a.parameters():
                p.zero_()
            assert torch.equal(layers.run(["a", None], x), want)
            if memory is not None:
                for i in range(20):  # until it has made room for others
                    layers.mux.add_adapter(f"new{i}", layers.drawn(37), alpha=8)
                    layers.mux.prefetch([f"new{i}"])
                assert not layers.mux.memory().adapters["a"].resident
            torch.testing.assert_close(layers.run(["a", None], x), want)

    def test_what_is_trained_stays_resident(self) -> None:
        """Also where nothing else can make room: the pools hold 39 rank rows."""
        layers = Layers(memory="20KiB")
        for name in ("large", "other"):
            layers.mux.add_adapter(name, layers.drawn(25), alpha=8)
        layers.mux.train("large")
        layers.mux.unpin("large")
        with pytest.raises(PoolCapacityError):
            layers.mux.prefetch(["other"])
        assert layers.mux.memory().adapters["large"].resident
        layers.mux.freeze("large")
        layers.mux.prefetch(["other"])

    @pytest.mark.parametrize("way", ["remove", "replace", "detach"])
    def test_ends(self, way: str, tmp_path: Path) -> None:
        layers, x = Layers(), torch.randn(2, 24)
        a = layers.mux.train("a")
        optimizer = torch.optim.SGD(a.parameters(), lr=0.1)
        layers.mux.save("b", tmp_path)
        layers.run(["a", "a"], x).sum().backward()
        if way == "remove":
            layers.mux.remove("a")
        elif way == "replace":
            layers.mux.load("a", tmp_path, replace=True)
            want = layers.run(["a", "b"], x[:1].expand(2, -1))
            torch.testing.assert_close(want[0], want[1])
        else:
            layers.mux.detach()
            optimizer.step()
            assert not layers.mux.trained
            return
        assert not layers.mux.trained
        layers.mux.add_adapter("d", layers.drawn(4), alpha=8)  # in the slot that may be free
        before = layers.run(["d", "b"], x)
        optimizer.step()  # of parameters that are nobody's
        assert torch.equal(layers.run(["d", "b"], x), before)

    def test_a_used_slot_starts_without_gradients(self) -> None:
        layers = Layers()
        layers.mux.train("a")
        layers.mux.remove("a")
        layers.mux.add_adapter("d", layers.drawn(4), alpha=8)
        y = layers.run(["d"], torch.randn(1, 24))
        assert not y.requires_grad

    def test_copies_train_nothing(self) -> None:
        layers, x = Layers(), torch.randn(2, 24)
        a = layers.mux.train("a")
        with torch.no_grad():
            next(a.parameters()).mul_(3.0)
        twin = copy.deepcopy(layers.model)
        mux = lora_mux.Mux.of(twin)
        assert not mux.trained
        with mux.route(["a", "c"]):
            y = twin(x)
        assert not y.requires_grad
        assert torch.equal(y, layers.run(["a", "c"], x))
        mux.train("a")
        with mux.route(["a", "c"]):
            assert twin(x).requires_grad

    def test_casts_leave_the_parameters(self) -> None:
        layers = Layers()
        a = layers.mux.train("a")
        a.half().to(torch.bfloat16)
        layers.model.to(torch.bfloat16)
        assert all(p.dtype == torch.float32 for p in a.parameters())
        layers.run(["a"], torch.randn(1, 24, dtype=torch.bfloat16)).sum().backward()
        assert all(g is not None and g.dtype == torch.float32 for g in gradients(a))

    def test_nothing_is_part_of_the_model(self) -> None:
        layers = Layers()
        keys, parameters = list(layers.model.state_dict()), list(layers.model.parameters())
        layers.mux.train("a")
        assert list(layers.model.state_dict()) == keys
        assert len(list(layers.model.parameters())) == len(parameters)

    def test_no_trace_in_memory(self) -> None:
        layers = Layers()
        ref = weakref.ref(layers.mux.train("a"))
        layers.mux.freeze("a")
        gc.collect()
        assert ref() is None

    def test_passes_of_other_threads_have_one_state(self) -> None:
        """A step waits for a pass that is in progress: its layers have all the old values."""
        layers, x = Layers(), torch.randn(1, 24)
        a = layers.mux.train("a")
        with torch.no_grad():
            want = layers.run(["a"], x)
        inside, go = threading.Event(), threading.Event()
        found: list[Tensor] = []

        def pause(*_: Any) -> None:
            if threading.current_thread() is serving:
                inside.set()
                go.wait(20)

        def serve() -> None:
            with torch.no_grad():
                found.append(layers.run(["a"], x))

        serving = threading.Thread(target=serve)
        layers.model[1].register_forward_hook(pause)
        serving.start()
        assert inside.wait(20)
        with torch.no_grad():
            for p in a.parameters():
                p.mul_(3.0)
        timer = threading.Timer(0.2, go.set)
        timer.start()
        with torch.no_grad():
            changed = layers.run(["a"], x)
        serving.join(20)
        assert torch.equal(found[0], want) and not torch.allclose(changed, want)


ACTS: dict[str, Callable[[Any], object]] = {
    "train": lambda mux: mux.train("b", dropout=0.5),
    "freeze": lambda mux: mux.freeze("a"),
    "publish": lambda mux: mux.publish("a"),
    "remove": lambda mux: mux.remove("a"),
}


@pytest.mark.parametrize("memory", [None, "20KiB"])
@pytest.mark.parametrize("act", ACTS)
def test_an_interrupt_at_any_line(act: str, memory: Any) -> None:
    """Afterwards an adapter is trained, or it is not; nothing of what was learnt is lost."""
    line, going = 0, True
    while going:
        layers, x = Layers(memory=memory), torch.randn(2, 24)
        mux = layers.mux
        a = mux.train("a")
        with torch.no_grad():
            for p in a.parameters():
                p.mul_(2.0)
        going = interrupted(lambda mux=mux: ACTS[act](mux), line)
        if act == "remove" and "a" not in mux.adapters:
            assert not mux.trained
            y = layers.run(["b", "b"], x)
            assert not y.requires_grad
        else:
            with torch.no_grad():
                want = [layer.weight + 0 for layer in (layers.model[0], layers.model[2])]
                for path, w in a.weights.items():
                    want[path == "2"] += w.scaling * w.B @ w.A
                h = torch.tanh(nn.functional.linear(x, want[0], layers.model[0].bias))
                torch.testing.assert_close(layers.run(["a", "a"], x), h @ want[1].T)
            for name in ("a", "b"):
                y = layers.run([name, None], x)
                assert y.requires_grad == (name in mux.trained), name
                module = mux.train(name, dropout=0.5)
                layers.run([name, None], x).sum().backward()
                assert all(g is not None for g in gradients(module))
        line += 1 if act == "train" and memory is None else 7  # all of all take a minute


def distance(have: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the norm of each tensor."""
    assert list(have) == list(want)
    return max(float((have[k] - w).norm() / w.norm()) for k, w in want.items())


class TestBeginning:
    def test_a_16_bit_pool_does_not_round_the_start(self, tmp_path: Path) -> None:
        layers = Layers()
        layers.mux.save("a", tmp_path)
        other = Layers(torch.bfloat16)
        other.mux.load("exact", tmp_path)
        exact = other.mux.train("exact").state_dict()
        assert distance(exact, layers.mux.train("a").state_dict()) == 0.0
        with pytest.raises(TrainingError, match="weights={path"):
            other.mux.train("a")  # added from fp32 tensors that nobody has any more
        given = {p: (w.A, w.B) for p, w in layers.mux.trained["a"].weights.items()}
        trained = other.mux.train("a", weights=given)
        assert distance(trained.state_dict(), exact) == 0.0

    def test_creating(self, tmp_path: Path) -> None:
        layers, x = Layers(), torch.randn(2, 24)
        base_answer = layers.run([None, None], x)
        layers.mux.create("new", r=5, alpha=10, targets=["2"], seed=1)
        assert torch.equal(layers.run(["new", None], x), base_answer)
        new = layers.mux.train("new")
        assert [tuple(p.shape) for p in new.parameters()] == [(5, 32), (20, 5)]
        optimizer = torch.optim.AdamW(new.parameters(), lr=0.1)
        layers.run(["new", "a"], x).sum().backward()
        optimizer.step()
        layers.mux.save("new", tmp_path)
        again = Layers()
        again.mux.load("new", tmp_path)
        assert torch.equal(again.run(["new", "a"], x), layers.run(["new", "a"], x))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dropout": 1.0}, "`dropout` must be from 0 to below 1"),
            ({"dropout": -0.1}, "`dropout` must be from 0 to below 1"),
            ({"weights": {"0": (torch.ones(4, 24), torch.ones(32, 4))}}, "the targets of 'a'"),
            (
                {
                    "weights": {
                        "0": (torch.ones(2, 24), torch.ones(32, 2)),
                        "2": (torch.ones(4, 32), torch.ones(20, 4)),
                    }
                },
                "must have rank 4",
            ),
        ],
    )
    def test_refusals(self, options: Any, message: str) -> None:
        layers = Layers()
        with pytest.raises(AdapterError, match=message):
            layers.mux.train("a", **options)
        assert not layers.mux.trained


class TestDropout:
    def test_is_pefts(self) -> None:
        """Rates and expectation, row by row; none in eval() of the model or of the adapter."""
        layers = Layers()
        layers.model.train()
        a = layers.mux.train("a", dropout=0.25)
        x = torch.ones(4000, 24)
        seen: list[Tensor] = []
        rows = ["a", "c"] * 2000
        with torch.no_grad():
            whole = layers.mux.trained["a"].eval() and layers.run(rows, x)
            a.train()
            y = layers.run(rows, x)
            layers.model.eval()
            assert torch.equal(layers.run(rows, x), whole)
        assert torch.equal(y[1::2], whole[1::2])  # of others, every bit
        differs = (y[::2] != whole[::2]).any(1).float().mean()
        assert differs > 0.99
        dropped = lora_mux.ops.dropped(x, torch.full((4000, 1), 0.25))
        assert abs(float((dropped == 0).float().mean()) - 0.25) < 0.01
        assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
        del seen

    def test_repeats_by_seed_and_has_the_gradients_of_its_mask(self) -> None:
        layers = Layers(torch.float64)
        layers.model.train()
        a = layers.mux.train("a", dropout=0.5)
        x = torch.randn(6, 24, dtype=torch.float64)
        found = []
        for _ in range(2):
            torch.manual_seed(7)
            a.zero_grad()
            y = layers.run(["a"] * 6, x)
            y.square().sum().backward()
            found.append([y.detach(), *(g.clone() for g in gradients(a) if g is not None)])
        assert all(map(torch.equal, *found))
        p = next(a.parameters())
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                torch.manual_seed(7)
                p[0, 0] += sign * 1e-6
                ends.append(layers.run(["a"] * 6, x).square().sum())
                p[0, 0] -= sign * 1e-6
        assert abs(float(ends[0] - ends[1]) / 2e-6 - float(found[0][1][0, 0])) < 1e-6

    def test_unequal_rates_in_a_row_are_refused(self) -> None:
        layers = Layers()
        layers.model.train()
        a, x = layers.mux.train("a", dropout=0.5), torch.randn(2, 24)
        rows = ["a", ("a", "c")]
        with pytest.raises(lora_mux.errors.RoutingError, match="one dropout in each row"):
            layers.run(rows, x)
        layers.model.eval()  # in which nothing is dropped
        whole = layers.run(rows, x)
        a.eval()
        layers.model.train()
        assert torch.equal(layers.run(rows, x), whole)
        a.train()
        compiled = torch.compile(layers.model, backend="aot_eager")
        with layers.mux.route(rows):
            assert compiled(x).isnan().all(1).tolist() == [False, True]


class TestMeans:
    def test_an_update_is_as_alone(self) -> None:
        losses = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, float("nan")], [7.0, 8.0]])
        losses.requires_grad_()
        routing = lora_mux.Routing(torch.tensor([[5, -1], [-1, 5], [9, -1], [-1, -1]]))
        mask = torch.tensor([[True, True], [True, False], [True, False], [True, True]])
        mean = lora_mux.mean_by_adapter(losses, routing, mask=mask)
        assert float(mean.detach()) == 2.0 + 5.0
        mean.backward()
        third = 1 / 3
        want = torch.tensor([[third, third], [third, 0], [1.0, 0], [0, 0]])
        torch.testing.assert_close(losses.grad, want)

    def test_an_adapter_that_a_row_names_twice(self) -> None:
        """Its set is that of rows which name it once."""
        routing = lora_mux.Routing(torch.tensor([[0, 0], [0, -1], [-1, 0], [1, 0]]))
        losses = torch.tensor([1.0, 3.0, 5.0, 7.0])
        assert lora_mux.mean_by_adapter(losses, routing).item() == 3.0 + 7.0

    def test_a_wrong_number_of_rows(self) -> None:
        routing = lora_mux.Routing(torch.tensor([[0], [1]]))
        with pytest.raises(lora_mux.errors.RoutingError, match="\\[2, ...\\]"):
            lora_mux.mean_by_adapter(torch.zeros(3), routing)


def test_a_routing_that_was_handed_in() -> None:
    """Nobody keeps its adapters: a removal before backward is refused, and one of others is not."""
    layer = lora_mux.MuxLinear(nn.Linear(8, 6).requires_grad_(False), backend="reference")
    layers = Layers()
    layers.mux.train("a")
    handles = layers.mux.adapters
    first = layers.model[0]
    index = torch.tensor([[handles["a"]], [handles["c"]]])
    for removed, refused in (("b", False), ("c", True)):
        y = first(torch.randn(2, 24), lora_mux.Routing(index))
        layers.mux.remove(removed)
        if refused:
            with pytest.raises(TrainingError, match="stay until backward"):
                y.sum().backward()
        else:
            y.sum().backward()
    del layer
