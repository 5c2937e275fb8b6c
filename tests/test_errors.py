"""Messages: one short line with its beginning and its end; and suggestions that cost little."""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest

import lora_mux
from lora_mux.core.slots import Slots
from lora_mux.errors import short, warn

LONG = "begin" + "x" * 10**6 + "the way out"
ERRORS = [
    error
    for error in vars(lora_mux.errors).values()
    if isinstance(error, type) and issubclass(error, lora_mux.LoraMuxError)
]


@pytest.mark.parametrize("kind", ERRORS)
def test_long_messages_keep_their_beginning_and_their_end(kind: type[Exception]) -> None:
    text = str(kind(LONG))
    assert text.startswith("beginxxx") and text.endswith("xxxthe way out") and len(text) == 605
    for again in (copy.copy(kind(LONG)), pickle.loads(pickle.dumps(kind(LONG)))):
        assert type(again) is kind and str(again) == text
    assert str(kind("a short one: é, 'q'")) == "a short one: é, 'q'"


@pytest.mark.parametrize("kind", ERRORS)
def test_messages_are_one_line_that_a_terminal_shows_as_it_is(kind: type[Exception]) -> None:
    """Otherwise a folder's name could forge a line of a log, or hide what stands before it."""
    name = "a\nERROR b\r\x1b[2J\u202e\u2028\x00\ud800\x85"
    text = str(kind(name))
    assert text == r"a\nERROR b\r\x1b[2J\u202e\u2028\x00\ud800\x85"
    assert len(str(kind("\U0010ffff" * 500))) == 605 and str(kind("\n" * 10**6)).isprintable()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", r"'a\nb'"),
        (3, "3"),
        (10**5000, "a huge int"),
        ({"a": [1, {"b": {}}]}, "{'a': [1, {...}]}"),
        ([1] * 10**6, "[1, 1, 1, 1, 1, 1, ...]"),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_values_are_short(value: object, text: str) -> None:
    assert short(value) == text


def test_values_of_any_size_and_depth_are_short() -> None:
    deep: list[object] = []
    for _ in range(10**5):
        deep = [deep]
    for value in ("a" * 10**6, deep, [["b" * 100] * 100] * 100, {"c" * 100: 1}, object):
        assert len(short(value)) <= 80


def test_warnings_name_the_caller_and_leave_nothing_behind() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(2):  # shown each time, because what was shown is not kept
            warn("folder\n" + LONG)
    assert [str(w.message)[:15] for w in shown] == [r"folder\nbeginxx"] * 2
    assert all(w.filename == __file__ and len(str(w.message)) == 605 for w in shown)
    assert "__warningregistry__" not in globals()


def slots(names: list[str]) -> Slots:
    made = Slots()
    for name in names:
        made.bind(name, made.allot())
    return made


def test_a_suggestion_among_thousands() -> None:
    """difflib alone takes 3.4 s for 50,000."""
    made = slots([f"tenant-{i:05}-{'abc'[i % 3]}" for i in range(50_000)])
    for slip, name in (
        ("tenant-31234c-b", "tenant-31234-b"),
        ("tennant-49999-b", "tenant-49999-b"),
        ("Tenant-00007-b", "tenant-00007-b"),
    ):
        with pytest.raises(lora_mux.errors.UnknownAdapterError) as caught:
            made.lookup([slip])
        assert f"unknown adapter {slip!r} (did you mean {name!r}?); loaded: 'tenant-00000-a', " in (
            str(caught.value)
        )
        assert str(caught.value).endswith("... (50000 in all)")


@pytest.mark.parametrize(
    ("names", "unknown"),
    [
        (["a" * 79 + "b"] + [f"{'a' * 70}{i}" for i in range(50_000)], "a" * 80),
        ([f"{'a' * 10_000}{i}" for i in range(300)], "a" * 10_000),
        (["a" * 10_000], "a" * 9_999),
        ([f"{i}" for i in range(50_000)], "b" * 10**6),
    ],
    ids=["many alike", "many long", "one long", "a huge name"],
)
def test_few_and_short_names_are_compared(
    names: list[str], unknown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def compare(word: str, others: Callable[[], list[str]], n: int) -> list[str]:
        seen.extend([word, *others])  # type: ignore[misc]
        return []

    monkeypatch.setattr("difflib.get_close_matches", compare)
    with pytest.raises(lora_mux.errors.UnknownAdapterError):
        slots(names).lookup([unknown])
    assert len(seen) <= 201 and max(map(len, seen), default=0) <= 80
