"""Adapters that are trained with what others build around a loop: checkpointing to compilers."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.utils import counters

import data_parallel
import lora_mux
from peft_oracle import llama
from two_processes import answers_of_two, data

ROWS: list[Any] = ["t0", None, "t1", ("t0", "t1"), "t0"]  # t2 has none
OLD = torch.__version__.startswith("2.6.")
whole_llama = pytest.mark.skipif(OLD, reason="torch 2.6 does not trace transformers' own wrapper")


def ids() -> Tensor:
    return torch.randint(2, 250, (5, 9), generator=torch.Generator().manual_seed(1))


def drawn(module: nn.Module) -> nn.Module:
    """An adapter that changes something from the beginning."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.02)
    return module


class Tenants:
    """A small Llama in train(), and three adapters that are trained."""

    def __init__(self, dropout: float = 0.0, layers: int = 2) -> None:
        torch.manual_seed(0)
        self.model = llama().requires_grad_(False).train()
        del self.model.model.layers[layers:]
        self.mux = lora_mux.attach(self.model)
        for i in range(3):
            self.mux.create(f"t{i}", r=3 + i, alpha=8, dropout=dropout, seed=i)
        self.trained = {n: drawn(self.mux.train(n)) for n in ("t0", "t1", "t2")}

    def loss(self, rows: Any = ROWS, model: Any = None) -> Tensor:
        x, run = ids(), self.model if model is None else model
        with self.mux.route(rows):
            loss: Tensor = run(input_ids=x, labels=x, use_cache=False).loss
        return loss

    def parameters(self) -> list[nn.Parameter]:
        return [p for t in self.trained.values() for p in t.parameters()]

    def gradients(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.parameters()]


def error(have: list[Tensor | None], want: list[Tensor | None]) -> float:
    """The largest difference in units of each gradient's largest value."""
    assert [g is None for g in have] == [g is None for g in want]
    pairs = [(a, b) for a, b in zip(have, want, strict=True) if a is not None and b is not None]
    assert pairs
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.fixture(scope="module")
def plain() -> list[Tensor | None]:
    """The gradients of ROWS in the plainest loop."""
    tenants = Tenants()
    tenants.loss().backward()
    found = tenants.gradients()
    assert [g is None for g in found].count(True) == 28
    return found


class TestCheckpointing:
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
    def test_of_transformers(self, reentrant: bool, dropout: float) -> None:
        """Layers run a second time, after the block has ended, and drop the same."""
        found = []
        for checkpointing in (False, True):
            tenants, runs = Tenants(dropout), [0]
            if checkpointing:
                tenants.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            layer = tenants.model.model.layers[0].self_attn
            layer.register_forward_hook(lambda *_, runs=runs: runs.__setitem__(0, runs[0] + 1))
            torch.manual_seed(7)
            loss = tenants.loss()
            with tenants.mux.route([None] * 5):  # of somebody else
                loss.backward()
            assert runs[0] == (2 if checkpointing else 1)
            found.append(tenants.gradients())
        assert error(found[1], found[0]) == 0.0

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_of_torch(self, reentrant: bool) -> None:
        """A reentrant one asks for an input that needs gradients: torch warns without."""
        from torch.utils.checkpoint import checkpoint

        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).requires_grad_(False)
        mux = lora_mux.attach(model)
        mux.create("a", r=2, alpha=4, seed=0)
        a = drawn(mux.train("a"))
        x, found = torch.randn(3, 6), []
        for checkpointing in (False, True):
            a.zero_grad()
            given = x.clone().requires_grad_(reentrant)
            with mux.route(["a", None, "a"]):
                y = model(given) if not checkpointing else run(model, checkpoint, given, reentrant)
            y.square().sum().backward()
            found.append([p.grad.clone() for p in a.parameters() if p.grad is not None])
        assert len(found[0]) == 4 and all(map(torch.equal, *found))


