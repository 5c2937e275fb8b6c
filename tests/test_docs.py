"""All Python in README, docs and docstrings runs; links and figures hold; the site builds."""

import contextlib
import doctest
import importlib
import inspect
import io
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import learning
import lora_mux
import plot
from paths import ROOT

README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("*/*.md"))]
WITH_CODE = {"README.md"} | {
    f"docs/{name}.md"
    for name in (
        *("adapters", "compose", "concepts", "errors", "examples", "from_peft", "graphs"),
        *("isolation", "mixtures", "quickstart", "route_tokens", "serving", "towers", "training"),
    )
}
MODULES = [m.name for m in pkgutil.walk_packages(lora_mux.__path__, "lora_mux.")]


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_of(page: Path) -> list[str]:
    """The blocks of Python on a page."""
    found: list[str] = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    return found


def run(code: str, name: str, names: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' and peft's own
        exec(compile(code, name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_code_of_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder and without any names, as for a reader who pastes it."""
    code = python_of(page)
    assert bool(code) == (page_name(page) in WITH_CODE)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for i, block in enumerate(code):
        run(block, f"{page.name}, block {i + 1}", names)


def test_the_readme_s_first_block_shows_four_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        run(python_of(ROOT / "README.md")[0], "README.md, block 1", {})
    answers = [line.rpartition("[")[2] for line in shown.getvalue().splitlines()]
    assert len(answers) == len(set(answers)) == 4
    assert not list(tmp_path.iterdir())


def test_the_readme_s_first_screen() -> None:
    """It ends where the site's first page stops including it."""
    included = re.match(r'--8<-- "README.md::(\d+)"', (ROOT / "docs/index.md").read_text("utf-8"))
    assert included and int(included[1]) <= 40
    lines = README.splitlines()
    assert lines[int(included[1]) :][:2] == ["## The formula", ""]
    assert "pip install" in "\n".join(lines[: int(included[1])])


def test_the_readme_links_only_to_other_projects() -> None:
    """A package index shows it without our other files; what it names as text is there."""
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]+)\)", README))
    named = set(re.findall(r"[\w./]+\.(?:md|jsonl)", README))
    assert len(named) > 12
    assert all((ROOT / name).is_file() for name in named)


def shares(provider: str, selections: int) -> list[float]:
    """Times of a provider as shares of the base, where rows have so many adapters."""
    panels = plot.panels(plot.read(ROOT / "bench/results/cpu.jsonl"))
    return [
        share
        for providers in panels.values()
        for case, share in providers[provider]
        if case.endswith(f"/ {selections}")
    ]


def test_the_readme_s_figures_are_the_record_s() -> None:
    text = " ".join(README.split())
    claim = re.search(
        r"a layer takes (\S+) to (\S+) times .*? takes (\S+) to (\S+) times\. \((\d+) workloads",
        text,
    )
    assert claim
    ours, theirs = shares("lora_mux as a module", 4), shares("PEFT mixed", 4)
    measured = [f"{min(ours):.1f}", f"{max(ours):.1f}", f"{min(theirs):.0f}", f"{max(theirs):.0f}"]
    assert list(claim.groups()) == [*measured, str(len(ours))]


def test_the_table_of_benchmarks_is_the_record_s() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text("utf-8")
    table, *sums = plot.cpu_table(plot.read(ROOT / "bench/results/cpu.jsonl")).split("\n\n")
    assert table in page
    assert [re.findall(r"\d+ of \d+|\d+$", line) for line in sums] == [
        ["120 of 120", "120"],
        ["118 of 120", "120"],
    ]
    assert "In all 120 cells we are within 10 %" in page and "118 cells are within 10 %" in page


def test_the_tables_of_a_gpu_are_the_record_s() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text("utf-8")
    records = plot.read(ROOT / "bench/results/h100-headline.jsonl")
    assert plot.headline_table(records) in page and plot.gpu_table(records) in page
    assert all(r["gate"] != "failed" for r in records if "gate" in r)


