"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

BOUNDED = "adapters/bounded.py"
PLACEMENT = "adapters/placement.py"
RESIDENT = "adapters/resident.py"
STRETCHES = "adapters/stretches.py"
CHANGES = "adapters/changes.py"
TEST_INTERRUPTS = ("model/test_interrupts.py",)
TEST_BOUNDED = ("adapters/test_bounded.py",)
TEST_PLACEMENT = ("adapters/test_placement.py",)
TEST_STREAMS = ("adapters/test_streams.py",)
PASSES, STREAMS = "routes/passes.py", "core/streams.py"
TRAINING, TRAINED = "adapters/training.py", "adapters/trained_adapter.py"
WRITING = "adapters/writing.py"
TEST_PUBLISHING = ("adapters/test_publishing.py",)
TEST_TRAINED_STREAMS = ("adapters/test_trained_streams.py",)
TEST_TRAINING = ("model/test_training_rows.py",)
TEST_STATE = ("model/test_training_state.py",)
TEST_BETWEEN = ("model/test_training_between.py",)
MUTATIONS = {
    "streams: a pass does not wait for its adapters": Mutation(
        STREAMS, "if last is not None and last.stream != stream:", "if False:", TEST_STREAMS
    ),
    "streams: a write does not wait for who has read": Mutation(
        STREAMS,
        "if event is not None:\n                    stream.wait_event(event)",
        "pass",
        TEST_STREAMS,
    ),
    "streams: the backward of a pass is not waited for": Mutation(
        PASSES, "is_over = not torch.is_grad_enabled()", "is_over = True", TEST_STREAMS
    ),
    "streams: all writes wait for all passes": Mutation(
        STREAMS, "[*self._reads] if slots is None else", "[*self._reads] if True else", TEST_STREAMS
    ),
    "streams: who has replayed a graph is not waited for": Mutation(
        STREAMS,
        "if not torch.cuda.is_current_stream_capturing():\n                order",
        "if False:\n                order",
        TEST_STREAMS,
    ),
    "streams: layers share a plan across streams": Mutation(
        PASSES, "here = site_on(device)", "here = device, 0", TEST_STREAMS
    ),
    "streams: views for graphs that nobody has compiled": Mutation(
        "routes/compiled.py", "are_read = False", "are_read = True", TEST_STREAMS
    ),
    "streams: pools grow under a pass in progress": Mutation(
        "core/pool.py",
        "if has_streams(self.A_rows.device):  # a pass",
        "if False:  # a pass",
        TEST_STREAMS,
    ),
    "placement: what is asked for is evicted": Mutation(
        BOUNDED, "beside(kept).union(wanted)", "beside(kept)", TEST_BOUNDED
    ),
    "placement: the pinned is evicted": Mutation(
        BOUNDED, "beside(kept).union(wanted)", "beside(wanted)", TEST_BOUNDED
    ),
    "placement: the last routed makes room": Mutation(
        BOUNDED, "self._resident.move_to_end(handle)", "pass", TEST_BOUNDED
    ),
    "placement: evicted before it is known to fit": Mutation(
        PLACEMENT, "raise PoolCapacityError(_no_room", "return {}, {}; (_no_room", TEST_BOUNDED
    ),
    "placement: whoever went in vain": Mutation(
        PLACEMENT, "reversed(evicted.values()))) > 1", "evicted.values())) > 99", TEST_PLACEMENT
    ),
    "placement: plans of before a later eviction": Mutation(
        PLACEMENT, "stale = [p for p in needed if", "stale = [p for p in () if", TEST_PLACEMENT
    ),
    "placement: more goes than is needed": Mutation(
        STRETCHES, "while room - ordered[first].room >= rows:", "while False:", TEST_PLACEMENT
    ),
    "placement: moving costs no more than evicting": Mutation(
        STRETCHES, "more_than_all = (1 + len(going)) ** 2", "more_than_all = 1", TEST_PLACEMENT
    ),
    "placement: no last resort": Mutation(
        STRETCHES, "or self._evict_the_oldest(going, moving)", "or None", TEST_PLACEMENT
    ),
    "residency: values that overflow come in": Mutation(
        "adapters/writing.py",
        "if torch.finfo(pool.A_rows.dtype).max < widest",
        "if False",
        TEST_BOUNDED,
    ),
    "adapters: removed under a forward in progress": Mutation(
        RESIDENT, "if users is not None and handle not in users:", "if True:", TEST_BOUNDED
    ),
    "adapters: routes look through all that were loaded at once": Mutation(
        RESIDENT,
        "self._nameless = self._nameless.difference(self._binding.values())",
        "self._nameless.difference_update(self._binding.values())",
        TEST_BOUNDED,
    ),
    "adapters: a replaced one stays for ever": Mutation(
        RESIDENT, "if users is not None and handle not in users:", "if False:", TEST_BOUNDED
    ),
    "interrupts: nothing is mended": Mutation(
        CHANGES, "if kind is not None:", "if False:", TEST_INTERRUPTS
    ),
    "interrupts: names are given before they are known": Mutation(
        RESIDENT,
        "self._finish_binding()\n        with self._writing():",
        "with self._writing():",
        TEST_INTERRUPTS,
    ),
    "interrupts: what is on its way in stays live": Mutation(
        BOUNDED, "self._slots.suspend(handle)  # it was", "pass  # it was", TEST_INTERRUPTS
    ),
    "interrupts: the sticky rows keep the old adapter": Mutation(
        RESIDENT, "self._router.mend_sticky()", "pass", TEST_INTERRUPTS
    ),
    "interrupts: a signal handler mends what goes on below it": Mutation(
        CHANGES, "is_running(self._frame)", "False", TEST_INTERRUPTS
    ),
    "training: fused steps are not published": Mutation(
        TRAINED, "trained.mux_steps += 1", "pass", TEST_TRAINING
    ),
    "training: fused steps are not seen by a backward": Mutation(
        TRAINING,
        "torch.autograd.graph.increment_version(trained.mux_parameters)",
        "pass",
        TEST_BETWEEN,
    ),
    "training: graphs do not see that a training has begun": Mutation(
        TRAINING, "if before == begun:", "if False:", TEST_BETWEEN
    ),
    "training: what is published is taken for changed": Mutation(
        TRAINING, "if before == state:", "if False:", TEST_BETWEEN
    ),
    "training: double rounding by casts": Mutation(
        TRAINING, " and not any(span.cast for span in spans)", "", TEST_STATE
    ),
    "training: tensors that nobody trains": Mutation(
        TRAINED, "if assign:", "if False:", TEST_STATE
    ),
    "training: a module's copy decides who drops": Mutation(
        TRAINED, '"mux_follow": None, ', "", TEST_STATE
    ),
    "training: an old module's mode drops x of the slot's next tenant": Mutation(
        TRAINING, "if self._trained.get(handle) is not trained:", "if False:", TEST_STATE
    ),
    "training: another dropout is passed over": Mutation(
        TRAINING, "self._follow_dropout(handle, self._trained[handle])", "pass", TEST_STATE
    ),
    "training: what has diverged is kept by copies": Mutation(
        TRAINING, "if self._unfit(trained) is None:", "if True:", TEST_STATE
    ),
    "training: copies of a model go back to before": Mutation(
        RESIDENT, "self._learnt(handle, learnt)", "pass", TEST_STATE
    ),
    "training: nobody waits for passes": Mutation(
        TRAINING, "if not self._router.passes.use_any(handles):", "if True:", TEST_TRAINING
    ),
    "training: an eviction of what is trained": Mutation(
        BOUNDED, "self._pinned.union(self.training.handles)", "self._pinned", TEST_TRAINING
    ),
    "training: what was learnt is lost by an eviction": Mutation(
        BOUNDED, "self._loaded[handle] = stored", "pass", TEST_TRAINING
    ),
    "training: ends before the name goes": Mutation(
        RESIDENT,
        "        with self._writing([slot_of(handle)]):",
        "        self.training.end(handle)\n        with self._writing([slot_of(handle)]):",
        TEST_TRAINING,
    ),
    "training: large values are taken for infinite ones": Mutation(
        WRITING, "next(finite) or bool(rows.isfinite().all())", "next(finite)", TEST_PUBLISHING
    ),
    "training: what is not finite reaches the pool of a host": Mutation(
        WRITING, "torch._foreach_zero_(views)", "pass", TEST_PUBLISHING
    ),
    "training: what is not finite reaches the pool of a GPU": Mutation(
        WRITING, "rounded.masked_fill_(whose, 0.0)", "pass", TEST_PUBLISHING
    ),
    "training: what is not finite has a scaling on a GPU": Mutation(
        WRITING, "scalings = scalings + lost", "pass", TEST_PUBLISHING
    ),
    "training: infinite values are no NaN": Mutation(
        WRITING,
        "torch.split(rounded - rounded, sizes)",
        "torch.split(rounded, sizes)",
        TEST_PUBLISHING,
    ),
    "training: scalings of another pool": Mutation(
        WRITING, "        start = end\n", "        pass\n", TEST_PUBLISHING
    ),
    "training: one by one": Mutation(WRITING, "1 << 22", "1", TEST_PUBLISHING),
    "streams: what is stepped elsewhere is read before": Mutation(
        STREAMS, "            here.wait_stream(writer)\n", "", TEST_TRAINED_STREAMS
    ),
    "streams: a step does not wait for who reads": Mutation(
        STREAMS, "other.wait_event(event)", "pass", TEST_TRAINED_STREAMS
    ),
    "streams: who writes reads what was changed elsewhere": Mutation(
        STREAMS,
        "with torch.cuda.stream(reader):\n        others",
        "if True:\n        others",
        TEST_TRAINED_STREAMS,
    ),
    "streams: what is rounded is copied before": Mutation(
        WRITING, "writer.wait_stream(reader)", "pass", TEST_TRAINED_STREAMS
    ),
    "streams: nobody knows where a step was": Mutation(
        TRAINED,
        "            trained.mux_note_stream()\n\n",
        "\n",
        TEST_TRAINED_STREAMS,
    ),
    "streams: what was learnt is saved before": Mutation(
        TRAINED, "wait_for(self.mux_streams)", "pass", TEST_TRAINED_STREAMS
    ),
    "streams: copies of a module hold its streams": Mutation(
        TRAINED, ', "mux_streams": {}', "", TEST_TRAINED_STREAMS
    ),
    "graphs: a step that is captured is waited for": Mutation(
        STREAMS, " and not is_capturing(device):", ":", TEST_TRAINED_STREAMS
    ),
    "graphs: what is trained is published by each replay": Mutation(
        TRAINING, "if any(map(is_cap", "if False and any(map(is_cap", TEST_TRAINED_STREAMS
    ),
    "graphs: a pass that trains is captured": Mutation(
        "routes/plans.py", "if method.trained and ops", "if False and ops", TEST_TRAINED_STREAMS
    ),
    "graphs: dropout is captured": Mutation(
        "core/weights.py", "if is_capturing(slots.device):", "if False:", TEST_TRAINED_STREAMS
    ),
}