def run(model: nn.Module, checkpoint: Any, x: Tensor, reentrant: bool) -> Tensor:
    """The model's top, with its first layers in a checkpoint."""
    whole = model.forward

    def forward(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(whole, x, use_reentrant=reentrant)
        return y

    model.forward = forward  # type: ignore[method-assign]
    try:
        y: Tensor = model(x)
    finally:
        del model.forward
    return y


class TestPrecision:
    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
    def test_autocast_is_as_far_off_as_pefts(self) -> None:
        """From fp32: what is left are the roundings of bf16 in the base."""
        config = peft.LoraConfig(r=3, lora_alpha=8, target_modules="all-linear")
        torch.manual_seed(0)
        tuned: Any = peft.get_peft_model(llama(), config).train()
        tenants, x = Tenants(), ids()
        own = {k.replace(".weight", ".default.weight"): v for k, v in state(tenants, "t0").items()}
        assert not tuned.load_state_dict(own, strict=False).unexpected_keys

        def gradients(autocast: bool) -> list[list[Tensor | None]]:
            found = []
            theirs = {k: p for k, p in tuned.named_parameters() if p.requires_grad}
            for name, loss in (
                ("ours", lambda: tenants.loss(["t0"] * 5)),
                ("theirs", lambda: tuned(input_ids=x, labels=x).loss),
            ):
                parameters = [theirs[k] for k in own] if name == "theirs" else tenants.parameters()
                for p in parameters:
                    p.grad = None
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    value = loss()
                value.backward()
                found.append([p.grad for p in parameters if p.grad is not None])
            return found

        (ours, theirs), (ours_16, theirs_16) = gradients(False), gradients(True)
        assert error(ours, theirs) < 2e-5
        assert all(g is not None and g.dtype == torch.float32 for g in ours_16)
        assert 1e-4 < error(ours_16, ours) < 1.5 * error(theirs_16, theirs)

    @pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="torch has no GradScaler")
    def test_scaler(self, plain: list[Tensor | None]) -> None:
        """An optimizer for each skips the step of the one that overflows, and no other's."""
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        tenants = Tenants()
        optimizers = {n: torch.optim.SGD(t.parameters(), 0.1) for n, t in tenants.trained.items()}
        scaler.scale(tenants.loss()).backward()
        for name in ("t0", "t1"):
            scaler.unscale_(optimizers[name])
        assert error(tenants.gradients(), plain) == 0.0  # 1024 is a power of 2
        next(p for p in tenants.trained["t0"].parameters()).grad[0, 0] = float("inf")
        scaler.update()

        before = {
            n: [p.detach().clone() for p in t.parameters()] for n, t in tenants.trained.items()
        }
        with torch.no_grad():
            first = tenants.loss()
        for t in tenants.trained.values():
            t.zero_grad()
        scaler.scale(tenants.loss()).backward()
        next(p for p in tenants.trained["t0"].parameters()).grad[0, 0] = float("inf")
        for name in ("t0", "t1"):
            scaler.step(optimizers[name])
        scaler.update()
        assert scaler.get_scale() == 512.0  # for all
        moved = {
            n: not all(map(torch.equal, before[n], t.parameters()))
            for n, t in tenants.trained.items()
        }
        assert moved == {"t0": False, "t1": True, "t2": False}
        with torch.no_grad():
            assert tenants.loss() < first  # what was stepped is in force


def state(tenants: Tenants, name: str) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in tenants.trained[name].state_dict().items()}


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    """accelerate keeps one state for the process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("no_accelerator")
class TestAccelerate:
    @pytest.mark.parametrize("precision", ["no", "bf16"])
    def test_prepare(self, precision: str, plain: list[Tensor | None]) -> None:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        tenants = Tenants()
        model, optimizer = accelerator.prepare(
            tenants.model, torch.optim.AdamW(tenants.parameters(), lr=1e-3)
        )
        before = [p.detach().clone() for p in tenants.parameters()]
        loss = tenants.loss(model=model)
        accelerator.backward(loss)
        if precision == "no":
            assert error(tenants.gradients(), plain) == 0.0
        else:
            want = Tenants()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                expected = want.loss()
            expected.backward()
            assert error(tenants.gradients(), want.gradients()) < 1e-6
        optimizer.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, tenants.parameters(), strict=True)]
        assert moved == [g is not None for g in plain]
        with torch.no_grad():
            assert tenants.loss(model=model) < loss


class Data(torch.utils.data.Dataset[Mapping[str, Any]]):
    """Three tenants; each one's tokens are from another part of the vocabulary."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(i)
        part = i % 3
        return {
            "input_ids": torch.randint(60 * part + 2, 60 * part + 62, (9,), generator=g),
            "t": part,
        }


def losses_of(logits: Tensor, x: Tensor) -> Tensor:
    """[samples, tokens - 1]."""
    found = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="none"
    )
    return found.view(len(x), -1)


