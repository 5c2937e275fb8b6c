"""Compile the kernels ahead of time, without a GPU and without torch, and read what came out.

    python tests/support/codegen.py sm_90 gfx942         a line for each kernel: both ends of each
                                                         tile size on sm_90, elsewhere the widest
    python tests/support/codegen.py --ends sm_90 gfx942  both ends on every SWEPT one
    python tests/support/codegen.py --all sm_90 gfx942   every config of `choose`, all dtypes

Without a name, for all architectures. Uses only triton and the tools in its wheel, so that it also
runs in an environment that holds nothing but the version of triton that a GPU machine has.
"""

import dataclasses
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from load_chain import chain, ways_through

# The package without its __init__, whose launchers need torch.
_package = types.ModuleType("kernels_src")
_package.__path__ = [str(Path(__file__).parents[2] / "kernels" / "src")]
sys.modules["kernels_src"] = _package
config = importlib.import_module("kernels_src.config")
tensors = importlib.import_module("kernels_src.tensors")
plan_kernel = importlib.import_module("kernels_src.plan").plan_kernel
shrink_kernel = importlib.import_module("kernels_src.shrink").shrink_kernel
expand_kernel = importlib.import_module("kernels_src.expand").expand_kernel
fused_kernel = importlib.import_module("kernels_src.fused").fused_kernel
weight_gradient = importlib.import_module("kernels_src.weight_gradient")

