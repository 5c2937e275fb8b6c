"""The demo from end to end, as a user runs it; and what its parts promise."""

import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import lora_mux
from lora_mux import cli
from lora_mux.demo import command, corpus, encoder, quality, report, search, tasks, train
from paths import ROOT
from peft_oracle import transformers

ADAPTERS = ROOT / "lora_mux" / "demo" / "adapters"
NAMES = ["kind", "module", "name", "noisy"]


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = cli.main(["demo", *options])
    caught = capsys.readouterr()
    return code, caught.out, caught.err


@pytest.fixture(scope="module")
def indexes() -> dict[tuple[str, ...], search.Index]:
    """What the base model made of the answers: 3,000 of them take half a minute."""
    return {}


@pytest.fixture(autouse=True)
def index_once(
    indexes: dict[tuple[str, ...], search.Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = search.Search.index

    def remembered(
        self: search.Search, task: tasks.Task, items: Sequence[corpus.Item]
    ) -> search.Index:
        described = (task.describe(answer) for answer in task.candidates(items))
        key = str(self.encoder.model.config.hidden_size), *described
        if key not in indexes:
            indexes[key] = make(self, task, items)
        return indexes[key]

    monkeypatch.setattr(search.Search, "index", remembered)


@pytest.fixture(scope="module")
def text() -> corpus.Corpus:
    return corpus.read_corpus()


@pytest.fixture(scope="module")
def model() -> encoder.Encoder:
    os.environ["HF_HUB_OFFLINE"] = "1"
    return encoder.load_encoder()


def check_shown(out: str) -> None:
    heading = re.search(r"One batch: (\d+) rows, (\d+) routings", out)
    assert heading and int(heading[1]) >= 16 and int(heading[2]) >= 8
    difference = re.search(r"Largest difference from PEFT: (\S+)", out)
    assert difference and 0 < float(difference[1]) < 1e-6  # fp32: 1.2e-7 was measured
    assert re.search(r"\d+ ms for the batch, \d+ ms for PEFT", out)


@pytest.mark.slow
def test_all_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """As scripts/demo runs it: 100 seconds, nearly all of them to embed 3,000 answers."""
    code, out, _ = run(capsys)
    assert code == 0
    check_shown(out)
    for cells in ("textwrap", "exception class", "0.7 noisy + name", "compress"):
        assert cells in out


def test_one_batch_against_peft(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a difference from PEFT is a failure."""
    code, out, _ = run(capsys, "--quick")
    assert code == 0
    check_shown(out)
    real = command.peft_rows
    monkeypatch.setattr(command, "peft_rows", lambda *a: (real(*a)[0] + 1e-3, 1.0))
    assert run(capsys, "--quick")[0] == 1


def test_a_query_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        *(capsys, "--quick", "--text", "read a zip file"), "--adapters", "name+0.5*module"
    )
    assert code == 0 and "'read a zip file' with name=1, module=0.5" in out
    assert re.search(r"module +│ zipfile", out)


class TestRefusals:
    """Exit code 2 and one line that says what to do."""

    def refused(self, capsys: pytest.CaptureFixture[str], *options: str) -> str:
        code, _, err = run(capsys, *options)
        assert code == 2 and err.startswith("lora-mux demo: ") and err.count("\n") == 1, err
        return err

    def test_unknown_adapter(self, capsys: pytest.CaptureFixture[str]) -> None:
        err = self.refused(capsys, "--text", "x", "--adapters", "nme")
        assert "'nme'" in err and "kind, module, name, noisy" in err

    def test_adapters_without_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--text" in self.refused(capsys, "--adapters", "name")

    def test_no_base(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "--base" in self.refused(capsys, "--base", str(tmp_path / "nowhere"))
        assert "--base" in self.refused(capsys, "--base", str(tmp_path))

    def test_no_adapters(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        err = self.refused(capsys, "--adapter-folder", str(tmp_path))
        assert f"--adapter-folder: expected folders that PEFT saved inside {tmp_path}" in err
        assert "leave the option out" in err and "--retrain" in err

    def test_retraining_without_a_folder_of_ones_own(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """In a clone the shipped adapters would be overwritten, elsewhere an installed package."""
        assert "add --adapter-folder FOLDER" in self.refused(capsys, "--retrain")

    @pytest.mark.parametrize("option", ["--evaluate", "--retrain"])
    def test_quick_with_what_needs_all_text(
        self, capsys: pytest.CaptureFixture[str], option: str
    ) -> None:
        err = self.refused(capsys, "--quick", option, "--adapter-folder", str(ADAPTERS))
        assert option in err and "leave out --quick" in err

    def test_broken_adapter(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        shutil.copytree(ADAPTERS, tmp_path / "all")
        config = tmp_path / "all" / "name" / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
        assert "use_dora" in self.refused(capsys, "--adapter-folder", str(tmp_path / "all"))

    def test_other_adapters_than_the_batch_needs(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        shutil.copytree(ADAPTERS / "name", tmp_path / "name")
        assert "--text" in self.refused(capsys, "--adapter-folder", str(tmp_path))

    def test_missing_packages(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(command, "_is_installed", lambda name: name != "peft")
        assert "needs peft: pip install 'lora-mux[demo]'" in self.refused(capsys)

    def test_no_base_package(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(encoder, "MODEL_PACKAGE", "gt_nothing")
        err = self.refused(capsys)
        assert "gt-nothing" in err and "pip install 'lora-mux[demo]'" in err and "--base" in err

    def test_another_model_under_its_name(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(encoder, "MODEL_SHA256", "0" * 64)
        err = self.refused(capsys)
        assert f"expected sha256 {'0' * 64}" in err and "pip install --force-reinstall" in err


def test_shipped_adapters_are_plain_peft_folders() -> None:
    assert sorted(path.name for path in ADAPTERS.iterdir()) == NAMES
    for name in NAMES:
        files = {file.name for file in (ADAPTERS / name).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}
        config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == encoder.MODEL_NAME and config["r"] == 8


def test_each_adapter_is_best_at_its_own_task(text: corpus.Corpus, model: encoder.Encoder) -> None:
    """On the first 100 held-out items; `--evaluate` has all 250."""
    small = corpus.Corpus(text.items[:100], text.about)
    found = search.Search(model, small)
    mux = lora_mux.attach(model.model)
    try:
        for name in NAMES:
            mux.load(name, ADAPTERS / name)
        scores = quality.singles(quality.Quality(found, mux), NAMES)
        for row in scores:
            best = max(row, key=lambda score: score.accuracy)
            assert best.adapters == (best.task,)
    finally:
        mux.detach()


class TestCorpus:
    def test_is_what_the_recipe_says(self, text: corpus.Corpus) -> None:
        assert 2500 < len(text.items) < 4000 and 50 < len(text.about) < 60
        assert len(text.held_out) == 250
        assert {item.kind for item in text.items} == set(tasks.KINDS)

    def test_training_never_meets_the_held_out(self, text: corpus.Corpus) -> None:
        assert not {item.doc for item in text.held_out} & {item.doc for item in text.train}

    def test_order_follows_the_text_only(self, text: corpus.Corpus) -> None:
        docs = [item.doc for item in text.items]
        assert docs == sorted(set(docs), key=corpus.text_hash)

    def test_quick_is_a_part_of_all(self, text: corpus.Corpus) -> None:
        """A description that several packages have belongs to the first of those that are read."""
        quick = corpus.read_corpus(corpus.QUICK_PACKAGES)
        docs = {item.doc for item in quick.items}
        assert docs < {item.doc for item in text.items} and 100 < len(docs) < 400
        assert quick.about.keys() == set(corpus.QUICK_PACKAGES)

    def test_reads_what_it_says(self, tmp_path: Path) -> None:
        (tmp_path / "argparse.py").write_text(
            '"""Parse arguments.\n\nMore."""\n'
            'class Parser:\n    """Parses the arguments of a program."""\n'
            "    def parse(self):\n"
            '        """Parse all of them,\n        at once, and return.\n\n        No."""\n'
            'class ParseError(ValueError):\n    """Raised when arguments do not parse."""\n'
            'def _hidden():\n    """Not documented for anybody else."""\n'
            'def short():\n    """Too short."""\n'
        )
        (tmp_path / "ast.py").write_text("this is not Python either")
        latin = '"""Caf\xe9s."""\ndef opens():\n    """Whether any of them is open already."""\n'
        (tmp_path / "base64.py").write_bytes(latin.encode("latin-1"))
        read = corpus.read_corpus(library=tmp_path)
        assert {(i.kind, i.name, i.doc) for i in read.items} == {
            ("class", "Parser", "Parses the arguments of a program."),
            ("method", "parse", "Parse all of them, at once, and return."),
            ("exception class", "ParseError", "Raised when arguments do not parse."),
        }
        assert read.about == {"argparse": "argparse: Parse arguments."}


def test_garbled_text_is_the_same_every_time() -> None:
    first = tasks.garble("Open a connection to the mail server.", random.Random(3))
    assert first == tasks.garble("Open a connection to the mail server.", random.Random(3))
    assert len(first) < 33 and first.startswith("o")


@pytest.mark.parametrize(
    ("name", "words"), [("readIntoBuffer", "read into buffer"), ("read_into", "read into")]
)
def test_identifiers_as_words(name: str, words: str) -> None:
    assert tasks.spaced(name) == words


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers
def test_training_learns_and_saves_what_loads(
    text: corpus.Corpus, model: encoder.Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "STEPS", 12)
    losses: list[float] = []
    task = tasks.make_tasks(text)["module"]
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    trained = train.train_adapter(model, task, text, losses.append)
    assert len(losses) == 12 and sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    train.save_adapter(trained, "module", encoder.MODEL_NAME, tmp_path)
    tokens = model.tokens(["Raised when it fails."])
    with torch.no_grad():
        want = encoder.pooled(trained, tokens)
        mux = lora_mux.attach(model.model)
        try:
            mux.load("module", tmp_path / "module")
            with mux.route(["module"]):
                torch.testing.assert_close(encoder.pooled(model.model, tokens), want)
        finally:
            mux.detach()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers
def test_adapters_of_a_base_with_layers_of_other_names(text: corpus.Corpus) -> None:
    config = transformers.DistilBertConfig(vocab_size=9, dim=8, n_heads=2, hidden_dim=8, n_layers=1)
    other = encoder.Encoder(None, transformers.DistilBertModel(config))
    task = tasks.make_tasks(text)["name"]
    with pytest.raises(lora_mux.LoraMuxError, match="layers called query, key, value, dense: .*q"):
        train.train_adapter(other, task, text, lambda loss: None)


def test_training_draws_each_kind_as_often(text: corpus.Corpus) -> None:
    """Of all items 60 % are methods, and 3 % classes of exceptions."""
    task = tasks.make_tasks(text)["kind"]
    draw = train._sampler(task, text.train, random.Random(0))
    drawn = Counter(item.kind for _ in range(100) for item in draw())
    assert drawn.keys() == set(tasks.KINDS) and set(text.train) >= {*draw()}
    assert all(500 < count < 700 for count in drawn.values()), drawn  # of 2,400; 21 = one sigma


def test_scores_are_shown_with_the_best_of_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    score = quality.Score
    scores = [
        [score("name", False, (), 0.5), score("name", False, ("name",), 0.75)],
        [score("noisy", True, (), 0.25), score("noisy", True, ("name",), 0.25)],
    ]
    report.Report().quality("All of it", ["base", "name"], scores)
    lines = capsys.readouterr().out.splitlines()
    cells = [re.split(" *[│┃] *", line.strip("│┃ ")) for line in lines]
    assert lines[0].rstrip() == "All of it" and ["held-out top-1", "base", "name"] in cells
    assert ["clean -> name", "0.500", "0.750 *"] in cells
    assert ["garbled -> noisy", "0.250 *", "0.250 *"] in cells


@pytest.fixture
def small_base(model: encoder.Encoder, tmp_path: Path) -> Path:
    """An encoder of two layers, not trained, which takes a twentieth of the demo's own time."""
    config = transformers.BertConfig(
        **{"vocab_size": len(model.tokenizer), "hidden_size": 32, "intermediate_size": 48},
        **{"num_hidden_layers": 2, "num_attention_heads": 2},
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_retrained_and_evaluated(
    text: corpus.Corpus,
    small_base: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One step for each adapter, on a few items, from the options to the tables."""
    monkeypatch.setattr(corpus, "HELD_OUT", 40)
    monkeypatch.setattr(corpus, "FIRST_TRAINED", 50)
    small = corpus.Corpus(text.items[:90], text.about)
    monkeypatch.setattr(command, "read_corpus", lambda packages: small)
    for module in (command, train):
        monkeypatch.setattr(module, "STEPS", 1)
    folder = tmp_path / "adapters"
    options = "--retrain", "--evaluate", "--adapter-folder", str(folder), "--base", str(small_base)
    code, out, _ = run(capsys, *options)
    assert code == 0 and sorted(path.name for path in folder.iterdir()) == NAMES
    assert re.search(r"module \(loss \d\.\d\d\).* 100%", out)  # the last bar
    tables = out[out.index("Each adapter on each task") :].split("Sums of two on garbled text")
    rows = [re.findall(r"(clean|garbled) -> (\w+)", table) for table in tables]
    clean = [("clean", name) for name in ("name", "kind", "module")]
    assert rows == [[("garbled", "noisy"), *clean], [("garbled", name) for _, name in clean]]
    # What the base answers, without lora_mux.
    made = encoder.load_encoder(small_base)
    names = [item.name for item in small.held_out]
    answers = list(dict.fromkeys(names))
    queries = made.embed([item.doc for item in small.held_out])
    nearest = (queries @ made.embed([tasks.spaced(a) for a in answers]).T).argmax(1)
    right = sum(answers[i] == name for i, name in zip(nearest, names, strict=True)) / len(names)
    assert re.search(rf"clean -> name +│ {right:.3f}", tables[0])
