"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

CONFIG = "kernels/config.py"
EXPAND = "kernels/expand.py"
FUSED = "kernels/fused.py"
GRADIENT = "kernels/weight_gradient.py"
LAUNCH = "kernels/launch.py"
PAIRS = "kernels/pairs.py"
PLAN = "kernels/plan.py"
RANK_BLOCKS = "kernels/rank_blocks.py"
READY = "kernels/ready.py"
SHRINK = "kernels/shrink.py"
SIZES = "kernels/sizes.py"
TEST_CONFIG = ("kernels/test_config.py",)
TEST_GRADIENT = ("kernels/test_weight_gradient.py",)
TEST_FUSED = ("kernels/test_fused.py",)
TEST_LAUNCH = ("kernels/test_launch.py",)
TEST_KERNELS = ("kernels/test_kernels.py",)
TEST_READY = ("kernels/test_ready.py",)
MUTATIONS = {
    "plan: a freed handle counts": Mutation(
        PLAN,
        "alive = (live == handle) & (handle >= 0)",
        "alive = (live >= 0) & (handle >= 0)",
        TEST_KERNELS,
    ),
    "plan: a negative handle counts": Mutation(
        PLAN, "alive = (live == handle) & (handle >= 0)", "alive = live == handle", TEST_KERNELS
    ),
    "plan: reads outside of the table": Mutation(
        PLAN, "(handle & SLOT_MASK), mask", "handle, mask", TEST_KERNELS
    ),
    "plan: duplicates stay in the union": Mutation(
        PLAN, "(offs == 0) | (ordered !=", "(offs >= 0) | (ordered !=", TEST_KERNELS
    ),
    "plan: the union is one place off": Mutation(PLAN, "axis=0) - 1", "axis=0)", TEST_KERNELS),
    "plan: the last place instead of the first": Mutation(
        PLAN,
        "tl.min(tl.where(here, offs_j[None, :], BLOCK_J), axis=1)",
        "tl.max(tl.where(here, offs_j[None, :], -1), axis=1)",
        TEST_KERNELS,
    ),
    "plan: weights masked by multiplying": Mutation(
        PLAN, "tl.where(here, weight, 0.0)", "here * weight", TEST_KERNELS
    ),
    "plan: a dead handle is a selection": Mutation(
        PLAN, "tl.where(dead, DEAD,", "tl.where(dead, SELECTS,", TEST_KERNELS
    ),
    "plan: rows past the end select": Mutation(
        PLAN, "mask_m = offs_m < M", "mask_m = offs_m <= M", TEST_KERNELS
    ),
    "plan: half of the union": Mutation(
        PLAN, "(pid_u + 1) * BLOCK_U", "pid_u * BLOCK_U + 8", TEST_KERNELS
    ),
    "shrink: no scaling": Mutation(
        SHRINK, "* scaling[None, :]", "+ 0.0 * scaling[None, :]", TEST_KERNELS
    ),
    "shrink: no strength": Mutation(SHRINK, "(strength.to(tl.float32) *", "(1.0 *", TEST_KERNELS),
    "blocks: a rank row too many": Mutation(
        RANK_BLOCKS, "> offs_b[None, :]", ">= offs_b[None, :]", TEST_KERNELS
    ),
    "shrink: a column of x too many": Mutation(SHRINK, "offs_k < K)", "offs_k <= K)", TEST_KERNELS),
    "shrink: each split sums everything": Mutation(
        SHRINK,
        "range(pid_k * BLOCK_K, end_k, BLOCK_K * SPLIT_K)",
        "range(0, end_k, BLOCK_K)",
        TEST_KERNELS,
    ),
    "shrink: the bias in every split": Mutation(
        SHRINK, "tl.where(pid_k == 0, 1.0, 0.0)", "1.0", TEST_KERNELS
    ),
    "shrink: every program does every group": Mutation(
        SHRINK, "start += groups * GROUP", "start += GROUP", TEST_KERNELS
    ),
    "shrink: only the first group of a program": Mutation(
        SHRINK, "left = window.total - start", "left = 0 * start", TEST_KERNELS
    ),
    "shrink: x for groups that do not exist": Mutation(
        SHRINK, "tl.where(start < window.total, K, 0)", "K", TEST_KERNELS
    ),
    "shrink: only the first window": Mutation(
        SHRINK, "range(BLOCK_U, asked.length, BLOCK_U)", "range(BLOCK_U, BLOCK_U)", TEST_KERNELS
    ),
    "shrink: h of rows that do not select": Mutation(
        SHRINK, "mask=selects[:, :, None])", "mask=(place >= -1)[:, :, None])", TEST_KERNELS
    ),
    "shrink: the next row's place": Mutation(
        SHRINK, "at = tile_m[:, None] * J + place", "at = tile_m[:, None] * J", TEST_KERNELS
    ),
    "expand: h rounded to the type of B": Mutation(
        EXPAND, "if DOT_DTYPE != tl.float32:", "if DOT_DTYPE == tl.float64:", TEST_KERNELS
    ),
    "expand: an overflow is NaN": Mutation(
        EXPAND, 'tl.abs(low) < float("inf")', "low == low", TEST_KERNELS
    ),
    "expand: every row is written": Mutation(
        EXPAND, "(changes | (state == DEAD))[:, None]", "(offs_m < M)[:, None]", TEST_KERNELS
    ),
    "expand: a dead handle is the base": Mutation(EXPAND, 'float("nan")', "0.0", TEST_KERNELS),
    "expand: a column of y too many": Mutation(
        EXPAND, "(offs_n < N)", "(offs_n <= N)", TEST_KERNELS
    ),
    "expand: the first split only": Mutation(
        EXPAND, "tl.sum(h, axis=3)", "tl.max(tl.where(offs_s == 0, h, -1e30), axis=3)", TEST_KERNELS
    ),
    "expand: the first block of each adapter": Mutation(
        EXPAND, "* sizes.R + blocks.first[None, :]", "* sizes.R", TEST_KERNELS
    ),
    "expand: masked by multiplying": Mutation(
        EXPAND,
        """mask=(place >= 0)[:, :, None, None],
            other=0.0,
            cache_modifier=".cg",
        )""",
        "mask=(place >= -1)[:, :, None, None], other=0.0) * (place >= 0)[:, :, None, None]",
        TEST_KERNELS,
    ),
    "expand: only the first window": Mutation(
        EXPAND, "range(BLOCK_U, asked.length, BLOCK_U)", "range(BLOCK_U, BLOCK_U)", TEST_KERNELS
    ),
    "expand: only the first group": Mutation(
        EXPAND, "left = window.total - start", "left = 0 * start", TEST_KERNELS
    ),
    "expand: the delta rounded before the sum": Mutation(
        EXPAND,
        "+ tl.trans(acc)",
        "+ tl.trans(acc).to(y_ptr.dtype.element_ty).to(tl.float32)",
        TEST_KERNELS,
    ),
    "blocks: one too few": Mutation(RANK_BLOCKS, "(rank + RANK_BLOCK - 1)", "(rank)", TEST_KERNELS),
    "blocks: the wrong adapter at a border": Mutation(
        RANK_BLOCKS, "<= block[:, None]", "< block[:, None]", TEST_KERNELS
    ),
    "blocks: the first row of an adapter always": Mutation(
        RANK_BLOCKS, "first = (block - (packed", "first = 0 * (block - (packed", TEST_KERNELS
    ),
    "blocks: an adapter begins where it ends": Mutation(
        RANK_BLOCKS, "(ends - blocks).to(tl.int64)", "ends.to(tl.int64)", TEST_KERNELS
    ),
    "blocks: slots past the union": Mutation(
        RANK_BLOCKS,
        "tl.arange(0, BLOCK_U) < asked.length",
        "tl.arange(0, BLOCK_U) >= 0",
        TEST_KERNELS,
    ),
    "blocks: rank rows of blocks that do not exist": Mutation(
        RANK_BLOCKS, "left = tl.where(exists, ", "left = tl.where(exists | True, ", TEST_KERNELS
    ),
    "blocks: places of blocks that do not exist": Mutation(
        RANK_BLOCKS, "tl.where(blocks.exists[None, :], place, -1)", "place", TEST_KERNELS
    ),
    "blocks: every window is the first": Mutation(
        RANK_BLOCKS,
        "plan.union + pid_m * sizes.U + window",
        "plan.union + pid_m * sizes.U",
        TEST_KERNELS,
    ),
    "blocks: the places of the first window": Mutation(
        RANK_BLOCKS,
        "(pid_m * sizes.U + window) * BLOCK_M",
        "(pid_m * sizes.U) * BLOCK_M",
        TEST_KERNELS,
    ),
    "launch: more slots than a program holds": Mutation(
        SIZES, "max(16, power(S)) if S <= WIDEST.value else 0", "16", TEST_KERNELS
    ),
    "launch: tiles of odd rows fill the registers": Mutation(
        SIZES, "most if width >= 4 else 1", "most", TEST_LAUNCH
    ),
    "launch: a tile too few": Mutation(
        LAUNCH,
        "(sizes.cdiv(M, config.block_m), sizes.cdiv(N",
        "(max(1, M // config.block_m), sizes.cdiv(N",
        TEST_KERNELS,
    ),
    "launch: columns too few": Mutation(
        LAUNCH,
        "sizes.cdiv(N, config.block_n * config.walk)",
        "max(1, N // (config.block_n * config.walk))",
        TEST_KERNELS,
    ),
    "expand: the first columns again and again": Mutation(
        EXPAND, "tl.program_id(1) * WALK + w", "tl.program_id(1) * WALK", TEST_KERNELS
    ),
    "plan: counters begin as they come": Mutation(
        PLAN, "tl.store(plan.counters +", "tl.load(plan.counters +", TEST_FUSED
    ),
    "fused: nobody waits": Mutation(FUSED, "if asked.length > 0:", "if pid < 0:", TEST_FUSED),
    "fused: waits for one too few": Mutation(
        FUSED, "while done < programs", "while done < programs - 1", TEST_FUSED
    ),
    "fused: what was stored is not handed on": Mutation(
        FUSED, 'sem="release"', 'sem="relaxed"', TEST_FUSED
    ),
    "fused: what was handed on is not taken": Mutation(
        FUSED, 'sem="acquire"', 'sem="relaxed"', TEST_FUSED
    ),
    "fused: counters stay": Mutation(FUSED, "tl.num_programs(0) - 1", "-1", TEST_FUSED),
    "fused: no bias": Mutation(FUSED, "if bias_ptr is not None:", "if False:", TEST_FUSED),
    "fused: a dead handle is the base": Mutation(FUSED, 'float("nan")', "0.0", TEST_FUSED),
    "fused: a column of W too many": Mutation(
        FUSED, "offs_m < M, offs_n < N", "offs_m < M, offs_n <= N", TEST_FUSED
    ),
    "fused: a row of x too many": Mutation(
        FUSED, "offs_m < M, offs_n < N", "offs_m <= M, offs_n < N", TEST_FUSED
    ),
    "fused: a step of K too many": Mutation(
        FUSED, "(k + offs_k < K)", "(k + offs_k <= K)", TEST_FUSED
    ),
    "fused: one part of K": Mutation(
        FUSED, "groups, pid // groups)", "groups, pid // groups * 0)", TEST_FUSED
    ),
    "ready: the arguments in another order": Mutation(
        READY, "in kernel.arg_names[len(tensors) :]", "in options", TEST_READY
    ),
    "ready: a pool of as many slots as before": Mutation(
        "ops/eager/again.py", "scaling.dtype, scaling.shape", "scaling.dtype", TEST_READY
    ),
    "ready: nobody is told of launches": Mutation(
        READY, "return bool(hooks or", "return bool(", TEST_READY
    ),
    "ready: parts of a Plan begin anywhere": Mutation(
        READY, "size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT", "size += 2", TEST_READY
    ),
    "launch: on whatever device is current": Mutation(
        LAUNCH, "if device < 0 or device == torch.cuda.current_device():", "if True:", TEST_LAUNCH
    ),
    "fused: all streams share": Mutation(LAUNCH, "if number < STREAMS", "if True", TEST_FUSED),
    "config: every card is an A100": Mutation(
        CONFIG, "known.get(major,", "known.get(0,", TEST_CONFIG
    ),
    "fused: other columns are asked for in advance": Mutation(
        FUSED, "tl.minimum(n + line, stride_bc - 1)", "tl.minimum(n, stride_bc - 1)", TEST_FUSED
    ),
    "config: stages whatever fits": Mutation(CONFIG, "min(4, most)", "4", TEST_CONFIG),
    "config: bf16 on any card": Mutation(
        CONFIG, "(8, 0) if modern else (7, 0)", "(7, 0)", TEST_CONFIG
    ),
    "config: fp16 without tensor cores in large tiles": Mutation(
        CONFIG,
        'itemsize <= 2 and cores != "none"',
        "itemsize <= 2",
        TEST_CONFIG,
    ),
    "gradient: a repeated slot counts twice": Mutation(
        PAIRS, "torch.where(named_before, len(numbers.bounds) - 1, key)", "key", TEST_GRADIENT
    ),
    "gradient: rows in no fixed order": Mutation(
        PAIRS, "sort(stable=True)", "sort(descending=True)", TEST_GRADIENT
    ),
    "gradient: the next adapter's first pair": Mutation(
        GRADIENT, "mask_p = p + offs_p < end", "mask_p = p + offs_p <= end", TEST_GRADIENT
    ),
    "gradient: a column too many": Mutation(
        GRADIENT, "mask_c = offs_c < C\n", "mask_c = offs_c <= C\n", TEST_GRADIENT
    ),
    "gradient: another row's v": Mutation(GRADIENT, "(pair // J)[", "(pair % J)[", TEST_GRADIENT),
    "gradient: the first rank rows always": Mutation(
        GRADIENT, "* R + first + offs_r", "* R + offs_r", TEST_GRADIENT
    ),
    "gradient: rank rows of the next adapter": Mutation(
        GRADIENT, "(offs_r < stored)[None, :]", "(offs_r <= stored)[None, :]", TEST_GRADIENT
    ),
    "gradient: no gain": Mutation(
        GRADIENT, "if gain_ptr is not None:", "if gain_ptr is None:", TEST_GRADIENT
    ),
    "gradient: constant rank rows are trained": Mutation(
        GRADIENT, "tl.where((offs_r < wanted)[None, :], acc, 0.0)", "acc", TEST_GRADIENT
    ),
    "gradient: each split sums everything": Mutation(
        GRADIENT, "range(begin, end, splits * BLOCK_P)", "range(begin, end, BLOCK_P)", TEST_GRADIENT
    ),
    "gradient: parts that are not written are read": Mutation(
        GRADIENT, "begin + s * BLOCK_P < end, left, 0)", "s > 0, left, 0)", TEST_GRADIENT
    ),
    "gradient: an empty adapter stays as it is": Mutation(
        GRADIENT, "(split == 0) | (begin < end)", "(begin < end)", TEST_GRADIENT
    ),
    "gradient: the first rank block of an item": Mutation(
        GRADIENT, "tl.minimum(left, GROUP * RANK_BLOCK)", "RANK_BLOCK", TEST_GRADIENT
    ),
    "gradient: one part of h": Mutation(
        GRADIENT, "tl.static_range(1, PARTS)", "tl.static_range(1, 1)", TEST_GRADIENT
    ),
    "gradient: a graph's items may go": Mutation(
        PAIRS, "_CAPTURED[id(kept)] = kept", "pass", TEST_GRADIENT
    ),
    "config: bits of an adapter follow its neighbours": Mutation(
        CONFIG, "1 if batch_invariant or mean", "1 if mean", TEST_CONFIG
    ),
}
