"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

CPU = "ops/cpu/plan.py"
CPU_GROUPS = "ops/cpu/groups.py"
DISPATCH = "ops/dispatch.py"
ON_TRITON = "ops/on_triton.py"
OPERANDS = "ops/operands.py"
OPERATORS = "ops/operators.py"
REFERENCE = "ops/reference.py"
TILED = "ops/tiled.py"
AGAIN = "ops/eager/again.py"
EAGER_TRAINING = "ops/eager/training.py"
TEST_DISPATCH = ("ops/test_dispatch.py",)
TEST_FUSED = ("kernels/test_fused.py",)
TEST_CPU_AND_TEST_LINEAR = ("ops/test_cpu.py", "layers/test_linear.py")
TEST_OPERATORS_AND_TEST_TRITON_BACKEND = ("ops/test_operators.py", "ops/test_triton_backend.py")
TEST_TRITON_BACKEND = ("ops/test_triton_backend.py",)
TEST_KINDS = ("model/test_kinds.py",)
TEST_READY = ("kernels/test_ready.py",)
TEST_TUNED = ("measure/test_tune.py",)
TEST_BF16_PRODUCTS = ("ops/test_bf16_products.py",)
TEST_AUTOCAST = ("ops/test_autocast.py",)
TEST_LARGE_WEIGHTS = ("ops/test_large_weights.py",)
CPU_TRAINING = "ops/cpu/training.py"
TEST_TRAINING = ("model/test_training_rows.py",)
TEST_BETWEEN = ("model/test_training_between.py",)
TEST_OPERATORS_ALONE = ("ops/test_operators.py",)
MUTATIONS = {
    "dispatch: one launch that knows no gains": Mutation(
        "ops/dispatch.py", " and not pool.has_gains", "", ("model/test_dora.py",)
    ),
    "dispatch: the method of before the first gain": Mutation(
        "ops/dispatch.py", "pool.max_rank, pool.has_gains", "pool.max_rank", ("model/test_dora.py",)
    ),
    "fused: rows that are no multiple of 16 bytes": Mutation(
        DISPATCH, "if N % 8 or K % 8", "if False", TEST_FUSED
    ),
    "fused: without having been measured": Mutation(
        DISPATCH, "tuned.fuses(launch", "not tuned.fuses(launch", TEST_TUNED
    ),
    "embedding: no scaling": Mutation(
        ON_TRITON,
        "(plan.strength[:, :, None] * rows.scaling[slot])",
        "plan.strength[:, :, None]",
        TEST_KINDS,
    ),
    "embedding: numbers are vectors": Mutation(
        REFERENCE, "if not x.is_floating_point():", "if False:", TEST_KINDS
    ),
    "cpu: repeated rows are added": Mutation(
        CPU_GROUPS,
        "selects = (place < count)",
        "selects = (place <= count)",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "cpu: every group is in order": Mutation(
        CPU,
        "if (np.diff(rows) == 1).all():",
        "if len(np.unique(rows)) == len(rows):",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "cpu: no scaling": Mutation(CPU, "[[[span.scaling for", "[[[1.0 for", TEST_CPU_AND_TEST_LINEAR),
    "cpu: the first strength for all": Mutation(
        CPU, "bool((wanted == wanted[0]).all())", "True", TEST_CPU_AND_TEST_LINEAR
    ),
    "cpu: layers share a cut whatever they hold": Mutation(
        CPU,
        "key = dtype, sizes, tuple(spans.items())",
        "key = dtype",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "cpu: a row gets all adapters": Mutation(
        CPU, "h.view(self.mask.dtype).bitwise_and_(self.mask)", "pass", TEST_CPU_AND_TEST_LINEAR
    ),
    "cpu: masked by multiplying": Mutation(
        CPU,
        "h.view(self.mask.dtype).bitwise_and_(self.mask)",
        "h *= self.mask != 0",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "cpu: base rows are added to": Mutation(
        CPU, "some = selects[0].any(1)", "some = selects[0].any(1) | True", TEST_CPU_AND_TEST_LINEAR
    ),
    "cpu: base rows are rounded": Mutation(
        CPU,
        "return rounded if self.selecting is None else",
        "return rounded if True else",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "cpu: several products are summed in bf16": Mutation(
        CPU,
        "sums = dtype if one_each else torch.promote_types(dtype, torch.float32)",
        "sums = dtype",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "cpu: no bias": Mutation(
        CPU, "biases if constant.any()", "biases if False", TEST_CPU_AND_TEST_LINEAR
    ),
    "cpu: the last weight of a slot that stands twice": Mutation(
        CPU_GROUPS,
        "np.add.at(weights, wanted, weight)",
        "weights[wanted] = weight",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "cpu: another adapter's rank rows": Mutation(
        CPU,
        "rank_rows=blocks_of(rank_rows, G)",
        "rank_rows=blocks_of(rank_rows[0] + np.arange(len(rank_rows)), G)",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "cpu: writes to what is not ours": Mutation(
        CPU, "if owned and given == sums", "if given == sums", TEST_CPU_AND_TEST_LINEAR
    ),
    "cpu: prepared for buffers that were replaced": Mutation(
        CPU, 'or known.A_rows is not buffers["A_rows"]', "", TEST_CPU_AND_TEST_LINEAR
    ),
    "cpu: prepared for another dtype": Mutation(
        CPU, "or known.given != (x, y)", "", TEST_CPU_AND_TEST_LINEAR
    ),
    "cpu: gradients are lost": Mutation(
        CPU, "if tracked(y, x, self.weight):", "if False:", TEST_CPU_AND_TEST_LINEAR
    ),
    "cpu: copies take along what is prepared": Mutation(
        CPU,
        "return Plan, (self.weight, self.slots)",
        "return super().__reduce__()",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "cpu: all is moved at once": Mutation(
        CPU, "max(1, MOVED // moved)", "len(group.rows)", TEST_CPU_AND_TEST_LINEAR
    ),
    "cpu: all rows are always multiplied with all adapters": Mutation(
        CPU_GROUPS, "return products <= FEW[bf16] or", "return True or", TEST_CPU_AND_TEST_LINEAR
    ),
    "cpu: all adapters share a product": Mutation(
        CPU_GROUPS, "shared[alone] = -1 - np.flatnonzero(alone)", "pass", TEST_CPU_AND_TEST_LINEAR
    ),
    "cpu: odd inner dimensions in bf16": Mutation(
        CPU, "return size + size % 2 if", "return size if", TEST_BF16_PRODUCTS
    ),
    "cpu: the last rank row counts twice": Mutation(
        CPU, "mask[..., sum(ranks) :] = 0", "pass", TEST_BF16_PRODUCTS
    ),
    "cpu: a strength that y does not hold is a number": Mutation(
        CPU, "and abs(wanted[0]) <= torch.finfo(dtype).max", "", TEST_LARGE_WEIGHTS
    ),
    "cpu: products in autocast's dtype": Mutation(
        CPU, 'if torch.is_autocast_enabled("cpu"):', "if False:", TEST_AUTOCAST
    ),
    "reference: products in autocast's dtype": Mutation(
        REFERENCE, "if torch.is_autocast_enabled(y.device.type):", "if False:", TEST_AUTOCAST
    ),
    "reference: the gradient of strength in autocast's dtype": Mutation(
        REFERENCE, "if torch.is_autocast_enabled(x.device.type):", "if False:", TEST_AUTOCAST
    ),
    "operators: linear in autocast's dtype": Mutation(
        OPERATORS, "torch.autocast(x.device.type, enabled=False)", "torch.no_grad()", TEST_AUTOCAST
    ),
    "dispatch: a trace asks for a capture": Mutation(
        DISPATCH,
        " or torch.compiler.is_compiling():\n        return False",
        ":\n        return False",
        TEST_DISPATCH,
    ),
    "dispatch: a capture on whatever device is current": Mutation(
        "core/streams.py",
        "if device.index is None or device.index == torch.cuda.current_device():",
        "if True:",
        TEST_DISPATCH,
    ),
    "dispatch: warns at every layer": Mutation(
        DISPATCH, "if problem not in _TOLD:", "if problem:", TEST_DISPATCH
    ),
    "dispatch: an old GPU by name": Mutation(
        DISPATCH,
        "    if problem:\n        raise BackendError(",
        "    if not asked:\n        raise BackendError(",
        TEST_DISPATCH,
    ),
    "dispatch: an old triton says nothing": Mutation(
        DISPATCH, '_tell(f"triton {problem}")', "pass", TEST_DISPATCH
    ),
    "dispatch: eager on the host while compiling": Mutation(
        DISPATCH, "if compiling:", "if False:", TEST_DISPATCH
    ),
    "dispatch: the reference by name is not the reference": Mutation(
        DISPATCH, 'backend == "auto" and device == "cpu"', 'device == "cpu"', TEST_DISPATCH
    ),
    "operators: the gradient of x keeps the bias": Mutation(
        OPERANDS,
        "B_rows=rows.A_rows, constant=None)",
        "B_rows=rows.A_rows)",
        TEST_OPERATORS_AND_TEST_TRITON_BACKEND,
    ),
    "operators: gradients in another order": Mutation(
        OPERATORS,
        '("y", "x", *_NAMES',
        '("x", "y", *_NAMES',
        TEST_OPERATORS_AND_TEST_TRITON_BACKEND,
    ),
    "operators: the gradient of strength without scaling": Mutation(
        ON_TRITON,
        ".sum(2) * _scaling(rows, plan))",
        ".sum(2))",
        TEST_OPERATORS_AND_TEST_TRITON_BACKEND,
    ),
    "operators: dead handles are the base on the CPU": Mutation(
        OPERATORS,
        "(plan.state == DEAD)",
        "(plan.state > DEAD)",
        TEST_OPERATORS_AND_TEST_TRITON_BACKEND,
    ),
    "ops: writes to what is not ours": Mutation(TILED, "if owned and", "if", TEST_TRITON_BACKEND),
    "ops: launches for any rows": Mutation(
        AGAIN, "x.shape, x.stride(), x.dtype, x.get_device())", "x.dtype)", TEST_READY
    ),
    "ops: launches for any address": Mutation(
        AGAIN, "return not own & (ALIGNMENT - 1)", "return True", TEST_READY
    ),
    "ops: gradients are lost": Mutation(
        TILED,
        "owned and not followed and",
        "owned and",
        TEST_TRITON_BACKEND,
    ),
    "ops: no flag on the routing": Mutation(
        DISPATCH, "routing.last_pass.row_states =", "_ =", TEST_TRITON_BACKEND
    ),
    "training: rows that only fill up count": Mutation(
        CPU_TRAINING,
        "torch.where(self.selects, values, 0.0)",
        "values",
        ("model/test_mixtures.py",),
    ),
    "training: A learns without the gain": Mutation(
        CPU_TRAINING, "_product(gained.mT, x_rows)", "_product(g.mT, x_rows)", TEST_TRAINING
    ),
    "training: plans do not know whom they use": Mutation(
        DISPATCH,
        "method.batch_invariant, triton, here, used)",
        "method.batch_invariant, triton, here)",
        TEST_BETWEEN,
    ),
    "training: plans of eager mode do not know whom they use": Mutation(
        DISPATCH,
        "EagerPlan(now, method.batch_invariant, learn, used)",
        "EagerPlan(now, method.batch_invariant, learn)",
        TEST_BETWEEN,
    ),
    "training: changed parameters are not noticed": Mutation(
        OPERANDS, "!= list(versions)", "== []", TEST_TRAINING
    ),
    "training: the gradient of x is the adapters' alone": Mutation(
        OPERATORS, "base = grad @ weight", "base = torch.zeros_like(x)", TEST_OPERATORS_ALONE
    ),
    "training: biases are left out": Mutation(
        OPERANDS, "next(both)[1][:, 0]", "next(both)[0][:, 0]", TEST_OPERATORS_ALONE
    ),
    "training: g without the gain where x needs no gradient": Mutation(
        EAGER_TRAINING, "how, weighted=True)", "how)", TEST_READY
    ),
    "training: sums are launched for any dy": Mutation(
        EAGER_TRAINING, "*sizes, dy.shape, dy.stride(), dy.dtype", "*sizes, dy.dtype", TEST_READY
    ),
    "training: B learns from g": Mutation(
        EAGER_TRAINING, "of_B(h, dy, step.pairs)", "of_B(g, dy, step.pairs)", TEST_READY
    ),
    "training: launched while somebody looks on": Mutation(
        AGAIN,
        "if aligned(own, pointers) and not plan.watched():",
        "if aligned(own, pointers):",
        TEST_READY,
    ),
}
