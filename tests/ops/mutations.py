"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

CPU = "ops/cpu.py"
DISPATCH = "ops/dispatch.py"
OPERATORS = "ops/operators.py"
TEST_FUSED = ("kernels/test_fused.py",)
TEST_CPU_AND_TEST_LINEAR = ("ops/test_cpu.py", "layers/test_linear.py")
TEST_OPERATORS_AND_TEST_TRITON_BACKEND = ("ops/test_operators.py", "ops/test_triton_backend.py")
TEST_TRITON_BACKEND = ("ops/test_triton_backend.py",)
TEST_TUNED = ("measure/test_tune.py",)
MUTATIONS = {
    "fused: rows that are no multiple of 16 bytes": Mutation(
        DISPATCH, "if N % 8 or K % 8", "if False", TEST_FUSED
    ),
    "fused: without having been measured": Mutation(
        DISPATCH, "tuned.fuses(launch", "not tuned.fuses(launch", TEST_TUNED
    ),
    "grouped: repeated rows are added": Mutation(
        CPU, "selects = (place < count)", "selects = (place <= count)", TEST_CPU_AND_TEST_LINEAR
    ),
    "grouped: every group is in order": Mutation(
        CPU,
        "if (np.diff(rows) == 1).all():",
        "if len(np.unique(rows)) == len(rows):",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "grouped: no scaling": Mutation(
        CPU, "[[[span.scaling for", "[[[1.0 for", TEST_CPU_AND_TEST_LINEAR
    ),
    "grouped: the first strength for all": Mutation(
        CPU, "bool((wanted == wanted[0]).all())", "True", TEST_CPU_AND_TEST_LINEAR
    ),
    "grouped: layers share a cut whatever they hold": Mutation(
        CPU,
        "key = dtype, sizes, tuple(map(pool.spans.get, self.used))",
        "key = dtype",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "grouped: a row gets all adapters": Mutation(
        CPU, "h.view(bits.dtype).bitwise_and_(bits)", "pass", TEST_CPU_AND_TEST_LINEAR
    ),
    "grouped: masked by multiplying": Mutation(
        CPU, "h.view(bits.dtype).bitwise_and_(bits)", "h *= bits != 0", TEST_CPU_AND_TEST_LINEAR
    ),
    "grouped: base rows are added to": Mutation(
        CPU, "some = selects[0].any(1)", "some = selects[0].any(1) | True", TEST_CPU_AND_TEST_LINEAR
    ),
    "grouped: base rows are rounded": Mutation(
        CPU,
        "return rounded if plan.partly is None else",
        "return rounded if True else",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "grouped: several products are summed in bf16": Mutation(
        CPU, "torch.float32) if repeated else dtype)", "dtype))", TEST_CPU_AND_TEST_LINEAR
    ),
    "grouped: no bias": Mutation(
        CPU, "biases if constant.any()", "biases if False", TEST_CPU_AND_TEST_LINEAR
    ),
    "grouped: the last weight of a slot that stands twice": Mutation(
        CPU,
        "np.add.at(weight, wanted, strength)",
        "weight[wanted] = strength",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "grouped: another adapter's rank rows": Mutation(
        CPU,
        "_rows(rank_rows)",
        "_rows(rank_rows[0] + np.arange(len(rank_rows)))",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "grouped: writes to what is not ours": Mutation(
        CPU, "if owned and given == sums", "if given == sums", TEST_CPU_AND_TEST_LINEAR
    ),
    "grouped: bound to another plan": Mutation(
        CPU, "or bound.plan is not plan", "", TEST_CPU_AND_TEST_LINEAR
    ),
    "grouped: bound to buffers that were replaced": Mutation(
        CPU, 'or bound.A_rows is not buffers["A_rows"]', "", TEST_CPU_AND_TEST_LINEAR
    ),
    "grouped: bound for another dtype": Mutation(
        CPU, "or bound.given != (x.dtype, y.dtype)", "", TEST_CPU_AND_TEST_LINEAR
    ),
    "operators: the gradient of x keeps the bias": Mutation(
        OPERATORS,
        "B_rows=rows.A_rows, constant=None)",
        "B_rows=rows.A_rows)",
        TEST_OPERATORS_AND_TEST_TRITON_BACKEND,
    ),
    "operators: gradients in another order": Mutation(
        OPERATORS,
        '("y", "x", *RankRows',
        '("x", "y", *RankRows',
        TEST_OPERATORS_AND_TEST_TRITON_BACKEND,
    ),
    "operators: the gradient of strength without scaling": Mutation(
        OPERATORS, ".sum(2) * scaling)", ".sum(2))", TEST_OPERATORS_AND_TEST_TRITON_BACKEND
    ),
    "operators: dead handles are the base on the CPU": Mutation(
        OPERATORS,
        "(plan.state == DEAD)",
        "(plan.state > DEAD)",
        TEST_OPERATORS_AND_TEST_TRITON_BACKEND,
    ),
    "ops: writes to what is not ours": Mutation(
        DISPATCH, "if owned and", "if", TEST_TRITON_BACKEND
    ),
    "ops: gradients are lost": Mutation(
        DISPATCH, "owned and not tracked(y, x, tensors.strength)", "owned", TEST_TRITON_BACKEND
    ),
    "ops: no flag on the routing": Mutation(
        DISPATCH, "routing.last_pass.row_states =", "_ =", TEST_TRITON_BACKEND
    ),
}
