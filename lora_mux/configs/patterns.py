r"""Patterns of a config: programs by strangers, in the syntax of `re`, run in bounded time.

`re` backtracks and holds the GIL: `(.+ ?)+#` takes 2^30 steps on a path of 31 characters, and no
look at a pattern tells them all. So it never runs one here. A pattern becomes a tree, and a node
maps sets of places of a path to sets of places:

    before(after) = the places from which the node matches up to a place of `after`

A set is an int whose bit i is the place i characters before the path's end. Every node distributes
over unions of sets, so no way through the pattern is tried twice: a sequence asks its parts from
the last to the first, and a lookahead asks where its part matches up to any place. Nested repeats
can still cost a power of the path's length, and patterns are many, so `Steps` counts what is done.

The syntax is that of the patterns that people write for PEFT: text, classes, groups, alternatives,
repeats, anchors, \b and lookahead. (google-re2 was considered: it has no lookahead, which ms-swift
writes into each of its configs.) `re` decides where one character or one anchor matches, which
takes it one step a place, so that \w and [^.] mean the same as in PEFT. Possessive repeats,
lookbehind, references and flags are refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

# 300 full paths as alternatives have 15,000 characters.
MAX_PATTERN_LENGTH = 1 << 16
MAX_CLASS_LENGTH = 200  # what `re` compiles, and keeps, at once
MAX_NESTING = 30
MAX_REPEATS = 1000
MAX_PATH_LENGTH = 1000  # the bits of a set
# Of one config, and for each path that it is asked about. A step takes about 0.5 us. 500 patterns
# over 500 paths take 400,000; Unsloth's pattern takes 80 a path, and an adapter of 128 experts in
# 48 layers has 18,432 paths.
MAX_STEPS = 1 << 20
MAX_STEPS_PER_PATH = 128

TOKEN = re.compile(
    r"""
    (?P<text> (?: [^\\.^$*+?{\[()|] | \\[^0-9A-Za-z] )+ (?![*+?{])  # a repeat is of one character
            | [^\\.^$*+?{\[()|] | \\[^0-9A-Za-z] )
  | (?P<one> \. | \\[dDsSwW] | \[\^?\]?(?:\\.|[^\]\\])*\] )
  | (?P<anchor> \^ | \$ | \\[AbBZ] )
  | (?P<open> \((?!\?) | \(\?: | \(\?P<\w+> | \(\?= | \(\?! )
  | (?P<branch> \| )
  | (?P<close> \) )
  | (?P<repeat> (?: [*+?] | \{(?!\})[0-9]*(?:,[0-9]*)?\} )\?? )
  | (?P<brace> \{ )
    """,
    re.VERBOSE | re.DOTALL,
)
# What `re` warns of, since its meaning will change.
NESTED_SET = re.compile(r"\[\[|--|&&|~~|\|\|")
ESCAPED = re.compile(r"\\(.)", re.DOTALL)
# What is left in a pattern that is more than text, dots, and the anchor of a whole path.
SPECIAL = re.compile(r"[\\^$*+?{\[()|]")
ESCAPED_SPECIAL = re.compile(r"\\[^0-9A-Za-z\\]", re.DOTALL)
UNESCAPED_DOT = re.compile(r"(?<!\\)\.")

Value = TypeVar("Value")


class PatternError(ValueError):
    """A pattern, or a path to match with it, is beyond what can be matched in bounded time."""


class Steps:
    """How much work the patterns of one config may still take.

    Args:
        paths: how many paths the patterns are matched with.
    """

    def __init__(self, paths: int = 0) -> None:
        self.limit = self.left = MAX_STEPS + MAX_STEPS_PER_PATH * paths

    def spend(self, count: int = 1) -> None:
        """Count steps; raises PatternError if none are left."""
        self.left -= count
        if self.left < 0:
            raise PatternError(f"work of at most {self.limit} steps")


class Path:
    """A module's path, and where in it texts and characters stand.

    Raises:
        PatternError: it is too long, or has a line break, where `.` and `$` would need care.
    """

    def __init__(self, text: str, steps: Steps) -> None:
        if len(text) > MAX_PATH_LENGTH or "\n" in text:
            raise PatternError(
                f"module paths of at most {MAX_PATH_LENGTH} characters without a line break"
            )
        self.text = text
        self.steps = steps
        self.start = 1 << len(text)  # the place before the first character
        self.everywhere = 2 * self.start - 1
        # Where names begin: at first, and after each dot.
        self.names = [0, *(dot.end() for dot in re.finditer(r"\.", text))]
        steps.spend(len(self.names))
        self._texts: dict[str, int] = {}
        self._pieces = {".": self.start - 1}

    def ends_of_text(self, text: str) -> int:
        """The places right after a text, wherever it stands."""
        found = self._texts.get(text)
        if found is None:
            found, start = 0, self.text.find(text)
            while start >= 0:
                found |= self.start >> start + len(text)
                self.steps.spend()
                start = self.text.find(text, start + 1)
            self._texts[text] = found
        return found

    def ends_of_piece(self, piece: "Piece") -> int:
        """The places right after a piece, wherever it stands."""
        found = self._pieces.get(piece.source)
        if found is None:
            found = 0
            self.steps.spend(1 + len(self.text) // 8)
            for match in piece.ahead.finditer(self.text):
                self.steps.left -= 1
                found |= self.start >> match.start() + piece.width
            self._pieces[piece.source] = found
        return found


class Node(Protocol):
    """A part of a pattern. Each call takes a step at least."""

    def before(self, path: Path, after: int) -> int:
        """The places from which this matches up to one of the places `after`."""


@dataclass(frozen=True, slots=True)
class Text:
    """Characters that stand for themselves."""

    text: str

    def before(self, path: Path, after: int) -> int:
        path.steps.left -= 1
        return (after & path.ends_of_text(self.text)) << len(self.text)


@dataclass(frozen=True, slots=True)
class Piece:
    """One character of a class, or an anchor: what `re` may decide."""

    source: str
    width: int
    ahead: re.Pattern[str]  # matches, with no width, wherever the piece would

    def before(self, path: Path, after: int) -> int:
        path.steps.left -= 1
        return (after & path.ends_of_piece(self)) << self.width


@dataclass(frozen=True, slots=True)
class Sequence:
    """Parts, one after another."""

    parts: tuple[Node, ...]

    def before(self, path: Path, after: int) -> int:
        path.steps.spend()
        for part in reversed(self.parts):
            if not after:
                break
            after = part.before(path, after)
        return after


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several branches."""

    branches: tuple[Node, ...]

    def before(self, path: Path, after: int) -> int:
        path.steps.spend()
        found = 0
        for branch in self.branches:
            found |= branch.before(path, after)
        return found


@dataclass(frozen=True, slots=True)
class Lookahead:
    """A place from which a part matches, or from which it does not."""

    part: Node
    wanted: bool

    def before(self, path: Path, after: int) -> int:
        path.steps.spend()
        found = self.part.before(path, path.everywhere)
        return after & (found if self.wanted else ~found)


@dataclass(frozen=True, slots=True)
class Repeat:
    """A part `least` to `most` times, or at least `least` times if `most` is None."""

    part: Node
    least: int
    most: int | None

    def before(self, path: Path, after: int) -> int:
        path.steps.spend()
        for _ in range(self.least):
            before = self.part.before(path, after)
            if before == after:
                break  # and so it would stay
            after = before
        if self.most is None and isinstance(self.part, Piece) and self.part.width:
            # All at once: the sum carries a mark through the run of characters that it stands at
            # (Cameron et al., "Bitwise data parallelism in regular expression matching", 2014).
            runs = path.ends_of_piece(self.part)
            return after | (((after & runs) + runs) ^ runs)
        fresh = found = after
        times = len(path.text) if self.most is None else self.most - self.least
        while fresh and times:
            fresh = self.part.before(path, fresh) & ~found
            found |= fresh
            times -= 1
        return found


@dataclass
class _Group:
    """A group that is being read."""

    opening: str = "(?:"
    branches: list[Node] = field(default_factory=list)
    parts: list[Node] = field(default_factory=list)

    def node(self) -> Node:
        last = self.parts[0] if len(self.parts) == 1 else Sequence(tuple(self.parts))
        node = Choice((*self.branches, last)) if self.branches else last
        looks_ahead = self.opening in ("(?=", "(?!")
        return Lookahead(node, self.opening == "(?=") if looks_ahead else node


def parse(pattern: str, steps: Steps) -> Node:
    """The tree of a pattern.

    Raises:
        PatternError: it is too long, broken, or beyond the syntax that this module matches.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise PatternError(f"a pattern of at most {MAX_PATTERN_LENGTH} characters")
    groups = [_Group()]
    position, repeatable = 0, False
    while position < len(pattern):
        steps.spend(4)  # which take about as long
        token = TOKEN.match(pattern, position)
        if token is None:
            raise PatternError(_beyond(pattern, position))
        kind, text, group = token.lastgroup, token[0], groups[-1]
        if kind in ("text", "brace"):
            group.parts.append(Text(ESCAPED.sub(r"\1", text)))
        elif kind == "one":
            group.parts.append(_one(text, steps))
        elif kind == "anchor":
            group.parts.append(Piece(text, 0, re.compile(f"(?={text})")))
        elif kind == "open":
            if len(groups) > MAX_NESTING:
                raise PatternError(f"groups nested at most {MAX_NESTING} deep")
            groups.append(_Group(text))
        elif kind == "branch":
            group.branches.append(Sequence(tuple(group.parts)))
            group.parts = []
        elif kind == "close" and len(groups) > 1:
            groups.pop()
            groups[-1].parts.append(group.node())
        elif kind == "repeat" and repeatable:
            group.parts.append(_repeat(group.parts.pop(), text))
        else:  # a bracket too many, or a repeat of nothing
            raise PatternError(_beyond(pattern, position))
        repeatable = kind in ("text", "brace", "one", "close")
        position = token.end()
    if len(groups) > 1:
        raise PatternError("a pattern whose groups are closed")
    return groups[0].node()


def check(pattern: str, steps: Steps) -> None:
    """Refuse a pattern that could not be matched.

    Raises:
        PatternError: says what it must be.
    """
    if not _is_fixed(pattern):
        parse(pattern, steps)


def _is_fixed(pattern: str) -> bool:
    return not SPECIAL.search(ESCAPED_SPECIAL.sub("", pattern.removeprefix("^")))


def _one(source: str, steps: Steps) -> Piece:
    if len(source) > MAX_CLASS_LENGTH or NESTED_SET.search(source):
        raise PatternError(f"plain classes of at most {MAX_CLASS_LENGTH} characters")
    if source[0] == "[":
        steps.spend(100)  # `re` takes 50 us to compile one
    try:
        return Piece(source, 1, re.compile(f"(?={source})"))
    except re.error as error:
        raise PatternError(f"valid classes ({error})") from None


def _repeat(part: Node, text: str) -> Repeat:
    least, comma, most = text.rstrip("?").strip("{}").partition(",")
    if text[0] != "{":
        return Repeat(part, int(text[0] == "+"), 1 if text[0] == "?" else None)
    if max(len(least), len(most)) > 9 or max(int(least or 0), int(most or 0)) > MAX_REPEATS:
        raise PatternError(f"at most {MAX_REPEATS} repeats")
    fewest = int(least or 0)
    limit = (int(most) if most else None) if comma else fewest
    if limit is not None and limit < fewest:
        raise PatternError("repeats {m,n} with m <= n")
    return Repeat(part, fewest, limit)


def _beyond(pattern: str, position: int) -> str:
    return (
        "text, classes, groups, |, repeats, anchors and lookahead, without the rest of `re`'s "
        f"syntax ({pattern[position : position + 3]!r} at {position})"
    )


@dataclass(frozen=True, slots=True)
class _Shape:
    """Where the texts of a fixed pattern are, and whether it is of whole paths only."""

    whole: bool
    spans: tuple[tuple[int, int], ...]


class PathEnds(Generic[Value]):
    r"""Path -> the value of the first pattern P with `re.match(rf"(.*\.)?({P})$", path)`.

    Most are fixed: only text, and dots that stand for any character. Those are looked up. A key is
    the texts between the dots, in a table for each shape (the length, and where the texts are), so
    that 300 full paths as patterns are a few look-ups for each path.

    Args:
        values: pattern -> value, in the order that counts.
        default: the value if none matches.
        steps: what reading and matching the patterns may take.
    """

    def __init__(self, values: Mapping[str, Value], default: Value, steps: Steps) -> None:
        self._values = [*values.values(), default]
        self._steps = steps
        self._others: list[tuple[int, Node]] = []
        self._fixed: dict[int, dict[_Shape, dict[tuple[str, ...], int]]] = {}
        for index, pattern in enumerate(values):
            if _is_fixed(pattern):
                self._add_fixed(pattern, index)
            else:
                self._others.append((index, parse(rf"(?:.*\.)?(?:{pattern})$", steps)))

    def __getitem__(self, path: Path) -> Value:
        first = self._first_fixed(path) if self._fixed else len(self._values) - 1
        for index, node in self._others:
            if index > first:
                break
            if node.before(path, path.everywhere) & path.start:
                return self._values[index]
        return self._values[first]

    def _add_fixed(self, pattern: str, index: int) -> None:
        pieces = UNESCAPED_DOT.split(pattern.removeprefix("^"))
        texts = tuple(piece.replace("\\", "") for piece in pieces)
        self._steps.spend(len(texts))
        spans, end = [], -1
        for text in texts:
            spans.append((end + 1, end + 1 + len(text)))
            end += 1 + len(text)
        shape = _Shape(pattern.startswith("^"), tuple(spans))
        self._fixed.setdefault(end, {}).setdefault(shape, {}).setdefault(texts, index)

    def _first_fixed(self, path: Path) -> int:
        text, found = path.text, [len(self._values) - 1]  # the default
        for start in path.names:
            for shape, indices in self._fixed.get(len(text) - start, {}).items():
                self._steps.spend(len(shape.spans))
                if not (start and shape.whole):
                    texts = tuple([text[start + a : start + b] for a, b in shape.spans])
                    found.append(indices.get(texts, found[0]))
        return min(found)