class ZeroGrad(transformers.TrainerCallback):
    """Trainer empties the gradients of model.parameters() alone."""

    def on_optimizer_step(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        optimizer.zero_grad()


class Mixed(transformers.Trainer):
    mux: lora_mux.Mux
    seen: list[tuple[Tensor, Tensor]]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        x, tenant = inputs["input_ids"], inputs["t"]
        self.seen.append((x, tenant))
        with self.mux.route([f"t{i}" for i in tenant.tolist()]) as routing:
            losses = losses_of(model(input_ids=x).logits, x)
        return lora_mux.mean_by_adapter(losses, routing)


def train(
    folder: Path, own: bool = True, zero: bool = True, **options: Any
) -> tuple[Tenants, Mixed, list[Tensor]]:
    tenants = Tenants()
    before = [p.detach().clone() for p in tenants.parameters()]
    arguments = transformers.TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=6,
        per_device_train_batch_size=4,
        logging_steps=1,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=3,
        **options,
    )
    optimizer = torch.optim.AdamW(tenants.parameters(), lr=1e-2)
    trainer = Mixed(
        model=tenants.model,
        args=arguments,
        train_dataset=Data(),
        optimizers=(optimizer if own else None, None),
        callbacks=[ZeroGrad()] if zero else [],
    )
    trainer.mux, trainer.seen = tenants.mux, []
    trainer.train()
    return tenants, trainer, before


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
class TestTrainer:
    @pytest.mark.parametrize("checkpointing", [None, False, True])
    def test_trains_as_peft_does(self, checkpointing: bool | None, tmp_path: Path) -> None:
        options: dict[str, Any] = {}
        if checkpointing is not None:
            kwargs = {"use_reentrant": checkpointing}
            options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
        tenants, trainer, _ = train(tmp_path, **options)
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        want = [0.0] * len(trainer.seen)
        for i in range(3):
            config = peft.LoraConfig(r=3 + i, lora_alpha=8, target_modules="all-linear")
            torch.manual_seed(0)
            tuned: Any = peft.get_peft_model(llama(), config).train()
            begin = {
                key.replace(".weight", ".default.weight"): value
                for key, value in state(Tenants(), f"t{i}").items()
            }
            assert not tuned.load_state_dict(begin, strict=False).unexpected_keys
            parameters = dict(tuned.named_parameters())
            optimizer = torch.optim.AdamW([parameters[key] for key in begin], lr=1e-2)
            for step, (x, tenant) in enumerate(trainer.seen):
                mine = x[tenant == i]
                if not len(mine):
                    continue
                optimizer.zero_grad()
                loss = losses_of(tuned(mine).logits, mine).mean()
                loss.backward()
                optimizer.step()
                want[step] += loss.item()
            for key, value in state(tenants, f"t{i}").items():
                found = parameters[key.replace(".weight", ".default.weight")].detach()
                assert float((found - value).abs().max()) < 3e-5 * float(found.abs().max())
        assert (
            len(logged) == 6 and max(abs(a - b) for a, b in zip(logged, want, strict=True)) < 1e-4
        )

    def test_without_an_optimizer_of_ours_nothing_is_trained(self, tmp_path: Path) -> None:
        """What docs/training.md warns of."""
        tenants, _, before = train(tmp_path, own=False)
        assert all(map(torch.equal, before, tenants.parameters()))

    def test_without_zero_grad_of_ours_gradients_add_up(self, tmp_path: Path) -> None:
        """What docs/training.md warns of."""
        summed, trainer, _ = train(tmp_path, zero=False)
        want = Tenants()
        optimizer = torch.optim.AdamW(want.parameters(), lr=1e-2)
        for x, tenant in trainer.seen:
            with want.mux.route([f"t{i}" for i in tenant.tolist()]) as routing:
                losses = losses_of(want.model(input_ids=x).logits, x)
            lora_mux.mean_by_adapter(losses, routing).backward()
            optimizer.step()
        assert all(map(torch.equal, summed.parameters(), want.parameters()))

    def test_its_clipping_clips_nothing_of_ours(self, tmp_path: Path) -> None:
        tight, _, _ = train(tmp_path, max_grad_norm=1e-6)
        loose, _, _ = train(tmp_path, max_grad_norm=0.0)
        assert all(map(torch.equal, tight.parameters(), loose.parameters()))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two processes has."""
    return answers_of_two(data_parallel, tmp_path_factory.mktemp("two"), 120)


class TestDataParallel:
    def test_means_over_the_processes_that_named_it(self, two: list[Any]) -> None:
        """Against the formula, written by hand."""
        model = data_parallel.model()
        own: list[dict[str, list[Tensor | None]]] = []
        for rank in range(2):
            leaves = {
                name: {
                    path: [factor.requires_grad_() for factor in pair]
                    for path, pair in data_parallel.factors(name).items()
                }
                for name in data_parallel.NAMES
            }
            for x, entry in zip(data(rank), data_parallel.ROWS[rank], strict=True):
                chosen = entry if isinstance(entry, dict) else {entry: 1.0} if entry else {}
                for path in ("0", "2"):
                    layer: Any = model.get_submodule(path)
                    y = layer(x)
                    for name, weight in chosen.items():
                        A, B = leaves[name][path]
                        y = y + weight * (B @ (A @ x))  # alpha / r is 1
                    x = torch.tanh(y) if path == "0" else y
                if x.requires_grad:
                    x.square().sum().backward()
            own.append(
                {
                    n: [f.grad for pair in parts.values() for f in pair]
                    for n, parts in leaves.items()
                }
            )
        for gradients, *_ in two:
            assert gradients["none"] == [None] * 4
            for have, want in zip(gradients["one"], own[0]["one"], strict=True):
                torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)
            for have, a, b in zip(gradients["both"], own[0]["both"], own[1]["both"], strict=True):
                assert a is not None and b is not None
                torch.testing.assert_close(have, (a + b) / 2, rtol=1e-12, atol=1e-12)

    def test_compiled_passes_count_where_they_named_it(self, two: list[Any]) -> None:
        """They have gradients of 0 for all others, who then are no part of the mean."""
        for gradients, *_, all_by_graph, compiled in two:
            assert all_by_graph and compiled["none"] == [None] * 4
            for name in ("one", "both"):
                for have, want in zip(compiled[name], gradients[name], strict=True):
                    torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)

    def test_all_stay_equal(self, two: list[Any]) -> None:
        for name in data_parallel.NAMES:
            assert all(map(torch.equal, two[0][1][name], two[1][1][name]))
        begin = data_parallel.factors("none")
        assert all(
            map(torch.equal, two[0][1]["none"], [f for pair in begin.values() for f in pair])
        )

    def test_unequal_sets_are_refused_in_all(self, two: list[Any]) -> None:
        for _, _, refusals, untouched, *_ in two:
            assert len(refusals) == 2 and untouched
            assert all("must train adapters of the same names and shapes" in r for r in refusals)


@whole_llama
@pytest.mark.usefixtures("no_old_graphs")
class TestCompiled:
    ROUTES = {
        "mixed": ROWS,
        "others": ["t2", "t1", None, ("t1", "t2"), "t0"],
        "weights": [{"t0": 0.5}, {"t1": -1.0, "t2": 2.0}, None, "t2", "t1"],
        "one": ["t1"] * 5,
    }

    def test_gradients_are_those_of_eager_mode(self) -> None:
        """With one graph for all routes and steps."""
        tenants = Tenants(layers=1)
        run = torch.compile(tenants.model, backend="aot_eager", fullgraph=True)
        optimizer = torch.optim.SGD(tenants.parameters(), lr=0.1)
        for _ in range(3):
            for name, rows in self.ROUTES.items():
                found = []
                for model in (tenants.model, run):
                    optimizer.zero_grad()
                    tenants.loss(rows, model).backward()
                    found.append(tenants.gradients())
                eager, compiled = found
                named = [g is not None for g in eager]
                assert any(named), name
                have = [g if n else None for g, n in zip(compiled, named, strict=True)]
                assert error(have, eager) < 5e-6, name
            optimizer.step()
            assert counters["stats"]["unique_graphs"] == 1

    def test_what_is_absent_gets_zeros(self) -> None:
        """Not None, as in eager mode: a graph has an output for each adapter that is trained."""
        tenants = Tenants(layers=1)
        run = torch.compile(tenants.model, backend="aot_eager", fullgraph=True)
        tenants.loss(ROWS, run).backward()
        for p in tenants.trained["t2"].parameters():
            assert p.grad is not None and not p.grad.any()

    def test_dropout(self) -> None:
        """A graph of its own, which drops in train() alone."""
        tenants = Tenants(dropout=0.5, layers=1)
        run = torch.compile(tenants.model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            whole = Tenants(layers=1).loss()
        first, second = (tenants.loss(model=run) for _ in range(2))
        assert len({x.item() for x in (whole, first, second)}) == 3
        first.backward()
        tenants.model.eval()
        torch.testing.assert_close(tenants.loss(model=run), whole)
