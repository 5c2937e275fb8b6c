r"""Patterns of strangers: the same answers as `re` gives, in a bounded number of steps."""

import random
import re
import warnings
from collections.abc import Callable

import pytest

from lora_mux.configs.patterns import (
    MAX_NESTING,
    MAX_PATH_LENGTH,
    MAX_PATTERN_LENGTH,
    MAX_STEPS,
    Path,
    PathEnds,
    PatternError,
    Steps,
    parse,
)

LLAMA = [
    f"model.layers.{layer}.{block}"
    for layer in (0, 1, 11, 31)
    for block in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        *("mlp.experts.3.up_proj", "mlp.experts.11.down_proj", "linear_attn.in_proj_qkv"),
    )
]
VISION = [
    *(path.replace("model.", "model.language_model.") for path in LLAMA),
    *(
        f"{root}.blocks.{layer}.{block}"
        for root in ("visual", "model.visual")
        for layer in (0, 5, 26)
        for block in ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.gate_proj", "mlp.fc2")
    ),
    *("language_model.model.layers.2.mlp.up_proj", "language_model.lm_head"),
    *("visual.merger.mlp.0", "model.visual.merger.linear_fc2", "audio_tower.layers.4.fc1"),
    *("custom_text_proj", "lm_head", "thinker.model.layers.0.self_attn.q_proj"),
]
SDXL = [
    f"{side}_blocks.{block}.attentions.{n}.transformer_blocks.{layer}.{part}"
    for side in ("down", "up")
    for block in (1, 2)
    for n in (0, 1)
    for layer in (0, 9)
    for part in ("attn1.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1")
] + ["mid_block.resnets.0.time_emb_proj", "transformer_blocks.3.attn.to_add_out", "time_embed.0"]
PATHS = [*LLAMA, *VISION, *SDXL]

PARTS = "self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense"
LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
# As Unsloth, ms-swift, axolotl, diffusers' and PEFT's examples and users' own scripts write them.
TARGET_MODULES = [
    rf"(?:.*?(?:language|text).*?(?:{PARTS}).*?(?:{LINEARS}).*?)|"
    rf"(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{PARTS})\.(?:(?:{LINEARS})))",
    rf"(?:.*?(?:language|text).*?(?:{PARTS}).*?\.(?:{LINEARS}))|"
    rf"(?:\bmodel\.layers\.[\d]{{1,}}(?!.*\.experts\.\d)\..*?(?:{PARTS})\.(?:{LINEARS}))",
    rf"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:{PARTS}).*?(?:qkv|proj|fc1|fc2).*?)",
    rf"^(language_model.*\.({LINEARS}))$",
    rf"^(model\.language_model(?=\.).*\.({LINEARS}))$",
    rf"^(model(?=\.).*\.({LINEARS})|audio_tower(?=\.).*\.(fc1|fc2))$",
    rf"^(model\.language_model(?=\.).*\.({LINEARS})|(?!(model.visual.merger))model\.visual(?=\.).*"
    r"\.(linear_fc2|attn.proj|qkv|linear_fc1)|model\.visual\.merger(?=\.).*\.(linear_fc2))$",
    r"model.language_model.layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj",
    r"model\.language_model\.layers\.[\d]+\.(_checkpoint_wrapped_module\.)?(mlp|self_attn)\."
    r"(up|down|gate|q|k|v|o)_proj",
    rf"^(?!.*visual).*(?:{LINEARS}).*",
    rf"(.*(model)(?!.*visual).*({LINEARS}).*$|.*custom_text_proj.*)",
    r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*",
    r".*\.(?!11)\d+\.mlp.up_proj$",
    r".*\.(?!1\b)\d+\.self_attn\.k_proj",
    r"mlp\.(?!gate_proj)down_proj|.*mlp\.(?!gate_proj|up_proj)down_proj",
    r".*(self_attn|mlp)\.[^.]*_proj",
    r"(.*_blocks\.\d+\.attentions\.){1,2}.*\.to_(q|k|v|out\.0)",
    r"^(?!.*(norm|time)).*transformer_blocks\.[0-9]+\.(attn[12]\.to_\w|ff\.net\.\d(\.proj)?)$",
    r".*\.?(visual|vision_tower|vision_model)\..*",
    "|".join(re.escape(path) for path in PATHS[::2]),
    "^(?:" + "|".join(PATHS[1::2]) + ")$",
    r"(?P<root>model)\.(?:[a-z_]+\.)*?layers\.(?:[13]|1\d)\.\S+\.\w+?_proj",
    ".*.*.*proj",
]
LAST_PATTERNS = [
    *("q_proj", "self_attn.q_proj", r"self_attn\.k_proj", "^model.layers.0.mlp.up_proj", ".*"),
    *(r"layers\.(0|11)\..*", r".*\.experts\..*", "proj", "", "layers", "^q_proj", "mlp.*proj|qkv"),
    *(r"^model\.language_model\.layers\.[0-9]\..*", r"model.layers.1.*up_proj", "..[qk]_proj"),
    *("fc1$", r"(?=.*attn)to_q", "language_model(?=\\.).*up_proj", "^audio_tower.layers.4.fc1"),
]


