"""All Python in README, docs and docstrings runs; commands and links in them exist."""

import doctest
import importlib
import pkgutil
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_mux
import peft_oracle

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("*/*.md"))]
WITH_CODE = {"README.md"} | {
    f"docs/{name}.md"
    for name in (*("backends", "concepts", "examples", "from_peft", "quickstart", "serving"),)
}
MODULES = [m.name for m in pkgutil.walk_packages(lora_mux.__path__, "lora_mux.")]


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def readme_surroundings(folder: Path) -> dict[str, Any]:
    """What the README's reader has: a model, inputs, and two adapters in adapters/."""
    model = peft_oracle.llama()
    configs = peft_oracle.configs("llama")
    wanted = {"sql": configs["plain"], "french": configs["rslora"]}
    peft_oracle.save_adapters(model, wanted, folder / "adapters")
    return {"model": model, "input_ids": torch.randint(1, 255, (4, 5))}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_code_of_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert bool(code) == (page_name(page) in WITH_CODE)
    monkeypatch.chdir(tmp_path)
    names = readme_surroundings(tmp_path) if page.name == "README.md" and code else {}
    for i, block in enumerate(code):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers' and peft's own
            exec(compile(block, f"{page.name}, block {i + 1}", "exec"), names)


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
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for script in re.findall(r"bash (\S+)", text):
        assert (ROOT / script).exists(), script
