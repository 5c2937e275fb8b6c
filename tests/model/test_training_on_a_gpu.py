"""On a real GPU: adapters that are trained, by the kernels, which are asked for by name."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lora_mux
from lora_mux.measure.timing import no_syncs
from peft_oracle import llama, peft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("no_old_graphs"),
    pytest.mark.filterwarnings("default"),  # compilers, PEFT and transformers warn of their affairs
]

DEVICE = torch.device("cuda")
BACKEND: Any = "triton"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS, ALPHAS, RATES = (4, 8, 33, 7), (8, 8, 33, 7), (1e-2, 3e-3, 1e-3, 5e-3)
STEPS = 10
Make = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=10 * lr, momentum=0.9, weight_decay=0.01),
    "adamw for each": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True),
    "fused adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
}


def close(got: Tensor, want: Tensor, limit: float) -> None:
    """By the norm of the difference."""
    assert got.shape == want.shape and got.isfinite().all()
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error <= limit, f"{error:.1e}"


def losses_of(logits: Tensor, ids: Tensor) -> Tensor:
    """[samples, tokens - 1]."""
    predicted = logits[:, :-1].transpose(1, 2)
    return nn.functional.cross_entropy(predicted, ids[:, 1:], reduction="none")


class TestAsPeftTrains:
    """Four tenants in one shuffled batch, against PEFT that trains each alone."""

    def base(self, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(0)
        return llama().to(DEVICE, dtype).requires_grad_(False)

    def batches(self) -> list[list[Tensor]]:
        """For each step what each tenant learns from: another part of the vocabulary."""
        g = torch.Generator().manual_seed(1)
        return [
            [torch.randint(20 * i, 20 * i + 40, (2, 12), generator=g).to(DEVICE) for i in range(4)]
            for _ in range(STEPS)
        ]

    def alone(
        self, folder: Path, i: int, make: Make, dtype: torch.dtype = torch.float32
    ) -> tuple[list[float], list[Tensor]]:
        """PEFT's losses, and the weights that it ends with."""
        model: Any = peft.PeftModel.from_pretrained(self.base(), folder, is_trainable=True)
        model = model.to(dtype)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer, losses = make(parameters, RATES[i]), []
        for batch in self.batches():
            optimizer.zero_grad()
            loss = losses_of(model(batch[i], use_cache=False).logits, batch[i]).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, [p.detach() for p in parameters]

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_each_alone(self, name: str, tmp_path: Path) -> None:
        model, make = self.base(), OPTIMIZERS[name]
        mux = lora_mux.attach(model, TARGETS, backend=BACKEND)
        names = [f"t{i}" for i in range(4)]
        for i, tenant in enumerate(names):
            mux.create(tenant, r=RANKS[i], alpha=ALPHAS[i], seed=i)
            module = mux.train(tenant)
            with torch.no_grad():  # B begins with 0, where nothing is seen of A
                for p in module.parameters():
                    p.add_((torch.randn(p.shape) * 0.02).to(p))
            mux.save(tenant, tmp_path / tenant)
        start = {n: [p.detach().clone() for p in mux.trained[n].parameters()] for n in names}
        optimizers = [make(mux.trained[n].parameters(), RATES[i]) for i, n in enumerate(names)]
        found = []
        for step, batch in enumerate(self.batches()):
            order = torch.randperm(8, generator=torch.Generator().manual_seed(step))
            ids = torch.cat(batch)[order.to(DEVICE)]
            for optimizer in optimizers:
                optimizer.zero_grad()
            with mux.route([names[i // 2] for i in order.tolist()]) as routing:
                losses = losses_of(model(ids, use_cache=False).logits, ids)
            lora_mux.mean_by_adapter(losses, routing).backward()
            for optimizer in optimizers:
                optimizer.step()
            found.append(losses.detach().cpu()[order.argsort()].view(4, -1).mean(1))
        for i, tenant in enumerate(names):
            want_losses, want = self.alone(tmp_path / tenant, i, make)
            assert distance(start[tenant], want) > 1e-3  # it has moved
            assert max(abs(float(f[i]) - w) for f, w in zip(found, want_losses, strict=True)) < 1e-4
            have = [p.detach() for p in mux.trained[tenant].parameters()]
            if distance(have, want) > 1e-4:
                # Where a gradient is 0 but for rounding, Adam steps either way, and so does PEFT.
                _, exact = self.alone(tmp_path / tenant, i, make, torch.float64)
                assert distance(have, exact) <= 3 * distance(want, exact)
            mux.freeze(tenant)
            mux.save(tenant, tmp_path / "learnt")
            theirs = peft.PeftModel.from_pretrained(self.base(), tmp_path / "learnt").eval()
            with torch.no_grad(), mux.route([tenant] * 8):
                close(model(ids).logits, theirs(ids).logits, 2e-5)


def distance(have: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference, relative to the norm of each tensor."""
    pairs = zip(have, want, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


class Layer:
    """One layer with adapters a to d of several ranks, all but the last of them trained."""

    ROWS = ("a", None, "d", "b", "b", "c", "a")  # nothing of "absent"
    NAMES = ("a", "b", "c", "d", "absent")

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(256, 512)).to(DEVICE, dtype).requires_grad_(False)
        self.mux = lora_mux.attach(self.model, backend=BACKEND, **options)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, r in zip(self.NAMES, (8, 33, 64, 16, 5), strict=True):
            pair = torch.randn(r, 256) / 16, torch.randn(512, r) / r**0.5
            self.factors[name] = tuple(t.to(DEVICE, dtype) for t in pair)  # type: ignore[assignment]
            self.mux.add_adapter(name, {"0": self.factors[name]}, scaling=0.5)
        self.x = torch.randn(len(self.ROWS), 50, 256).to(DEVICE, dtype)
        self.upstream = torch.randn(len(self.ROWS), 50, 512).to(DEVICE, dtype)

    def train(self, *names: str) -> dict[str, nn.Module]:
        return {name: self.mux.train(name) for name in names}

    def run(self, rows: Iterable[Any] = ROWS, x: Tensor | None = None) -> Tensor:
        with self.mux.route(list(rows)):
            y: Tensor = self.model(self.x if x is None else x)
        return y

    def exact(self) -> tuple[Tensor, Tensor, dict[str, list[Tensor]]]:
        """y, and the gradients of x and of each adapter's A and B, by autograd in fp64."""
        leaves = {n: [t.double().requires_grad_() for t in f] for n, f in self.factors.items()}
        x = self.x.detach().double().requires_grad_()
        linear = self.model[0]
        rows = []
        for row, name in zip(x, self.ROWS, strict=True):
            y = row @ linear.weight.double().T + linear.bias.double()
            if name is not None:
                A, B = leaves[name]
                y = y + 0.5 * row @ A.T @ B.T
            rows.append(y)
        found = torch.stack(rows)
        found.backward(self.upstream.double())
        assert x.grad is not None
        return (
            found.detach(),
            x.grad,
            {n: [t.grad for t in f if t.grad is not None] for n, f in leaves.items()},
        )


class TestGradients:
    @pytest.mark.parametrize(
        ("dtype", "limit"),
        [(torch.float32, 2e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)],
        ids=str,
    )
    def test_against_fp64(self, dtype: torch.dtype, limit: float) -> None:
        layer = Layer(dtype)
        trained = layer.train("a", "b", "c", "absent")
        layer.x.requires_grad_()
        y = layer.run()
        y.backward(layer.upstream)
        want_y, want_x, want = layer.exact()
        close(y, want_y, limit)
        assert layer.x.grad is not None
        close(layer.x.grad, want_x, limit)
        for name, module in trained.items():
            gradients = [p.grad for p in module.parameters()]
            if name == "absent":
                assert gradients == [None, None]
                continue
            for have, exact in zip(gradients, want[name], strict=True):
                assert have is not None and have.dtype == torch.float32
                close(have, exact, limit)

    def test_autocast_and_scaler(self) -> None:
        """One tenant's infinity costs that tenant the step."""
        layer = Layer(torch.float32)
        trained = layer.train("a", "b", "c")
        optimizers = {n: torch.optim.AdamW(t.parameters(), lr=1e-3) for n, t in trained.items()}
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0)  # type: ignore[attr-defined]
        with torch.autocast(DEVICE.type, torch.float16):
            y = layer.run()
        assert y.dtype == torch.float16
        scaler.scale((y.float() * layer.upstream).sum()).backward()
        spoilt, (_, _, want) = next(trained["b"].parameters()), layer.exact()
        assert spoilt.grad is not None
        spoilt.grad[0, 0] = float("inf")
        for name, optimizer in optimizers.items():
            scaler.unscale_(optimizer)
            for have, exact in zip(trained[name].parameters(), want[name], strict=True):
                assert have.grad is not None and have.grad.dtype == torch.float32
                if have is not spoilt:
                    close(have.grad, exact, 1e-2)
        before = {n: [p.detach().clone() for p in t.parameters()] for n, t in trained.items()}
        for optimizer in optimizers.values():
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 128.0
        stayed = {n: all(map(torch.equal, before[n], t.parameters())) for n, t in trained.items()}
        assert stayed == {"a": False, "b": True, "c": False}

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_and_dropout(self, reentrant: bool) -> None:
        """Layers run a second time, and drop the same."""
        found = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            model = llama().to(DEVICE).requires_grad_(False).train()
            mux = lora_mux.attach(model, backend=BACKEND)
            parameters: list[nn.Parameter] = []
            for i in range(2):
                mux.create(f"t{i}", r=3 + i, alpha=8, dropout=0.5, seed=i)
                parameters += mux.train(f"t{i}").parameters()
            with torch.no_grad():
                for p in parameters:
                    p.add_(0.01)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            ids = (torch.arange(45) % 37).view(5, 9).to(DEVICE)
            torch.manual_seed(7)
            with mux.route(["t0", None, "t1", "t0", "t1"]):
                losses = losses_of(model(ids, use_cache=False).logits, ids)
            losses.mean().backward()
            found.append([p.grad for p in parameters])
        for plain, again in zip(*found, strict=True):
            assert plain is not None and again is not None
            close(again, plain, 1e-5)

    def test_dropout_by_seed(self) -> None:
        """Repeats by seed, leaves others every bit, and has the mean of the whole."""
        layer = Layer(torch.float32)
        layer.model.train()
        module = layer.mux.train("a", dropout=0.5)
        x = torch.randn(1, 256, device=DEVICE).expand(4000, -1).contiguous()
        rows = ["a", "d"] * 2000
        found = []
        for _ in range(2):
            torch.manual_seed(5)
            module.zero_grad()
            y = layer.run(rows, x)
            y.square().sum().backward()
            found.append([y.detach(), *(p.grad.clone() for p in module.parameters())])  # type: ignore[union-attr]
        assert all(map(torch.equal, *found))
        module.eval()
        with torch.no_grad():
            whole = layer.run(rows, x)
        y = found[0][0]
        assert torch.equal(y[1::2], whole[1::2])
        deviation = (y[::2] - whole[::2]).double()
        assert (deviation.abs().amax(1) > 0).all()
        standard = deviation.std(0) / 2000**0.5
        assert (deviation.mean(0).abs() < 6 * standard).all()

    def test_one_compiled_graph(self) -> None:
        """Inductor's, forward and backward, for two routes and a step between them."""
        torch.manual_seed(0)
        layers = nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32, bias=False)
        model = nn.Sequential(*layers).to(DEVICE).requires_grad_(False)
        mux = lora_mux.attach(model, backend=BACKEND)
        for i, name in enumerate("abc"):
            mux.create(name, r=3 + i, alpha=8, seed=i)
        trained = {name: mux.train(name) for name in "ab"}
        parameters = [p for t in trained.values() for p in t.parameters()]
        with torch.no_grad():
            for p in parameters:
                p.add_(torch.randn_like(p) * 0.1)
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        compiled, x = torch.compile(model, fullgraph=True), torch.randn(5, 64, device=DEVICE)
        for rows in (["a", None, "b", ("a", "b"), "c"], ["b", "b", "c", {"a": -0.5}, None]) * 2:
            found = []
            for run in (model, compiled):
                optimizer.zero_grad()
                with mux.route(rows):
                    y = run(x)
                y.square().sum().backward()
                found.append([y.detach(), *(p.grad.clone() for p in parameters)])  # type: ignore[union-attr]
            for have, want in zip(found[1], found[0], strict=True):
                close(have, want, 1e-5)
            optimizer.step()
        assert counters["stats"]["unique_graphs"] == 1

    def test_a_warm_step_does_not_stop_the_host(self) -> None:
        """The recipes of docs/training.md: means, clipping, steps that are skipped, publishing."""
        layer = Layer(torch.bfloat16)
        trained = layer.train("a", "b", "c")
        makes = (OPTIMIZERS["fused adamw"], OPTIMIZERS["adamw for each"], OPTIMIZERS["sgd"])
        optimizers = {
            name: make(trained[name].parameters(), 1e-2)
            for name, make in zip(trained, makes, strict=True)
        }

        def step(rows: Iterable[Any]) -> None:
            with layer.mux.route(list(rows)) as routing:
                y = layer.model(layer.x)
            losses = (y.float() - layer.upstream).square().mean(2)
            lora_mux.mean_by_adapter(losses, routing).backward()
            for name, optimizer in optimizers.items():
                norm = torch.nn.utils.clip_grad_norm_(trained[name].parameters(), 1.0)
                if name == "a":
                    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
                optimizer.step()
                optimizer.zero_grad()

        for _ in range(2):
            step(layer.ROWS)
        with torch.no_grad():
            before = layer.run().float()
        torch.cuda.synchronize()
        with no_syncs():
            for rows in (layer.ROWS, layer.ROWS[::-1], layer.ROWS):
                step(rows)
            layer.mux.publish("a")
        with torch.no_grad():
            after = layer.run().float()
        changed = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
        assert changed == [row not in (None, "d") for row in layer.ROWS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
class TestServedBesideTraining:
    def test_keeps_every_bit(self, dtype: torch.dtype) -> None:
        """Before, beside, and when what is trained beside it has diverged."""
        layer = Layer(dtype)
        served = torch.tensor([row in (None, "d") for row in layer.ROWS], device=DEVICE)
        with torch.no_grad():
            want = layer.run()
        trained = layer.train("a", "b", "c")
        y = layer.run()
        assert y.requires_grad and torch.equal(y, want)
        y.backward(layer.upstream)
        torch.optim.SGD([p for t in trained.values() for p in t.parameters()], lr=1e-3).step()
        y = layer.run().detach()
        assert torch.equal(y[served], want[served])
        assert (y != want).flatten(1).any(1).tolist() == (~served).tolist()
        with torch.no_grad():
            next(trained["b"].parameters())[0, 0] = float("inf")
        y = layer.run().detach()
        assert torch.equal(y[served], want[served])
        nan = y.isnan().flatten(1)
        assert nan.all(1).tolist() == nan.any(1).tolist() == [r == "b" for r in layer.ROWS]

    def test_as_alone_in_a_batch_of_its_shape(self, dtype: torch.dtype) -> None:
        layer = Layer(dtype, batch_invariant=True)
        alone = [row if row == "d" else None for row in layer.ROWS]
        with torch.no_grad():
            want = layer.run(alone)
        layer.train("a", "b", "c")
        y = layer.run()
        y.backward(layer.upstream)
        assert torch.equal(y[1:3], want[1:3]) and not torch.equal(y, want)
