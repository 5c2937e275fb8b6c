"""A row as text: what it means, that it comes back, and where it is wrong."""

import itertools
import random
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_mux import format_row, parse_row
from lora_mux.errors import ArgumentTypeError, RoutingError

NAMES = st.from_regex(r"\w[\w.-]{0,6}", fullmatch=True).filter(lambda name: name != "__base__")
WEIGHTS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("sql", {"sql": 1.0}),
        ("sql+0.4*french", {"sql": 1.0, "french": 0.4}),
        ("-0.5*legal", {"legal": -0.5}),
        ("a+-0.5*b", {"a": 1.0, "b": -0.5}),
        ("1e-3*a+2E2*b+.5*c+3.*d", {"a": 0.001, "b": 200.0, "c": 0.5, "d": 3.0}),
        ("7*7+8", {"7": 7.0, "8": 1.0}),  # names may be numbers
        ("2e3+0*a", {"2e3": 1.0, "a": 0.0}),
        ("1*1e+2*a", {"1e": 1.0, "a": 2.0}),
        ("1e+2", {"1e": 1.0, "2": 1.0}),  # and numbers that no weight can be
        ("1e+0.5*a", {"1e": 1.0, "a": 0.5}),
        ("a-1e+2*b", {"a-1e": 1.0, "b": 2.0}),
        ("1e-3+2*b", {"1e-3": 1.0, "b": 2.0}),
        ("1e-+2*b", {"1e-": 1.0, "b": 2.0}),
        ("tenant-1.v2_x", {"tenant-1.v2_x": 1.0}),
        ("größe", {"größe": 1.0}),
        ("__base__", {}),
    ],
)
def test_what_a_text_means(text: str, row: dict[str, float]) -> None:
    assert parse_row(text) == row
    assert list(parse_row(text)) == list(row)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        *(("", 0), ("+a", 0), ("a+", 2), ("a++b", 2), ("-a", 0), ("*a", 0), ("0.4*", 4)),
        *(("a b", 1), (" a", 0), ("a\n", 1), ("a/b", 1), ("../a", 0), ("a:b", 1), ("a=1", 1)),
        *(("a+a", 2), ("a+2*a", 4), ("a+__base__", 2), ("0.5*__base__", 4), ("__base__+a", 0)),
        *(("sql-0.5*legal", 7), ("nan*a", 3), ("+1*a", 0), ("1e*a", 2), ("a+0x1*b", 5)),
        *(("-1e+2*a", 0), (".5e+2*a", 0)),
        *(("٣*a", 1), ("1,5*a", 1), ("2*3*a", 3), ("a,b", 1)),
    ],
)
def test_where_a_text_is_wrong(text: str, position: int) -> None:
    with pytest.raises(RoutingError, match=f"`text` must .* at position {position}, got"):
        parse_row(text)


@pytest.mark.parametrize(
    ("text", "position", "weight", "name"),
    [
        ("1e+2*sql", 0, "1e2*", "1*1e+2*"),
        ("a+11.5E+0*b", 2, "11.5E0*", "1*11.5E+0*"),
        ("1.e+22*b+c", 0, "1.e22*", "1*1.e+22*"),
    ],
)
def test_a_text_with_two_meanings(text: str, position: int, weight: str, name: str) -> None:
    """The error says how to write either of them, and both can be read."""
    with pytest.raises(RoutingError, match=f"one meaning at position {position}") as caught:
        parse_row(text)
    assert f"write '{weight}' where a weight" in str(caught.value)
    assert f"or '{name}' where" in str(caught.value)
    rest = text[position:].partition("*")[2]
    before = text[:position]
    assert parse_row(f"{before}{weight}{rest}") != parse_row(f"{before}{name}{rest}")


def test_what_is_no_text_and_what_is_too_large() -> None:
    with pytest.raises(ArgumentTypeError, match="`text` must be a str such as 'sql"):
        parse_row({"sql": 1.0})  # type: ignore[arg-type]
    with pytest.raises(RoutingError, match=r"`text\[2:7\]` must be finite"):
        parse_row("a+1e999*b")
    with pytest.raises(RoutingError, match="at most 4096 characters, got 5000"):
        parse_row("a" * 5000)


