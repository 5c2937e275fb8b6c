"""Whose rows a forward pass has: those of its call, of a `with` block, or the sticky ones.

A scope belongs to the execution context that opened it (`contextvars`), so that threads and asyncio
tasks do not see each other's, and what is started in a copy of the context inherits them. A
generator shares the context of whoever runs it. Its block goes with the generator: it is in force
while the generator runs, in whatever context that is.

Where it cannot be known whose rows a pass has, it is refused.
"""

import dis
import inspect
import itertools
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType, MappingProxyType
from typing import Any, Literal, TypeAlias

from ..errors import RoutingBusyError, RoutingError
from . import threads
from .route import Route
from .threads import running_name

Kind: TypeAlias = Literal["block", "disabled block", "call"]  # what a scope spans

GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
ASYNC = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
SUSPENDED = GENERATORS | ASYNC  # what may be
WAY_OUT = (
    "give the rows with the call (`adapter_names=`, `__base__` for a row of the base model), open "
    "a block around it, or choose once for all by set_adapter"
)


class Sticky:
    """The rows of passes that have none of their own."""

    def __init__(self) -> None:
        self.route: Route | None = None  # None = the base model
        self.is_chosen = False  # somebody has set them, so that they are meant


@dataclass(eq=False, slots=True)
class Scope:
    """Rows that are in force for one call, or inside one `with` block."""

    owner: object  # tells the scopes of one router from those of another
    route: Route | None  # None = the base model
    kind: Kind
    beams: int | None  # of generate(): how often it repeats each sample, in order
    inputs: Mapping[str, Any]  # of generate(): its arguments
    opener: "weakref.ref[Any]"  # the asyncio task, else the thread
    generator: FrameType | None  # the innermost one that ran when it was opened
    around: frozenset[int]  # the blocks of generators that ran then, by number
    thread: int
    number: int  # in the order of opening
    ended: bool = False
    is_over: bool = False  # it has ended, and everything follows what is around it
    may_linger: bool = False  # it has ended, and the context that opened it may still hold it
    whole: Route | None = None  # of generate(): the rows that it began with

    def keep(self, rows: Sequence[int], beams: int) -> None:
        """Let the call go on with these of its samples, each of them `beams` times in order."""
        self.whole = self.whole or self.route
        self.route = self.whole and self.whole.with_rows(rows)
        self.beams = beams

    def __str__(self) -> str:
        opener = self.opener()
        name = "one that is gone" if opener is None else threads.name_of(opener)
        return f"{self.kind} of {name}"

    @property
    def is_call(self) -> bool:
        """Whether it is a call, which goes before all blocks."""
        return self.kind == "call"

    @property
    def is_own(self) -> bool:
        """Whether the thread or task that opened it runs here."""
        return self.opener() is threads.running()

    @property
    def is_left_behind(self) -> bool:
        """Whether the thread or task that opened it is over."""
        opener = self.opener()
        if isinstance(opener, threading.Thread):
            return not opener.is_alive()
        return opener is None or bool(opener.done())


_NUMBERS = itertools.count()
# Of all routers, the innermost one last. One variable, because a context never lets go of one.
_SCOPES: ContextVar[tuple[Scope, ...]] = ContextVar("lora_mux_scopes", default=())


