"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

COMPILED = "routes/compiled.py"
GRAPHS = "routes/graphs.py"
PASSES = "routes/passes.py"
PLANS = "routes/plans.py"
ROUTE = "routes/route.py"
ROUTER = "routes/router.py"
SCOPES = "routes/scopes.py"
THREADS = "routes/threads.py"
TOWERS = "routes/towers.py"
UNIFORM_ROUTES = "routes/route.py"
TEST_BOUNDED = ("adapters/test_bounded.py",)
TEST_COMPILE = ("model/test_compile.py",)
TEST_DIFFUSERS = ("model/test_diffusers.py",)
TEST_GENERATION = ("model/test_generation.py",)
TEST_MUX = ("model/test_mux.py",)
TEST_CPU_AND_TEST_LINEAR = ("ops/test_cpu.py", "layers/test_linear.py")
TEST_TRITON_BACKEND = ("ops/test_triton_backend.py",)
TEST_BACKWARD = ("routes/test_backward.py",)
TEST_INTERLEAVINGS = ("routes/test_interleavings.py",)
TEST_OTHER_BATCHES = ("model/test_other_batches.py",)
TEST_PASSES = ("routes/test_passes.py",)
TEST_SCOPES = ("routes/test_scopes.py",)
TEST_SIDE_BY_SIDE = ("model/test_side_by_side.py",)
TEST_THREADS = ("routes/test_threads.py",)
TEST_TOWERS = ("model/test_towers.py",)
MUTATIONS = {
    "router: what graphs read stays on the host": Mutation(
        ROUTER, "if self.anchor is pool:", "if False:", ("model/test_compile_on_cuda.py",)
    ),
    "router: any pass is like the last": Mutation(
        PLANS, " or last.case != case", "", TEST_CPU_AND_TEST_LINEAR
    ),
    "router: routes with other weights are alike": Mutation(
        "core/routing.py",
        "given = routing.index, routing.weight\n    if not all",
        "given = (routing.index,)\n    if not all",
        TEST_CPU_AND_TEST_LINEAR,
    ),
    "router: blocks with equal rows plan again": Mutation(
        PLANS, "case = route.value,", "case = route,", TEST_CPU_AND_TEST_LINEAR
    ),
    "router: a plan for each pass": Mutation(
        PLANS, "if case is None:", "if True:", TEST_CPU_AND_TEST_LINEAR
    ),
    "router: a plan for each layer": Mutation(
        PLANS, "if planned.layers == layers:", "if False:", TEST_TRITON_BACKEND
    ),
    "graphs: a graph answers with the base": Mutation(
        GRAPHS, "NOBODY = -2", "NOBODY = -1", TEST_TRITON_BACKEND
    ),
    "graphs: a graph keeps its route": Mutation(
        GRAPHS, "captured.follow(route if", "(route if", TEST_TRITON_BACKEND
    ),
    "graphs: a graph keeps the route of a block that ended": Mutation(
        GRAPHS, "if self._holder is scope:", "if False:", TEST_TRITON_BACKEND
    ),
    "passes: a backward without its route": Mutation(
        PASSES, "self._in_backward[number] = past", "pass", TEST_BACKWARD
    ),
    "router: a model that is run again forgets its pass": Mutation(
        ROUTER, "past = self.passes.of_backward()", "past = None", TEST_BACKWARD
    ),
    "compiled: a shape for each route": Mutation(
        COMPILED, "missing = (0, places - index.shape[1])", "missing = (0, 0)", TEST_COMPILE
    ),
    "compiled: set_adapter in a shape of its own": Mutation(
        COMPILED, "index.expand(rows, -1), weight", "index.expand(1, -1), weight", TEST_COMPILE
    ),
    "compiled: a trace is reported": Mutation(
        PLANS, "given.weight, LastPass())", "given.weight, given.last_pass)", TEST_COMPILE
    ),
    "compiled: symbols outlive their trace": Mutation(
        COMPILED, "if torch.compiler.is_compiling():", "if False:", TEST_COMPILE
    ),
    "route: packed samples of one adapter": Mutation(
        PASSES, 'if "cu_seq_lens_q" in kwargs and', "if False and", TEST_GENERATION
    ),
    "residency: what is in force is evicted": Mutation(
        ROUTER, "sticky = None if leaving else self.sticky.route", "sticky = None", TEST_BOUNDED
    ),
    "residency: what a block has is evicted": Mutation(
        ROUTER, "[*self.scopes.routes(), ", "[", TEST_BOUNDED
    ),
    "residency: what a pass or a backward needs is evicted": Mutation(
        ROUTER, "*self.passes.in_use(), sticky]", "sticky]", TEST_BOUNDED
    ),
    "router: a sticky route does not follow": Mutation(
        ROUTER,
        "self.sticky.route = self.sticky.route.with_replaced(old, new, self.slots)",
        "pass",
        TEST_BOUNDED,
    ),
    "router: a forward in progress changes its adapter": Mutation(
        ROUTER,
        "self.passes.running()",
        "self.passes.of_backward()",
        TEST_BOUNDED,
    ),
    "route: tiles of unknown number": Mutation(
        ROUTE, 'if expand == "tile" and times > 3:', "if False:", TEST_DIFFUSERS
    ),
    "scopes: crossed blocks stay": Mutation(
        SCOPES, "ended = [scope, *siblings] if crossed else [scope]", "ended = [scope]", TEST_SCOPES
    ),
    "scopes: crossed blocks end those of generators": Mutation(
        SCOPES, "if s.generator is None and s.opener() is opener", "", TEST_SCOPES
    ),
    "scopes: crossed blocks end those of the starter": Mutation(
        SCOPES,
        "s.generator is None and s.opener() is opener",
        "s.generator is None",
        TEST_SCOPES,
    ),
    "scopes: crossed blocks in changing contexts": Mutation(
        SCOPES,
        "if scope.generator is not None:\n            found",
        "if False:\n            found",
        TEST_INTERLEAVINGS,
    ),
    "scopes: a block is that of whoever steps": Mutation(
        SCOPES, "inner[0] if inner else None,", "None,", TEST_INTERLEAVINGS
    ),
    "scopes: between the steps of a generator": Mutation(
        SCOPES,
        "if innermost.is_own:\n            raise",
        "if False:\n            raise",
        TEST_INTERLEAVINGS,
    ),
    "scopes: generators that take turns": Mutation(
        SCOPES, "if by_turns or", "if False or", TEST_SCOPES
    ),
    "scopes: loops end the search for generators": Mutation(
        SCOPES, "for generator in (*inner, *outer):", "for generator in inner:", TEST_SCOPES
    ),
    "scopes: a scheduler is a task's generator": Mutation(
        SCOPES, "if in_task and found is inner and not _delegates(frame):", "if False:", TEST_SCOPES
    ),
    "scopes: blocks inside a loop": Mutation(
        SCOPES, "if any(s.number in innermost.around for s in found):", "if False:", TEST_SCOPES
    ),
    "scopes: a copied context outlives its block": Mutation(
        SCOPES, "s.ended and s.may_linger and s.is_own", "s.ended and s.is_own", TEST_SCOPES
    ),
    "scopes: what ended elsewhere stays": Mutation(
        SCOPES, "s.ended and s.may_linger and s.is_own", "False", TEST_SCOPES
    ),
    "scopes: blocks go before calls": Mutation(
        SCOPES, "if scope.is_call and not scope.ended:", "if False:", TEST_SCOPES
    ),
    "scopes: generate beside others' blocks": Mutation(
        SCOPES, "if meant and not scope.is_left_behind:", "if False:", TEST_INTERLEAVINGS
    ),
    "threads: whatever the variable holds": Mutation(
        SCOPES,
        "return self.current() or self.of_starter()",
        "return (self.here() or [None])[-1]",
        TEST_THREADS,
    ),
    "threads: those of a pool inherit": Mutation(
        THREADS, 'POOLS = ("concurrent.",', 'POOLS = ("none.",', TEST_THREADS
    ),
    "passes: another thread ends them": Mutation(
        PASSES, "began.thread is not self._thread.token or", "", TEST_SCOPES
    ),
    "passes: an interrupted one goes on": Mutation(
        ROUTER,
        "self.passes.forget_interrupted()\n        outer",
        "outer",
        TEST_PASSES,
    ),
    "passes: torn by what is set": Mutation(
        ROUTER,
        "found = self.passes.running()",
        "found = self.passes.of_backward()",
        TEST_PASSES,
    ),
    "compiled: the rows that the thread prepared": Mutation(
        COMPILED,
        "made = _read(padded(route, rows, places, index.device))",
        "return index.clone(), weight.clone()",
        TEST_SIDE_BY_SIDE,
    ),
    "compiled: sticky rows of before the first graph": Mutation(
        COMPILED, "cell.source, cell.is_behind = sticky, True", "pass", TEST_COMPILE
    ),
    "compiled: gradients of another's rows": Mutation(
        COMPILED, "fits = owner.view.cell.source is route", "fits = True", TEST_SIDE_BY_SIDE
    ),
    "graphs: blocks do not wait": Mutation(
        GRAPHS, "return holder not in around", "return False", TEST_SIDE_BY_SIDE
    ),
    "graphs: a dead thread holds them": Mutation(
        GRAPHS, "or holder.is_left_behind", "", TEST_SIDE_BY_SIDE
    ),
    "uniform_routes: routes outlive a reload": Mutation(
        UNIFORM_ROUTES,
        "if self._name_changes != self._slots.name_changes:",
        "if False:",
        TEST_MUX,
    ),
    "route: towers hold no adapters": Mutation(
        ROUTE, "found |= route.handles", "pass", TEST_TOWERS
    ),
    "route: beams are what expand says": Mutation(
        ROUTE, "if beams not in (None, 1) and times == beams:", "if False:", TEST_OTHER_BATCHES
    ),
    "towers: one image for each sample": Mutation(
        TOWERS, "samples.repeat_interleave(counts).repeat", "samples.repeat", TEST_TOWERS
    ),
    "towers: images of any number of tokens": Mutation(
        TOWERS, "if end and end not in ends:", "if False:", TEST_TOWERS
    ),
    "towers: the first image's rows for all": Mutation(
        TOWERS,
        "return torch.arange(rows).repeat",
        "return torch.zeros(rows).long().repeat",
        TEST_TOWERS,
    ),
    "towers: samples before tokens": Mutation(
        TOWERS,
        "samples).repeat(x.shape[0])",
        "samples).repeat_interleave(x.shape[0])",
        TEST_OTHER_BATCHES,
    ),
    "towers: images are their placeholders' samples'": Mutation(
        TOWERS, "if counts is not None and counts != found:", "if False:", TEST_TOWERS
    ),
    "route: the first row trains for all": Mutation(
        ROUTE, " or weight.requires_grad", "", TEST_MUX
    ),
    "route: all that a fader has had is kept": Mutation(
        ROUTE, "if len(self._routes) == MAX_ROUTES:", "if False:", TEST_MUX
    ),
    "compiled: rows of any number": Mutation(
        COMPILED, "route.routing.rows != index.shape[0] or ", "", TEST_COMPILE
    ),
    "scopes: whoever steps a generator starts its tasks": Mutation(
        SCOPES, "or (before and _is_at_yield(generator))", "", TEST_SCOPES
    ),
    "router: sticky rows keep the adapter of before": Mutation(
        ROUTER,
        "(successor := self.slots.successor(handle))",
        "(successor := handle)",
        ("model/test_interrupts.py",),
    ),
    "training: no pass publishes": Mutation(
        PASSES,
        "            self.before()\n",
        "            pass\n",
        ("model/test_training_rows.py",),
    ),
    "training: a plan of before": Mutation(
        PLANS, "trained and self._slots.trained", "()", ("model/test_training_rows.py",)
    ),
}