@given(st.dictionaries(NAMES, WEIGHTS, max_size=5))
def test_a_row_comes_back(row: dict[str, float]) -> None:
    back = parse_row(format_row(row))
    assert back == row and list(back) == list(row)
    assert [str(weight) for weight in back.values()] == [str(weight) for weight in row.values()]


NASTY = ["1e", "3E", "11.5e", "1.", "1.5", "1e5", "1e-3", "0", "e", "E-1", "\u00b2e", "\u0663e"]


def test_rows_of_names_like_numbers_come_back() -> None:
    drawn = random.Random(0)
    weights = [1.0, 0.0, -0.0, -0.5, 2.0, 12.0, 1e-30, 5e-324, 1e16, 1e22, -1e38, 0.1, 1 / 3]
    for _ in range(20_000):
        made = ["".join(drawn.choices("01eE._-\u00b2\u00e9", k=drawn.randint(1, 5))) for _ in "ab"]
        names = [name for name in [*made, *drawn.choices(NASTY, k=2)] if name[0] not in ".-"]
        row = {name: drawn.choice(weights) for name in names}
        text = format_row(row)
        back = parse_row(text)
        assert [*map(repr, back.items())] == [*map(repr, row.items())], text


PIECES = ["1", "1e+", "1e+1*", "e", "+", "*", ".", "-", "b"]


def readings(text: str) -> list[dict[str, float]]:
    """All rows that a text could be, if numbers may have a + as Python's have."""
    rows = []
    cuts = [i for i, sign in enumerate(text) if sign == "+"]
    for chosen in itertools.product([False, True], repeat=len(cuts)):
        ends = [cut for cut, is_one in zip(cuts, chosen, strict=True) if is_one]
        pairs = zip([-1, *ends], [*ends, len(text)], strict=True)
        terms = [TERM.fullmatch(text[i + 1 : j]) for i, j in pairs]
        found = [(term[2], float(term[1] or 1)) for term in terms if term]
        if len(dict(found)) == len(terms):
            rows.append(dict(found))
    return rows


TERM = re.compile(r"(?:(-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\*)?(\w[\w.-]*)")


def test_no_text_has_two_meanings() -> None:
    """Whatever can be read in two ways is refused; nothing is read in a way that it cannot be."""
    drawn, several = random.Random(0), 0
    for _ in range(40_000):
        text = "".join(drawn.choices(PIECES, k=drawn.randint(3, 9)))
        could_be = readings(text)
        several += len(could_be) > 1
        try:
            assert [parse_row(text)] == could_be, text
        except RoutingError:
            assert not could_be or "e+" in text or "e1" in text, text  # 1e111 is not finite
    assert several > 50


@settings(max_examples=300)
@given(st.text("ab1.+*-e_ ", max_size=12))
def test_any_text_is_a_row_or_refused(text: str) -> None:
    """What is read means what the parts between the signs say."""
    try:
        row = parse_row(text)
    except RoutingError:
        return
    assert parse_row(format_row(row)) == row
    assert all(name in text for name in row)


def test_other_entries_as_text() -> None:
    assert format_row(None) == format_row("__base__") == format_row({}) == "__base__"
    assert format_row("sql") == "sql"
    assert format_row(("sql", "french")) == "sql+french"
    assert format_row({"a": -1, "b": 0.1, "c": 1e-30}) == "-1*a+0.1*b+1e-30*c"
    assert format_row({"a": 1e16, "1e": 1, "3E5": 1}) == "1e16*a+1*1e+3E5"


@pytest.mark.parametrize("name", ["a/b", "a+b", "-a", ".a", "", "a b", "a*b", "a\n"])
def test_names_that_no_text_has(name: str) -> None:
    with pytest.raises(RoutingError, match="`row` must have names of letters"):
        format_row({name: 1.0})


def test_rows_that_no_text_has() -> None:
    with pytest.raises(RoutingError, match=r"`row\['a'\]` must be finite"):
        format_row({"a": float("inf")})
    with pytest.raises(ArgumentTypeError, match="`row` must be None, a name"):
        format_row(7)  # type: ignore[arg-type]
    names = ["".join(random.choices(string.ascii_letters, k=9)) + str(i) for i in range(500)]
    with pytest.raises(RoutingError, match="`row` must have a text of at most 4096"):
        format_row(names)