class Scopes:
    """The scopes of one router."""

    def __init__(self) -> None:
        self._owner = object()
        self._open: dict[int, Scope] = {}  # those of all contexts, by number
        _ALL[id(self)] = self
        threads.follow(_in_force)

    def new(
        self,
        kind: Kind,
        beams: int | None = None,
        inputs: Mapping[str, Any] = MappingProxyType({}),
    ) -> Scope:
        """A scope of this context that is not open yet. `close` takes it in any state."""
        inner, outer = _generators()
        around: frozenset[int] = frozenset()
        if inner or outer:
            # Numbers and no frames, which would keep alive what their generators hold.
            running = *inner, *outer
            around = frozenset(s.number for s in self.all_open() if s.generator in running)
        return Scope(
            self._owner,
            None,
            kind,
            beams,
            inputs,
            weakref.ref(threads.running()),
            inner[0] if inner else None,
            around,
            threading.get_ident(),
            next(_NUMBERS),
        )

    def open(self, scope: Scope, route: Route | None) -> None:
        """Put a new scope in force, inside of those that this context has; None = the base."""
        scope.route = route
        self._open[scope.number] = scope
        _SCOPES.set((*_without_stale(), scope))

    def close(self, scope: Scope) -> None:
        """End a scope, in whatever context, or go on with an end that was interrupted.

        Raises:
            RoutingError: blocks end in another order than they began. Then none of them is in force
                any more.
        """
        stack = _SCOPES.get()
        if scope.ended and scope not in stack:
            return
        if scope.generator is None and stack and stack[-1] is scope:  # as nearly always
            scope.may_linger = scope.may_linger or not scope.is_own
            self._end(scope)
            _SCOPES.set(stack[:-1])
            return
        siblings, is_open = self._siblings(scope), scope.number in self._open
        crossed = is_open and any(other.number > scope.number for other in siblings)
        is_here = scope in stack and scope.is_own
        scope.may_linger = not is_here or scope.generator is not None
        ended = [scope, *siblings] if crossed else [scope]
        for other in ended:
            self._end(other)
        _SCOPES.set(tuple(s for s in stack if s not in ended))
        if crossed:
            raise RoutingError(
                "`with` blocks of a model must end in the opposite order of their beginnings, got "
                "one that ended before a later one; all of them have ended now"
            )

    def _siblings(self, scope: Scope) -> list[Scope]:
        """The open blocks that must begin and end in order with this one.

        Those of different generators, threads and tasks do not depend on each other.
        """
        if scope.is_call:
            return []
        if scope.generator is not None:
            found = [s for s in self.all_open() if s.generator is scope.generator]
        else:
            opener = scope.opener()
            found = [s for s in self.here() if s.generator is None and s.opener() is opener]
        return [s for s in found if s is not scope and not s.is_call and not s.ended]

    def _end(self, scope: Scope) -> None:
        self._open.pop(scope.number, None)
        scope.ended, scope.generator, scope.inputs = True, None, {}

    def end_those_left_behind(self) -> None:
        """In a process that was forked, where the threads and tasks of others do not run."""
        for scope in self.all_open():
            if scope.is_left_behind:
                self._end(scope)

    def routes(self) -> list[Route | None]:
        """The routes of the scopes that are open in any context."""
        return [scope.route for scope in self.all_open()]

    def all_open(self) -> list[Scope]:
        """Those of any context."""
        return list(self._open.values())

    def here(self) -> list[Scope]:
        """The scopes of this context, the innermost one last."""
        return [s for s in _SCOPES.get() if s.owner is self._owner]

    def innermost(self) -> Scope | None:
        """The innermost scope of this context."""
        for scope in reversed(_SCOPES.get()):
            if scope.owner is self._owner:
                return scope
        return None

    def current(self) -> Scope | None:
        """The scope whose rows a pass that begins now has; None = the sticky rows.

        Raises:
            RoutingError: the block that the context was copied in has ended, or it belongs to a
                generator that does not run.
        """
        here = [s for s in _without_stale() if s.owner is self._owner]
        for scope in reversed(here):
            if scope.is_call and not scope.ended:
                return scope
        innermost = here[-1] if here else None
        others = [s for s in self.all_open() if s is not innermost and not s.is_call]
        if innermost is None or innermost.generator is not None or others:
            inside = _nearest(innermost, others) if others or innermost else None
            if inside is not None:
                return inside
        if innermost is None:
            return None
        self._still_open(innermost)
        if innermost.generator is not None:
            self._refuse_between_steps(innermost, innermost.generator, here[:-1])
        return innermost

    def _refuse_between_steps(
        self, innermost: Scope, generator: FrameType, before: list[Scope]
    ) -> None:
        """Refuse a pass that may not belong to the generator with the innermost block."""
        if innermost.is_own:
            raise RoutingError(
                "this pass runs between two steps of a generator whose `with` block is still open, "
                f"so that its rows cannot be known; {WAY_OUT}"
            )
        # What runs here was started in a copy of the generator's context: by itself, or by others
        # between its steps.
        before = [s for s in before if not s.ended and s.generator is not generator]
        by_turns = any(s.generator and s.number not in innermost.around for s in before)
        if by_turns or (before and _is_at_yield(generator)):
            raise RoutingError(
                f"{running_name()} was started where `with` blocks of several generators, or of "
                "one and of the code that steps it, are open, so that its rows cannot be known; "
                f"{WAY_OUT}"
            )

    def of_starter(self) -> Scope | None:
        """The innermost block in which this thread was started.

        Raises:
            RoutingError: it has ended.
        """
        inside = threads.inherited().get(self._owner)
        if isinstance(inside, str):
            raise RoutingError(f"{running_name()} was started where rows are not known: {inside}")
        return None if inside is None else self._still_open(inside)

    def for_started(self) -> Scope | str | None:
        """What a thread that is started here inherits: a scope, or why it cannot be known."""
        try:
            return self.current() or self.of_starter()
        except RoutingError as error:
            return str(error)

    @property
    def owner(self) -> object:
        """It tells the scopes of one router from those of another."""
        return self._owner

    def refuse_beside_blocks(self) -> None:
        """Refuse a generate() without rows while others' blocks are open: it may belong to one."""
        for scope in self.all_open():
            meant = scope.route is not None and scope.route.selects and not scope.is_call
            if meant and not scope.is_left_behind:
                raise RoutingBusyError(
                    f"{running_name()} has no rows for generate() while the {scope} is open; "
                    f"{WAY_OUT}"
                )

    def _still_open(self, scope: Scope) -> Scope:
        if scope.ended:
            raise RoutingError(
                f"{running_name()} was started inside the {scope.kind} of another, which has "
                f"ended, so that its rows cannot be known; {WAY_OUT}"
            )
        return scope


