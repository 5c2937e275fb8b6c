"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

ARGUMENTS = "core/arguments.py"
FREE_RUNS = "core/free_runs.py"
POOL = "core/pool.py"
ROUTING = "core/routing.py"
SLOTS = "core/slots.py"
TEST_BOUNDED = ("adapters/test_bounded.py",)
TEST_BF16_PRODUCTS = ("ops/test_bf16_products.py",)
TEST_CASTS = ("core/test_casts.py",)
TEST_NUMBERS = ("core/test_numbers.py",)
TEST_FREE_RUNS = ("core/test_free_runs.py",)
TEST_CPU_AND_TEST_LINEAR = ("ops/test_cpu.py", "layers/test_linear.py")
TEST_STREAMS = ("core/test_streams.py",)
TEST_ROWS = ("model/test_training_rows.py",)
TEST_STATE = ("model/test_training_state.py",)
TEST_BETWEEN = ("model/test_training_between.py",)
TEST_TRITON_BACKEND = ("ops/test_triton_backend.py",)
MUTATIONS = {
    "arguments: numbers that only a float holds": Mutation(
        ARGUMENTS, "abs(number) < FP32_OVERFLOW", "abs(number) < 1.8e308", TEST_NUMBERS
    ),
    "routing: weights that only fp64 holds": Mutation(
        ROUTING, "weight.detach().to(torch.float32).isfinite()", "weight.isfinite()", TEST_NUMBERS
    ),
    "pool: whatever to_empty() has brought": Mutation(
        POOL,
        "A_rows[start : start + used, self.in_features :] = 0",
        "pass",
        TEST_BF16_PRODUCTS,
    ),
    "pool: what other streams read and write while it moves": Mutation(
        POOL, "torch.cuda.synchronize(self.A_rows.device)", "pass", TEST_STREAMS
    ),
    "routing: a check while the pass runs": Mutation(
        ROUTING, "torch.cuda.synchronize(states.device)", "pass", TEST_STREAMS
    ),
    "pool: infinite after a cast": Mutation(POOL, "self._confine()", "pass", TEST_CASTS),
    "pool: one version before and after rows slide": Mutation(
        POOL,
        "self.version = Version()\n        start, rows",
        "start, rows",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "pool: one version before and after a write": Mutation(
        POOL,
        "self.version = Version()\n        self.expect(weights, slots)",
        "self.expect(weights, slots)",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "pool: a version of buffers of before": Mutation(
        POOL,
        "self.version = Version()\n        for name, new",
        "for name, new",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "pool: a version of buffers elsewhere": Mutation(
        POOL,
        "self.version, scaling, before = Version(),",
        "scaling, before =",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "pool: always fits": Mutation(
        POOL, "return all(n <= h", "return True or all(n <= h", TEST_TRITON_BACKEND
    ),
    "pool: a gain that moved is looked for where it was": Mutation(
        POOL,
        "self.gain_offset.data[move.slot].fill_(start + move.span.rank)",
        "pass",
        ("model/test_dora.py",),
    ),
    "pool: one state for factors and gains": Mutation(
        POOL,
        "return self._pool.version.gains",
        "return self._pool.version",
        ("model/test_dora.py",),
    ),
    "pool: a gain that was erased": Mutation(
        POOL, "self.gain_rank.data.index_fill_(0, those, 0)", "pass", ("model/test_dora.py",)
    ),
    "slots: a removed adapter stays alive": Mutation(
        SLOTS, "self._write(slot_of(handle), NONE)", "pass", TEST_TRITON_BACKEND
    ),
    "runs: neighbours stay apart": Mutation(
        FREE_RUNS, "first, start = first - 1, free[first - 1][0]", "pass", TEST_FREE_RUNS
    ),
    "runs: rebuilt from rows that two have": Mutation(
        FREE_RUNS, "assert end <= start", "assert True", TEST_FREE_RUNS
    ),
    "runs: rebuilt without the end": Mutation(
        FREE_RUNS, "[*sorted(taken), (capacity, 0)]", "sorted(taken)", TEST_FREE_RUNS
    ),
    "pool: rows slide without their values": Mutation(
        POOL, "buffer[start : start + rows] = values", "pass", TEST_BOUNDED
    ),
    "pool: rows slide over themselves": Mutation(
        POOL, "buffer[move.left] = 0", "pass", TEST_BOUNDED
    ),
    "slots: removals are not counted": Mutation(
        SLOTS, "self.suspensions += 1", "pass", TEST_TRITON_BACKEND
    ),
    "interrupts: a move is not finished": Mutation(
        POOL,
        "if self.moving is not None:\n            self._finish_move(self.moving)",
        "",
        ("core/test_moves.py",),
    ),
    "interrupts: buffers of two sizes": Mutation(
        POOL, "if len(sizes) > 1:", "if False:", ("core/test_moves.py",)
    ),
    "interrupts: a handle without a name lives": Mutation(
        SLOTS, "if handle not in self._names and", "if False and", ("core/test_slots.py",)
    ),
    "training: a backward reads what others have learnt since": Mutation(
        POOL, "self.spans[slot] = self.spans[slot]._replace()", "pass", TEST_BETWEEN
    ),
    "training: a cast leaves no trace": Mutation(
        POOL, "span._replace(cast=True)", "span", TEST_STATE
    ),
    "training: a cast rounds what the pool has": Mutation(
        POOL, "torch.autograd.graph.increment_version(masters.parameters)", "pass", TEST_STATE
    ),
    "pools: those that have grown count as overwritten": Mutation(
        POOL, "setattr(self, name, new.data)", "setattr(self, name, new)", TEST_ROWS
    ),
    "pools: copies count as overwritten": Mutation(
        POOL, "self.rank = self.rank.clone()", "pass", ("model/test_copies.py",)
    ),
    "refusals: names that are none": Mutation(
        SLOTS,
        "for name in names:\n            if not isinstance(name, str):",
        "for name in names:\n            if False:",
        ("test_refusals.py",),
    ),
    "refusals: names in a sequence that are none": Mutation(
        "core/arguments.py",
        "for i, name in enumerate(names):\n        if not isinstance(name, str):",
        "for i, name in enumerate(names):\n        if False:",
        ("test_refusals.py",),
    ),
}
