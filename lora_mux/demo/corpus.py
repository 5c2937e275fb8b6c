"""The demo's text: the documented objects of Python's own standard library."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = tuple(
    """argparse asyncio ast base64 calendar collections concurrent configparser csv ctypes datetime
    decimal difflib email enum ftplib functools gzip heapq html http imaplib importlib inspect io
    ipaddress json logging mailbox multiprocessing optparse os pathlib pdb pickle random re sched
    shutil smtplib socket sqlite3 ssl statistics string subprocess tarfile tempfile textwrap
    threading tkinter tokenize typing unittest urllib uuid weakref xml zipfile""".split()
)
# With these ten, which the demo's own queries are about, the index takes a tenth of the time.
QUICK_PACKAGES = tuple(
    "concurrent gzip shutil smtplib socket string subprocess textwrap threading zipfile".split()
)
HELD_OUT = 250
# Docstrings differ a little between Python versions, so another version's 250 held-out items may
# reach further down the same order. Training starts behind this gap and never meets them.
FIRST_TRAINED = 300
SHORTEST_DOC = 26
LONGEST_DOC = 180


@dataclass(frozen=True)
class Item:
    """One documented object: where it lives, what it is, its name and its first paragraph."""

    module: str
    kind: str
    name: str
    doc: str


@dataclass(frozen=True)
class Corpus:
    """All items in an order that depends on their text only, and one line about each package."""

    items: tuple[Item, ...]
    about: dict[str, str]

    @property
    def held_out(self) -> tuple[Item, ...]:
        """The items that no adapter was trained on."""
        return self.items[:HELD_OUT]

    @property
    def train(self) -> tuple[Item, ...]:
        """The items that adapters are trained on."""
        return self.items[FIRST_TRAINED:]


def read_corpus(packages: Sequence[str] = PACKAGES, library: Path | None = None) -> Corpus:
    """Parse the standard library, without importing any of it.

    Args:
        packages: The packages to read.
        library: Folder that holds the packages; this interpreter's own library by default.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    by_doc: dict[str, Item] = {}
    about: dict[str, str] = {}
    for package in packages:
        for path in _sources(library, package):
            tree = _parse(path)
            if tree is None:
                continue
            if path.name in ("__init__.py", f"{package}.py"):
                about.setdefault(package, _describe(package, tree))
            for item in _documented(tree, package):
                by_doc.setdefault(item.doc, item)
    items = sorted(by_doc.values(), key=lambda item: text_hash(item.doc))
    used = {item.module for item in items}
    return Corpus(tuple(items), {name: about.get(name, name) for name in sorted(used)})


def text_hash(text: str) -> str:
    """A key that orders texts alike on every machine and in every Python version."""
    return hashlib.sha256(text.encode()).hexdigest()


def _sources(library: Path, package: str) -> list[Path]:
    single = library / f"{package}.py"
    if single.exists():
        return [single]
    paths = sorted((library / package).rglob("*.py"))
    return [path for path in paths if "test" not in path.relative_to(library).parts]


def _parse(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return None


def _describe(package: str, tree: ast.Module) -> str:
    doc = ast.get_docstring(tree)
    return f"{package}: {_first_paragraph(doc)}" if doc else package


def _first_paragraph(doc: str) -> str:
    return re.sub(r"\s+", " ", doc.split("\n\n")[0]).strip()[:LONGEST_DOC]


def _documented(node: ast.AST, module: str, in_class: bool = False) -> Iterator[Item]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        doc = _first_paragraph(ast.get_docstring(child) or "")
        if len(doc) >= SHORTEST_DOC and not child.name.startswith("_"):
            yield Item(module, _kind(child, in_class), child.name, doc)
        if isinstance(child, ast.ClassDef):
            yield from _documented(child, module, in_class=True)


def _kind(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, in_class: bool) -> str:
    if not isinstance(node, ast.ClassDef):
        return "method" if in_class else "function"
    raised = any(re.search("Error|Exception|Warning", ast.unparse(base)) for base in node.bases)
    return "exception class" if raised else "class"
