"""Kernels whose chains their source states: python tests/support/pointer_chase.py sm_90 ...

Prints, for each architecture and depth, what load_chain.py finds in the machine code.
"""

import json
import os
import sys
from dataclasses import asdict

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from codegen import cuobjdump
from load_chain import chain, ways_through


@triton.jit
def chase(table_ptr, x_ptr, y_ptr, turns, DEPTH: tl.constexpr):
    """y = sum_t x_t x_t with x_t behind DEPTH loads, each of which says where the next one is.

    As many loads that wait for nothing stand beside them. A last load follows the products.
    """
    offs = tl.arange(0, 32)
    at = tl.program_id(0)
    for _ in tl.static_range(DEPTH):
        at = tl.load(table_ptr + at)
    apart = tl.program_id(0)
    for i in tl.static_range(DEPTH):
        apart += tl.load(table_ptr + 64 * (i + 1))
    tile = x_ptr + at * 1024 + offs[:, None] * 32 + offs[None, :]
    acc = tl.zeros((32, 32), tl.float32)
    for t in tl.range(0, turns, num_stages=1):
        x = tl.load(tile + t * 1024)
        acc = tl.dot(x, x, acc)
    last = tl.load(table_ptr + tl.sum(tl.sum(acc, axis=1), axis=0).to(tl.int32))
    y_tile = y_ptr + (apart + last) * 1024 + offs[:, None] * 32 + offs[None, :]
    tl.store(y_tile, acc.to(tl.float16))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for depth in (1, 4):
            source = ASTSource(
                fn=chase,
                signature={
                    **{"table_ptr": "*i32", "x_ptr": "*fp16", "y_ptr": "*fp16", "turns": "i32"},
                    "DEPTH": "constexpr",
                },
                constexprs={(4,): depth},
            )
            target = GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
            sass = cuobjdump("-sass", triton.compile(source, target=target).asm["cubin"])
            found = asdict(chain(ways_through(sass), 1, polls=False))
            print(json.dumps({"architecture": name, "depth": depth, **found}), flush=True)
