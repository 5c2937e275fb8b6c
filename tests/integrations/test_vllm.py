"""vLLM's plug-in with a stand-in for vLLM: what it registers, refuses and answers."""

import asyncio
import importlib
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lora_mux
from adapter_folders import save
from lora_mux.errors import BackendError, CheckpointError, RoutingError
from lora_mux.integrations import named_mixes, vllm_kernels
from lora_mux.integrations.named_mixes import NamedMixes
from lora_mux.integrations.vllm import MuxResolver, register
from paths import ROOT

VARIABLES = (
    *("LORA_MUX_VLLM", "LORA_MUX_ADAPTERS", "LORA_MUX_CACHE", "LORA_MUX_MIXES"),
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
)


class Registry:
    """vLLM 0.32's LoRAResolverRegistry, as far as it is used."""

    def __init__(self) -> None:
        self.resolvers: dict[str, Any] = {}

    def get_supported_resolvers(self) -> Any:
        return self.resolvers.keys()

    def register_resolver(self, name: str, resolver: Any) -> None:
        self.resolvers[name] = resolver


class Platform:
    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"

    def is_cuda_alike(self) -> bool:
        return False


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """vllm as modules, whose registry is returned; no variable is set."""
    registry = Registry()
    parts: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.resolver": {"LoRAResolverRegistry": registry},
        "vllm.lora.request": {
            "LoRARequest": lambda name, number, path: SimpleNamespace(
                lora_name=name, lora_int_id=number, lora_path=path
            )
        },
        "vllm.platforms": {"current_platform": type("Own", (Platform,), {})()},
        "vllm.lora.punica_wrapper": {},
        "vllm.lora.punica_wrapper.punica_cpu": {"PunicaWrapperCPU": type("CPU", (), {})},
        "vllm.lora.punica_wrapper.punica_gpu": {"PunicaWrapperGPU": type("GPU", (), {})},
    }
    for name, content in parts.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return registry


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    for seed, name in enumerate(("sql", "french")):
        save(tmp_path / "adapters" / name, 2, seed)
    return tmp_path / "adapters"


@pytest.fixture
def names(adapters: Path, engine: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """All that `names` needs is set."""
    monkeypatch.setenv("LORA_MUX_VLLM", "names")
    monkeypatch.setenv("LORA_MUX_ADAPTERS", str(adapters))
    monkeypatch.setenv("LORA_MUX_CACHE", str(adapters.parent / "cache"))
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    return engine


def test_the_entry_point_is_there() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    found = re.search(
        r'^\[project\.entry-points\."vllm\.general_plugins"\]\nlora_mux = "([\w.]+):(\w+)"$',
        text,
        re.MULTILINE,
    )
    assert found and getattr(importlib.import_module(found[1]), found[2]) is register


def test_it_does_nothing_unless_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM is missing too."""
    monkeypatch.setitem(sys.modules, "vllm", None)  # an import of it fails
    monkeypatch.delenv("LORA_MUX_VLLM", raising=False)
    register()
    monkeypatch.setenv("LORA_MUX_VLLM", "names")
    with pytest.raises(ImportError):
        register()


def test_names_are_registered_once(names: Registry, tmp_path: Path) -> None:
    register()
    (first,) = names.resolvers.values()
    register()
    assert names.resolvers == {"lora_mux": first}
    assert not (tmp_path / "cache").exists()  # each process of vLLM comes here


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("LORA_MUX_VLLM", "name", "names, kernels, both .* got 'name'"),
        ("LORA_MUX_ADAPTERS", "", "folder of the adapters"),
        ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0", "must be 1 .* got '0'"),
        ("LORA_MUX_MIXES", "-1", "number of mixes, got '-1'"),
    ],
)
def test_variables_that_cannot_work(
    names: Registry, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(BackendError, match=message):
        register()
    assert not names.resolvers


def test_a_folder_that_is_missing(names: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_MUX_ADAPTERS", "no/where")
    with pytest.raises(CheckpointError, match="existing folder, got 'no/where'"):
        register()


def test_answers(names: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_MUX_MIXES", "2")
    register()
    (resolver,) = names.resolvers.values()

    def ask(name: str) -> Any:
        return asyncio.run(resolver.resolve_lora("base", name))

    request = ask("sql+0.4*french")
    assert request.lora_name == "sql+0.4*french" and request.lora_int_id > 0
    assert Path(request.lora_path).parent == tmp_path / "cache"
    assert ask("nobody") is None
    with pytest.raises(RoutingError, match="2 decimals") as caught:
        ask("0.125*sql")
    assert isinstance(caught.value, ValueError)  # to which vLLM answers 400
    ask("sql")
    with pytest.raises(RoutingError, match="at most 2 mixes"):
        ask("french")


def test_requests_at_once_compose_once(
    adapters: Path, engine: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows: list[Any] = []

    def counting(folders: Any, row: Any, folder: Any, **more: Any) -> Path:
        rows.append(row)
        return lora_mux.compose(folders, row, folder, **more)

    monkeypatch.setattr(named_mixes, "compose", counting)
    resolver = MuxResolver(NamedMixes(adapters, tmp_path / "cache"))

    async def all_of(names: list[str]) -> list[Any]:
        return await asyncio.gather(*(resolver.resolve_lora("base", name) for name in names))

    requests = asyncio.run(all_of(["sql+0.5*french", "0.5*french+sql"] * 6))
    assert len({request.lora_path for request in requests}) == len(rows) == 1


def test_operators_are_swapped(engine: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = sys.modules["vllm.platforms"].current_platform
    monkeypatch.setenv("LORA_MUX_VLLM", "kernels")
    register()
    assert not engine.resolvers
    module, _, name = platform.get_punica_wrapper().rpartition(".")
    wrapper = getattr(importlib.import_module(module), name)
    cpu = sys.modules["vllm.lora.punica_wrapper.punica_cpu"].PunicaWrapperCPU
    assert wrapper.__mro__[1:3] == (vllm_kernels.MuxOperators, cpu)
    monkeypatch.setattr(type(platform), "is_cuda_alike", lambda self: True)
    gpu = sys.modules["vllm.lora.punica_wrapper.punica_gpu"].PunicaWrapperGPU
    assert gpu in getattr(importlib.import_module(module), name).__mro__
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        vllm_kernels.Other  # noqa: B018