def fullmatches(pattern: str, paths: list[str]) -> list[str]:
    steps = Steps()
    node = parse(pattern, steps)
    return [p.text for p in (Path(p, steps) for p in paths) if node.before(p, 1) & p.start]


def first(patterns: list[str], path: str) -> int | None:
    steps = Steps()
    return path_ends(patterns, steps)[Path(path, steps)]


def path_ends(patterns: list[str], steps: Steps) -> PathEnds[int | None]:
    """The place of the first pattern that matches; of the same pattern twice, the first."""
    places: dict[str, int | None] = {}
    for place, pattern in enumerate(patterns):
        places.setdefault(pattern, place)
    return PathEnds(places, None, steps)


def first_of_re(patterns: list[str], path: str) -> int | None:
    """PEFT's rule, by `re`."""
    matches = (re.match(rf"(.*\.)?({pattern})$", path) for pattern in patterns)
    return next((i for i, match in enumerate(matches) if match), None)


def steps_of(act: Callable[[Steps], object]) -> int:
    steps = Steps()
    act(steps)
    return MAX_STEPS - steps.left


@pytest.mark.parametrize("pattern", TARGET_MODULES)
def test_real_target_modules(pattern: str) -> None:
    want = [path for path in PATHS if re.fullmatch(pattern, path)]
    assert fullmatches(pattern, PATHS) == want
    assert 0 < len(want) < len(PATHS)


def test_real_keys_of_rank_pattern() -> None:
    draw = random.Random(1)
    for _ in range(60):
        patterns = draw.sample(LAST_PATTERNS, draw.randrange(1, 6)) + draw.sample(PATHS, 3)
        draw.shuffle(patterns)
        for path in draw.sample(PATHS, 20):
            assert first(patterns, path) == first_of_re(patterns, path), (patterns, path)


class Fuzz:
    """Random patterns of the syntax, and paths that they may match."""

    PIECES = (
        *("a", "b", "ab", "ba.", ".", ".", "_", "1", "é", r"\.", r"\-", r"\d", r"\w", r"\D", r"\S"),
        *(r"\W", r"\s", "[ab]", "[^.]", "[a-z.]", r"[\d_]", "[]a]", "[^]a]", r"[\]^b-]", "{", "}"),
        *("]", "a{b", r"\b", r"\B", "^", "$", r"\A", r"\Z", "²", "[à-ü]", ","),
    )
    REPEATS = (
        "*",
        "+",
        "?",
        "*?",
        "+?",
        "??",
        "{2}",
        "{1,2}",
        "{,2}",
        "{2,}",
        "{,}",
        "{0}?",
        "{0,3}",
    )
    OPENINGS = ("(", "(?:", "(?P<x{}>", "(?=", "(?!")

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self._names = 0

    def pattern(self, depth: int = 3) -> str:
        choice = self.draw.choice
        parts = []
        for _ in range(self.draw.randrange(4)):
            if depth and self.draw.random() < 0.35:
                self._names += 1
                part = choice(self.OPENINGS).format(self._names) + self.pattern(depth - 1) + ")"
            else:
                part = choice(self.PIECES)
            if self.draw.random() < 0.3 and part not in (r"\b", r"\B", "^", "$", r"\A", r"\Z"):
                part += choice(self.REPEATS)
            parts.append(part)
        text = "".join(parts)
        return f"{text}|{self.pattern(depth - 1)}" if depth and self.draw.random() < 0.2 else text

    def path(self) -> str:
        letters = "aaabb..1_é²{}],- ü"
        return "".join(self.draw.choice(letters) for _ in range(self.draw.randrange(9)))


def compare(seed: int, patterns: int) -> None:
    fuzz = Fuzz(seed)
    matched = 0
    for _ in range(patterns):
        several = [fuzz.pattern(), *(fuzz.pattern(1) for _ in range(3))]
        steps = Steps()
        try:
            node, ends = parse(several[0], steps), path_ends(several, steps)
        except PatternError:  # the pieces { 1 } are a repeat of nothing
            with pytest.raises(re.error):
                [re.compile(pattern) for pattern in several]
            continue
        for _ in range(6):
            path = fuzz.path()
            where = Path(path, steps)
            want = re.fullmatch(several[0], path) is not None
            assert (node.before(where, 1) & where.start != 0) == want, (several[0], path)
            assert ends[where] == first_of_re(several, path), (several, path)
            matched += want
    assert patterns / 4 < matched < 5 * patterns  # so that neither answer is rare


