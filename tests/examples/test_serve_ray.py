"""examples/serve_ray: the engine by itself, then Ray Serve with two replicas, against PEFT.

Everything listens on 127.0.0.1. Without Ray the engine's tests run alone, in a few seconds.
"""

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import httpx
import pytest
import serve_ray_load
from safetensors.torch import load_file, save_file

import plot
from lora_mux.errors import CheckpointError, LoraMuxError, PoolCapacityError, UnknownAdapterError
from paths import ROOT
from tiny_server import EXAMPLES, Tiny

sys.path.append(str(EXAMPLES))
from serve_ray.engine import Engine  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's, and PEFT's
INSTALL = "needs Ray: pip install 'ray[serve]==2.60.0'"
PATIENCE = 60.0
ROWS = ["sql", "__base__", "sql+0.4*french", "-0.5*legal"]
REQUESTS = [
    {"text": f"question {i}", "adapters": ROWS[i % 4], "tokens": 6 + i % 7} for i in range(16)
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """With served/ beside its adapters/, which holds copies of them."""
    made = Tiny(tmp_path_factory.mktemp("tiny"))
    shutil.copytree(made.adapters, made.base.parent / "served")
    return made


@pytest.fixture(scope="module")
def alone(tiny: Tiny) -> Callable[[Mapping[str, Any]], str]:
    """What PEFT answers to a request by itself."""

    def answer(request: Mapping[str, Any]) -> str:
        row = request["adapters"].removeprefix("__base__")
        return str(tiny.answer(row, request["text"], request["tokens"], chat=False))

    return answer


TOO_MUCH = {"text": "x", "adapters": "sql+french+legal", "tokens": 4}  # for 24 rank rows


def asked(engine: Engine, requests: Sequence[Mapping[str, Any]]) -> list[str | Exception]:
    """The answers of one batch, or why there is none."""
    questions = [engine.question(request) for request in requests]
    tokens: list[list[int]] = [[] for _ in requests]
    ended: dict[int, Any] = {}

    def put(pieces: Mapping[int, Any]) -> None:
        assert not ended.keys() & pieces.keys()
        for i, piece in pieces.items():
            if isinstance(piece, int):
                assert piece != engine.tokenizer.pad_token_id  # as of a row that has ended
                tokens[i].append(piece)
            else:
                ended[i] = piece

    engine.answer(questions, put)
    assert sorted(ended) == [*range(len(requests))]
    return [
        engine.tokenizer.decode(tokens[i], skip_special_tokens=True)
        if ended[i] is StopIteration
        else ended[i]
        for i in range(len(requests))
    ]


def memory_of(tiny: Tiny, rank_rows: int) -> Any:
    """Bytes for so many; sql has 16, french 8 and legal 16."""
    pools = Engine(str(tiny.base), "", "10MB").mux.memory().targets.values()
    return rank_rows * sum(pool.row_bytes for pool in pools)


def engine_of(tiny: Tiny, served: str = "served", rank_rows: int | None = None) -> Engine:
    """With all three adapters."""
    memory = None if rank_rows is None else memory_of(tiny, rank_rows)
    engine = Engine(str(tiny.base), str(tiny.base.parent / served), memory)
    for name in ("sql", "french", "legal"):
        engine.pull(name)
    return engine


class TestEngine:
    def test_a_mixed_batch_is_peft_s(self, tiny: Tiny, alone: Any) -> None:
        want = [alone(request) for request in REQUESTS]
        assert len(set(want)) > 12  # they tell whose they are
        engine = engine_of(tiny)
        assert asked(engine, REQUESTS) == want
        assert asked(engine, REQUESTS[:1]) == want[:1]

    def test_a_row_ends_at_its_end_of_text(self, tiny: Tiny, alone: Any) -> None:
        """And the others go on."""
        engine = engine_of(tiny)
        request, words = next(
            (request, words)
            for request in REQUESTS
            if len({*(words := alone(request).split())}) > 1
        )
        end = next(word for word in words if word != words[0])
        (token,) = engine.tokenizer.convert_tokens_to_ids([f" {end}"])
        engine._ends = {token}
        engine.model.generation_config.eos_token_id = token
        others = [r for r in REQUESTS if end not in alone(r).split()]
        got = asked(engine, [request, *others])
        assert got[0] == f" {words[0]}" * words.index(end)
        assert others and got[1:] == [alone(r) for r in others]

    def test_more_adapters_than_the_memory_holds(self, tiny: Tiny, alone: Any) -> None:
        """The batch is divided; what can never fit is refused alone."""
        *got, refused = asked(engine_of(tiny, rank_rows=32), [*REQUESTS, TOO_MUCH])
        assert got == [alone(request) for request in REQUESTS]
        assert isinstance(refused, PoolCapacityError)
        assert asked(engine_of(tiny, rank_rows=40), [TOO_MUCH]) == [alone(TOO_MUCH)]

    def test_an_adapter_that_cannot_be_read_any_more(self, tiny: Tiny, alone: Any) -> None:
        shutil.copytree(tiny.adapters, tiny.base.parent / "broken")
        engine = engine_of(tiny, "broken", rank_rows=28)
        engine.mux.prefetch(["sql", "french"])  # which puts legal out
        (tiny.base.parent / "broken" / "legal" / "adapter_model.safetensors").write_bytes(b"")
        got = asked(engine, REQUESTS)
        for request, answer in zip(REQUESTS, got, strict=True):
            if "legal" in request["adapters"]:
                assert isinstance(answer, CheckpointError)
            else:
                assert answer == alone(request)

    def test_one_that_comes_when_the_memory_is_in_use(self, tiny: Tiny, alone: Any) -> None:
        engine = Engine(str(tiny.base), str(tiny.adapters), memory_of(tiny, 16))
        engine.pull("legal")
        with engine.mux.route(["legal"]):
            engine.pull("sql")
        assert asked(engine, REQUESTS[:2]) == [alone(request) for request in REQUESTS[:2]]

    @pytest.mark.parametrize("memory", [None, "10MB"])
    def test_values_that_are_no_numbers(self, tiny: Tiny, memory: str | None) -> None:
        """They are refused before a batch, and taken when they are mended."""
        served = tiny.base.parent / f"mended {memory}"
        shutil.copytree(tiny.adapters, served)
        engine = Engine(str(tiny.base), str(served), memory)
        file = served / "sql" / "adapter_model.safetensors"
        tensors = load_file(file)
        first = next(iter(tensors))
        save_file({**tensors, first: tensors[first] * float("nan")}, file)
        with pytest.raises(LoraMuxError, match="finite"):
            engine.pull("sql")
        assert not engine.mux.adapters
        save_file(tensors, file)
        engine.pull("sql")
        assert [*engine.mux.adapters] == ["sql"]

    @pytest.mark.parametrize(
        "request_, message",
        [
            ({"text": "x", "adapters": "../sql"}, "position 0"),
            ({"text": "x", "adapters": "/etc"}, "position 0"),
            ({"text": "x", "adapters": "sql/../sql"}, "position 3"),
            ({"text": "x", "adapters": "sql+sql"}, "once"),
            ({"text": "x", "adapters": {"sql": 1}}, "`adapters` must be str"),
            ({"text": "x", "tokens": 0}, "`tokens` must be 1 to"),
            ({"text": "x", "tokens": 10**6}, "`tokens` must be 1 to"),
            ({"text": "x", "tokens": True}, "`tokens` must be int"),
            ({"text": "x" * 2048}, "2048 positions"),
            ({"text": ""}, "must have a token"),
            ({"text": "\ud800"}, "half a character"),
            ({}, "`text` must be str"),
            ({"text": "x", "temperature": 1}, "temperature"),
        ],
    )
    def test_bad_requests(self, tiny: Tiny, request_: Any, message: str) -> None:
        engine = Engine(str(tiny.base), str(tiny.base.parent / "served"))
        with pytest.raises(ValueError, match=message):
            engine.question(request_)

    @pytest.mark.parametrize("name", ["none", "x" * 4000])
    def test_adapters_that_are_not_there(self, tiny: Tiny, name: str) -> None:
        engine = Engine(str(tiny.base), str(tiny.base.parent / "served"))
        with pytest.raises(UnknownAdapterError, match="must name folders"):
            engine.pull(name)

    def test_a_row_that_nobody_waits_for_ends(self, tiny: Tiny) -> None:
        """At the next token; the batch ends with the last row that somebody waits for."""
        engine, seen = engine_of(tiny), Counter[int]()
        long, short = (
            engine.question({"text": "x", "adapters": "sql", "tokens": tokens})
            for tokens in (1000, 8)
        )

        def put(pieces: Mapping[int, Any]) -> None:
            seen.update(i for i, piece in pieces.items() if isinstance(piece, int))
            if seen[0] == 3:
                long.gone.set()

        engine.answer([long, short], put)
        assert seen[1] == 8 and seen[0] < 20

    def test_one_that_was_removed_is_refused_alone(self, tiny: Tiny, alone: Any) -> None:
        engine = engine_of(tiny)
        engine.mux.remove("legal")
        got = asked(engine, REQUESTS[:4])
        assert got[:3] == [alone(request) for request in REQUESTS[:3]]
        assert isinstance(got[3], UnknownAdapterError)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Ray on this machine, and where Ray Serve listens for HTTP."""
    loopback = pytest.importorskip("serve_ray.loopback", reason=INSTALL)
    import ray
    from ray import serve

    port, folder = free_port(), tempfile.mkdtemp(prefix="ray")  # a short path, for Ray's sockets
    loopback.start(8, log_to_driver=False, object_store_memory=100_000_000, _temp_dir=folder)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def handle(url: str, tiny: Tiny) -> Any:
    """Of two replicas, with their front."""
    return run(tiny)


def run(tiny: Tiny, count: int = 2, **limits: Any) -> Any:
    from ray import serve
    from serve_ray.front import Front
    from serve_ray.replicas import Mixed

    served = Mixed.options(num_replicas=count, **limits)
    where = str(tiny.base), str(tiny.base.parent / "served")
    serve.run(Front.bind(served.bind(*where, memory=memory_of(tiny, 24))))
    return serve.get_deployment_handle("Mixed", "default")


def send(handle: Any, request: Mapping[str, Any], session: str | None = None) -> Any:
    from serve_ray.replicas import affinity

    key = affinity(request["adapters"]) if session is None else session
    return handle.options(session_id=key).remote(request)


def stats(handle: Any) -> dict[int, dict[str, Any]]:
    """Of each replica, by its process; and "session", a key that leads to it."""
    found = {}
    for i in range(24):
        got = handle.options(session_id=f"s{i}").stats.remote().result(timeout_s=PATIENCE)
        found[got["pid"]] = {**got, "session": f"s{i}"}
    return found


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/generate", json=body, timeout=PATIENCE, trust_env=False)


def test_it_listens_on_this_machine_alone(handle: Any) -> None:
    psutil = pytest.importorskip("psutil", reason="needs psutil: pip install psutil")
    listening = [
        connection.laddr.ip
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_requests_meet_in_mixed_batches(handle: Any, alone: Any) -> None:
    before = sum(replica["batches"] for replica in stats(handle).values())
    responses = [send(handle, request, "one") for request in REQUESTS]
    assert [r.result(timeout_s=PATIENCE) for r in responses] == [alone(r) for r in REQUESTS]
    # Of four kinds of rows: were they apart, there would be four batches or more.
    assert sum(replica["batches"] for replica in stats(handle).values()) - before < 4


def test_who_comes_while_a_batch_runs_is_one_batch(handle: Any, alone: Any) -> None:
    before = sum(replica["batches"] for replica in stats(handle).values())
    responses = [send(handle, {**REQUESTS[0], "tokens": 400}, "one")]
    for request in REQUESTS[:8]:
        time.sleep(0.06)  # Ray by itself would make a batch of each
        responses.append(send(handle, request, "one"))
    assert [r.result(timeout_s=PATIENCE) for r in responses[1:]] == [alone(r) for r in REQUESTS[:8]]
    assert sum(replica["batches"] for replica in stats(handle).values()) - before < 4


def test_the_same_adapters_meet_in_one_replica(handle: Any, tiny: Tiny) -> None:
    names = [f"copy-{i}" for i in range(8)]
    for name in names:
        shutil.copytree(tiny.adapters / "sql", tiny.base.parent / "served" / name)
    orders = [f"{weight}*{name}+french" for name in names for weight in (1, 2)]
    orders += [f"french+{name}" for name in names]
    for adapters in orders:
        send(handle, {"text": "x", "adapters": adapters, "tokens": 1}).result(timeout_s=PATIENCE)
    loaded = Counter(name for replica in stats(handle).values() for name in replica["adapters"])
    assert {loaded[name] for name in names} == {1}


def test_text_as_it_comes(handle: Any, url: str, alone: Any) -> None:
    streams = [
        handle.options(stream=True, session_id="one").stream.remote(request)
        for request in REQUESTS[:4]
    ]
    parts = [[*stream] for stream in streams]
    assert ["".join(part) for part in parts] == [alone(request) for request in REQUESTS[:4]]
    assert min(map(len, parts)) > 3
    how: Any = {"json": {**REQUESTS[2], "stream": True}, "timeout": PATIENCE}
    with httpx.Client(trust_env=False) as client:
        with client.stream("POST", f"{url}/generate", **how) as response:
            chunks = [*response.iter_text()]
    assert "".join(chunks) == alone(REQUESTS[2]) and len(chunks) > 3


def test_bad_requests_leave_others_alone(handle: Any, alone: Any) -> None:
    """Some before their batch, and what cannot fit into the memory in the batch."""
    names = ("none", "../sql", "/etc")
    bad = [TOO_MUCH, *({"text": "x", "tokens": 4, "adapters": name} for name in names)]
    responses = [send(handle, request, "one") for request in [*bad, *REQUESTS[:4]]]
    for response in responses[:4]:
        with pytest.raises(LoraMuxError):
            response.result(timeout_s=PATIENCE)
    assert [r.result(timeout_s=PATIENCE) for r in responses[4:]] == [alone(r) for r in REQUESTS[:4]]


def test_what_http_says(handle: Any, url: str, alone: Any) -> None:
    answer = post(url, **REQUESTS[2])
    assert (answer.status_code, answer.text) == (200, alone(REQUESTS[2]))
    for stream in (False, True):
        missing = post(url, text="x", adapters="none", stream=stream)
        assert missing.status_code == 404
        assert missing.json()["detail"].startswith("`adapters` must name folders that are served")
        assert post(url, text="x", adapters="../sql", stream=stream).status_code == 400
        assert post(url, text="x", tokens=0, stream=stream).status_code == 400
    assert post(url, text="x", adapter="sql").status_code == 422


def test_an_adapter_that_comes_later(handle: Any, tiny: Tiny, alone: Any) -> None:
    later = {"text": "x", "adapters": "later", "tokens": 8}
    with pytest.raises(LoraMuxError, match="must name folders"):
        send(handle, later).result(timeout_s=PATIENCE)
    shutil.copytree(tiny.adapters / "legal", tiny.base.parent / "served" / "later")
    want = alone({**later, "adapters": "legal"})
    assert send(handle, later).result(timeout_s=PATIENCE) == want


def test_a_client_that_hangs_up(handle: Any, url: str, alone: Any) -> None:
    """The model is free for the next one at once."""
    long = {"text": "x", "adapters": "sql", "tokens": 1024}
    start = time.monotonic()
    assert send(handle, long).result(timeout_s=PATIENCE) == alone(long)
    took = time.monotonic() - start
    how: Any = {"json": {**long, "stream": True}, "timeout": PATIENCE}
    with httpx.Client(trust_env=False) as client:
        with client.stream("POST", f"{url}/generate", **how) as stream:
            next(stream.iter_text())
    start = time.monotonic()
    assert send(handle, REQUESTS[0], "sql").result(timeout_s=PATIENCE) == alone(REQUESTS[0])
    assert time.monotonic() - start < took / 2


@pytest.mark.slow
def test_a_replica_that_is_killed(handle: Any, url: str, alone: Any) -> None:
    """What it was answering fails; others are answered, and so is what comes then."""
    from ray.exceptions import RayActorError

    victim = handle.options(session_id="sql").stats.remote().result(timeout_s=PATIENCE)["pid"]
    (other,) = (r["session"] for pid, r in stats(handle).items() if pid != victim)
    long = {"text": "x", "adapters": "sql", "tokens": 1000}
    want = alone(long)  # beside the stream it would take as long as that
    how: Any = {"json": {**long, "stream": True}, "timeout": PATIENCE}
    with httpx.Client(trust_env=False) as client:
        with client.stream("POST", f"{url}/generate", **how) as stream:
            parts = stream.iter_text()
            assert want.startswith(next(parts))
            lost = [send(handle, long, "sql") for _ in range(3)]
            kept = [send(handle, long, other) for _ in range(3)]
            time.sleep(0.5)
            os.kill(victim, signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                list(parts)
    for response in lost:
        with pytest.raises(RayActorError):
            response.result(timeout_s=PATIENCE)
    again = send(handle, REQUESTS[0], "sql")
    assert again.result(timeout_s=PATIENCE) == alone(REQUESTS[0])
    assert [r.result(timeout_s=PATIENCE) for r in kept] == [want] * 3
    deadline = time.monotonic() + PATIENCE
    while len(now := stats(handle)) < 2 or victim in now:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert post(url, **REQUESTS[2]).text == alone(REQUESTS[2])


@pytest.mark.slow
def test_a_drain_and_too_many_requests(handle: Any, tiny: Tiny, url: str, alone: Any) -> None:
    """One replica takes over from two, which answer first. Then it refuses what is too much."""
    long = {"text": "x", "adapters": "sql", "tokens": 1024}
    running = [send(handle, long, f"s{i}") for i in range(8)]
    run(tiny, 1, max_ongoing_requests=4, max_queued_requests=6)
    assert [r.result(timeout_s=PATIENCE) for r in running] == [alone(long)] * 8
    # Ray counts those whose replica it is still looking for as none that wait.
    assert post(url, **REQUESTS[0]).text == alone(REQUESTS[0])
    together = Barrier(20)

    def at_once(_: int) -> httpx.Response:
        with httpx.Client(timeout=PATIENCE, trust_env=False) as client:
            client.get(f"{url}/-/healthz")  # connects
            together.wait(PATIENCE)
            return client.post(f"{url}/generate", json=long)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(at_once, range(20)))
    found = Counter((a.status_code, a.headers.get("retry-after")) for a in answers)
    assert found.keys() == {(200, None), (503, "1")} and 8 <= found[503, "1"] <= 14
    assert {a.text for a in answers if a.status_code == 200} == {alone(long)}


@pytest.mark.slow
def test_openai_s_api(url: str, tiny: Tiny, alone: Any) -> None:
    """On two replicas, of which one is replaced when its engine dies."""
    pytest.importorskip("serve_openai.app", reason="pip install 'transformers[serving]==5.23.0'")
    from ray import serve
    from serve_ray.openai_replicas import OpenAI
    from serve_ray.replicas import affinity

    class Mortal(OpenAI.func_or_class):  # type: ignore[misc]
        def pid(self) -> int:
            return os.getpid()

        def die(self) -> None:
            """At the next batch, as of a GPU that has failed."""
            del self._models.engine._cb.batch_processor

    folders = {name: str(tiny.adapters / name) for name in tiny.names}
    app = OpenAI.options(Mortal, num_replicas=2).bind(str(tiny.base), folders, None, {})
    serve.run(app)
    handle = serve.get_deployment_handle("OpenAI", "default")

    def pids() -> dict[int, str]:
        """And a key that leads there."""
        keys = [f"s{i}" for i in range(24)]
        asked = {key: handle.options(session_id=key).pid.remote() for key in keys}
        return {response.result(timeout_s=PATIENCE): key for key, response in asked.items()}

    def complete(request: Mapping[str, Any], key: str | None = None) -> httpx.Response:
        adapters = request["adapters"]
        model = "base" if adapters == "__base__" else f"base:{adapters}"
        body = {"model": model, "prompt": request["text"], "max_tokens": request["tokens"]}
        return httpx.post(
            f"{url}/v1/completions",
            json={**body, "temperature": 0},
            headers={"x-session-id": affinity(adapters) if key is None else key},
            timeout=PATIENCE,
            trust_env=False,
        )

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(complete, REQUESTS))
    assert [a.json()["choices"][0]["text"] for a in answers] == [alone(r) for r in REQUESTS]
    (victim, its), (_, other) = pids().items()
    handle.options(session_id=its).die.remote().result(timeout_s=PATIENCE)
    assert complete(REQUESTS[0], its).status_code >= 500
    answer = complete(REQUESTS[0], other)
    assert answer.json()["choices"][0]["text"] == alone(REQUESTS[0])
    deadline = time.monotonic() + PATIENCE
    while len(now := pids()) < 2 or victim in now:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    for key in now.values():
        answer = complete(REQUESTS[2], key)
        assert answer.json()["choices"][0]["text"] == alone(REQUESTS[2])


def test_the_figures_of_the_page_are_the_record_s() -> None:
    page = (ROOT / "docs/serve_ray.md").read_text("utf-8")
    records = plot.read(ROOT / serve_ray_load.RECORD)
    assert serve_ray_load.table(records) in page
    assert serve_ray_load.sentence(records) in " ".join(page.split())
    assert all(r["gate"] == "passed" for r in records)
