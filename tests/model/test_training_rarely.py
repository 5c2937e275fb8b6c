"""What happens seldom to adapters that are trained: refusals, and layers of other kinds."""

import threading
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn

import lora_mux
from lora_mux.adapters import training
from lora_mux.errors import RoutingBusyError, TargetError, TrainingError


def pair(K: int, N: int, r: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(r, K) / 4, torch.randn(N, r) / 4


def attached(**options: Any) -> tuple[Any, lora_mux.Mux]:
    """Two layers: "both" touches both of them, "second" the second one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)).requires_grad_(False)
    mux = lora_mux.attach(model, **options)
    mux.add_adapter("both", {"0": pair(6, 8), "1": pair(8, 5)}, alpha=3)
    mux.add_adapter("second", {"1": pair(8, 5)}, alpha=3)
    return model, mux


def run(model: Any, mux: lora_mux.Mux, rows: Any, x: torch.Tensor) -> torch.Tensor:
    with mux.route(rows):
        y: torch.Tensor = model(x)
    return y


def test_what_it_looks_like() -> None:
    _, mux = attached()
    assert repr(mux.train("second")) == "TrainedAdapter('second', 39 numbers)"


def test_embeddings_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))
    mux = lora_mux.attach(model)
    mux.add_adapter("tokens", {"0": pair(10, 8)}, alpha=3)
    with pytest.raises(TrainingError, match="'0', which is no whole linear layer"):
        mux.train("tokens")


def saved(folder: Path, **options: Any) -> Path:
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **options)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned: Any = peft.get_peft_model(model, config)
        tuned.save_pretrained(folder)
    return folder


def test_dora_and_saved_modules_are_refused(tmp_path: Path) -> None:
    _, mux = attached()
    mux.load("dora", saved(tmp_path / "dora", use_dora=True))
    mux.load("saved", saved(tmp_path / "saved", modules_to_save=["1"]))
    with pytest.raises(TrainingError, match="DoRA at '0'"):
        mux.train("dora")
    with pytest.raises(TrainingError, match="saved modules"):
        mux.save("saved", tmp_path / "again")


def test_beside_dora_in_the_same_layer(tmp_path: Path) -> None:
    """Its rows are rescaled, and those that are trained have the gradients that they had."""
    x, rows = torch.randn(3, 6), ["both", None, "both"]
    found = []
    for dora in (False, True):
        model, mux = attached()
        if dora:
            mux.load("dora", saved(tmp_path, use_dora=True))
        both = mux.train("both")
        y = run(model, mux, [*rows, "dora"] if dora else rows, x if not dora else x[[0, 1, 2, 0]])
        y[:3].sum().backward()
        found.append([p.grad for p in both.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_layer_without_it(backend: Any) -> None:
    model, mux = attached(backend=backend)
    second = mux.train("second")
    x = torch.randn(2, 6, requires_grad=True)
    run(model, mux, ["second", "both"], x).sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in second.parameters())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_parameters_that_are_held_still(backend: Any) -> None:
    model, mux = attached(backend=backend)
    x = torch.randn(2, 6, requires_grad=True)
    run(model, mux, ["both", None], x).sum().backward()
    want, x.grad = x.grad, None
    both = mux.train("both").requires_grad_(False)
    run(model, mux, ["both", None], x).sum().backward()
    torch.testing.assert_close(x.grad, want)
    assert all(p.grad is None for p in both.parameters())


def test_no_gradients_of_gradients() -> None:
    """Also where what comes to the layer is constant, of which autograd would see nothing."""
    for backend in ("reference", "auto"):
        model, mux = attached(backend=backend)
        both, x = mux.train("both"), torch.randn(2, 6, requires_grad=True)
        for loss in (lambda y: y.square().sum(), lambda y: y.sum()):
            y = loss(run(model, mux, ["both", None], x))
            with pytest.raises(TrainingError, match="create_graph"):
                torch.autograd.grad(y, x, create_graph=True)
        assert len(list(both.parameters())) == 4


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.interpreter)]
)
def test_dropout_on_other_backends(backend: Any) -> None:
    """Also in a batch of others alone, without gradients, of which nothing is dropped."""
    model, mux = attached(backend=backend)
    x = torch.randn(64, 6)
    with torch.no_grad():
        others, mine = (run(model, mux, [name] * 64, x) for name in ("second", "both"))
        model.train()
        mux.train("both", dropout=0.5)
        assert torch.equal(run(model, mux, ["second"] * 64, x), others)
        assert not torch.allclose(run(model, mux, ["both"] * 64, x), mine)


def test_gradients_move_with_the_model() -> None:
    model, mux = attached()
    both = mux.train("both")
    run(model, mux, ["both"], torch.randn(1, 6)).sum().backward()
    want = [p.grad for p in both.parameters()]
    model.to("cpu")
    assert all(
        p.grad is not None and torch.equal(p.grad, w)
        for p, w in zip(both.parameters(), want, strict=True)
    )


def test_passes_that_do_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PATIENCE", 0.05)
    model, mux = attached()
    both, x = mux.train("both"), torch.randn(1, 6)
    inside, go = threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        if threading.current_thread() is other:
            inside.set()
            go.wait(20)

    model[0].register_forward_hook(pause)
    other = threading.Thread(target=lambda: run(model, mux, ["both"], x))
    run(model, mux, ["both"], x)
    other.start()
    assert inside.wait(20)
    with torch.no_grad():
        next(both.parameters()).mul_(2.0)
    with pytest.raises(RoutingBusyError, match="between passes"):
        run(model, mux, ["both"], x)
    go.set()
    other.join(20)
    assert run(model, mux, ["both"], x).isfinite().all()


def test_an_end_on_the_way_to_the_pools() -> None:
    """Another thread may end the training while this one waits."""
    _, mux = attached()
    mux.train("both")
    handle = mux.adapters["both"]
    mux.remove("both")
    mux._adapters.training.publish([handle])
    assert not mux.trained


def test_processes_that_train_nothing() -> None:
    _, mux = attached()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mux.reduce_gradients()
    finally:
        dist.destroy_process_group()


def test_gradients_that_nobody_has_are_not_made() -> None:
    """As of what a user holds still, which AdamW would let decay."""
    model, mux = attached()
    trained = mux.train("both")
    (A, B), (C, D) = ([p for p in trained.parameters()][i : i + 2] for i in (0, 2))
    A.requires_grad_(False)
    run(model, mux, ["both"], torch.randn(1, 6)).sum().backward()
    want, C.grad = [B.grad, D.grad], None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mux.reduce_gradients()
        assert A.grad is None and C.grad is None
        torch.testing.assert_close([B.grad, D.grad], want)
        trained.requires_grad_(False)
        mux.reduce_gradients()
        assert all(p.grad is None for p in trained.parameters())
    finally:
        dist.destroy_process_group()


def test_a_plan_with_other_strengths() -> None:
    """As a split layer puts in."""
    model, mux = attached()
    mux.train("both")
    layer = model[0]
    index = torch.tensor([[mux.adapters["both"]]])
    plan: Any = layer._plan_of(torch.randn(1, 6), lora_mux.Routing(index), fusable=True)
    other = torch.full_like(plan.strength, 2.0)
    assert plan.with_strength(other).strength is other


def test_a_head_that_was_replaced_before_it_joined() -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.lm_head = nn.Linear(6, 8), nn.Linear(8, 5)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.lm_head(self.body(x))
            return y

    model = WithHead()
    mux = lora_mux.attach(model)
    model.lm_head = nn.Linear(8, 5)
    with pytest.raises(TargetError, match="must be the layer that was attached"):
        mux.add_adapter("head", {"lm_head": pair(8, 5)}, alpha=3)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_layer_with_a_routing_of_its_own(backend: Any) -> None:
    """It has what was learnt, and gives gradients, whatever equal rows it had before."""
    model, mux = attached(backend=backend)
    layer, x = model[1], torch.randn(3, 8)
    index = torch.tensor([[mux.adapters["second"]], [-1], [mux.adapters["second"]]])
    layer(x, lora_mux.Routing(index))
    trained = mux.train("second")
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)

    def check() -> None:
        A, B = trained.parameters()
        added = x @ A.T @ B.T  # alpha is the rank
        want = (
            nn.functional.linear(x, layer.weight, layer.bias)
            + torch.tensor([[1.0], [0.0], [1.0]]) * added
        )
        y = layer(x, lora_mux.Routing(index.clone()))
        torch.testing.assert_close(y, want)
        mine = torch.autograd.grad(y.square().sum(), list(trained.parameters()))
        theirs = torch.autograd.grad(want.square().sum(), list(trained.parameters()))
        torch.testing.assert_close(mine, theirs)

    check()
    with torch.no_grad():
        for p in trained.parameters():
            p.mul_(2.0)
    check()
    layer(x, lora_mux.Routing(index)).sum().backward()
    optimizer.step()
    check()


@pytest.mark.parametrize("fused", [False, True])
def test_an_interrupt_after_a_step_has_written(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what a fused kernel wrote, torch's counters know nothing."""
    model, mux = attached()
    trained, x = mux.train("both"), torch.randn(2, 6)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1, fused=fused)
    run(model, mux, ["both", None], x).sum().backward()
    before = run(model, mux, ["both", None], x)
    counted = iter([False, True])

    def interrupted() -> None:
        if next(counted):
            raise KeyboardInterrupt

    monkeypatch.setattr(trained, "mux_note_stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.undo()
    after = run(model, mux, ["both", None], x)
    mux.publish("both")
    assert torch.equal(after, run(model, mux, ["both", None], x))
    assert not torch.equal(after, before)


def test_factors_that_require_grad() -> None:
    """They are copied; it is said who learns."""
    _, mux = attached()
    A, B = pair(6, 8)
    with pytest.warns(UserWarning, match=r"call train\('mine'\), and give its parameters"):
        mux.add_adapter("mine", {"0": (nn.Parameter(A), B)}, alpha=3)


@pytest.mark.parametrize("seed", ["x", 1.5, 1 << 64, -1, True])
def test_a_seed_that_is_none(seed: Any) -> None:
    _, mux = attached()
    with pytest.raises(lora_mux.errors.ArgumentTypeError, match="`seed` must be an int"):
        mux.create("new", r=2, alpha=2, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rows_beside_those_that_train_keep_their_bits(dtype: torch.dtype, backend: Any) -> None:
    """Whatever the strides of x: torch adds the bias of some in a step of its own."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(10, 20)).to(dtype).requires_grad_(False)
    whole = torch.randn(3, 16, 12).to(dtype)
    inputs = whole[..., :10], whole[..., ::1][..., 2:], torch.randn(3, 10, 16).to(dtype).mT
    plain = [layer(x) for x in inputs]
    mux = lora_mux.attach(layer, targets=["0"], backend=backend)
    mux.create("a", r=2, alpha=2, seed=1)
    mux.add_adapter("s", {"0": pair(10, 20)}, alpha=3)
    rows = ["a", None, "s"]
    served = [run(layer, mux, rows, x) for x in inputs]
    trained = mux.train("a")
    for x, base, before in zip(inputs, plain, served, strict=True):
        y = run(layer, mux, rows, x)
        assert torch.equal(y[1], base[1]) and torch.equal(y[2], before[2])
        _, B = trained.parameters()  # 0, so that A gets no gradient yet
        (of_B,) = torch.autograd.grad(y.float().sum(), [B])
        want = (x[0].float() @ trained.weights["0"].A.T).sum(0).expand(20, 2)
        torch.testing.assert_close(of_B, want, rtol=0.02, atol=0.02)


def test_a_training_that_an_interrupt_has_left_half_ended() -> None:
    """The next change ends it: of a name that is gone, or of a slot that trains no more."""
    for leave in ("name", "slot"):
        _, mux = attached()
        mux.train("both")
        training, handle = mux._adapters.training, mux.adapters["both"]
        if leave == "slot":
            mux._slots.trained = ()
        training.mend([handle] if leave == "slot" else [])
        assert not mux.trained and not any(pool.masters for pool in training._pools.values())


def test_means_where_the_host_may_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a graph is captured."""
    monkeypatch.setattr(lora_mux.model.trained, "host_may_read", lambda tensor: False)
    routing = lora_mux.Routing(torch.tensor([[0], [0], [1], [-1]]))
    assert lora_mux.mean_by_adapter(torch.tensor([1.0, 3.0, 5.0, 9.0]), routing).item() == 7.0


def test_a_model_that_is_nowhere() -> None:
    """On the meta device: shapes are right, and no backend has anything to follow."""
    model = nn.Sequential(nn.Linear(6, 8, device="meta"))
    mux = lora_mux.attach(model)
    assert run(model, mux, [None, None], torch.empty(2, 6, device="meta")).shape == (2, 8)


def test_a_users_own_list_of_what_ddp_leaves_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["mine"])
    mux = lora_mux.attach(model)
    assert len(model._ddp_params_and_buffers_to_ignore) > 1
    mux.detach()
    assert {*model._ddp_params_and_buffers_to_ignore} == {"mine"}