def soup(seed: int, patterns: int) -> None:
    """Random characters: what we take, `re` takes and means the same by."""
    draw = random.Random(seed)
    letters = r"aab1.*+?{}[]()|^$\\dDwbAZ1,2:=!<P>-&~ #i"
    taken = 0
    for _ in range(patterns):
        pattern = "".join(draw.choice(letters) for _ in range(draw.randrange(1, 12)))
        try:
            steps = Steps()
            node = parse(pattern, steps)
        except PatternError:
            continue
        taken += 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compiled = re.compile(pattern)
        for path in ("", "a", "aab", "1.a", "b1", "a.a.1", "{}", "-", draw.choice(letters) * 2):
            where = Path(path, steps)
            want = compiled.fullmatch(path) is not None
            assert (node.before(where, 1) & where.start != 0) == want, (pattern, path)
    assert taken > patterns / 20


def test_random_patterns_match_what_re_matches() -> None:
    compare(seed=0, patterns=1000)
    soup(seed=0, patterns=10_000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_random_patterns_match_what_re_matches(seed: int) -> None:
    compare(seed, patterns=8_000)
    soup(seed, patterns=80_000)


REFUSED = {
    "(": "groups are closed",
    "a)": "at 1",
    "*a": "at 0",
    "a**": "at 2",
    "a*+b": "at 2",
    "^*": "at 1",
    "(?>a)": "syntax",
    r"(a)\1": "syntax",
    "(?P<x>a)(?P=x)": "syntax",
    "(?<=a)b": "syntax",
    "(?<!visual)q": "syntax",
    "(?i)a": "syntax",
    r"(?x:(.+) +)\#": "syntax",
    "(a)(?(1)b|c)": "syntax",
    "(?#a)": "syntax",
    r"\n": "syntax",
    r"\x41": "syntax",
    "[a": "syntax",
    "[]": "classes",
    "[b-a]": "classes",
    "[[a]]": "classes",
    "[a--b]": "classes",
    "a{2,1}": "m <= n",
    "a{1001}": "1000 repeats",
    "a{9999999999}": "1000 repeats",
    "(" * (MAX_NESTING + 1) + ")" * (MAX_NESTING + 1): "nested",
    "a" * (MAX_PATTERN_LENGTH + 1): "characters",
    "[" + "a" * 200 + "]": "200 characters",
}


@pytest.mark.parametrize("pattern", REFUSED, ids=lambda pattern: pattern[:20])
def test_other_syntax_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError, match=re.escape(REFUSED[pattern])):
        parse(pattern, Steps())


LONG = "a" * (MAX_PATH_LENGTH - 1) + "!"
# Each runs `re` for longer than the universe, on paths of 1,000 characters.
HOSTILE = {
    "(.+ ?)+#": 15_000,
    "(a+)+$": 15_000,
    "(.|.)*x": 15_000,
    "(a|aa)+": 15_000,
    "(a*)*(a*)*(a*)*b": 15_000,
    ".*" * 400 + "x": 5_000,
    "a?" * 900 + "a" * 900: 10_000,
    "(?:a{0,500}){500}": 600_000,
    "(?=(a+)+!)(?!(a+)+$).*": 30_000,
    "((a*)b?)*c": 15_000,
    "|" * 60_000: 400_000,
    "()" * 30_000: 400_000,
    "a{0}" * 10_000: 400_000,
}


@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda pattern: pattern[:20])
def test_hostile_patterns_take_few_steps(pattern: str) -> None:
    def act(steps: Steps) -> None:
        parse(pattern, steps).before(Path(LONG, steps), 1)

    assert steps_of(act) <= HOSTILE[pattern]


def test_the_steps_of_a_config_are_bounded() -> None:
    """Where one pattern is too much, and where many are."""
    steps, ends = Steps(), path_ends([f".*.*{i}" for i in range(5000)], Steps())
    node = parse("(?:(?:(?:a*b?)*c?)*d?)*", steps)
    acts: list[Callable[[], object]] = [
        lambda: node.before(Path("aab" * 333, steps), 1),
        lambda: ends[Path("layers.x", ends._steps)],
        lambda: parse("a*" * 1000, steps),
        lambda: parse("[ab]" * 1000, steps),
    ]
    for act in acts:
        steps.left = ends._steps.left = 30_000
        with pytest.raises(PatternError, match=f"at most {MAX_STEPS} steps"):
            for _ in range(100):
                act()
        assert min(steps.left, ends._steps.left) > -200  # what is done between two looks


def test_paths_are_bounded() -> None:
    Path("a" * MAX_PATH_LENGTH, Steps())
    for path in ("a" * (MAX_PATH_LENGTH + 1), "a\nb"):
        with pytest.raises(PatternError, match="module paths"):
            Path(path, Steps())


def test_many_keys_that_are_paths_take_few_steps() -> None:
    """300 keys and 300 paths, however the dots are written."""
    paths = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(75) for n in "qkvo"]
    for keys in (paths, [re.escape(p) for p in paths], [f"^{p}" for p in paths]):

        def act(steps: Steps, keys: list[str] = keys) -> None:
            ends = path_ends(keys, steps)
            assert [ends[Path(path, steps)] for path in paths] == list(range(300))

        assert steps_of(act) < 5000
