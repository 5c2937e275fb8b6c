"""A row as text, for command lines and for the names of models that servers take.

    ROW = "__base__" | TERM ("+" TERM)*        TERM = [WEIGHT "*"] NAME

A WEIGHT is a decimal number such as 0.4, -0.5, 1e-3 or 1e5. A NAME begins with a letter, a digit or
"_", and goes on with those, "." and "-". There are no spaces. A "+" always joins terms, and is in
no number: 1e+2*sql is refused, which may mean 100*sql, or an adapter 1e and 2*sql.
"""

import re

from ..core import BASE, Selection, check_number, selected_adapters
from ..errors import ArgumentTypeError, RoutingError, short

WEIGHT = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:[eE]-?\d+)?\*", re.ASCII)
NAME = re.compile(r"\w[\w.-]*")
NUMBER_OR_NAME = re.compile(r"(\d+\.?\d*[eE])\+(\d+\*)", re.ASCII)  # 1e+2*: 100, or 1e and 2
BEGUN_NUMBER = re.compile(r"\d+\.?\d*[eE]", re.ASCII)  # a name that a + could make such
MAX_CHARACTERS = 4096  # of a row, which may come from a stranger


def parse_row(text: str) -> dict[str, float]:
    """The adapters that a text names, with their weights; {} for `"__base__"`.

    What it returns is an entry of `rows` in `Mux.route`.

    Raises:
        ArgumentTypeError: it is no str.
        RoutingError: names the position, counted from 0, where the text is no row, or could be two.
            Or it names an adapter twice, or a weight is not finite in fp32.

    Examples:
        >>> parse_row("sql+0.4*french")
        {'sql': 1.0, 'french': 0.4}
        >>> parse_row("-0.5*legal")
        {'legal': -0.5}
    """
    if not isinstance(text, str):
        raise ArgumentTypeError(
            f"`text` must be a str such as 'sql+0.4*french', got {type(text).__name__}"
        )
    if len(text) > MAX_CHARACTERS:
        raise RoutingError(
            f"`text` must be a row of at most {MAX_CHARACTERS} characters, got {len(text)}; name "
            "fewer adapters"
        )
    if text == BASE:
        return {}
    row: dict[str, float] = {}
    at = 0
    while True:
        start, weight = at, 1.0
        if factor := WEIGHT.match(text, at):
            at = factor.end()
            weight = check_number(float(factor[0][:-1]), f"text[{start}:{at - 1}]")
        elif either := NUMBER_OR_NAME.match(text, at):
            raise _two_readings(text, at, *either.groups())
        name = NAME.match(text, at)
        if name is None:
            raise _error(text, at, "the name of an adapter")
        if name[0] in row or name[0] == BASE:
            once = "the base model alone" if name[0] == BASE else "each adapter once"
            raise _error(text, at, once)
        row[name[0]], at = weight, name.end()
        if at == len(text):
            return row
        if text[at] != "+":
            raise _error(text, at, "+ or the end")
        at += 1


def _error(text: str, at: int, expected: str) -> RoutingError:
    """What is wrong at a position, and what a row looks like."""
    rest = short(text[at : at + 20]) if text[at:] else "the end"
    return RoutingError(
        f"`text` must have {expected} at position {at}, got {rest} in {short(text)}; a row is "
        f"{BASE}, or NAME or WEIGHT*NAME joined by +, such as sql+0.4*french+-0.5*legal, without "
        "spaces; a NAME has letters, digits, _, . and -"
    )


def _two_readings(text: str, at: int, begun: str, rest: str) -> RoutingError:
    """That a number could also be a name and the weight after it, and how to say which it is."""
    return RoutingError(
        f"`text` must have one meaning at position {at}, got {short(text[at : at + 20])} in "
        f"{short(text)}; write {short(begun + rest)} where a weight is meant, or "
        f"{short(f'1*{begun}+{rest}')} where {short(begun)} is an adapter"
    )


def format_row(row: Selection) -> str:
    """The text of a row, of which `parse_row` makes the same row again.

    Args:
        row: one entry of `rows` in `Mux.route`.

    Raises:
        ArgumentTypeError: the row, a name or a weight has the wrong type.
        RoutingError: a name or a weight cannot be written so that it is read again.

    Examples:
        >>> format_row({"sql": 1.0, "french": 0.4}), format_row(None)
        ('sql+0.4*french', '__base__')
    """
    chosen = selected_adapters(row, "row")
    for name in chosen:
        if NAME.fullmatch(name) is None:
            raise RoutingError(
                "`row` must have names of letters, digits, _, . and -, which begin with none of "
                f"the last two, got {short(name)}; load the adapter under another name"
            )
    text = "+".join(_term(name, weight) for name, weight in chosen.items()) or BASE
    if len(text) > MAX_CHARACTERS:
        raise RoutingError(
            f"`row` must have a text of at most {MAX_CHARACTERS} characters, got {len(text)}; name "
            "fewer adapters"
        )
    return text


def _term(name: str, weight: float) -> str:
    if weight == 1 and not BEGUN_NUMBER.fullmatch(name):
        return name
    return f"{repr(weight).removesuffix('.0').replace('e+', 'e')}*{name}"
