"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

CONTINUOUS_BATCHING = "model/continuous_batching.py"
MUX = "model/mux.py"
TEST_BOUNDED = ("adapters/test_bounded.py",)
TEST_CONTINUOUS_BATCHING = ("model/test_continuous_batching.py",)
MUTATIONS = {
    "continuous: prefixes are shared": Mutation(
        CONTINUOUS_BATCHING, "config.allow_block_sharing", "False", TEST_CONTINUOUS_BATCHING
    ),
    "continuous: children have no adapters": Mutation(
        CONTINUOUS_BATCHING,
        "range(self.num_return_sequences - 1)",
        "range(0)",
        TEST_CONTINUOUS_BATCHING,
    ),
    "continuous: finished requests are kept": Mutation(
        CONTINUOUS_BATCHING,
        "in self.mux_started - known",
        "in set[str]()",
        TEST_CONTINUOUS_BATCHING,
    ),
    "mux: a route of before a reload": Mutation(
        MUX, "return make() if first.named", "return first if first.named", TEST_BOUNDED
    ),
}
