"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

MIXES = "integrations/named_mixes.py"
VLLM = "integrations/vllm.py"
KERNELS = "integrations/vllm_kernels.py"
TEST_MIXES = ("integrations/test_named_mixes.py",)
TEST_VLLM = ("integrations/test_vllm.py",)
TEST_KERNELS = ("integrations/test_vllm_kernels.py",)
MUTATIONS = {
    "mixes: an adapter that has changed": Mutation(
        MIXES,
        "status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns",
        "1,",
        TEST_MIXES,
    ),
    "mixes: only what the owner can set": Mutation(MIXES, ", status.st_ctime_ns", "", TEST_MIXES),
    "mixes: one that changes meanwhile": Mutation(
        MIXES, "if self._state(row) != state:", "if False:", TEST_MIXES
    ),
    "mixes: the weights are part of it": Mutation(
        MIXES, "sorted(row.items()), state]", "sorted(row), state]", TEST_MIXES
    ),
    "mixes: the order is not": Mutation(
        MIXES, "sorted(row.items()), state]", "row, state]", TEST_MIXES
    ),
    "mixes: links lead out": Mutation(MIXES, "return inside and os", "return os", TEST_MIXES),
    "mixes: decimals without end": Mutation(
        MIXES, "round(weight, DECIMALS) != weight or ", "", TEST_MIXES
    ),
    "mixes: weights without end": Mutation(MIXES, " or abs(weight) > MAX_WEIGHT", "", TEST_MIXES),
    "mixes: adapters without end": Mutation(
        MIXES, "if len(row) > MAX_ADAPTERS:", "if False:", TEST_MIXES
    ),
    "mixes: names without end": Mutation(
        MIXES,
        "if name not in self._names and len(self._names) >= self.most:",
        "if False:",
        TEST_MIXES,
    ),
    "mixes: a cache without end": Mutation(
        MIXES, "if there >= self.most:", "if False:", TEST_MIXES
    ),
    "mixes: what a killed server left": Mutation(
        MIXES, 'not entry.startswith(".") for', "bool(entry) for", TEST_MIXES
    ),
    "mixes: a fork removes its parent's": Mutation(
        MIXES, "if os.getpid() == owner:", "if True:", TEST_MIXES
    ),
    "mixes: a folder is left behind": Mutation(
        MIXES, "weakref.finalize(self, _remove, made, os.getpid())", "pass", TEST_MIXES
    ),
    "vllm: many compose at once": Mutation(
        VLLM,
        "self._composing = ThreadPoolExecutor(1,",
        "self._composing = ThreadPoolExecutor(8,",
        TEST_VLLM,
    ),
    "vllm: registered again": Mutation(
        VLLM, "if NAME in LoRAResolverRegistry.get_supported_resolvers():", "if False:", TEST_VLLM
    ),
    "vllm: a misspelt part": Mutation(
        VLLM, 'if not parts <= {"names", "kernels"}:', "if False:", TEST_VLLM
    ),
    "kernels: the last batch's plan": Mutation(
        KERNELS,
        "self._plans: dict[tuple[int, int, float], tuple[Any, ...]] = {}",
        'self.__dict__.setdefault("_plans", {})',
        TEST_KERNELS,
    ),
    "kernels: other rows than were named": Mutation(
        KERNELS, "if len(self.token_lora_indices) != len(x):", "if False:", TEST_KERNELS
    ),
    "kernels: graphs that keep their rows": Mutation(
        KERNELS, "if torch.compiler.is_compiling() or", "if", TEST_KERNELS
    ),
    "kernels: all slices write the first": Mutation(KERNELS, "first += size", "pass", TEST_KERNELS),
}
