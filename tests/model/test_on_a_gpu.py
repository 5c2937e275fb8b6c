"""On a real GPU: layers of all kinds, requests of continuous batching, and graphs beside training.

By the kernels, asked for by name, so that nothing falls back. The oracle is PEFT on the same GPU.
"""

import copy
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from continuous import batching, collected, crowded
from torch import Tensor, nn

import lora_mux
from peft_oracle import attached_llama, peft, set_weights, transformers, with_adapters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # PEFT and transformers warn of their own affairs
]

DEVICE = torch.device("cuda")
BACKEND: Any = "triton"
PROMPTS = [[7, 8, 9] * 5, [5, 17, 99], [7, 8, 9] * 5, [201, 4, 8, 33, 120, 7], [64, 65]]
ROWS: list[Any] = ["plain", None, "rslora", {"plain": 0.5, "biased": -1.5}, "biased"]
NEW = 12
SECONDS = 120.0  # in which kernels are compiled, beside other tests


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of convolutions: by default torch computes those of fp32 by TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def close(got: Tensor, want: Tensor, limit: float = 1e-4) -> None:
    """In units of the largest value."""
    assert got.shape == want.shape and got.device == want.device
    error = float((got - want).abs().max() / want.abs().max())
    assert error <= limit, f"{error:.1e}"


class Kinds(nn.Module):
    """An embedding, a convolution, a linear layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.middle = nn.Linear(512, 48)
        self.score = nn.Linear(48, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.embed(ids)).view(len(ids), 4, 8, 8)
        h = torch.tanh(self.conv(h)).flatten(1) / 8
        return self.score(torch.tanh(self.middle(h)))  # type: ignore[no-any-return]


def adapters_of_kinds() -> dict[str, Any]:
    def config(*targets: str, **fields: Any) -> Any:
        fields |= {"target_modules": list(targets), "init_lora_weights": False}
        return peft.LoraConfig(**fields)

    return {
        "all": config("embed", "conv", "middle", r=4, lora_alpha=6),
        "headed": config("embed", "middle", r=3, modules_to_save=["score"]),
        "dora": config("conv", "middle", r=8, lora_alpha=9, use_dora=True),
        "headed dora": config("middle", r=17, use_dora=True, modules_to_save=["score"]),
        "biased": config("conv", "middle", r=2, lora_alpha=5, lora_bias=True, use_rslora=True),
    }


class TestKinds:
    @pytest.fixture
    def stage(self, tmp_path: Path) -> SimpleNamespace:
        torch.manual_seed(0)
        base = Kinds().eval()
        theirs = with_adapters(base, adapters_of_kinds())
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                if "magnitude" in name:
                    p.mul_(0.5 + torch.rand_like(p))
                if "modules_to_save" in name or ("lora_B" in name and name.endswith("bias")):
                    p.copy_(torch.randn_like(p))
        theirs.save_pretrained(tmp_path)
        ids = torch.randint(50, (9, 16)).to(DEVICE)
        return SimpleNamespace(
            base=base.to(DEVICE), peft=theirs.to(DEVICE), folder=tmp_path, ids=ids
        )

    @pytest.mark.parametrize("memory", [None, "500KiB"])
    @torch.no_grad()
    def test_mixed_rows(self, memory: Any, stage: SimpleNamespace) -> None:
        names = list(adapters_of_kinds())
        rows: list[Any] = [*names, None, "headed", {"all": -0.5}, ("all", "biased")]
        want = []
        for row, ids in zip(rows, stage.ids, strict=True):
            if row is None:
                want.append(stage.base(ids[None]))
                continue
            chosen = row if isinstance(row, tuple | dict) else (row,)
            set_weights(
                stage.peft, chosen if isinstance(chosen, dict) else dict.fromkeys(chosen, 1.0)
            )
            want.append(stage.peft(ids[None]))
        model = copy.deepcopy(stage.base)
        targets = ["embed", "conv", "middle", "score"]
        mux = lora_mux.attach(model, targets, backend=BACKEND, memory=memory)
        mux.load_many({name: stage.folder / name for name in names})
        with mux.route(rows):
            got = model(stage.ids)
        close(got, torch.cat(want))
        for y, alone in zip(got, want, strict=True):
            close(y[None], alone)
        with mux.route([None] * 9):
            assert torch.equal(model(stage.ids), stage.base(stage.ids))


@pytest.fixture
def llamas(tmp_path: Path) -> SimpleNamespace:
    """A plain model, PEFT's with three adapters, and ours with the same ones."""
    made = attached_llama(tmp_path / "peft")
    base, theirs = made.base.to(DEVICE), made.peft.to(DEVICE)
    model = copy.deepcopy(base)
    mux = lora_mux.attach(model, backend=BACKEND)
    for name in ("plain", "rslora", "biased"):
        mux.load(name, tmp_path / "peft" / name)
    return SimpleNamespace(base=base, peft=theirs, model=model, mux=mux, folder=tmp_path)


