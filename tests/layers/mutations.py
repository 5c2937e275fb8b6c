"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

GAINS = "layers/gains.py"
HANDED_IN = "layers/handed_in.py"
KINDS = "layers/kinds.py"
LINEAR = "layers/linear.py"
SHARDING = "layers/sharding.py"
TEST_FUSED = ("kernels/test_fused.py",)
TEST_KINDS = ("model/test_kinds.py",)
TEST_MODULE = ("layers/test_module.py",)
TEST_ON_CUDA = ("model/test_compile_on_cuda.py",)
TEST_SHARDED = ("layers/test_sharded.py",)
TEST_CPU_AND_TEST_LINEAR = ("ops/test_cpu.py", "layers/test_linear.py")
TEST_BETWEEN = ("model/test_training_between.py",)
TEST_DORA = ("model/test_dora.py",)
MUTATIONS = {
    "gains: infinity times 0 in rows without": Mutation(
        GAINS, "own = torch.where((gain == 0) & ~own.isfinite(), 0.0, own)", "pass", TEST_DORA
    ),
    "gains: the base's bias is rescaled": Mutation(
        GAINS, "y.to(dtype) - bias.to(dtype) if", "y.to(dtype) if", TEST_DORA
    ),
    "gains: what a base rounds beside its bias": Mutation(
        GAINS, "MUCH = 64.0", "MUCH = 1.0", TEST_DORA
    ),
    "gains: a row without an adapter is computed": Mutation(
        GAINS, "if selecting is None:", "if True:", TEST_DORA
    ),
    "fused: whatever the base": Mutation(KINDS, "not layer.mux_owns_output", "False", TEST_FUSED),
    "fused: gradients are lost": Mutation(
        KINDS,
        'None if ops.tracked(x, weight, layer._parameters.get("bias")) else weight',
        "weight",
        TEST_FUSED,
    ),
    "fused: gradients of weights are lost": Mutation(
        LINEAR, "if fusable and not gate", "if fusable", TEST_FUSED
    ),
    "fused: a wrapped weight": Mutation(
        KINDS, "type(weight) is not nn.Parameter or", "", TEST_FUSED
    ),
    "kinds: the odd place comes first": Mutation(
        KINDS, "((k - 1) // 2, k // 2)", "(k // 2, (k - 1) // 2)", TEST_KINDS
    ),
    "kinds: an embedding's own scale is lost": Mutation(
        KINDS, "weights.scaling * self.scale", "weights.scaling", TEST_KINDS
    ),
    "kinds: each group sees all of h": Mutation(
        KINDS, "on_diagonal(B, self.groups)", "B.repeat(1, self.groups)", TEST_KINDS
    ),
    "kinds: places before samples": Mutation(
        KINDS, "x.movedim(1, 1 + dimensions)", "x.mT.movedim(1, 1 + dimensions)", TEST_KINDS
    ),
    "kinds: another layout": Mutation(
        KINDS, "added.contiguous() if y.is_contiguous() else added", "added", TEST_KINDS
    ),
    "linear: a trace makes the table of handles": Mutation(
        LINEAR, "self.mux_slots.live(device)", "pass", TEST_ON_CUDA
    ),
    "linear: any routing is the last one": Mutation(
        HANDED_IN, "and torch.equal(index, self.index)", "", TEST_CPU_AND_TEST_LINEAR
    ),
    "linear: a removal is not seen": Mutation(
        HANDED_IN, "and suspensions == self.suspensions", "", TEST_CPU_AND_TEST_LINEAR
    ),
    "linear: a patched forward hides the adapters": Mutation(
        LINEAR, 'vars(self).get("forward")', "None", TEST_MODULE
    ),
    "linear: what a patched forward returns is written to": Mutation(
        LINEAR, ", mux_owns_output=False", "", TEST_MODULE
    ),
    "linear: pools stay on the meta device": Mutation(
        LINEAR, "pool.to_empty(device=device)", "pass", TEST_MODULE
    ),
    "sharding: a bias of each process": Mutation(
        SHARDING, "bias is not None and self.place", "False", TEST_SHARDED
    ),
    "sharding: a delta over the old closure": Mutation(
        SHARDING, 'held["self"].install_forward', "(lambda *a: 0)", TEST_SHARDED
    ),
    "sharding: a part of the gradient": Mutation(
        SHARDING, "whole.to_local(grad_placements=[Partial()])", "whole.to_local()", TEST_SHARDED
    ),
    "training: a routing that was handed in keeps nobody": Mutation(
        HANDED_IN, "if now is span:", "if True:", ("model/test_training_rows.py",)
    ),
    "training: a routing that was handed in may mean anybody": Mutation(
        LINEAR, "and host_may_read(whole.index)", "and False", TEST_BETWEEN
    ),
    "training: others count as much as those of the batch": Mutation(
        HANDED_IN, "(spans if used is None else used)", "spans", TEST_BETWEEN
    ),
}