GRADIENT = ("weight_gradient", "reduce", "parts")
CUOBJDUMP = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
# Bytes of shared memory that a program may have, from NVIDIA's and AMD's tables.
SHARED = {
    **{"sm_70": 98304, "sm_75": 65536},
    **{"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448},
    **{"sm_100": 232448, "sm_103": 232448, "sm_120": 101376, "gfx942": 65536},
}
PROCESSORS = {
    **{"sm_70": 80, "sm_75": 40},
    **{"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132},
    **{"sm_100": 148, "sm_103": 148, "sm_120": 170, "gfx942": 304},
}


def _architecture(name: str) -> Any:
    number = name.removeprefix("sm_")
    cores = "mfma" if number == name else config.nvidia_tensor_cores(int(number) // 10)
    return config.Architecture(cores, PROCESSORS[name], SHARED[name])


ARCHITECTURES = {name: _architecture(name) for name in SHARED}
SWEPT = ("sm_80", "sm_90", "sm_100", "gfx942")  # one for each kind of tensor cores
DTYPES = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}


def signatures(dtype: str) -> dict[str, dict[str, Any]]:
    """The arguments of each kernel that are no constexpr, as the launchers pass them."""
    x = f"*{dtype}"
    plan = tensors.Plan(
        **dict.fromkeys(("slots", "union", "length", "counters"), "*i32"),
        **{"strength": "*fp32", "place": "*i16", "state": "*i8"},
    )
    tables = {"offset": "*i32", "rank": "*i32", "scaling": "*fp32"}
    both = {"plan": plan, "pool": tensors.Pool(A_rows=x, B_rows=x, constant="*u1", **tables)}
    items = {"start_ptr": "*i32", "item_ptr": "*i32"}
    to_sum = {"out_ptr": "*fp32", "pair_ptr": "*i32", **items}
    pointers = {
        "plan": {"index_ptr": "*i64", "weight_ptr": "*fp32", "live_ptr": "*i32", "plan": plan},
        "shrink": {"x_ptr": x, "h_ptr": "*fp32", **both},
        "expand": {"h_ptr": "*fp32", "y_ptr": x, **both},
        "fused": {"x_ptr": x, "W_ptr": x, "bias_ptr": x, "h_ptr": "*fp32", "y_ptr": x, **both},
        "weight_gradient": {"u_ptr": "*fp32", "v_ptr": x, "gain_ptr": "*fp32", **to_sum},
        "reduce": {"part_ptr": "*fp32", "out_ptr": "*fp32", **items},
        "parts": {"u_ptr": "*fp32", "out_ptr": "*fp32"},
    }
    ints = {
        "plan": "M J U stride_im stride_ij stride_wm stride_wj",
        "shrink": "M K J R U S stride_xm stride_ac",
        "expand": "M N J R U S stride_bc stride_ym",
        "fused": "M K N J R U S stream_number groups "
        "stride_xm stride_wn stride_ac stride_bc stride_ym",
        "weight_gradient": "C J R rows stride_vm",
        "reduce": "C rows",
        "parts": "n",
    }
    return {
        kernel: {**pointers[kernel], **dict.fromkeys(names.split(), "i32")}
        for kernel, names in ints.items()
    }


# The launchers see to it. K, N and their strides are given in units of 16 when they can be.
DIVISIBLE = {"R", "stride_ac", "stride_bc"}


def compile_kernel(
    kernel: str,
    dtype: str,
    architecture: str,
    chosen: Any,
    window: int,
    unit: int = 16,
    ranks: int = 0,
) -> Any:
    """The compiled kernel of a Config; `window` is BLOCK_U (BLOCK_J of the plan).

    With `ranks`, B stands by columns, in blocks of as many rank rows.
    """
    functions = {
        "plan": plan_kernel,
        "shrink": shrink_kernel,
        "expand": expand_kernel,
        "fused": fused_kernel,
        "weight_gradient": weight_gradient.weight_gradient_kernel,
        "reduce": weight_gradient.reduce_kernel,
        "parts": weight_gradient.parts_kernel,
    }
    if kernel == "parts":
        constants: dict[str, Any] = {"PARTS": 8, "BLOCK": 1024}
        warps, stages = 4, 3
    elif kernel in GRADIENT:
        constants = {"GROUP": chosen.group, "BLOCK_P": chosen.block_p}
        warps, stages = chosen.warps, chosen.stages
        if kernel == "reduce":
            constants |= {"BLOCK_C": 64, "SPLIT": chosen.split}
            warps, stages = 4, 3
        else:
            constants |= {"BLOCK_C": chosen.block_c, "UNIT": unit, "DOT_DTYPE": DTYPES[dtype]}
    elif kernel == "plan":
        constants = {"BLOCK_J": window, "BLOCK_U": 16}
        warps, stages = 8 if chosen.block_m * window > 2048 else 4, 3
    else:
        constants = {
            "BLOCK_U": window,
            "SLOTS": window,
            "SPLIT_K": chosen.split_k,
            "DOT_DTYPE": DTYPES[dtype],
        }
    if kernel == "shrink":
        constants |= {"WEIGHTED": True, "X_UNIT": unit}
        constants |= {"GROUP": chosen.shrink_group, "BLOCK_K": chosen.block_k}
        warps, stages = chosen.shrink_warps, chosen.shrink_stages
        stages = stages if unit > 1 or dtype == "fp32" else 1  # as kernels/src/sizes.py has it
    if kernel == "expand":
        constants |= {"GROUP": chosen.expand_group, "BLOCK_N": chosen.block_n, "Y_UNIT": unit}
        constants |= {"WALK": chosen.walk, "RANKS": ranks}
        warps, stages = chosen.expand_warps, chosen.expand_stages
    if kernel == "fused":
        constants |= {"X_UNIT": unit, "Y_UNIT": unit}
        constants["PREFETCHES"] = architecture.startswith("sm_")  # by NVIDIA's assembly
        constants |= {"BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k}
        constants |= {"SHRINK_GROUP": chosen.shrink_group, "EXPAND_GROUP": chosen.expand_group}
        warps, stages = chosen.warps, chosen.stages
    if kernel not in GRADIENT:
        constants["BLOCK_M"] = chosen.block_m
    fn, given = functions[kernel], signatures(dtype)[kernel]
    names = fn.arg_names
    aligned = []  # paths of the arguments: (i,), or (i, j) in a tuple
    for name, type_ in given.items():
        if isinstance(type_, tuple):
            aligned += [(names.index(name), j) for j in range(len(type_))]
        elif name in DIVISIBLE or name.endswith("_ptr"):
            aligned.append((names.index(name),))
    source = ASTSource(
        fn=fn,
        signature={name: given.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=dict.fromkeys(aligned, [["tt.divisibility", 16]]),
    )
    options = {"num_warps": warps, "num_stages": stages}
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture[3:]), 32)
        if kernel not in ("plan", "reduce", "parts") and chosen.registers is not None:
            options["maxnreg"] = chosen.registers if unit >= 8 else 255
    else:
        target = GPUTarget("hip", architecture, 64)
    return triton.compile(source, target=target, options=options)


def report(
    kernel: str,
    dtype: str,
    architecture: str,
    chosen: Any,
    window: int,
    unit: int = 16,
    ranks: int = 0,
) -> dict[str, Any]:
    """What the machine code of a kernel needs and uses."""
    compiled = compile_kernel(kernel, dtype, architecture, chosen, window, unit, ranks)
    found = {
        "kernel": kernel,
        "dtype": dtype,
        "architecture": architecture,
        "window": window,
        "unit": unit,
        "ranks": ranks,
        "config": dataclasses.asdict(chosen),
        "shared": compiled.metadata.shared,
    }
    if architecture.startswith("gfx"):
        return found | _amd(compiled.asm["amdgcn"])
    sass = cuobjdump("-sass", compiled.asm["cubin"])
    found |= _nvidia(compiled, sass)
    # A product by tcgen05 is waited for in a loop: there are more ways than can be walked.
    return found | {"chains": {} if found["tcgen05"] else _chains(kernel, sass)}


def _chains(kernel: str, sass: str) -> dict[str, dict[str, Any]]:
    """Kernel -> the loads that follow one another in it; a fused one's programs of shrink apart.

    Empty where no tensor core multiplies (the plan, fp32, and old cards), and in a backward.
    """
    ways = [] if kernel in GRADIENT else ways_through(sass)
    if not ways:
        return {}
    if kernel != "fused":
        return {kernel: dataclasses.asdict(chain(ways, 1, polls=False))}
    base, shrink = chain(ways, 2, polls=True), chain(ways, 1, polls=False)
    return {"fused": dataclasses.asdict(base), "fused's shrink": dataclasses.asdict(shrink)}


def _nvidia(compiled: Any, sass: str) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    usage = cuobjdump("-res-usage", compiled.asm["cubin"])
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", sass)
    wgmma = re.findall(r"wgmma\.mma_async[^;]*;", ptx)
    return {
        "registers": int(registers),
        "spills": int(stack),
        "mma": ptx.count("mma.sync"),
        "wgmma": len(wgmma),
        # Accumulators stand in braces; a second pair is a left operand in registers.
        "wgmma_from_registers": sum(len(re.findall(r"\{", line)) > 1 for line in wgmma),
        "tcgen05": ptx.count("tcgen05.mma"),
        "loads": sorted({o for o in operations if o.startswith("LDG")}),
        "compare_and_swap": [o for o in operations if ".CAS" in o],
        "float_atomics": [o for o in operations if o.startswith(("RED", "ATOM")) and "F" in o],
    }


def _amd(assembly: str) -> dict[str, Any]:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + field("private_segment_fixed_size"),
        "mma": len(re.findall("v_mfma", assembly)),
        "loads_of_16_bytes": len(re.findall("(?:global|buffer)_load_dwordx4", assembly)),
        "compare_and_swap": re.findall(r"\w*cmpswap\w*", assembly),
        "float_atomics": re.findall(r"\w*atomic\w*add_f\w*", assembly),
    }


def cuobjdump(what: str, cubin: bytes) -> str:
    """What NVIDIA's disassembler, of triton's wheel, prints of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True)
    return done.stdout + done.stderr


def shipped(architecture: str, itemsize: int) -> list[Any]:
    """Every Config that `choose` returns for the architecture, over rows, sizes and ranks."""
    grid = itertools.product(
        (1, 16, 17, 64, 128, 256, 257, 512, 1024, 2048, 4096, 16384, 65536),  # rows
        (64, 512, 1024, 4096, 14336),  # in_features
        (64, 1024, 4096, 28672),  # out_features
        (False, True),  # batch_invariant
    )
    return list(
        dict.fromkeys(
            config.choose(*sizes, itemsize, ARCHITECTURES[architecture], None, invariant)
            for *sizes, invariant in grid
        )
    )


def shipped_fused(architecture: str) -> list[Any]:
    """Every FusedConfig that ships for the architecture."""
    columns = 512, 1024, 2048, 4096, 6144, 8192, 14336, 28672
    sizes = itertools.product((1, 32), columns, (1, 2))
    machine = ARCHITECTURES[architecture]
    found = (config.choose_fused(rows, N, machine, places) for rows, N, places in sizes)
    return list(dict.fromkeys(found))


def shipped_gradient(architecture: str, itemsize: int) -> list[Any]:
    """Every GradientConfig that ships for the architecture, over batches, ranks and columns."""
    grid = itertools.product(
        (16, 1024, 16384, 1 << 20),  # pairs
        (1, 16, 1024),  # adapters
        (1, 2, 3, 32),  # rank blocks of each
        (64, 1024, 4096, 28672),  # columns
    )
    machine = ARCHITECTURES[architecture]
    found = (
        config.choose_gradient(
            pairs, adapters, adapters * blocks, columns, itemsize, machine, invariant
        )
        for pairs, adapters, blocks, columns in grid
        for invariant in (False, True)
    )
    return list(dict.fromkeys(found))


def half_dtypes(architecture: str) -> tuple[str, ...]:
    """The 16-bit types that run there, the last of which stands for all."""
    return ("fp16",) if ARCHITECTURES[architecture].tensor_cores == "none" else ("fp16", "bf16")


def few(architecture: str) -> Iterator[dict[str, Any]]:
    """The reports of what needs the most registers, and the most shared memory where it is short.

    A compile of the fused kernel takes as long as five of the others.
    """
    half, swept = half_dtypes(architecture)[-1], architecture in SWEPT
    for dtype in ("fp32", half) if swept else (half,):
        configs = shipped(architecture, ITEMSIZE[dtype])
        widest = max(configs, key=lambda c: (c.block_m, c.split_k, c.expand_group))
        for kernel in ("shrink", "expand"):
            yield report(kernel, dtype, architecture, widest, 64)
    if half == "bf16" and (swept or SHARED[architecture] < SHARED["sm_80"]):
        chosen = max(shipped_fused(architecture), key=lambda c: (c.block_m + c.block_n) * c.block_k)
        yield report("fused", half, architecture, chosen, 16)
    yield from sweep_gradient(architecture, (half,), widest=True)
    if swept:
        yield plan_report(architecture, 64, 8)


def plan_report(architecture: str, block_m: int, places: int) -> dict[str, Any]:
    chosen = dataclasses.replace(shipped(architecture, 4)[0], block_m=block_m)
    return report("plan", "fp32", architecture, chosen, places)


def sweep_gradient(
    architecture: str, dtypes: tuple[str, ...], units: tuple[int, ...] = (16,), widest: bool = False
) -> Iterator[dict[str, Any]]:
    """The reports of the weight gradient, one for all splits, and of what adds their parts."""
    for dtype in dtypes:
        configs = shipped_gradient(architecture, ITEMSIZE[dtype])
        tiles = list({dataclasses.replace(c, split=1): c for c in configs})
        for chosen in [max(tiles, key=lambda c: c.group)] if widest else tiles:
            for unit in units:
                yield report("weight_gradient", dtype, architecture, chosen, 16, unit)
    sums = {c.split: c for c in configs if c.split > 1}
    for split in [max(sums)] if widest else sums:
        yield report("reduce", "fp32", architecture, sums[split], 16)
    yield report("parts", "fp32", architecture, configs[0], 16)


def sweep_fused(architecture: str, everything: bool) -> Iterator[dict[str, Any]]:
    """The reports of the fused kernel: all, or those of the fewest and of the most rows."""
    configs = shipped_fused(architecture)
    if everything:
        for chosen, window, unit in itertools.product(configs, (16, 64), (16, 8)):
            for dtype in ("fp16", "bf16") if unit == 16 else ("bf16",):
                yield report("fused", dtype, architecture, chosen, window, unit)
        return
    for chosen in (configs[0], configs[-1]):
        yield report("fused", "bf16", architecture, chosen, 16)


def sweep(
    architectures: list[str], everything: bool, ends_of: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """The reports: of every config, or of the two ends (K splits, window) of each tile size.

    Of the latter for `ends_of`, and a few for the others. And, of one end, with rows of sizes that
    are not multiples of 16.
    """
    for architecture in architectures or ARCHITECTURES:
        if not everything and architecture not in ends_of:
            yield from few(architecture)
            continue
        halves = half_dtypes(architecture)
        for dtype in ("fp32", *(halves if everything else halves[-1:])):
            configs = shipped(architecture, ITEMSIZE[dtype])
            for block_m in sorted({c.block_m for c in configs}):
                of_tile = [c for c in configs if c.block_m == block_m]
                ends = sorted(of_tile, key=lambda c: (c.split_k, c.expand_group, c.block_n))
                for kernel in ("shrink", "expand"):
                    if everything:
                        pairs = list(itertools.product(of_tile, (16, 32, 64)))
                    else:
                        pairs = [(ends[0], 16), (ends[-1], 64)]
                    seen = set()
                    for chosen, window in pairs:
                        ignored = "expand" if kernel == "shrink" else "shrink"
                        fields = dataclasses.asdict(chosen).items()
                        key = (window, *(v for k, v in fields if not k.startswith(ignored)))
                        if key not in seen:
                            seen.add(key)
                            yield report(kernel, dtype, architecture, chosen, window)
                    if kernel == "expand" and dtype == halves[-1]:
                        yield report(kernel, dtype, architecture, ends[-1], 64, 16, ranks=16)
                    if dtype == halves[-1] and (everything or block_m == 64):
                        yield report(kernel, dtype, architecture, ends[-1], 64, 8)
                        sizes = block_m, 4095, 4095, ITEMSIZE[dtype]
                        odd = config.choose(*sizes, ARCHITECTURES[architecture], block_m)
                        yield report(kernel, dtype, architecture, odd, 64, 1)
        if everything:
            yield from sweep_gradient(architecture, ("fp32", *halves), (16, 8, 1))
        else:
            yield from sweep_gradient(architecture, ("fp32", halves[-1]))
            yield from sweep_gradient(architecture, halves[-1:], (1,), widest=True)
        if "bf16" in halves:
            yield from sweep_fused(architecture, everything)
        for block_m, places in ((16, 1), (64, 8), (64, 32))[: 3 if everything else 2]:
            yield plan_report(architecture, block_m, places)


if __name__ == "__main__":
    options = {word for word in sys.argv[1:] if word.startswith("--")}
    names = [word for word in sys.argv[1:] if word not in options]
    ends_of = SWEPT if "--ends" in options else ("sm_90",)
    for line in sweep(names, "--all" in options, ends_of):
        print(json.dumps(line), flush=True)
