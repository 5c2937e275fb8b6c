"""Every interleaving of two contexts, up to some length, against the precedence in ten lines.

Each adapter answers with an integer of its own, and each context routes a row of its own, so that
an answer shows whose rows it was computed with. No sequence may give a wrong row, and nothing may
be refused but what `Precedence.refusal` names.
"""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lora_mux
from actors import Actor, InCopiedContexts, InGenerator, InPool, InTask, InThread, Plain
from integers import Squares
from lora_mux.errors import LoraMuxError, RoutingBusyError, RoutingError, UnknownAdapterError

X = torch.ones(2, 1)
VALUES = {"a": 1, "b": 2, "a after 1": 4, "a after 2": 6, "a after 3": 8, "a after 4": 10}
# Of one context: open a block, one of the base model, leave the innermost or the outermost one,
# begin and end a generate() that spans steps. Of all: set_adapter, load(replace=True), remove.
OWN = ("enter", "disable", "leave", "leave outermost", "begin generate", "end generate")
SHARED = ("set_adapter", "replace", "remove")
Step = tuple[int, str]  # a context and what it does


def save(folder: Path, value: int) -> None:
    folder.mkdir()
    config = {"peft_type": "LORA", "lora_alpha": 1, "r": 1, "target_modules": ["first", "second"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.{path}.lora_{factor}.weight": torch.full((1, 1), float(scale))
        for path in ("first", "second")
        for factor, scale in (("A", 1), ("B", value))
    }
    save_file(tensors, folder / "adapter_model.safetensors")


def rows_of(context: int, name: str | None) -> list[str | None]:
    return [name, None] if context == 0 else [None, name]


@dataclass(eq=False)
class Block:
    context: int
    values: list[str | None]  # of each row, the version of the adapter that it selects
    is_open: bool = True


@dataclass
class Precedence:
    """Whose rows a pass has: those of its call, of its block, or the sticky ones."""

    shares_context: tuple[int, ...] = ()  # generators in the context of whoever steps them
    steps_inside: bool = False  # context 1 is plain code, and steps context 0
    names: dict[str, str] = field(default_factory=lambda: {"a": "a", "b": "b"})
    sticky: list[str | None] | None = None
    blocks: tuple[list[Block], list[Block]] = field(default_factory=lambda: ([], []))
    calls: tuple[list[Any], list[Any]] = field(default_factory=lambda: ([], []))
    order: list[Block] = field(default_factory=list)
    reloads: int = 0
    removed: set[str] = field(default_factory=set)  # versions; those replaced live on in blocks

    def open_blocks(self, context: int) -> list[Block]:
        return [block for block in self.blocks[context] if block.is_open]

    def rows(self, context: int) -> list[str | None]:
        if self.calls[context]:
            return self.calls[context][-1]  # type: ignore[no-any-return]
        if self.open_blocks(context):
            return self.open_blocks(context)[-1].values
        if self.steps_inside and context == 0 and self.open_blocks(1):
            return self.open_blocks(1)[-1].values
        return self.sticky or [None, None]

    def refusal(self, context: int, generates: bool) -> tuple[type[LoraMuxError], str] | None:
        """The error of a forward or a generate() that begins now."""
        order, own = [b for b in self.order if b.is_open], self.open_blocks(context)
        runs = own and context in self.shares_context
        suspended = (
            order and order[-1].context != context and order[-1].context in (self.shares_context)
        )
        if suspended and not runs and not self.calls[context]:
            return RoutingError, "between two steps of a generator"
        inherited = self.steps_inside and context == 0 and self.open_blocks(1)
        others = any(set(block.values) != {None} for block in self.open_blocks(1 - context))
        if generates and others and self.sticky is None and not own and not inherited:
            if not self.calls[context]:
                return RoutingBusyError, "has no rows for generate"
        if self.removed.intersection(map(str, self.rows(context))):
            return UnknownAdapterError, "loaded"
        return None

    def answer(self, context: int) -> list[int]:
        return [(1 + (VALUES[value] if value else 0)) ** 2 for value in self.rows(context)]


class Run:
    """Does the steps of a sequence in the actors and in the model of the precedence."""

    def __init__(
        self,
        model: Squares,
        mux: lora_mux.Mux,
        folders: Path,
        actors: list[Actor],
        truth: Precedence,
    ) -> None:
        self.model, self.mux, self.folders = model, mux, folders
        self.actors, self.truth = actors, truth
        self.managers: tuple[list[Any], list[Any]] = ([], [])

    def step(self, context: int, act: str) -> None:
        getattr(self, "do_" + act.replace(" ", "_"))(context)

    def check(self) -> None:
        """A forward and a generate() in each context."""
        for context, actor in enumerate(self.actors):
            for generates in (False, True):
                run = self.model.generate if generates else self.model
                got = actor.do(lambda run=run: run(X))  # type: ignore[misc]
                refusal = self.truth.refusal(context, generates)
                if refusal is None:
                    assert not isinstance(got, Exception), (context, generates, got)
                    assert got.flatten().tolist() == self.truth.answer(context), context
                else:
                    self.expect(got, *refusal)

    @staticmethod
    def expect(got: Any, error: type[LoraMuxError], says: str) -> None:
        assert type(got) is error and says in str(got), got

    def do_enter(self, context: int) -> None:
        name = "ab"[len(self.managers[context]) % 2]
        got = self.actors[context].do(lambda: self._entered(rows_of(context, name)))
        if name not in self.truth.names:
            self.expect(got, UnknownAdapterError, "loaded")
        else:
            self._begun(context, got, rows_of(context, self.truth.names[name]))

    def do_disable(self, context: int) -> None:
        got = self.actors[context].do(lambda: self._entered(None))
        self._begun(context, got, [None, None])

    def _entered(self, rows: Any) -> Any:
        manager = self.mux.disable_adapter() if rows is None else self.mux.route(rows)
        manager.__enter__()
        return manager

    def _begun(self, context: int, manager: Any, values: list[str | None]) -> None:
        assert not isinstance(manager, Exception), manager
        self.managers[context].append(manager)
        block = Block(context, values)
        self.truth.blocks[context].append(block)
        self.truth.order.append(block)

    def do_leave(self, context: int, which: int = -1) -> None:
        if not self.managers[context]:
            return  # it was refused
        manager = self.managers[context].pop(which)
        block = self.truth.blocks[context].pop(which)
        later = self.truth.open_blocks(context) if which == 0 else []
        got = self.actors[context].do(lambda: manager.__exit__(None, None, None))
        if block.is_open and later:
            self.expect(got, RoutingError, "opposite order")
            for other in later:
                other.is_open = False
        else:
            assert got is None or got is False, got
        block.is_open = False

    def do_leave_outermost(self, context: int) -> None:
        self.do_leave(context, 0)

    def do_begin_generate(self, context: int) -> None:
        actor = self.actors[context]
        assert isinstance(actor, InThread)
        refusal = self.truth.refusal(context, True)
        got = actor.begin(lambda serve: self.model.generate(X, serve))
        if refusal is None:
            assert got == "begun", got
            self.truth.calls[context].append(self.truth.rows(context))
        else:
            self.expect(got, *refusal)

    def do_end_generate(self, context: int) -> None:
        actor = self.actors[context]
        assert isinstance(actor, InThread)
        if not self.truth.calls[context]:
            return  # it was refused
        refusal, answer = self.truth.refusal(context, True), self.truth.answer(context)
        got = actor.end()
        if refusal is None:
            assert isinstance(got, Tensor) and got.flatten().tolist() == answer, got
        else:
            self.expect(got, *refusal)
        self.truth.calls[context].pop()

    def do_set_adapter(self, context: int) -> None:
        got = self.actors[context].do(lambda: self.mux.set_adapter("a"))
        if "a" in self.truth.names:
            assert got is None, got
            self.truth.sticky = [self.truth.names["a"]] * 2
        else:
            self.expect(got, UnknownAdapterError, "loaded")

    def do_replace(self, context: int) -> None:
        before = self.truth.names.get("a")
        self.truth.reloads += 1
        now = self.truth.names["a"] = f"a after {self.truth.reloads}"
        got = self.actors[context].do(lambda: self.mux.load("a", self.folders / now, replace=True))
        assert isinstance(got, int), got
        if self.truth.sticky is not None and before is not None and before in self.truth.sticky:
            self.truth.sticky = [now] * 2

    def do_remove(self, context: int) -> None:
        got = self.actors[context].do(lambda: self.mux.remove("a"))
        assert got is None, got
        self.truth.removed.add(self.truth.names.pop("a"))

    def reset(self) -> None:
        """Leave everything, and look that nothing is left in force."""
        for context in (0, 1):
            while self.truth.calls[context]:
                self.do_end_generate(context)
            while self.managers[context]:
                self.do_leave(context)
        assert self.mux._router.scopes.all_open() == []
        assert not self.mux._router.passes.in_progress
        self.mux.set_adapter(None)
        self.mux._router.sticky.is_chosen = False
        if self.truth.names.get("a") != "a":
            self.mux.load("a", self.folders / "a", replace="a" in self.truth.names)


def possible(sequence: tuple[Step, ...], spans: bool, symmetric: bool) -> list[Step]:
    """What can come after a sequence: blocks that are open can be left, and so on."""
    steps: list[Step] = []
    mine = [act for act in sequence if act[1] in OWN]
    for context in (0, 1):
        acts = [act for who, act in sequence if who == context]
        left = acts.count("leave") + acts.count("leave outermost")
        blocks = acts.count("enter") + acts.count("disable") - left
        calls = acts.count("begin generate") - acts.count("end generate")
        if symmetric and context == 1 and not mine:
            continue  # the same as in context 0
        fits = {
            "enter": True,
            "disable": True,
            "leave": blocks > 0,
            "leave outermost": blocks > 1,
            "begin generate": spans and calls == 0,
            "end generate": spans and calls > 0,
        }
        steps += [(context, act) for act in OWN if fits[act]]
    last = next((act for _, act in reversed(sequence) if act in ("remove", "replace")), "replace")
    shared = SHARED if last == "replace" else ("set_adapter", "replace")
    steps += [(len(sequence) % 2, act) for act in shared]
    return steps


def sequences(length: int, spans: bool, symmetric: bool) -> Iterator[tuple[Step, ...]]:
    """All of a length. Who calls set_adapter, load or remove takes turns."""
    found: list[tuple[Step, ...]] = [()]
    for _ in range(length):
        found = [(*s, step) for s in found for step in possible(s, spans, symmetric)]
    return iter(found)


@contextmanager
def threads() -> Iterator[list[Actor]]:
    actors: list[Actor] = [InThread(), InThread()]
    yield actors
    for actor in actors:
        actor.close()


@contextmanager
def tasks() -> Iterator[list[Actor]]:
    with closing(asyncio.new_event_loop()) as loop:
        actors: list[Actor] = [InTask(loop) for _ in range(2)]
        yield actors
        for actor in actors:
            actor.close()


@contextmanager
def generators() -> Iterator[list[Actor]]:
    yield [InGenerator(), InGenerator()]


@contextmanager
def generator_beside_plain_code() -> Iterator[list[Actor]]:
    yield [InGenerator(), Plain()]


@contextmanager
def copied_contexts_beside_plain_code() -> Iterator[list[Actor]]:
    yield [InCopiedContexts(), Plain()]


@contextmanager
def pool() -> Iterator[list[Actor]]:
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        yield [InPool((one, other)), InPool((one, other))]


KINDS: dict[Any, tuple[tuple[int, ...], bool]] = {
    threads: ((), False),
    tasks: ((), False),
    generators: ((0, 1), False),
    generator_beside_plain_code: ((0,), True),
    copied_contexts_beside_plain_code: ((), True),
    pool: ((), False),
}


def sweep(kind: Any, length: int, watched: bool, folders: Path) -> int:
    """Run all sequences of a length; how many there are."""
    for value in VALUES:
        if not (folders / value).exists():
            save(folders / value, VALUES[value])
    model, count = Squares(), 0
    mux = lora_mux.attach(model)
    mux.load("a", folders / "a")
    mux.load("b", folders / "b")
    shares_context, steps_inside = KINDS[kind]
    with torch.no_grad(), kind() as actors:
        for actor in actors:
            actor.do(lambda: torch.set_grad_enabled(False))
        for sequence in sequences(length, kind is threads, not steps_inside):
            run = Run(model, mux, folders, actors, Precedence(shares_context, steps_inside))
            count += 1
            try:
                for step in sequence:
                    run.step(*step)
                    if watched:
                        run.check()
                run.check()
                run.reset()
            except AssertionError as error:
                raise AssertionError(f"after {sequence}: {error}") from error
    return count


# How many sequences there are of each length. Two forwards and two generates follow each.
COUNTS = {
    threads: (6, 46, 417, 4091),
    tasks: (5, 30, 215, 1711),
    generators: (5, 30, 215, 1711),
    generator_beside_plain_code: (7, 52, 409, 3367),
    copied_contexts_beside_plain_code: (7, 52, 409, 3367),
    pool: (5, 30, 215, 1711),
}
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@each_kind
def test_no_row_is_wrong(kind: Any, tmp_path: Path) -> None:
    for length in (1, 2, 3):
        assert sweep(kind, length, False, tmp_path) == COUNTS[kind][length - 1]


@each_kind
def test_no_row_is_wrong_at_any_step(kind: Any, tmp_path: Path) -> None:
    """The forwards and generates are steps as well, and leave nothing behind."""
    assert sweep(kind, 2, True, tmp_path) == COUNTS[kind][1]


@pytest.mark.slow
@pytest.mark.parametrize("watched", [False, True], ids=["", "watched"])
@each_kind
def test_no_row_is_wrong_in_long_sequences(kind: Any, watched: bool, tmp_path: Path) -> None:
    """Six steps, of which the last two are forwards; watched, also forwards in between."""
    assert sweep(kind, 3 if watched else 4, watched, tmp_path) == COUNTS[kind][2 if watched else 3]
