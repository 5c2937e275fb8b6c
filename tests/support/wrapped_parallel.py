"""One of two processes over gloo whose base model is wrapped, by DDP or by FSDP2.

    python tests/support/wrapped_parallel.py RANK STORE OUT

STORE is a file that both share. OUT gets what test_training_parallel.py judges: for each way of
wrapping, the gradients of two steps, and what was learnt.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lora_mux
from two_processes import data, join

NAMES = ("both", "one")
ROWS: list[list[Any]] = [["both", "one", "both"], ["both", None, {"both": -0.5}]]
TARGETS, HEAD, STEPS = ("body.0", "body.2"), "body.4", 3


class Net(nn.Module):
    """Two layers that carry adapters, and a head that does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)
        self.body = nn.Sequential(*layers)
        self.again = False  # run the body once more in the backward
        self.double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        run = checkpoint(self.body, x, use_reentrant=False) if self.again else self.body(x)
        return run  # type: ignore[no-any-return]


def factors(name: str) -> dict[str, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(len(name))
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {"body.0": (draw(2, 6), draw(8, 2)), "body.2": (draw(2, 8), draw(8, 2))}


def shard(net: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for i in (0, 2, 4):
        fully_shard(net.get_submodule(f"body.{i}"), mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def whole(tensor: Tensor | None) -> Tensor | None:
    """A copy, of a DTensor all of it."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full is not None else None if tensor is None else tensor.detach().clone()


def trained(
    rank: int, wrap: Callable[[nn.Module], nn.Module], *, head: bool, order: str, again: bool
) -> dict[str, Any]:
    """Steps of AdamW under a wrapper; `order` says what comes after one another."""
    net, mux = Net(), None
    net.again = again
    net.get_submodule(HEAD).requires_grad_(head)
    run: nn.Module = wrap(net) if order == "wrap, attach, train" else net
    mux = lora_mux.attach(run, targets=TARGETS)
    for name in NAMES:
        mux.add_adapter(name, factors(name), alpha=2)
    if order == "attach, wrap, train":
        run = wrap(net)
    modules = {name: mux.train(name) for name in NAMES}
    if order == "attach, train, wrap":
        run = wrap(net)
    named = {f"{n} {k}": p for n in NAMES for k, p in modules[n].named_parameters()}
    named |= {f"head {k}": p for k, p in net.get_submodule(HEAD).named_parameters() if head}
    # Two: what FSDP2 has sharded is stepped by itself.
    ours = [p for key, p in named.items() if not key.startswith("head")]
    theirs = [p for key, p in named.items() if key.startswith("head")]
    optimizers = [torch.optim.AdamW(group, lr=0.01) for group in (ours, theirs) if group]
    gradients = []
    for _ in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with mux.route(ROWS[rank]):
            y = run(data(rank))
        y.square().sum().backward()
        mux.reduce_gradients()
        gradients.append({key: whole(p.grad) for key, p in named.items()})
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad(), mux.route(ROWS[0]):
        answer = run(data(0))
    return {
        "gradients": gradients,
        "learnt": {key: whole(p) for key, p in named.items()},
        "answer": answer,
    }


def of_its_own(rank: int) -> list[Tensor | str]:
    """What a process answers that serves an adapter of its own: before the wrap, and by it."""
    net = Net()
    net.get_submodule(HEAD).requires_grad_(True)  # else DDP refuses
    mux = lora_mux.attach(net, targets=TARGETS)
    mux.add_adapter("mine", factors("mine" * (1 + rank)), alpha=2)
    found = []
    for run in (net, DistributedDataParallel(net), DistributedDataParallel(compiled(net))):
        found.append(answer(mux, run))
    return found


def compiled(net: nn.Module) -> Any:
    return torch.compile(net, backend="eager")


class Parent(nn.Module):
    """What holds an attached model, and a head of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, nn.Linear(5, 5).double()
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.net(x))
        return y


def in_a_parent(rank: int, order: str, ignored: bool) -> list[Tensor | str]:
    """What a process answers by itself, then by DDP around a parent, and then by itself again."""
    net = Net()
    mux = lora_mux.attach(net, targets=TARGETS)
    parent: nn.Module = Parent(net)
    if ignored:
        names = [n for n, _ in parent.named_buffers() if "mux_pool" in n]
        setattr(parent, "_ddp_params_and_buffers_to_ignore", names)  # noqa: B010
    run = DistributedDataParallel(parent) if order == "wrap, load" else parent
    mux.add_adapter("mine", factors("mine" * (1 + rank)), alpha=2)
    found = [answer(mux, net)]
    if order == "load, wrap":
        run = DistributedDataParallel(parent)
        found.append(answer(mux, net))
    return [*found, answer(mux, run), answer(mux, net)]


def answer(mux: lora_mux.Mux, run: nn.Module) -> Tensor | str:
    try:
        with mux.route(["mine"] * 3):
            y: Tensor = run(data(0)).detach()
        return y
    except lora_mux.errors.TargetError as error:
        return str(error)


def ddp(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net)


ORDERS = "load, wrap", "wrap, load"
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"wrap": ddp, "head": True, "order": "attach, wrap, train"},
    "ddp first": {"wrap": ddp, "head": True, "order": "wrap, attach, train"},
    "ddp last": {"wrap": ddp, "head": True, "order": "attach, train, wrap"},
    "fsdp2": {"wrap": shard, "head": False, "order": "attach, wrap, train"},
    "fsdp2 first": {"wrap": shard, "head": False, "order": "wrap, attach, train"},
    "fsdp2 last": {"wrap": shard, "head": False, "order": "attach, train, wrap"},
    "fsdp2 with a head": {"wrap": shard, "head": True, "order": "attach, wrap, train"},
    "fsdp2 and checkpointing": {
        "wrap": shard,
        "head": False,
        "order": "attach, wrap, train",
        "again": True,
    },
}


def main(rank: int, store: str, out: str) -> None:
    join(rank, store)
    found: dict[str, Any] = {}
    for name, way in WAYS.items():
        try:
            found[name] = trained(rank, **{"again": False, **way})
        except lora_mux.errors.TargetError as error:  # in both
            found[name] = {"refused": str(error)}
    found["own"] = of_its_own(rank)
    for order in ORDERS:
        for ignored in (False, True):
            found[order, ignored] = in_a_parent(rank, order, ignored)
    net = Net()
    lora_mux.attach(net, targets=TARGETS)
    try:
        DistributedDataParallel(net)
    except RuntimeError as error:
        found["refusal"] = str(error)
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