# Of all routers.
_ALL: "weakref.WeakValueDictionary[int, Scopes]" = weakref.WeakValueDictionary()


def _in_force() -> dict[object, Scope | str]:
    routers = [scopes for ref in _ALL.valuerefs() if (scopes := ref()) is not None]
    found = {scopes.owner: scopes.for_started() for scopes in routers}
    return {owner: inside for owner, inside in found.items() if inside is not None}


def _without_stale() -> tuple[Scope, ...]:
    """The scopes of this context, without those that ended and that it should not hold any more.

    A block that ended in the context that opened it may be in copies of it; who runs there is
    refused.
    """
    here = _SCOPES.get()
    if here and any(scope.ended for scope in here):
        left = tuple(s for s in here if not (s.ended and s.may_linger and s.is_own))
        if len(left) < len(here):
            _SCOPES.set(left)  # so that what is started from here does not inherit them
            return left
    return here


def _nearest(innermost: Scope | None, others: list[Scope]) -> Scope | None:
    """The block of the innermost generator that runs here and has one, if any has."""
    candidates = [s for s in (*others, innermost) if s is not None and s.generator is not None]
    inner, outer = _generators() if candidates else ((), ())
    for generator in (*inner, *outer):
        found = [s for s in candidates if s.generator is generator]
        if found and generator in outer and innermost is not None and innermost not in found:
            if any(s.number in innermost.around for s in found):
                return None  # the context's own block is inside of the generator's
        if found:
            # The context knows best which one is innermost, if it knows any of them.
            return innermost if innermost in found else max(found, key=lambda s: s.number)
    return None


def _generators() -> tuple[tuple[FrameType, ...], tuple[FrameType, ...]]:
    """The generators that run here, the innermost one first.

    Those of context managers do not count: a block that one opens is its caller's.

    Returns:
        Those that this thread or task runs; then those that run this task.
    """
    inner: list[FrameType] = []
    outer: list[FrameType] = []
    found, in_task = inner, False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        flags, caller = frame.f_code.co_flags, frame.f_back
        if not (in_task or flags & SUSPENDED):  # a plain frame, which must cost next to nothing
            frame = caller
            continue
        if in_task and found is inner and not _delegates(frame):
            found = outer  # it runs the task: an event loop, which may itself be a generator
        in_task = in_task or bool(flags & ASYNC)
        if flags & GENERATORS:
            if caller is None or caller.f_globals.get("__name__") != "contextlib":
                found.append(frame)
        frame = caller
    return tuple(inner), tuple(outer)


def _delegates(frame: FrameType) -> bool:
    """Whether a frame is at a `yield from` or `await`, and does not call what runs in it."""
    code, at = frame.f_code.co_code, frame.f_lasti
    while dis.opname[code[at]] == "CACHE" and at > 0:  # Python 3.12 stands behind the instruction
        at -= 2
    return dis.opname[code[at]] in ("SEND", "YIELD_FROM")


def _is_at_yield(frame: FrameType) -> bool:
    """Whether a generator is suspended between two steps, and not running or at an `await`."""
    code, at = frame.f_code.co_code, frame.f_lasti
    if dis.opname[code[at]] == "RESUME":  # Python 3.13 stands at the next instruction
        at -= 2
    if dis.opname[code[at]] != "YIELD_VALUE":
        return False
    awaits = dis.opname[code[at + 2]] == "RESUME" and code[at + 3] & 3 in (2, 3)
    return not awaits
