"""Break one line at a time, and see a test turn red: python tests/mutate.py [part of a name]

The lines stand in tests/*/mutations.py. Each is broken in a copy of the package, against which the
named tests run; before that they run against the unbroken copy, for tests that are red anyway would
notice everything. A mutation that no test notices is a hole in the tests, and makes the script
fail. All of them take about half an hour on two cores.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

from mutation import Mutation, all_mutations  # noqa: E402
from paths import ROOT  # noqa: E402


def copy_of_package(folder: Path) -> Path:
    """The package in a folder, as in a wheel, where kernels/src is lora_mux/kernels."""
    package = folder / "lora_mux"
    shutil.copytree(ROOT / "lora_mux", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels" / "src", package / "kernels")
    return package


def green(tests: tuple[str, ...], folder: Path) -> bool:
    """Whether the tests pass with the package that lies in a folder.

    Raises:
        RuntimeError: no test ran.
    """
    options = ["-c", str(ROOT / "pyproject.toml"), "-x", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(ROOT / "tests" / t) for t in tests)],
        cwd=folder,  # first on the path: the copy, not the installed package
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    if "passed" not in done.stdout and "failed" not in done.stdout and done.returncode >= 0:
        raise RuntimeError(f"the tests did not run:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def survives(mutation: Mutation) -> bool:
    """Whether the tests stay green with it."""
    with tempfile.TemporaryDirectory() as folder:
        file = copy_of_package(Path(folder)) / mutation.file
        source = file.read_text(encoding="utf-8")
        if mutation.old not in source:
            raise RuntimeError(f"{mutation.file} no longer holds {mutation.old!r}")
        file.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        return green(mutation.tests, Path(folder))


def green_unbroken(tests: tuple[str, ...]) -> bool:
    """Whether the tests pass with the package as it is."""
    with tempfile.TemporaryDirectory() as folder:
        copy_of_package(Path(folder))
        return green(tests, Path(folder))


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = {name: m for name, m in all_mutations().items() if wanted in name}
    if not chosen:
        print(f"no mutation has {wanted!r} in its name", file=sys.stderr)
        return 2
    alive = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        sets = sorted({m.tests for m in chosen.values()})
        red = [t for t, ok in zip(sets, pool.map(green_unbroken, sets), strict=True) if not ok]
        if red:
            print(f"red without any mutation, so that they prove nothing: {red}", file=sys.stderr)
            return 2
        print(f"unbroken: {len(sets)} sets of tests are green", flush=True)
        for name, survived in zip(chosen, pool.map(survives, chosen.values()), strict=True):
            print(f"{'SURVIVED' if survived else 'noticed '}  {name}", flush=True)
            alive += [name] * survived
    print(f"{len(chosen) - len(alive)} of {len(chosen)} noticed")
    return 1 if alive else 0


if __name__ == "__main__":
    raise SystemExit(main())