def test_what_is_said_of_learning_is_the_record_s() -> None:
    page = " ".join((ROOT / "docs/training.md").read_text("utf-8").split())
    records = plot.read(ROOT / "bench/results/learning.jsonl")
    assert learning.sentence(records) in page
    assert [r["rows"] for r in records] == [1, 2, 4]
    assert all(len(r["mixed"]) == len(r["alone"]) == 100 for r in records)


def test_the_quickstart_s_error_message() -> None:
    shown = re.search(r"print\(error\)  # (.*)", (ROOT / "docs/quickstart.md").read_text("utf-8"))
    assert shown
    mux = lora_mux.attach(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    for name in ("sql", "french"):
        mux.add_adapter(name, {"0": (torch.ones(1, 2), torch.ones(2, 1))}, alpha=1)
    with pytest.raises(lora_mux.LoraMuxError) as caught:
        mux.set_adapter("frnech")
    assert str(caught.value) == shown[1]


@pytest.mark.parametrize("name", [n for n in MODULES if n != "lora_mux.__main__"])
def test_docstrings(name: str) -> None:
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert not failures


def test_there_are_docstring_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [
        t
        for n in MODULES
        if n != "lora_mux.__main__"
        for t in finder.find(importlib.import_module(n))
    ]
    assert {t.name.rpartition(".")[2] for t in found if t.examples} >= {
        "Routing",
        "MuxLinear",
        "attach",
    }


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_and_scripts_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for link in re.findall(r"\]\(([^)#:]+)[)#]", text):
        assert (page.parent / link).exists(), link
    for script in re.findall(r"bash ([\w./]+)", text):
        assert (ROOT / script).exists(), script


def test_every_error_has_its_section() -> None:
    page = (ROOT / "docs/errors.md").read_text("utf-8")
    sections = re.findall(r"^::: lora_mux\.errors\.(\w+)$", page, re.MULTILINE)
    assert sections == [n for n, x in vars(lora_mux.errors).items() if inspect.isclass(x)]
    assert page.count("**What to do:**") == len(sections) - 1  # all but the root


def build(root: Path, out: Path) -> "subprocess.CompletedProcess[str]":
    """mkdocs as `scripts/docs` calls it."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation's pages, built; warnings are errors."""
    pytest.importorskip("mkdocs", reason="its tools need Python 3.11")
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_site_documents_every_public_name(site: Path) -> None:
    page = (site / "api.html").read_text("utf-8")
    members = [f"Mux.{name}" for name in dir(lora_mux.Mux) if not name.startswith("_")]
    for name in (*members, "MuxLinear.forward", "Routing.check"):
        assert f'id="lora_mux.{name}"' in page, name
    for name in set(lora_mux.__all__) - {"errors", "LoraMuxError", "__version__"}:
        assert re.search(rf'id="lora_mux\.([\w.]*\.)?{name}"', page), name
    assert "<strong>base</strong>" not in page  # of "__base__", without backticks


def test_the_site_fetches_nothing(site: Path) -> None:
    """Neither fonts nor scripts nor pictures come from elsewhere."""
    fetching = re.compile(
        r"""<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//"""
    )
    pages = [*site.rglob("*.html")]
    assert len(pages) > 15
    for page in pages:
        assert not fetching.search(page.read_text("utf-8")), page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", sheet.read_text("utf-8")), sheet.name


def test_a_broken_link_stops_the_build(site: Path, tmp_path: Path) -> None:
    """To a page, or to a heading; that the same pages build as they are is what `site` shows."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for name in ("README.md", "lora_mux", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    with (tmp_path / "docs" / "demo.md").open("a", encoding="utf-8") as page:
        page.write("\n[a](no_page.md) [b](concepts.md#no-heading)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "no_page.md" in done.stderr and "no-heading" in done.stderr