def alone(llamas: SimpleNamespace, prompt: list[int], row: Any) -> list[int]:
    """What PEFT, or the plain model, answers to this prompt alone."""
    model = llamas.base
    if row is not None:
        set_weights(llamas.peft, row if isinstance(row, dict) else {row: 1.0})
        model = llamas.peft
    ids = torch.tensor([prompt], device=DEVICE)
    new: list[int] = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)[0].tolist()
    return new[len(prompt) :]


def managed(model: Any, **fields: Any) -> Any:
    generation = transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=255, pad_token_id=0
    )
    return model.continuous_batching_context_manager(
        generation_config=generation,
        continuous_batching_config=batching(use_cuda_graph=False, **fields),
    )


class TestContinuousBatching:
    def check(self, llamas: SimpleNamespace, mux: lora_mux.Mux, **fields: Any) -> None:
        with managed(mux.model, **fields) as manager:
            rows = [row or "__base__" for row in ROWS]
            names = manager.add_requests(PROMPTS, adapter_names=rows)
            results = collected(manager, len(names), SECONDS)
        for name, prompt, row in zip(names, PROMPTS, ROWS, strict=True):
            assert results[name] == alone(llamas, prompt, row), row

    def test_each_as_alone(self, llamas: SimpleNamespace) -> None:
        self.check(llamas, llamas.mux)
        assert alone(llamas, PROMPTS[0], "plain") != alone(llamas, PROMPTS[0], None)

    @pytest.mark.parametrize("most", [1, 3])
    def test_memory_for_some(self, most: int, llamas: SimpleNamespace) -> None:
        """Adapters take turns in the pools, on a stream beside the manager's."""
        mux = crowded(llamas.base, llamas.folder / "crowded")
        self.check(llamas, mux, max_requests_per_batch=most)

    @pytest.mark.parametrize("bounded", [False, True])
    def test_removed_while_it_runs(self, bounded: bool, llamas: SimpleNamespace) -> None:
        mux = crowded(llamas.base, llamas.folder / "crowded") if bounded else llamas.mux
        model: Any = mux.model
        inside, go, steps = threading.Event(), threading.Event(), [0]

        def wait(*_: Any) -> None:
            steps[0] += 1
            if steps[0] == 2:
                inside.set()
                go.wait(SECONDS)

        rows = ["plain", "__base__", "biased", "plain"]
        with managed(model) as manager:
            hook = model.model.layers[1].register_forward_pre_hook(wait)
            names = manager.add_requests([PROMPTS[3]] * 4, adapter_names=rows)
            assert inside.wait(SECONDS)
            mux.remove("plain")
            go.set()
            results = collected(manager, 4, SECONDS)
            hook.remove()
            with pytest.raises(lora_mux.errors.UnknownAdapterError):
                manager.add_request(PROMPTS[3], adapter_names="plain")
        for name, row in zip(names, rows, strict=True):
            want = alone(llamas, PROMPTS[3], None if row == "__base__" else row)
            assert results[name] == want, row


