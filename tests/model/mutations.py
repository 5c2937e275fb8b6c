"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

ATTACH = "model/attach.py"
BOUNDED = "adapters/bounded.py"
CALL = "model/given_rows.py"
IN_FLIGHT = "model/continuous_batching/in_flight.py"
LENGTHS = "model/continuous_batching/lengths.py"
OVERFLOWS = "model/continuous_batching/overflows.py"
MANAGER = "model/continuous_batching/manager.py"
REQUEST_ROWS = "model/continuous_batching/request_rows.py"
GENERATION = "model/generation.py"
GIVEN_ROWS = "model/given_rows.py"
LAYOUT = "model/layout.py"
MUX = "model/mux.py"
ROUTE = "routes/route.py"
ROUTER = "routes/router.py"
SELECTIONS = "core/selections.py"
RESIDENT = "adapters/resident.py"
SAVED_MODULES = "layers/saved_modules.py"
PEFT_MODEL = "checkpoints/peft_model.py"
STORED_ADAPTER = "checkpoints/stored_adapter.py"
TOP = "model/top.py"
TRAINED = "model/trained.py"
TRAINED_ADAPTER = "adapters/trained_adapter.py"
TRAINING = "adapters/training.py"
CPU_TRAINING = "ops/cpu/training.py"
KINDS = "layers/kinds.py"
LINEAR = "layers/linear.py"
PASSES = "routes/passes.py"
PEFT_FOLDER = "checkpoints/peft_folder.py"
TEST_ADAPTER_NAMES = ("model/test_adapter_names.py",)
TEST_CALL = ("model/test_call.py",)
TEST_CONTINUOUS_CALLS = ("model/test_continuous_calls.py",)
TEST_CANCELS = ("model/test_continuous_cancels.py",)
TEST_LENGTHS = ("model/test_continuous_lengths.py",)
TEST_OVERFLOWS = ("model/test_continuous_overflows.py",)
TEST_COPIES = ("model/test_copies.py",)
TEST_KINDS = ("model/test_kinds.py",)
TEST_TOKEN_INDEX = ("routes/test_token_index.py",)
TEST_SAVED_MODULES = ("model/test_saved_modules.py",)
TEST_WRAPPERS = ("model/test_wrappers.py",)
TEST_BOUNDED = ("adapters/test_bounded.py",)
TEST_CONTINUOUS_BATCHING = ("model/test_continuous_batching.py",)
TEST_EVENTS = ("model/test_continuous_events.py",)
TEST_TURNS = ("model/test_continuous_turns.py",)
TEST_OTHER_BATCHES = ("model/test_other_batches.py",)
TEST_TOWERS = ("model/test_towers.py",)
TEST_RARELY = ("model/test_training_rarely.py",)
TEST_RESUMED = ("model/test_training_resumed.py",)
TEST_ROWS = ("model/test_training_rows.py",)
TEST_STATE = ("model/test_training_state.py",)
TEST_BETWEEN = ("model/test_training_between.py",)
TEST_DATA_PARALLEL = ("model/test_training_ecosystem.py",)
TEST_PARALLEL = ("model/test_training_parallel.py",)
MUTATIONS = {
    "continuous: the batch that is not computed": Mutation(
        MANAGER,
        "batch.current_pair]",
        "1 - batch.current_pair]",
        TEST_CONTINUOUS_BATCHING,
    ),
    "layout: positions have the samples' rows": Mutation(
        LAYOUT, "elif target in unknown:", "elif False:", TEST_KINDS
    ),
    "continuous: prefixes are shared": Mutation(
        MANAGER, "config.allow_block_sharing", "False", TEST_CONTINUOUS_BATCHING
    ),
    "continuous: children have no adapters": Mutation(
        MANAGER,
        "range(self.num_return_sequences - 1)",
        "range(0)",
        TEST_CONTINUOUS_BATCHING,
    ),
    "continuous: finished requests are kept": Mutation(
        IN_FLIGHT,
        "elif waiting.isdisjoint(request.names):",
        "elif False:",
        TEST_CONTINUOUS_BATCHING,
    ),
    "continuous: what is in the queue is forgotten": Mutation(
        IN_FLIGHT,
        "elif waiting.isdisjoint(request.names):",
        "else:",
        TEST_EVENTS,
    ),
    "continuous: a name in flight comes again": Mutation(
        IN_FLIGHT, "if other and not (", "if other and False and (", TEST_EVENTS
    ),
    "continuous: what does not fit fails all": Mutation(
        IN_FLIGHT, "except PoolCapacityError:", "except ZeroDivisionError:", TEST_EVENTS
    ),
    "continuous: small ones overtake for ever": Mutation(
        IN_FLIGHT, "if first and new and asked.handles and not", "if False and not", TEST_TURNS
    ),
    "continuous: those that pass take the room of the first together": Mutation(
        IN_FLIGHT, "(first.beside,) = self._adapters", "self._adapters", TEST_TURNS
    ),
    "continuous: those that pass take room that was pinned since": Mutation(
        IN_FLIGHT, "if not self._fit(first, first.beside.handles):", "if False:", TEST_TURNS
    ),
    "continuous: what lies in the way of the first stays there": Mutation(
        IN_FLIGHT, "self._hold(first.row.handles.union(*running))", "pass", TEST_TURNS
    ),
    "continuous: room is kept for one that has gone": Mutation(
        IN_FLIGHT,
        "            self._first = None\n",
        "            pass\n",
        TEST_TURNS,
    ),
    "continuous: a broken file fails all": Mutation(
        IN_FLIGHT,
        "except LoraMuxError as error:",
        "except ZeroDivisionError as error:",
        TEST_EVENTS,
    ),
    "continuous: keys and values that overflow are written": Mutation(
        OVERFLOWS, "x.masked_fill(~fine[:, None], 0)", "x", TEST_OVERFLOWS
    ),
    "continuous: logits that are no numbers are drawn from": Mutation(
        OVERFLOWS, "scores.masked_fill(~fine[..., None], 0)", "scores", TEST_OVERFLOWS
    ),
    "continuous: an overflow is answered": Mutation(
        OVERFLOWS, "fine.append(all(own))", "fine.append(True)", TEST_OVERFLOWS
    ),
    "continuous: a cancellation ends whoever has the name": Mutation(
        MANAGER, "if self.distributed_helper.tp_size > 1:", "if True:", TEST_CANCELS
    ),
    "continuous: one sequence is cancelled, not its request": Mutation(
        IN_FLIGHT, "request.names if name == request.names[0] else (name,)", "(name,)", TEST_CANCELS
    ),
    "continuous: a full cache stays closed when all are cancelled": Mutation(
        MANAGER, "scheduler.block_new_requests = False", "pass", TEST_CANCELS
    ),
    "continuous: a cancelled request goes on in the batch that is computed": Mutation(
        MANAGER, "state.status = type(state.status).FINISHED", "pass", TEST_CANCELS
    ),
    "continuous: sequences of a cancelled request begin": Mutation(
        MANAGER, "if not any(state is gone for gone in cancelled)", "if True", TEST_CANCELS
    ),
    "continuous: a prompt without tokens ends all": Mutation(
        LENGTHS, "if not tokens:", "if False:", TEST_LENGTHS
    ),
    "continuous: a prompt that is too long is added": Mutation(
        LENGTHS, "len(tokens) > most:", "len(tokens) > most + 1:", TEST_LENGTHS
    ),
    "continuous: one that outgrows the cache ends all": Mutation(
        MANAGER, "if found or not scheduler.starved_requests", "if True", TEST_LENGTHS
    ),
    "continuous: a full cache ends what its adapters keep back": Mutation(
        MANAGER, "is_full &= not scheduler.active_requests", "is_full &= True", TEST_LENGTHS
    ),
    "continuous: refused requests are kept": Mutation(
        MANAGER, "if added is None:", "if False:", TEST_EVENTS
    ),
    "continuous: a stopped manager keeps its requests": Mutation(
        MANAGER, "self.mux_requests.forget(set, lambda name: False)", "pass", TEST_EVENTS
    ),
    "continuous: a removed adapter dies at once": Mutation(
        RESIDENT, "promised = handle in self._promises.handles", "promised = False", TEST_EVENTS
    ),
    "continuous: promised rank rows are freed": Mutation(
        RESIDENT,
        "self._nameless - self._claims.alive() - self._promises.handles",
        "self._nameless - self._claims.alive()",
        TEST_EVENTS,
    ),
    "continuous: promised adapters go for good": Mutation(
        BOUNDED,
        "self._nameless.intersection(handles) - self._promises.handles",
        "self._nameless.intersection(handles)",
        TEST_EVENTS,
    ),
    "continuous: a batch may lose its adapters again": Mutation(
        BOUNDED, "self._staying.add(held)", "pass", TEST_EVENTS
    ),
    "continuous: what was learnt is lost with the name": Mutation(
        RESIDENT, "handle in self.training.handles and handle in", "handle not in", TEST_EVENTS
    ),
    "continuous: removed names serve others": Mutation(
        "core/slots.py", "if self._removed and not promised:", "if False:", TEST_EVENTS
    ),
    "continuous: detached under requests": Mutation(
        MUX, "if self._adapters.has_promises:", "if False:", TEST_EVENTS
    ),
    "continuous: requests do not see their own rows": Mutation(
        REQUEST_ROWS, "if entry is NOT_GIVEN:", "if True:", TEST_CONTINUOUS_CALLS
    ),
    "continuous: none is a guess": Mutation(
        REQUEST_ROWS, "if entry is None:", "if False:", TEST_CONTINUOUS_CALLS
    ),
    "continuous: a number of base rows is not compared": Mutation(
        REQUEST_ROWS,
        "    if route is None:\n",
        "    if route is None or not route.selects:\n",
        TEST_CONTINUOUS_CALLS,
    ),
    "continuous: generate_batch looks twice": Mutation(
        MANAGER, "if due_rows() is not None:", "if False:", TEST_CONTINUOUS_CALLS
    ),
    "continuous: the model may be detached under a batch": Mutation(
        MANAGER, "with self._serving(route):", "if True:", TEST_CONTINUOUS_CALLS
    ),
    "generation: the keyword reaches the model": Mutation(
        GENERATION,
        "rows = kwargs.pop(KEYWORD, None)\n        inputs",
        "rows = kwargs.get(KEYWORD)\n        inputs",
        TEST_ADAPTER_NAMES,
    ),
    "top: the keyword reaches the model": Mutation(
        TOP, "if name != KEYWORD}", "if True}", TEST_ADAPTER_NAMES
    ),
    "top: a graph for each list of rows": Mutation(
        TOP,
        'if "torch._dynamo" not in sys.modules:',
        "if True:",
        TEST_ADAPTER_NAMES,
    ),
    "top: a pass ends as a traced one": Mutation(
        TOP, "and not router.view.cell.in_pass:", "and True:", TEST_ADAPTER_NAMES
    ),
    "top: rows are left out of a graph": Mutation(
        TOP, "            if rows is not None:\n", "            if False:\n", TEST_ADAPTER_NAMES
    ),
    "mux: messages call all rows `rows`": Mutation(
        GIVEN_ROWS, "self._slots, argument=KEYWORD)", "self._slots)", TEST_ADAPTER_NAMES
    ),
    "call: what runs later is handed out": Mutation(
        CALL, "inspect.isawaitable(result) or", "", TEST_CALL
    ),
    "call: it is a block": Mutation(
        MUX,
        'Call(lambda: self._under(make, "call"))',
        'Call(lambda: self._under(make, "block"))',
        TEST_CALL,
    ),
    "attach: a wrapper is attached": Mutation(
        ATTACH, "    model = unwrapped(model)\n", "", TEST_WRAPPERS
    ),
    "attach: the outer model is attached as well": Mutation(
        ATTACH, "if mux_of(module) is not None:", "if False:", TEST_WRAPPERS
    ),
    "mux: handles begin anew": Mutation(
        MUX, "Slots(_GENERATIONS.get(model, ()))", "Slots()", TEST_WRAPPERS
    ),
    "mux: a block of a detached Mux": Mutation(
        ROUTER,
        "if self.is_detached:",
        "if False:",
        TEST_WRAPPERS,
    ),
    "copies: an adapter on the host has no pickle": Mutation(
        STORED_ADAPTER, "functools.partial(_held, packed))", "lambda pinned: packed)", TEST_COPIES
    ),
    "copies: an adapter of before a copy": Mutation(
        BOUNDED, '"_streams": {}', '"_streams": {}, "_loaded": {}', TEST_COPIES
    ),
    "route: another batch of as many tokens": Mutation(
        ROUTE,
        "if self.samples is not None and self.samples != samples:",
        "if False:",
        TEST_TOKEN_INDEX,
    ),
    "route: the weights of the first samples": Mutation(
        SELECTIONS, "weights.flatten(0, 1)", "weights.flip(0).flatten(0, 1)", TEST_TOKEN_INDEX
    ),
    "mux: a route of before a reload": Mutation(
        GIVEN_ROWS, "return make() if first.named", "return first if first.named", TEST_BOUNDED
    ),
    "generation: samples that finish keep their places": Mutation(
        GENERATION,
        "number // sequences",
        "reduced[2].index(number) // sequences",
        TEST_OTHER_BATCHES,
    ),
    "generation: guidance repeats as beams do": Mutation(
        GENERATION, "if own and guided and", "if False and", TEST_OTHER_BATCHES
    ),
    "generation: samples that are computed again": Mutation(
        GENERATION, "if shrinks and isinstance", "if False and isinstance", TEST_OTHER_BATCHES
    ),
    "layout: images are samples": Mutation(LAYOUT, "if not media:", "if True:", TEST_TOWERS),
    "layout: text is images": Mutation(
        LAYOUT, "text |= _decoders(root, paths)", "pass", TEST_TOWERS
    ),
    "layout: codebooks are samples": Mutation(
        LAYOUT, 'if not kind.startswith("musicgen"):', "if True:", TEST_OTHER_BATCHES
    ),
    "layout: tokens are samples": Mutation(
        LAYOUT, 'place = Place(target, place.tower, "tokens first")', "pass", TEST_OTHER_BATCHES
    ),
    "layout: picked tokens are samples": Mutation(
        LAYOUT, 'place = Place(target, place.tower, "picked tokens")', "pass", TEST_OTHER_BATCHES
    ),
    "saved modules: different ones are summed": Mutation(
        SELECTIONS,
        "sorted(companion.modules & other.modules)[:1]",
        "list[str]()",
        TEST_SAVED_MODULES,
    ),
    "saved modules: scaled by the adapter's weight": Mutation(
        SELECTIONS,
        "(more != NONE).to(weight.dtype)",
        "weight[:, :1].expand(more.shape)",
        TEST_SAVED_MODULES,
    ),
    "saved modules: equal ones are held twice": Mutation(
        SELECTIONS,
        "        if users:\n            return self._of",
        "        if False:\n            return self._of",
        TEST_SAVED_MODULES,
    ),
    "saved modules: are there after their last adapter": Mutation(
        RESIDENT, "self._nameless.add(companion)", "pass", TEST_SAVED_MODULES
    ),
    "saved modules: taken for what an interrupt has left": Mutation(
        RESIDENT, " - self._slots.companions.handles", "", ("model/test_interrupts.py",)
    ),
    "saved modules: an adapter's are evicted before it": Mutation(
        BOUNDED,
        "return handle, self._slots.companions.beside([handle])",
        "return handle, [handle]",
        TEST_SAVED_MODULES,
    ),
    "saved modules: those of others stay after a reload": Mutation(
        ROUTE, "slots.companions.left_out(self.routing)", "self.routing", TEST_SAVED_MODULES
    ),
    "saved modules: the bias is the base's": Mutation(
        SAVED_MODULES, 'bias = more.get("bias")', "bias = None", TEST_SAVED_MODULES
    ),
    "saved modules: in force where LoRA is not": Mutation(
        PEFT_MODEL, "(*layers.items(), *wrappers.items())", "layers.items()", TEST_SAVED_MODULES
    ),
    "training: publish() leaves no trace": Mutation(
        TRAINED, "training.of(name).mux_steps += 1", "training.of(name)", TEST_BETWEEN
    ),
    "training: the pools have the user's values": Mutation(
        TRAINED, "trained.mux_steps += weights is not None", "pass", TEST_BETWEEN
    ),
    "training: values that are not finite are frozen": Mutation(
        TRAINED, "self._adapters.training.check_finite(name)", "pass", TEST_STATE
    ),
    "training: a mask of another shape": Mutation(
        TRAINED, " or mask.shape != losses.shape", "", TEST_STATE
    ),
    "training: processes whose graphs give 0 have a share in the mean": Mutation(
        TRAINED, "_flat_gradient(one).any()", "torch.tensor(True)", TEST_DATA_PARALLEL
    ),
    "training: what is held still gets a gradient": Mutation(
        TRAINED, "if some and parameter.grad is None", "if parameter.grad is None", TEST_RARELY
    ),
    "training: parameters that are held still count": Mutation(
        TRAINED,
        "[p for p in trained.mux_parameters if p.requires_grad]",
        "[*trained.mux_parameters]",
        TEST_RARELY,
    ),
    "training: parameters in a file's order": Mutation(
        TRAINING,
        "for path, pool in self._pools.items()\n            if path in weights",
        "for path in weights\n            for pool in (self._pools[path],)",
        TEST_RESUMED,
    ),
    "training: a checkpoint's dropout is forgotten": Mutation(
        PEFT_FOLDER, ", dropout=config.lora_dropout", "", TEST_RESUMED
    ),
    "training: all-linear means the head": Mutation(
        TRAINED, "and p not in heads", "", TEST_RESUMED
    ),
    "training: no trace before a step's end": Mutation(
        TRAINED_ADAPTER,
        "_HOOKS.append(register_optimizer_step_pre_hook(_stepped))",
        "pass",
        TEST_RARELY,
    ),
    "training: second derivatives on the CPU": Mutation(
        CPU_TRAINING, "        refuse_second_derivatives()\n", "", TEST_RARELY
    ),
    "training: one node for rows of any strides": Mutation(
        KINDS, "or not x.is_contiguous()", "", TEST_RARELY
    ),
    "training: the plan from before it began": Mutation(
        LINEAR, "is_compiling() or slots.trains else", "is_compiling() else", TEST_RARELY
    ),
    "training: a layer by itself has old values": Mutation(
        PASSES,
        "        if self.current() is None:\n            self.before()\n        self._order",
        "        self._order",
        TEST_RARELY,
    ),
    "training: an adapter twice is another set": Mutation(
        TRAINED, "masked_fill(again, -1)", "clone()", TEST_ROWS
    ),
    "training: what no process has named gets 0": Mutation(
        TRAINED, "one.zero_grad(set_to_none=True)", "pass", TEST_DATA_PARALLEL
    ),
    "parallel: DDP copies the pools": Mutation(
        MUX, "keep_from_broadcasts(model, [*targets, *joining])", "pass", TEST_PARALLEL
    ),
    "parallel: DDP copies the pools of a compiled model": Mutation(
        TOP, ", *own, *compiled})", ", *own})", TEST_PARALLEL
    ),
    "parallel: pools that DDP has copied are read": Mutation(
        TOP, "    _refuse_broadcasts(mux)", "", TEST_PARALLEL
    ),
    "parallel: copies of a pass are not noticed": Mutation(
        TOP, "torch.autograd.graph.increment_version(anchor.rank)", "pass", TEST_PARALLEL
    ),
    "saved modules: equal by their shapes": Mutation(
        STORED_ADAPTER, "made.update(values.data[", "(values.data[", TEST_SAVED_MODULES
    ),
}
