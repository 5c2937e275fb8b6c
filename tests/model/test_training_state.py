"""The state of adapters that are trained: restored, copied, cast, ended, and kept from others."""

import copy
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_mux
from lora_mux.errors import RoutingError, TrainingError

SIZES = {"0": (24, 32), "2": (32, 20)}
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def drawn(r: int, seed: int = 0) -> Mapping[str, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(100 * seed + r)
    draw = lambda *shape: torch.randn(shape, generator=g) / 4  # noqa: E731
    return {path: (draw(r, K), draw(N, r)) for path, (K, N) in SIZES.items()}


def attached(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, lora_mux.Mux]:
    """Two small layers and three adapters."""
    torch.manual_seed(3)
    layers = nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 20, bias=False)
    model = nn.Sequential(*layers).to(dtype).requires_grad_(False).train()
    mux = lora_mux.attach(model, **options)
    for name, r in (("a", 4), ("b", 7), ("c", 3)):
        mux.add_adapter(name, drawn(r), alpha=8)
    return model, mux


def run(model: Any, mux: lora_mux.Mux, rows: Any, x: Tensor) -> Tensor:
    with mux.route(rows):
        y: Tensor = model(x)
    return y


def change(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2.0).add_(0.01)


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


class TestRestoring:
    OPTIMIZERS: dict[str, Make] = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
        "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True, amsgrad=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    }

    @staticmethod
    def steps(model: Any, mux: lora_mux.Mux, name: str, optimizer: Any, numbers: range) -> None:
        """Of two tenants at once; the other one's rows are served."""
        dtype = next(model.parameters()).dtype
        for number in numbers:
            g = torch.Generator().manual_seed(number)
            x = torch.randn(5, 24, generator=g).to(dtype)
            torch.manual_seed(number)  # of what is dropped
            optimizer.zero_grad()
            y = run(model, mux, [name, "c", name, None, name], x)
            y.float().square().sum().backward()
            optimizer.step()

    @pytest.mark.parametrize("memory", [None, "60KiB"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", OPTIMIZERS)
    def test_in_another_slot_under_another_name(
        self, kind: str, dtype: torch.dtype, memory: Any, tmp_path: Path
    ) -> None:
        """After a restart, bit for bit as if there had been none; also what is dropped goes on."""
        make = self.OPTIMIZERS[kind]
        model, mux = attached(dtype, memory=memory)
        mux.create("tenant", r=5, alpha=10, dropout=0.25, seed=1)
        tenant = mux.train("tenant")
        optimizer = make(tenant.parameters())
        self.steps(model, mux, "tenant", optimizer, range(4))
        mux.save("tenant", tmp_path / "tenant")
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        self.steps(model, mux, "tenant", optimizer, range(4, 8))

        model, mux = attached(dtype, memory=memory)
        for i in range(3):  # other slots, and other rank rows
            mux.add_adapter(f"before{i}", drawn(1 + i), alpha=8)
        mux.remove("a")
        mux.load("again", tmp_path / "tenant")
        again = mux.train("again", dropout=0.25)
        restored = make(again.parameters())
        restored.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
        self.steps(model, mux, "again", restored, range(4, 8))
        assert list(again.state_dict()) == list(tenant.state_dict())
        assert equal(again, tenant)

    def test_without_the_optimizers_state_it_differs(self, tmp_path: Path) -> None:
        """What is compared above does depend on it."""
        found = []
        for restored in (True, False):
            model, mux = attached()
            a = mux.train("a")
            optimizer = torch.optim.AdamW(a.parameters(), lr=0.01)
            self.steps(model, mux, "a", optimizer, range(2))
            if not restored:
                optimizer = torch.optim.AdamW(a.parameters(), lr=0.01)
            self.steps(model, mux, "a", optimizer, range(2, 4))
            found.append(a)
        assert not equal(*found)

    def test_a_used_slot_starts_without_moments(self) -> None:
        """A tenant in the slot of one that left learns as the slot's first tenant would."""
        found = []
        for before in (True, False):
            model, mux = attached()
            if before:
                a = mux.train("a")
                optimizer = torch.optim.AdamW(a.parameters(), lr=0.01)
                self.steps(model, mux, "a", optimizer, range(3))
            mux.remove("a")
            mux.add_adapter("new", drawn(4, 9), alpha=8)
            new = mux.train("new")
            own = torch.optim.AdamW(new.parameters(), lr=0.01)
            self.steps(model, mux, "new", own, range(3))
            found.append(new)
        assert equal(*found)

    def test_a_step_of_one_that_left_is_nobodys(self) -> None:
        """Nor does its module's mode decide what the slot's next tenant drops."""
        model, mux = attached()
        x = torch.randn(64, 24)
        a = mux.train("a")
        mux.remove("a")
        mux.create("next", r=4, alpha=8, dropout=0.5, seed=1)
        following = mux.train("next")
        change(following)
        a.eval()
        with torch.no_grad():
            first, second = (run(model, mux, ["next"] * 64, x) for _ in range(2))
            assert not torch.equal(first, second)
            following.eval()
            a.train()
            first, second = (run(model, mux, ["next"] * 64, x) for _ in range(2))
        assert torch.equal(first, second)

    def test_values_are_copied_and_never_put_in_place(self) -> None:
        _, mux = attached()
        a = mux.train("a")
        with pytest.raises(TrainingError, match="`assign` must be False"):
            a.load_state_dict(a.state_dict(), assign=True)
        assert a.load_state_dict(a.state_dict()).missing_keys == []


class Waits(TorchDispatchMode):
    """Counts what would let the host wait for a GPU."""

    OPERATORS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in self.OPERATORS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def step_without_waiting(
    modules: Mapping[str, nn.Module], optimizers: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The recipe of docs/training.md: clip each by itself, and skip what is not finite."""
    norms = {}
    for name, optimizer in optimizers.items():
        norm = torch.nn.utils.clip_grad_norm_(modules[name].parameters(), 0.5)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        norms[name] = norm
    return norms


class TestWithoutWaiting:
    FUSED: dict[str, Make] = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    }

    @pytest.mark.parametrize("kind", FUSED)
    def test_one_that_is_not_finite_misses_its_step_alone(self, kind: str) -> None:
        """Parameters, moments and the number of steps too; others step as without it."""
        found = []
        for spoiled in (False, True):
            model, mux = attached()
            modules = {name: mux.train(name) for name in "ab"}
            optimizers = {n: self.FUSED[kind](m.parameters()) for n, m in modules.items()}
            for number in range(4):
                x = torch.randn(4, 24, generator=torch.Generator().manual_seed(number))
                rows = ["a", "b", "c", "a"]
                if number == 2:
                    before = copy.deepcopy(
                        (modules["b"].state_dict(), optimizers["b"].state_dict())
                    )
                    x[1] = float("nan") if spoiled else x[1]
                for optimizer in optimizers.values():
                    optimizer.zero_grad()
                run(model, mux, rows, x).square().sum(1)[[0, 1, 3]].sum().backward()
                with Waits() as waits:
                    norms = step_without_waiting(modules, optimizers)
                assert waits.seen == []
                if number == 2 and spoiled:
                    assert norms["a"].isfinite() and not norms["b"].isfinite()
                    now = modules["b"].state_dict(), optimizers["b"].state_dict()
                    assert all(torch.equal(now[0][k], v) for k, v in before[0].items())
                    for i, state in before[1]["state"].items():
                        for key, value in state.items():
                            assert torch.equal(now[1]["state"][i][key], value), key
            found.append(modules)
        assert equal(found[0]["a"], found[1]["a"]) and not equal(found[0]["b"], found[1]["b"])
        assert all(p.isfinite().all() for p in found[1]["b"].parameters())

    def test_the_counter_counts(self) -> None:
        with Waits() as waits:
            bool(torch.ones(1).isfinite().all())
        assert waits.seen


class TestCopies:
    @pytest.mark.parametrize("memory", [None, "60KiB"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_the_model_go_on_with_what_was_learnt(
        self, dtype: torch.dtype, memory: Any, tmp_path: Path
    ) -> None:
        """When they train, save, or bring it back; a pool holds it rounded, or not at all."""
        model, mux = attached(dtype, memory=memory)
        mux.create("new", r=4, alpha=8, seed=1)
        new, x = mux.train("new"), torch.randn(1, 24).to(dtype)
        change(new)
        want = run(model, mux, ["new"], x).detach()
        twin = copy.deepcopy(model)
        its = lora_mux.Mux.of(twin)
        its.save("new", tmp_path)
        if memory is not None:
            for i in range(20):
                its.add_adapter(f"other{i}", drawn(30, i), alpha=8)
                its.prefetch([f"other{i}"])
        assert torch.equal(run(twin, its, ["new"], x), want)
        assert equal(its.train("new"), new)
        mux.load("saved", tmp_path)
        assert equal(mux.train("saved"), new)

    @pytest.mark.parametrize("memory", [None, "60KiB"])
    def test_of_a_model_whose_adapter_diverged(self, memory: Any) -> None:
        """They go on with what is finite: what it had before."""
        model, mux = attached(memory=memory)
        mux.create("new", r=4, alpha=8, seed=1)
        new = mux.train("new")
        want = {key: p.clone() for key, p in new.state_dict().items()}
        with torch.no_grad():
            next(new.parameters())[0, 0] = float("nan")
        run(model, mux, ["new"], torch.randn(1, 24))
        again = lora_mux.Mux.of(copy.deepcopy(model)).train("new")
        if memory is not None:  # else the pool alone has it, where it is 0
            assert all(torch.equal(p, want[key]) for key, p in again.state_dict().items())
        assert all(p.isfinite().all() for p in again.parameters())

    def test_modules_and_optimizers_can_be_copied(self, tmp_path: Path) -> None:
        """As averages over steps do, torch.save, and worker processes; a copy trains nobody."""
        model, mux = attached()
        a = mux.train("a", dropout=0.5)
        optimizer = torch.optim.AdamW(a.parameters())
        average = torch.optim.swa_utils.AveragedModel(a)
        twins = [copy.deepcopy(a), pickle.loads(pickle.dumps(a)), average.module]
        pickle.loads(pickle.dumps(optimizer)), pickle.loads(pickle.dumps(list(a.parameters())))
        numbers = sum(p.numel() for p in a.parameters())
        assert len(pickle.dumps(a)) < 4 * numbers + 8000  # and not the model, which has 6,000
        x = torch.randn(64, 24)
        with torch.no_grad():
            a.eval()
            want = run(model, mux, ["a"] * 64, x)
            for twin in twins:
                assert equal(twin, a)
                twin.train()  # which drops nothing of the one that is trained
                change(twin)
                assert torch.equal(run(model, mux, ["a"] * 64, x), want)
        average.update_parameters(a)


class TestCasts:
    def test_of_the_model_round_nothing_that_is_trained(self) -> None:
        model, mux = attached()
        a, x = mux.train("a"), torch.randn(2, 24)
        base = copy.deepcopy(model.state_dict())
        want = run(model, mux, ["a", "a"], x).detach()
        model.half().float().load_state_dict(base)
        assert torch.equal(run(model, mux, ["a", "a"], x), want)
        with torch.no_grad():
            a.mux_masters["2"].B.mul_(1e6)
        model.half()
        y = run(model, mux, ["a", "b"], x.half())
        assert y[0].isnan().all() and y[1].isfinite().all()
        assert run(model.float(), mux, ["a", "a"], x).isfinite().all()

    @pytest.mark.parametrize("back", [False, True])
    def test_what_a_cast_has_rounded_is_nobodys_beginning(self, back: bool, tmp_path: Path) -> None:
        model, mux = attached()
        mux.save("a", tmp_path)
        model.to(torch.bfloat16)
        if back:
            model.float()
        for act in (lambda: mux.train("a"), lambda: mux.save("a", tmp_path / "again")):
            with pytest.raises(TrainingError, match="exact values are known"):
                act()
        given = {path: pair for path, pair in drawn(4).items()}
        exact = mux.train("a", weights=given).state_dict()
        mux.load("b", tmp_path, replace=True)  # the other way out
        again = mux.train("b").state_dict()
        assert all(torch.equal(again[key], value) for key, value in exact.items())
        mux.freeze("b")
        model.half()
        assert all(torch.equal(v, exact[k]) for k, v in mux.train("b").state_dict().items())

    def test_wider_is_exact(self) -> None:
        model, mux = attached()
        model.double()
        assert mux.train("a").state_dict()


class TestBeginning:
    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
    def test_inside_a_mode_without_gradients(self, mode: Any) -> None:
        """As in a server that begins a training while it serves."""
        model, mux = attached()
        with mode():
            mux.create("new", r=2, alpha=2, seed=1)
            new = mux.train("new")
            run(model, mux, ["new"], torch.randn(1, 24))
        run(model, mux, ["new", "a"], torch.randn(2, 24)).sum().backward()
        torch.optim.AdamW(new.parameters()).step()
        run(model, mux, ["new", "a"], torch.randn(2, 24)).sum().backward()

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_again_before_an_earlier_backward(self, backend: Any) -> None:
        """What that reads of the pool is another training's now."""
        model, mux = attached(backend=backend)
        mux.train("a")
        y = run(model, mux, ["a", "b"], torch.randn(2, 24))
        mux.freeze("a")
        change(mux.train("a"))
        run(model, mux, ["b", "a"], torch.randn(2, 24))
        with pytest.raises(TrainingError, match="those of the forward pass"):
            y.sum().backward()

    def test_again_while_it_is_trained(self) -> None:
        """Another dropout is in force, and other weights are refused."""
        model, mux = attached()
        a, x = mux.train("a"), torch.randn(64, 24)
        with torch.no_grad():
            whole = run(model, mux, ["a"] * 64, x)
            assert mux.train("a", dropout=0.5) is a
            dropped = run(model, mux, ["a"] * 64, x)
            assert mux.train("a") is a
            assert not torch.equal(run(model, mux, ["a"] * 64, x), dropped)
            mux.train("a", dropout=0.0)
            assert torch.equal(run(model, mux, ["a"] * 64, x), whole)
        assert not torch.equal(whole, dropped)
        with pytest.raises(TrainingError, match="`weights` must be None for 'a'"):
            mux.train("a", weights=drawn(4))


class TestEnd:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
    @pytest.mark.parametrize("memory", [None, "20KiB"])
    def test_of_one_that_diverged(self, memory: Any, value: float) -> None:
        """Its values must not come into a pool again, where they would reach others' rows."""
        model, mux = attached(torch.float16, memory=memory)
        mux.create("new", r=4, alpha=8, seed=1)
        new, x = mux.train("new"), torch.randn(2, 24).half()
        before = {key: p.clone() for key, p in new.state_dict().items()}
        with torch.no_grad():
            next(new.parameters())[0, 0] = value
        with pytest.raises(TrainingError, match=r"finite in the model's torch.float16, .* at '0'"):
            mux.freeze("new")
        y = run(model, mux, ["new", "b"], x)
        assert y[0].isnan().all() and y[1].isfinite().all() and "new" in mux.trained
        new.load_state_dict(before)
        mux.freeze("new")
        assert run(model, mux, ["new", "b"], x).isfinite().all()


class TestMasks:
    @pytest.mark.parametrize(
        "mask",
        [torch.ones(2, 3, dtype=torch.long), torch.ones(2, dtype=torch.bool), torch.ones(2, 3)],
    )
    def test_of_another_shape_or_dtype(self, mask: Tensor) -> None:
        """One of [rows] would be taken for one of tokens."""
        routing = lora_mux.Routing(torch.tensor([[0], [1]]))
        with pytest.raises(RoutingError, match=r"`mask` must be bool .* \[2, 3\], got"):
            lora_mux.mean_by_adapter(torch.ones(2, 3), routing, mask=mask)
