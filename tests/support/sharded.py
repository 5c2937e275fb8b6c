"""Two processes over gloo: attach after each way to shard a model, against one process.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/support/sharded.py FOLDER

FOLDER holds a small Llama. Prints "case: value" lines on the first process; test_sharded.py
judges them.
"""

import copy
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import lora_mux
from lora_mux.core import LoraWeights
from lora_mux.layers import with_gain
from quick_interpreter import without_repetitions

warnings.simplefilter("ignore")
import transformers  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402

transformers.logging.set_verbosity_error()

ROWS: list[Any] = ["a", None, {"a": 0.5, "b": -1.0}]
IDS = torch.randint(2, 250, (3, 5), generator=torch.Generator().manual_seed(1))
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def load(**how: Any) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(
        sys.argv[1], dtype=torch.float32, **how
    ).eval()


def attach(model: Any, **how: Any) -> lora_mux.Mux:
    mux = lora_mux.attach(model, **how)
    for rank, name in ((2, "a"), (5, "b")):
        weights = {}
        # With memory the output head is a target, too.
        for i, path in enumerate(t for t in mux.targets if t != "lm_head"):
            random = torch.Generator().manual_seed(10 * rank + i)
            layer = model.get_submodule(path)
            A = torch.randn(rank, layer.in_features, generator=random) / layer.in_features**0.5
            weights[path] = (A, torch.randn(layer.out_features, rank, generator=random))
        mux.add_adapter(name, weights, alpha=rank)
    mux.set_route(ROWS)
    return mux


def torch_parallel(model: Any, mesh: Any) -> None:
    for layer in model.model.layers:
        plan = {
            path: ColwiseParallel() if path.endswith(COLUMNS) else RowwiseParallel()
            for path, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        parallelize_module(layer, mesh, plan)


def fsdp(model: Any, mesh: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: Any, mux: lora_mux.Mux) -> dict[str, Tensor]:
    """Of the parameters, and of a routing's weights."""
    a, b = mux.adapters.values()
    weights = torch.tensor([[1.0, 0.0], [0.3, 0.0], [0.5, -1.0]], requires_grad=True)
    model.zero_grad()
    with mux.route(torch.tensor([[a, -1], [b, -1], [a, b]]), weights):
        whole(model(IDS).logits).square().mean().backward()
    found = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    assert weights.grad is not None
    return {**found, "weights": weights.grad}


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    plain = load()
    keys = list(plain.state_dict())
    reference = copy.deepcopy(plain)
    mux = attach(reference)
    with torch.no_grad():
        want = reference(IDS).logits
        base = plain(IDS).logits
        tokens = reference.generate(IDS, max_new_tokens=6, do_sample=False)
    wanted = gradients(reference, mux)

    def prepared(
        shard: Callable[[Any, Any], None], first: bool, **how: Any
    ) -> tuple[Any, lora_mux.Mux]:
        model = load()
        if first:
            mux = attach(model, **how)
        shard(model, mesh)
        return model, mux if first else attach(model, **how)

    def transformers_parallel() -> tuple[Any, lora_mux.Mux]:
        model = load(distributed_config=DistributedConfig(tp_size=dist.get_world_size()))
        return model, attach(model)

    def reduces(model: Any) -> int:
        with torch.no_grad(), CommDebugMode() as mode:
            model(IDS)
        return sum(mode.get_comm_counts().values())

    cases: dict[str, Callable[[], tuple[Any, lora_mux.Mux]]] = {
        "transformers": transformers_parallel,
        "parallelize_module": lambda: prepared(torch_parallel, first=False),
        "with memory": lambda: prepared(torch_parallel, first=False, memory="1MiB"),
        "fully_shard": lambda: prepared(fsdp, first=False),
        "attach, then fully_shard": lambda: prepared(fsdp, first=True),
    }
    for name, build in cases.items():
        try:
            model, mux = build()
            with torch.no_grad():
                got = whole(model(IDS).logits)
            report(f"{name}: error", (got - want).abs().max().item())
            tracked = (whole(model(IDS).logits) - want).abs().max().item()
            report(f"{name}: error with gradients", tracked)
            same = model.generate(IDS, max_new_tokens=6, do_sample=False)
            report(f"{name}: same tokens", bool(torch.equal(same, tokens)))
            report(f"{name}: same keys", list(model.state_dict()) == keys)
            found = gradients(model, mux)
            errors = [(found[n] - g).abs().max() / g.abs().max() for n, g in wanted.items()]
            report(f"{name}: gradient error", max(errors).item())
        except Exception:
            report(f"{name}: failed", traceback.format_exc())
    for backend in ("reference", "triton"):
        model = load()
        torch_parallel(model, mesh)
        found = gradients(model, attach(model, backend=backend))
        error = (found["weights"] - wanted["weights"]).abs().max() / wanted["weights"].abs().max()
        report(f"{backend}: gradient error", error.item())
    report("effect", (want - base).abs().max().item())
    model = load(distributed_config=DistributedConfig(tp_size=dist.get_world_size()))
    before = reduces(model)
    mux = attach(model)
    report("communication", [before, reduces(model)])
    layer = model.model.layers[0].self_attn.q_proj
    report("columns held", [layer.mux_pool.B_rows.shape[1], layer.out_features])
    shapes = {mux.targets[0]: (torch.ones(2, 64), torch.ones(32, 2))}
    report("refused: shapes of a part", refusal(lambda: mux.add_adapter("x", shapes, alpha=1)))
    dora = LoraWeights(torch.ones(2, 64), torch.ones(64, 2), 1.0), torch.ones(64), torch.float32
    report("refused: DoRA", refusal(lambda: with_gain(layer, *dora, "x")))
    mux.detach()
    with torch.no_grad():
        report("detached: error", (model(IDS).logits - base).abs().max().item())
    uneven = torch.nn.Sequential(torch.nn.Linear(8, 7))
    parallelize_module(uneven, mesh, {"0": ColwiseParallel()})
    report("refused: uneven", refusal(lambda: lora_mux.attach(uneven)))
    patched = torch.nn.Sequential(torch.nn.Linear(8, 6))
    parallelize_module(patched, mesh, {"0": ColwiseParallel()})
    patched[0].forward = patched[0].forward
    report("refused: patched", refusal(lambda: lora_mux.attach(patched)))
    dist.destroy_process_group()


def refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except lora_mux.LoraMuxError as error:
        return str(error)
    return "not refused"


def report(case: str, value: object) -> None:
    if dist.get_rank() == 0:
        print(f"{case}= {value!r}", flush=True)


if __name__ == "__main__":
    with without_repetitions():
        main()