class TestGraphBesideTraining:
    """A captured graph serves an adapter that goes on learning."""

    @pytest.fixture
    def stage(self) -> Iterator[SimpleNamespace]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96)).to(DEVICE).requires_grad_(False)
        mux = lora_mux.attach(model, backend=BACKEND)
        mux.reserve(adapters=4, rank=16)
        for name in "ab":
            pair = torch.randn(9, 64) / 8, torch.randn(96, 9) / 3
            mux.add_adapter(name, {"0": pair}, scaling=0.5)
        yield SimpleNamespace(model=model, mux=mux, x=torch.randn(3, 64, device=DEVICE))

    def test_replays_see_what_is_published(self, stage: SimpleNamespace) -> None:
        model, mux, x = stage.model, stage.mux, stage.x
        a = mux.train("a")
        optimizer = torch.optim.AdamW(a.parameters(), lr=0.05, fused=True)
        mux.set_route(["a", None, "b"])
        with torch.no_grad():
            first = model(x)  # once before capturing
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = model(x)
        graph.replay()
        close(y, first, 1e-5)
        first = last = y.clone()
        for publish in (True, False, True):
            with mux.route(["a", "a", None]):
                model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            graph.replay()
            assert torch.equal(y, last)  # what was captured published nothing
            if publish:
                mux.publish("a")
            else:  # as any pass does
                with torch.no_grad():
                    model(x)
            graph.replay()
            A, B = (p.detach().double() for p in a.parameters())
            want = nn.functional.linear(x[0].double(), model[0].weight.double())
            want = want + model[0].bias.double() + 0.5 * B @ (A @ x[0].double())
            close(y[0].double(), want, 1e-5)
            assert torch.equal(y[1:], first[1:]) and not torch.equal(y[0], last[0])
            last = y.clone()
        with torch.no_grad():
            next(a.parameters())[0, 0] = float("nan")
        mux.publish("a")
        graph.replay()
        assert y[0].isnan().all() and torch.equal(y[1:], first[1:])


class TestLivePeftModel:
    @torch.no_grad()
    def test_as_its_own_mixed_batch(self, llamas: SimpleNamespace) -> None:
        """One that is on the GPU; then another row of several, and training."""
        theirs = llamas.peft
        rows: list[Any] = ["plain", "__base__", "rslora", "biased", "rslora"]
        ids = torch.randint(2, 250, (5, 9), device=DEVICE)
        want = theirs(input_ids=ids, adapter_names=rows).logits
        set_weights(theirs, {"plain": 0.5, "biased": -1.5})
        both = theirs(input_ids=ids[:1]).logits
        mux = lora_mux.attach_peft(theirs, backend=BACKEND)
        model: Any = mux.model
        assert {p.device.type for p in model.parameters()} == {DEVICE.type}
        close(model(input_ids=ids[:1]).logits, both)  # what was active
        close(model(input_ids=ids, adapter_names=rows).logits, want)
        with mux.route([None if row == "__base__" else row for row in rows]):
            close(model(input_ids=ids).logits, want)
        module = mux.train("plain")
        with torch.enable_grad(), mux.route([None if row == "__base__" else row for row in rows]):
            logits = model(input_ids=ids).logits
            close(logits.detach(), want)
            logits.square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())


class TestBoundedPools:
    def test_under_load(self) -> None:
        """Threads with streams of their own, and three times as many adapters as fit.

        Nobody waits for the GPU in between, so that copies and passes overlap as they may.
        """
        torch.manual_seed(0)
        width, rank, count = 256, 8, 18
        layers = [nn.Linear(width, width) for _ in range(3)]
        model = nn.Sequential(*layers).to(DEVICE).requires_grad_(False)
        row = 3 * (4 * 2 * width + 1)
        mux = lora_mux.attach(model, backend=BACKEND, memory=6 * rank * row)
        factors = {
            f"a{i}": [(torch.randn(rank, width) / 16, torch.randn(width, rank) / 3) for _ in layers]
            for i in range(count)
        }
        for name, pairs in factors.items():
            mux.add_adapter(name, {str(i): pair for i, pair in enumerate(pairs)}, scaling=0.5)  # type: ignore[misc]
        x = torch.randn(4, width, device=DEVICE)
        found: list[tuple[list[str], Tensor]] = []
        errors: list[BaseException] = []

        def serve(seed: int) -> None:
            drawn = random.Random(seed)
            try:
                with side_stream(), torch.no_grad():
                    for _ in range(60):
                        names = drawn.choices([*factors], k=2) * 2
                        with mux.route(names):
                            found.append((names, model(x)))
                        if seed:
                            mux.prefetch([drawn.choice([*factors])])
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert not errors and len(found) == 120
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        for names, y in found:
            want = torch.stack([answer(x[m], layers, factors[n]) for m, n in enumerate(names)])
            close(y.double(), want, 1e-4)


def side_stream() -> Any:
    if DEVICE.type != "cuda":
        return torch.no_grad()
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.default_stream())
    return torch.cuda.stream(stream)


def answer(x: Tensor, layers: list[nn.Linear], factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The formula in fp64."""
    y = x.double()
    for layer, (A, B) in zip(layers, factors, strict=True):
        own = layer.weight.double() @ y + layer.bias.double()
        y = own + 0.5 * B.to(y) @ (A.to(y) @ y)
    return y
