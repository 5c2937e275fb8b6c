"""Break one line at a time, and see a test turn red: python tests/mutate.py [part of a name]

Each mutation is made in a copy of the package, against which the named tests run. One that no test
notices is a hole in the tests, and makes the script fail. Takes about half an hour on two cores.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
KERNELS = ("tests/test_kernels.py",)
FUSED = ("tests/test_fused.py",)
BACKEND = ("tests/test_triton_backend.py",)
GROUPED = ("tests/test_grouped.py", "tests/test_linear.py")
CONTINUOUS = ("tests/test_continuous.py",)
CHECKPOINTING = ("tests/test_checkpointing.py",)
MODULE = ("tests/test_module.py",)
COMPILE = ("tests/test_compile.py",)
RESIDENCY = ("tests/test_residency.py",)
STATES = ("tests/test_residency_states.py",)
OPERATORS = ("tests/test_operators.py", "tests/test_triton_backend.py")


class Mutation(NamedTuple):
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = KERNELS


PLAN, SHRINK, EXPAND = (f"kernels/{name}.py" for name in ("plan", "shrink", "expand"))
FUSE = "kernels/fused.py"
BLOCKS, LAUNCH = "kernels/rank_blocks.py", "kernels/launch.py"
MUTATIONS = {
    "plan: a freed handle counts": Mutation(
        PLAN, "alive = (live == handle) & (handle >= 0)", "alive = (live >= 0) & (handle >= 0)"
    ),
    "plan: a negative handle counts": Mutation(
        PLAN, "alive = (live == handle) & (handle >= 0)", "alive = live == handle"
    ),
    "plan: reads outside of the table": Mutation(
        PLAN, "(handle & SLOT_MASK), mask", "handle, mask"
    ),
    "plan: duplicates stay in the union": Mutation(
        PLAN, "(offs == 0) | (ordered !=", "(offs >= 0) | (ordered !="
    ),
    "plan: the union is one place off": Mutation(PLAN, "axis=0) - 1", "axis=0)"),
    "plan: the last place instead of the first": Mutation(
        PLAN,
        "tl.min(tl.where(here, offs_j[None, :], BLOCK_J), axis=1)",
        "tl.max(tl.where(here, offs_j[None, :], -1), axis=1)",
    ),
    "plan: weights masked by multiplying": Mutation(
        PLAN, "tl.where(here, weight, 0.0)", "here * weight"
    ),
    "plan: a dead handle is a selection": Mutation(PLAN, "tl.where(dead, 2,", "tl.where(dead, 1,"),
    "plan: rows past the end select": Mutation(PLAN, "mask_m = offs_m < M", "mask_m = offs_m <= M"),
    "plan: half of the union": Mutation(PLAN, "(pid_u + 1) * BLOCK_U", "pid_u * BLOCK_U + 8"),
    "shrink: no scaling": Mutation(SHRINK, "(strength * scaling[None, :])", "strength"),
    "shrink: no strength": Mutation(
        SHRINK, "(strength * scaling[None, :])", "(scaling[None, :] + 0.0 * strength)"
    ),
    "shrink: a rank row too many": Mutation(SHRINK, "> offs_b[None, :]", ">= offs_b[None, :]"),
    "shrink: a column of x too many": Mutation(SHRINK, "offs_k < K)", "offs_k <= K)"),
    "shrink: each split sums everything": Mutation(
        SHRINK, "range(pid_k * BLOCK_K, K, BLOCK_K * SPLIT_K)", "range(0, K, BLOCK_K)"
    ),
    "shrink: the bias in every split": Mutation(SHRINK, "tl.where(pid_k == 0, 1.0, 0.0)", "1.0"),
    "shrink: every program does every group": Mutation(
        SHRINK,
        "range(first_group * GROUP, total, groups * GROUP)",
        "range(0, total, GROUP)",
    ),
    "shrink: only the first window": Mutation(SHRINK, "union_tile + window + u", "union_tile + u"),
    "shrink: h of rows that do not select": Mutation(
        SHRINK, "mask=selects[:, :, None])", "mask=(place >= -1)[:, :, None])"
    ),
    "shrink: the next row's place": Mutation(
        SHRINK, "tile_m[:, None] * J + place", "tile_m[:, None] * J"
    ),
    "expand: h rounded to the type of B": Mutation(
        EXPAND, "if DOT_DTYPE != tl.float32:", "if DOT_DTYPE == tl.float64:"
    ),
    "expand: an overflow is NaN": Mutation(EXPAND, 'tl.abs(low) < float("inf")', "low == low"),
    "expand: every row is written": Mutation(
        EXPAND, "mask=(changes | (state == 2))[:, None]", "mask=(offs_m < M)[:, None]"
    ),
    "expand: a dead handle is the base": Mutation(EXPAND, 'float("nan")', "0.0"),
    "expand: a rank row too many": Mutation(EXPAND, "> offs_b[None, :]", ">= offs_b[None, :]"),
    "expand: a column of y too many": Mutation(EXPAND, "(offs_n < N)", "(offs_n <= N)"),
    "expand: the first split only": Mutation(EXPAND, "static_range(SPLIT_K)", "static_range(1)"),
    "expand: the first block of each adapter": Mutation(EXPAND, "* R + first[None, :]", "* R"),
    "expand: masked by multiplying": Mutation(
        EXPAND,
        """mask=(place >= 0)[:, :, None],
                    other=0.0,
                    cache_modifier=".cg",
                )""",
        "mask=(place >= -1)[:, :, None], other=0.0) * (place >= 0)[:, :, None]",
    ),
    "expand: the delta rounded before the sum": Mutation(
        EXPAND, "y += tl.trans(acc)", "y += tl.trans(acc).to(y_ptr.dtype.element_ty).to(tl.float32)"
    ),
    "blocks: one too few": Mutation(BLOCKS, "(rank + RANK_BLOCK - 1)", "(rank)"),
    "blocks: the wrong adapter at a border": Mutation(
        BLOCKS, "<= block[:, None]", "< block[:, None]"
    ),
    "blocks: the first row of an adapter always": Mutation(
        BLOCKS, "(block - start) * RANK_BLOCK", "(start - start)"
    ),
    "launch: a tile too few": Mutation(
        LAUNCH,
        "expand_kernel[(triton.cdiv(M, config.block_m)",
        "expand_kernel[(max(1, M // config.block_m)",
    ),
    "launch: columns too few": Mutation(
        LAUNCH, "triton.cdiv(N, config.block_n))", "max(1, N // config.block_n))"
    ),
    "plan: counters begin as they come": Mutation(
        PLAN, "tl.store(counters_ptr +", "tl.load(counters_ptr +", FUSED
    ),
    "fused: nobody waits": Mutation(
        FUSE, "if tl.load(length_ptr + pid_m) > 0:", "if pid < 0:", FUSED
    ),
    "fused: waits for one too few": Mutation(
        FUSE, "while done < programs", "while done < programs - 1", FUSED
    ),
    "fused: what was stored is not handed on": Mutation(
        FUSE, 'sem="release"', 'sem="relaxed"', FUSED
    ),
    "fused: what was handed on is not taken": Mutation(
        FUSE, 'sem="acquire"', 'sem="relaxed"', FUSED
    ),
    "fused: counters stay": Mutation(FUSE, "tl.num_programs(0) - 1", "-1", FUSED),
    "fused: no bias": Mutation(FUSE, "if HAS_BIAS:", "if False:", FUSED),
    "fused: a dead handle is the base": Mutation(FUSE, 'float("nan")', "0.0", FUSED),
    "fused: a column of W too many": Mutation(
        FUSE, "offs_m < M, offs_n < N", "offs_m < M, offs_n <= N", FUSED
    ),
    "fused: a row of x too many": Mutation(
        FUSE, "offs_m < M, offs_n < N", "offs_m <= M, offs_n < N", FUSED
    ),
    "fused: a step of K too many": Mutation(FUSE, "(k + offs_k < K)", "(k + offs_k <= K)", FUSED),
    "fused: a last group of tiles that is too wide": Mutation(
        FUSE, "tl.minimum(tiles - first, SWIZZLE)", "SWIZZLE", FUSED
    ),
    "fused: one part of K": Mutation(
        FUSE, "pid // (tiles * groups),", "pid // (tiles * groups) * 0,", FUSED
    ),
    "fused: all streams share": Mutation(LAUNCH, "if place < STREAMS", "if True", FUSED),
    "fused: whatever the base": Mutation("linear.py", "not self.mux_owns_output or", "", FUSED),
    "fused: gradients are lost": Mutation(
        "linear.py", "if ops.tracked(x, weight, bias):", "if False:", FUSED
    ),
    "fused: gradients of weights are lost": Mutation(
        "linear.py", "fusable and not spread.weight.requires_grad", "fusable", FUSED
    ),
    "fused: a wrapped weight": Mutation("linear.py", "type(weight) is nn.Parameter and", "", FUSED),
    "fused: rows that are no multiple of 16 bytes": Mutation(
        "ops.py", "if N % 8 or K % 8", "if False", FUSED
    ),
    "fused: without having been measured": Mutation(
        "ops.py", "tuned.fuses(launch", "not tuned.fuses(launch", ("tests/test_tuned.py",)
    ),
    "grouped: repeated rows are added": Mutation(
        "grouped.py", "selects = (place < count)", "selects = (place <= count)", GROUPED
    ),
    "grouped: every group is in order": Mutation(
        "grouped.py",
        "if (np.diff(rows) == 1).all():",
        "if len(np.unique(rows)) == len(rows):",
        GROUPED,
    ),
    "grouped: no scaling": Mutation("grouped.py", "[[[span.scaling for", "[[[1.0 for", GROUPED),
    "grouped: the first strength for all": Mutation(
        "grouped.py", "bool((wanted == wanted[0]).all())", "True", GROUPED
    ),
    "grouped: layers share a cut whatever they hold": Mutation(
        "grouped.py",
        "key = dtype, sizes, tuple(map(pool.spans.get, self.used))",
        "key = dtype",
        GROUPED,
    ),
    "grouped: a row gets all adapters": Mutation(
        "grouped.py", "h.view(bits.dtype).bitwise_and_(bits)", "pass", GROUPED
    ),
    "grouped: masked by multiplying": Mutation(
        "grouped.py", "h.view(bits.dtype).bitwise_and_(bits)", "h *= bits != 0", GROUPED
    ),
    "grouped: base rows are added to": Mutation(
        "grouped.py", "some = selects[0].any(1)", "some = selects[0].any(1) | True", GROUPED
    ),
    "grouped: base rows are rounded": Mutation(
        "grouped.py",
        "return rounded if plan.partly is None else",
        "return rounded if True else",
        GROUPED,
    ),
    "grouped: several products are summed in bf16": Mutation(
        "grouped.py", "torch.float32) if repeated else dtype)", "dtype))", GROUPED
    ),
    "grouped: no bias": Mutation(
        "grouped.py", "biases if constant.any()", "biases if False", GROUPED
    ),
    "grouped: the last weight of a slot that stands twice": Mutation(
        "grouped.py", "np.add.at(weight, wanted, strength)", "weight[wanted] = strength", GROUPED
    ),
    "grouped: another adapter's rank rows": Mutation(
        "grouped.py", "_rows(rank_rows)", "_rows(rank_rows[0] + np.arange(len(rank_rows)))", GROUPED
    ),
    "grouped: writes to what is not ours": Mutation(
        "grouped.py", "if owned and given == sums", "if given == sums", GROUPED
    ),
    "grouped: bound to another plan": Mutation(
        "grouped.py", "or bound.plan is not plan", "", GROUPED
    ),
    "grouped: bound to buffers that were replaced": Mutation(
        "grouped.py", 'or bound.A_rows is not buffers["A_rows"]', "", GROUPED
    ),
    "grouped: bound for another dtype": Mutation(
        "grouped.py", "or bound.given != (x.dtype, y.dtype)", "", GROUPED
    ),
    "pool: bound where rank rows were before": Mutation(
        "pool.py", "self.bound = None\n        old, new", "old, new", GROUPED
    ),
    "pool: bound to what was written over": Mutation(
        "pool.py", "self.bound = None\n        if weights", "if weights", GROUPED
    ),
    "pool: bound to buffers of before": Mutation(
        "pool.py", "self.bound = None\n        for name, new", "for name, new", GROUPED
    ),
    "pool: bound to buffers elsewhere": Mutation(
        "pool.py", "self.bound, scaling = None,", "scaling =", GROUPED
    ),
    "router: any pass is like the last": Mutation(
        "router.py", "if kept != case:", "if kept is None:", GROUPED
    ),
    "router: a plan for each pass": Mutation("router.py", "if kept != case:", "if True:", GROUPED),
    "linear: any routing is the last one": Mutation(
        "linear.py", "and torch.equal(index, self.handles)", "", GROUPED
    ),
    "linear: a removal is not seen": Mutation(
        "linear.py", "and version == self.version", "", GROUPED
    ),
    "operators: the gradient of x keeps the bias": Mutation(
        "operators.py", "B_rows=rows.A_rows, constant=None)", "B_rows=rows.B_rows)", OPERATORS
    ),
    "operators: the gradient of strength without scaling": Mutation(
        "operators.py", ".sum(2) * scaling)", ".sum(2))", OPERATORS
    ),
    "operators: dead handles are the base on the CPU": Mutation(
        "operators.py", "(plan.state == 2)", "(plan.state == 3)", OPERATORS
    ),
    "ops: writes to what is not ours": Mutation("ops.py", "if owned and", "if", BACKEND),
    "ops: gradients are lost": Mutation(
        "ops.py", "owned and not tracked(y, x, tensors.strength)", "owned", BACKEND
    ),
    "ops: no flag on the routing": Mutation("ops.py", "routing.found.state =", "_ =", BACKEND),
    "pool: always fits": Mutation(
        "pool.py", "return all(n <= h", "return True or all(n <= h", BACKEND
    ),
    "router: a graph answers with the base": Mutation(
        "graphs.py", "NOBODY = -2", "NOBODY = -1", BACKEND
    ),
    "router: a graph keeps its route": Mutation(
        "router.py", "captured.follow(self.in_force", "(self.in_force", BACKEND
    ),
    "router: a plan for each layer": Mutation("router.py", "self._plans.append(", "(", BACKEND),
    "router: a backward without its route": Mutation(
        "router.py", "self._past = past", "pass", CHECKPOINTING
    ),
    "router: a backward's route stays": Mutation(
        "router.py", "task_id() != -1", "task_id() != -2", CHECKPOINTING
    ),
    "router: a model that is run again forgets its pass": Mutation(
        "router.py", "if not _in_backward():", "if True:", CHECKPOINTING
    ),
    "graphs: a shape for each route": Mutation(
        "graphs.py", "missing = (0, self._places - index.shape[1])", "missing = (0, 0)", COMPILE
    ),
    "graphs: set_adapter in a shape of its own": Mutation(
        "graphs.py", "expand(self._rows, -1)", "expand(1, -1)", COMPILE
    ),
    "router: a trace is reported": Mutation(
        "router.py", "given.weight, Found())", "given.weight, given.found)", COMPILE
    ),
    "graphs: symbols outlive their trace": Mutation(
        "graphs.py", "if torch.compiler.is_compiling():", "if False:", COMPILE
    ),
    "linear: a patched forward hides the adapters": Mutation(
        "linear.py", 'vars(layer).pop("forward", None)', "None", MODULE
    ),
    "linear: what a patched forward returns is written to": Mutation(
        "linear.py", ", mux_owns_output=False", "", MODULE
    ),
    "linear: pools stay on the meta device": Mutation(
        "linear.py", "pool.to_empty(device=device)", "pass", MODULE
    ),
    "sharding: a bias of each process": Mutation(
        "sharding.py", "bias is not None and self.place", "False", ("tests/test_sharded.py",)
    ),
    "sharding: a delta over the old closure": Mutation(
        "sharding.py", 'held["self"].install_forward', "(lambda *a: 0)", ("tests/test_sharded.py",)
    ),
    "sharding: a part of the gradient": Mutation(
        "sharding.py",
        "whole.to_local(grad_placements=[Partial()])",
        "whole.to_local()",
        ("tests/test_sharded.py",),
    ),
    "continuous: prefixes are shared": Mutation(
        "continuous.py", "config.allow_block_sharing", "False", CONTINUOUS
    ),
    "continuous: children have no adapters": Mutation(
        "continuous.py", "range(self.num_return_sequences - 1)", "range(0)", CONTINUOUS
    ),
    "continuous: finished requests are kept": Mutation(
        "continuous.py", "in self.mux_started - known", "in set[str]()", CONTINUOUS
    ),
    "continuous: the users' route": Mutation(
        "router.py", "self._served if self._serving else self.chosen", "self.chosen", CONTINUOUS
    ),
    "live_peft: a model that believes to have adapters": Mutation(
        "live_peft.py", "_hf_peft_config_loaded = False", "_x = 0", ("tests/test_attach_peft.py",)
    ),
    "diffusers file: paths are patterns": Mutation(
        "diffusers_file.py", "re.escape(path)", "path", ("tests/test_diffusers_file.py",)
    ),
    "diffusers file: no metadata": Mutation(
        "diffusers_file.py", "if own else", "if not own else", ("tests/test_diffusers_file.py",)
    ),
    "route: packed samples of one adapter": Mutation(
        "router.py", "self._refuse_packed()", "pass", ("tests/test_generate.py",)
    ),
    "slots: a removed adapter stays alive": Mutation(
        "slots.py", "self._write(slot_of(handle), NONE)", "pass", BACKEND
    ),
    "runs: neighbours stay apart": Mutation(
        "runs.py", "at, start = at - 1, self._free[at - 1][0]", "pass", ("tests/test_runs.py",)
    ),
    "pool: rows slide without their values": Mutation(
        "pool.py", "buffer[new] = buffer[old].clone()", "pass", RESIDENCY
    ),
    "pool: rows slide over themselves": Mutation("pool.py", "buffer[left] = 0", "pass", RESIDENCY),
    "placing: what is asked for is evicted": Mutation(
        "residency.py", "self._pinned | set(wanted)", "self._pinned", RESIDENCY
    ),
    "placing: the pinned is evicted": Mutation(
        "residency.py", "self._pinned | set(wanted)", "set(wanted)", RESIDENCY
    ),
    "placing: the last routed makes room": Mutation(
        "residency.py",
        "self._recent[handle] = None\n            for",
        "pass\n            for",
        RESIDENCY,
    ),
    "placing: evicted before it is known to fit": Mutation(
        "placing.py", "raise PoolCapacityError(_full", "break; (_full", RESIDENCY
    ),
    "placing: total free is enough": Mutation(
        "placing.py",
        "if all(asis.take(rows) is not None for rows in needed):",
        "if True:",
        RESIDENCY,
    ),
    "residency: what is in force is evicted": Mutation(
        "router.py", "last = None if leaving else self.route", "last = None", RESIDENCY
    ),
    "residency: what a block goes back to is evicted": Mutation(
        "router.py", "[*outer, *heir,", "[*heir,", RESIDENCY
    ),
    "residency: what a backward needs is evicted": Mutation(
        "router.py",
        "*(past.route for past in self._awaited), self._served, last",
        "self._served, last",
        RESIDENCY,
    ),
    "residency: a changed file is read": Mutation(
        "tensorfile.py",
        "if _state(os.fstat(file.fileno())) != self._state:",
        "if False:",
        RESIDENCY,
    ),
    "residency: values that are not finite come in": Mutation(
        "checkpoint.py", "_check_finite(source, key, block[key])", "pass", RESIDENCY
    ),
    "residency: values that overflow come in": Mutation(
        "residency.py", "if torch.finfo(pool.A_rows.dtype).max < widest", "if False", RESIDENCY
    ),
    "adapters: removed under a forward in progress": Mutation(
        "adapters.py", "if users is not None and handle not in users:", "if True:", RESIDENCY
    ),
    "adapters: a replaced one stays for ever": Mutation(
        "adapters.py", "if users is not None and handle not in users:", "if False:", RESIDENCY
    ),
    "router: a sticky route does not follow": Mutation(
        "router.py", "self._heir = sticky[0], sticky[1].renamed(old, new)", "pass", RESIDENCY
    ),
    "router: a forward in progress changes its adapter": Mutation(
        "router.py",
        "self._heir = sticky[0], sticky[1].renamed(old, new)",
        "self._put(sticky[1].renamed(old, new))",
        RESIDENCY,
    ),
    "router: two forward passes at once": Mutation(
        "router.py", "if self._runner not in (None, threading.get_ident()):", "if False:", RESIDENCY
    ),
    "router: a refused pass forgets the batch": Mutation(
        "router.py", "if self._runner != threading.get_ident():", "if False:", RESIDENCY
    ),
    "mux: a route of before a reload": Mutation(
        "mux.py", "make() if first.named and", "first if first.named and", RESIDENCY
    ),
    "mux: kept routes outlive a reload": Mutation(
        "mux.py", "if self._edition != self._slots.edition:", "if False:", ("tests/test_mux.py",)
    ),
    "checkpoint: links lead anywhere": Mutation(
        "checkpoint.py", "if not file.is_symlink():", "if True:", ("tests/test_checkpoint.py",)
    ),
    "slots: removals are not counted": Mutation("slots.py", "self.version += 1", "pass", BACKEND),
}


def survives(mutation: Mutation) -> bool:
    """Whether the tests stay green with it."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "lora_mux"
        # As in a wheel, where kernels/src is lora_mux/kernels.
        shutil.copytree(ROOT / "lora_mux", package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "kernels" / "src", package / "kernels")
        file = package / mutation.file
        source = file.read_text(encoding="utf-8")
        if source.count(mutation.old) < 1:
            raise SystemExit(f"{mutation.file} no longer holds {mutation.old!r}")
        file.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        tests = [str(ROOT / test) for test in mutation.tests]
        options = ["-c", str(ROOT / "pyproject.toml"), "-x", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=folder,  # first on the path: the copy, not the installed package
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": folder},
        )
        if "passed" not in done.stdout and "failed" not in done.stdout and done.returncode >= 0:
            raise SystemExit(f"the tests did not run:\n{done.stdout}{done.stderr}")
        return done.returncode == 0


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = {name: m for name, m in MUTATIONS.items() if wanted in name}
    if not wanted and survives(Mutation("errors.py", "class LoraMuxError", "class LoraMuxError")):
        print("unbroken: green, as it should be", flush=True)
    alive = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for name, survived in zip(chosen, pool.map(survives, chosen.values()), strict=True):
            print(f"{'SURVIVED' if survived else 'noticed '}  {name}", flush=True)
            alive += [name] * survived
    print(f"{len(chosen) - len(alive)} of {len(chosen)} noticed")
    return 1 if alive else 0


if __name__ == "__main__":
    raise SystemExit(main())
