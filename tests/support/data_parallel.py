"""One of two processes over gloo that train adapters on data of their own.

    python tests/support/data_parallel.py RANK STORE OUT

STORE is a file that both share. OUT gets what test_training_ecosystem.py judges.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lora_mux
from two_processes import data, join

NAMES = ("both", "one", "none")
ROWS: list[list[Any]] = [["both", "one", "both"], ["both", None, {"both": -0.5}]]


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)
    return nn.Sequential(*layers).double().requires_grad_(False)


def factors(name: str) -> dict[str, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(len(name))
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {"0": (draw(2, 6), draw(8, 2)), "2": (draw(2, 8), draw(5, 2))}


def refusal(mux: lora_mux.Mux) -> str:
    try:
        mux.reduce_gradients()
    except lora_mux.errors.TrainingError as error:
        return str(error)
    return ""


def main(rank: int, store: str, out: str) -> None:
    join(rank, store)
    mux = lora_mux.attach(net := model())
    for name in NAMES:
        mux.add_adapter(name, factors(name), alpha=2)
    trained = {name: mux.train(name) for name in NAMES}
    with mux.route(ROWS[rank]):
        net(data(rank)).square().sum().backward()
    mux.reduce_gradients()
    gradients = {name: [p.grad for p in trained[name].parameters()] for name in NAMES}
    for module in trained.values():
        module.zero_grad()
    with mux.route(ROWS[rank]):
        torch.compile(net, backend="aot_eager")(data(rank)).square().sum().backward()
    by_graph = all(p.grad is not None for t in trained.values() for p in t.parameters())
    mux.reduce_gradients()
    compiled = {name: [p.grad for p in trained[name].parameters()] for name in NAMES}
    for name, module in trained.items():  # not of graphs, whose bits are others
        for p, gradient in zip(module.parameters(), gradients[name], strict=True):
            p.grad = gradient

    optimizer = torch.optim.AdamW([p for t in trained.values() for p in t.parameters()])
    optimizer.step()
    stepped = {name: [p.detach().clone() for p in trained[name].parameters()] for name in NAMES}

    refusals = []
    kept = [p.grad.clone() for p in trained["both"].parameters() if p.grad is not None]
    if rank == 1:
        mux.freeze("none")
    refusals.append(refusal(mux))
    if rank == 1:
        mux.freeze("both"), mux.freeze("one")
    refusals.append(refusal(mux))
    untouched = all(map(torch.equal, kept, [p.grad for p in trained["both"].parameters()]))
    torch.save((gradients, stepped, refusals, untouched, by_graph, compiled), out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
