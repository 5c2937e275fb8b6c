"""lora-mux info, the parsing of the command line, and what stands in options."""

import argparse
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch

import lora_mux
from lora_mux import cli
from lora_mux.demo.command import adapter_weights


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["lora-mux"] == lora_mux.__version__
    assert shown["torch"] and shown["device"].startswith("cpu")
    assert shown["backend"].startswith("batched products on the CPU, reference elsewhere (")


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lora_mux", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"lora-mux {lora_mux.__version__}"


def test_info_says_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cli.main(["info"])
    assert "peft          not installed" in capsys.readouterr().out


def test_info_of_a_package_without_metadata(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of one that lies on the path by itself; triton is a part of some builds of torch."""

    def version(name: str) -> str:
        if name == "triton":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(cli, "version", version)
    cli.main(["info"])
    out = capsys.readouterr().out
    assert "triton        installed, version unknown" in out and "torch         1.0" in out


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("name", {"name": 1.0}),
        ("name+0.5*noisy", {"name": 1.0, "noisy": 0.5}),
        ("-2*name+noisy", {"name": -2.0, "noisy": 1.0}),
    ],
)
def test_adapters_option(text: str, weights: dict[str, float]) -> None:
    assert adapter_weights(text) == weights


@pytest.mark.parametrize("text", ["", "name=1", "name+name", "nan*name", "a++b"])
def test_adapters_option_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="at position"):
        adapter_weights(text)


@pytest.mark.parametrize("command", [[], ["info"], ["demo"], ["bench"], ["tune"]])
def test_help_fits_a_terminal(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert exit.value.code == 0 and len(lines) > 5 and max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rows", "0", "--rows: expected a whole number of at least 1, got '0'"),
        ("--rank", "many", "--rank: expected a whole number of at least 1, got 'many'"),
        ("--device", "gpu", "--device: expected cpu, cuda or cuda:INDEX, got 'gpu'"),
        ("--device", "meta", "--device: expected cpu, cuda or cuda:INDEX, got 'meta'"),
    ],
)
def test_bench_refuses(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", option, value])
    assert exit.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--device", "cuda"])
    assert "torch sees no GPU for 'cuda'; cpu works everywhere" in capsys.readouterr().err


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["dmo"])
    assert exit.value.code == 2 and "demo" in capsys.readouterr().err
