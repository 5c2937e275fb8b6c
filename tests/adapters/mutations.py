"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

BOUNDED = "adapters/bounded.py"
PLACEMENT = "adapters/placement.py"
RESIDENT = "adapters/resident.py"
TEST_BOUNDED = ("adapters/test_bounded.py",)
MUTATIONS = {
    "placement: what is asked for is evicted": Mutation(
        BOUNDED, "self._pinned | set(wanted)", "self._pinned", TEST_BOUNDED
    ),
    "placement: the pinned is evicted": Mutation(
        BOUNDED, "self._pinned | set(wanted)", "set(wanted)", TEST_BOUNDED
    ),
    "placement: the last routed makes room": Mutation(
        BOUNDED,
        "self._resident[handle] = None\n            self._wait",
        "pass\n            self._wait",
        TEST_BOUNDED,
    ),
    "placement: evicted before it is known to fit": Mutation(
        PLACEMENT, "raise PoolCapacityError(_no_room", "break; (_no_room", TEST_BOUNDED
    ),
    "placement: total free is enough": Mutation(
        PLACEMENT,
        "if all(without_sliding.take(rows) is not None for rows in needed):",
        "if True:",
        TEST_BOUNDED,
    ),
    "residency: values that overflow come in": Mutation(
        BOUNDED, "if torch.finfo(pool.A_rows.dtype).max < widest", "if False", TEST_BOUNDED
    ),
    "adapters: removed under a forward in progress": Mutation(
        RESIDENT, "if users is not None and handle not in users:", "if True:", TEST_BOUNDED
    ),
    "adapters: a replaced one stays for ever": Mutation(
        RESIDENT, "if users is not None and handle not in users:", "if False:", TEST_BOUNDED
    ),
}
