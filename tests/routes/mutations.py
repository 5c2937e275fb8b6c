"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

GRAPHS = "routes/graphs.py"
PLANS = "routes/plans.py"
ROUTER = "routes/router.py"
UNIFORM_ROUTES = "routes/uniform_routes.py"
TEST_BOUNDED = ("adapters/test_bounded.py",)
TEST_COMPILE = ("model/test_compile.py",)
TEST_CONTINUOUS_BATCHING = ("model/test_continuous_batching.py",)
TEST_GENERATION = ("model/test_generation.py",)
TEST_MUX = ("model/test_mux.py",)
TEST_CPU_AND_TEST_LINEAR = ("ops/test_cpu.py", "layers/test_linear.py")
TEST_TRITON_BACKEND = ("ops/test_triton_backend.py",)
TEST_BACKWARD = ("routes/test_backward.py",)
MUTATIONS = {
    "router: any pass is like the last": Mutation(
        PLANS, "or self._last.case != case", "", TEST_CPU_AND_TEST_LINEAR
    ),
    "router: a plan for each pass": Mutation(
        PLANS, "if case is None or", "if True or", TEST_CPU_AND_TEST_LINEAR
    ),
    "router: a graph answers with the base": Mutation(
        GRAPHS, "NOBODY = -2", "NOBODY = -1", TEST_TRITON_BACKEND
    ),
    "router: a graph keeps its route": Mutation(
        ROUTER, "captured.follow(self.in_force", "(self.in_force", TEST_TRITON_BACKEND
    ),
    "router: a plan for each layer": Mutation(
        PLANS, "if planned.layers == layers:", "if False:", TEST_TRITON_BACKEND
    ),
    "router: a backward without its route": Mutation(
        ROUTER, "self._past = past", "pass", TEST_BACKWARD
    ),
    "router: a backward's route stays": Mutation(
        ROUTER, "task_id() != -1", "task_id() != -2", TEST_BACKWARD
    ),
    "router: a model that is run again forgets its pass": Mutation(
        ROUTER, "if not _in_backward():", "if True:", TEST_BACKWARD
    ),
    "graphs: a shape for each route": Mutation(
        GRAPHS, "missing = (0, self._places - index.shape[1])", "missing = (0, 0)", TEST_COMPILE
    ),
    "graphs: set_adapter in a shape of its own": Mutation(
        GRAPHS, "expand(self._rows, -1)", "expand(1, -1)", TEST_COMPILE
    ),
    "router: a trace is reported": Mutation(
        ROUTER, "given.weight, LastPass())", "given.weight, given.last_pass)", TEST_COMPILE
    ),
    "graphs: symbols outlive their trace": Mutation(
        GRAPHS, "if torch.compiler.is_compiling():", "if False:", TEST_COMPILE
    ),
    "continuous: the users' route": Mutation(
        ROUTER,
        "self._served if self._serving else self.chosen",
        "self.chosen",
        TEST_CONTINUOUS_BATCHING,
    ),
    "route: packed samples of one adapter": Mutation(
        ROUTER, "self._refuse_packed()", "pass", TEST_GENERATION
    ),
    "residency: what is in force is evicted": Mutation(
        ROUTER, "last = None if leaving else self.route", "last = None", TEST_BOUNDED
    ),
    "residency: what a block goes back to is evicted": Mutation(
        ROUTER, "[*outer, *heir,", "[*heir,", TEST_BOUNDED
    ),
    "residency: what a backward needs is evicted": Mutation(
        ROUTER,
        "*awaiting, self._served, last",
        "self._served, last",
        TEST_BOUNDED,
    ),
    "router: a sticky route does not follow": Mutation(
        ROUTER, "self._heir = sticky[0], sticky[1].with_replaced(old, new)", "pass", TEST_BOUNDED
    ),
    "router: a forward in progress changes its adapter": Mutation(
        ROUTER,
        "self._heir = sticky[0], sticky[1].with_replaced(old, new)",
        "self.put(sticky[1].with_replaced(old, new))",
        TEST_BOUNDED,
    ),
    "router: two forward passes at once": Mutation(
        ROUTER, "if self._runner not in (None, threading.get_ident()):", "if False:", TEST_BOUNDED
    ),
    "router: a refused pass forgets the batch": Mutation(
        ROUTER, "if self._runner != threading.get_ident():", "if False:", TEST_BOUNDED
    ),
    "uniform_routes: routes outlive a reload": Mutation(
        UNIFORM_ROUTES,
        "if self._name_changes != self._slots.name_changes:",
        "if False:",
        TEST_MUX,
    ),
}
