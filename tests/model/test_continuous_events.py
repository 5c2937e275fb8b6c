"""What happens while requests of continuous batching wait or run: no event ends another's request.

Adapters are removed, replaced, changed on disk, or do not fit; requests are cancelled, come again
under the same name, and come from many threads. Each answer is PEFT's with its adapters alone.
"""

import copy
import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from continuous import alone, batching, collected, crowded

import lora_mux
from lora_mux.errors import (
    PoolCapacityError,
    RoutingBusyError,
    RoutingError,
    UnknownAdapterError,
)
from lora_mux.model.continuous_batching.in_flight import InFlight, Request
from lora_mux.model.continuous_batching.request_rows import NOBODY
from peft_oracle import attached_llama, configs, save_adapters, transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")

NAMES = ("plain", "rslora", "biased")
PROMPT, NEW = [5, 17, 99, 4], 6


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model, PEFT's with adapters, and where these are; "other" is another one of their names."""
    folder = tmp_path_factory.mktemp("adapters")
    made = attached_llama(folder)
    made.folder, made.others = folder, folder / "others"
    torch.manual_seed(9)
    wanted = {name: configs("llama")["plain"] for name in ("other", *NAMES)}
    made.other_peft = save_adapters(made.base, wanted, made.others)
    return made


def answer(
    stage: SimpleNamespace, row: Any, prompt: list[int] = PROMPT, new: int = NEW
) -> list[int]:
    """What PEFT, or the plain model, answers alone. "other" is that of `others`."""
    if row == "other":
        return alone(stage.base, stage.other_peft, prompt, "plain", new)
    return alone(stage.base, stage.peft, prompt, row, new)


def settings(**fields: Any) -> dict[str, Any]:
    return {
        "generation_config": transformers.GenerationConfig(
            max_new_tokens=NEW, do_sample=False, eos_token_id=255, pad_token_id=0
        ),
        "continuous_batching_config": batching(**fields),
    }


@pytest.fixture(params=["resident", "bounded"])
def mux(request: pytest.FixtureRequest, stage: SimpleNamespace, tmp_path: Path) -> lora_mux.Mux:
    """All adapters in the pools; or fewer than there are."""
    if request.param == "bounded":
        return crowded(stage.base, tmp_path)
    return lora_mux.Mux.of(copy.deepcopy(stage.model))


class Steps:
    """Runs something beside a batch of the manager, in a thread of its own."""

    def __init__(self, model: Any, **at: Callable[[], Any]) -> None:
        self.at = {int(name.removeprefix("s")): action for name, action in at.items()}
        self.count, self.results, self.batches = 0, dict[int, Any](), list[list[str]]()
        self._mux = lora_mux.Mux.of(model)
        self._hook = model.model.layers[1].register_forward_pre_hook(self._step)

    def _step(self, *_: Any) -> None:
        if threading.current_thread().name == "beside":
            return
        self.batches.append(self._mux.active_adapters)
        action = self.at.get(self.count)
        self.count += 1
        if action is not None:
            thread = threading.Thread(target=self._run, args=(action,), name="beside")
            thread.start()
            thread.join(20)

    def _run(self, action: Callable[[], Any]) -> None:
        try:
            self.results[self.count - 1] = action()
        except BaseException as error:
            self.results[self.count - 1] = error

    def remove(self) -> None:
        self._hook.remove()


@pytest.fixture
def managed(mux: lora_mux.Mux) -> Iterator[Callable[..., Any]]:
    """Starts managers; nothing is left of any request in the end."""
    opened = []

    def start(**fields: Any) -> Any:
        context = mux.model.continuous_batching_context_manager(**settings(**fields))
        manager = context.__enter__()
        opened.append((context, manager))
        return manager

    yield start
    for context, manager in opened:
        wait_for(lambda manager=manager: not len(manager.mux_requests))
        context.__exit__(None, None, None)
    assert not mux._adapters.has_promises
    mux.memory()  # whatever is not used any more goes
    assert not mux.memory().replaced and not mux._slots._removed
    assert mux._slots.tenants == {*mux.adapters.values()}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def refuse_everywhere(mux: lora_mux.Mux, name: str, handle: int) -> None:
    """A removed name means nothing to anybody but the requests that have it."""
    ids, index = torch.tensor([PROMPT]), torch.tensor([[handle]])
    for rows in ([name], index):
        with pytest.raises(UnknownAdapterError), mux.route(rows):
            pass
    for act in (mux.prefetch, mux.pin):
        with pytest.raises(UnknownAdapterError):
            act([name] if act == mux.prefetch else name)
    with pytest.raises(UnknownAdapterError):
        mux.model(ids, adapter_names=[name])
    assert name not in mux.adapters and name not in mux.memory().adapters


class TestNames:
    def test_removed_while_it_runs(self, mux: Any, managed: Any, stage: Any) -> None:
        handle = mux.adapters["plain"]

        def remove() -> None:
            mux.remove("plain")
            refuse_everywhere(mux, "plain", handle)
            with pytest.raises(UnknownAdapterError):
                manager.add_request(PROMPT, adapter_names="plain")
            with pytest.raises(UnknownAdapterError):
                manager.add_request(PROMPT, adapter_names=torch.tensor([handle]))

        steps = Steps(mux.model, s1=remove)
        manager = managed()
        rows = ["plain", None, "biased", {"plain": 0.5, "biased": -1.5}]
        names = manager.add_requests([PROMPT] * 4, adapter_names=rows)
        results = collected(manager, 4)
        steps.remove()
        assert steps.results == {1: None}
        assert [results[name] for name in names] == [answer(stage, row) for row in rows]
        later = manager.add_request(PROMPT, adapter_names="biased")
        assert collected(manager, 1)[later] == answer(stage, "biased")

    def test_removed_while_it_waits(self, mux: Any, managed: Any, stage: Any) -> None:
        manager = managed(max_requests_per_batch=1)
        steps = Steps(mux.model, s1=lambda: [mux.remove(name) for name in NAMES])
        rows = [None, "plain", "rslora", "biased", "plain"]
        names = manager.add_requests([PROMPT] * 5, adapter_names=rows)
        results = collected(manager, 5)
        steps.remove()
        assert steps.results == {1: [None] * 3} and not mux.adapters
        assert [results[name] for name in names] == [answer(stage, row) for row in rows]

    def test_replaced_while_it_waits(self, mux: Any, managed: Any, stage: Any) -> None:
        """The request that was added before keeps what its name meant then."""
        manager = managed(max_requests_per_batch=1)
        names: list[str] = []

        def replace() -> None:
            mux.load("plain", stage.others / "plain", replace=True)
            names.append(manager.add_request(PROMPT, adapter_names="plain"))

        steps = Steps(mux.model, s1=replace)
        rows = ["biased", "plain", "rslora"]
        names += manager.add_requests([PROMPT] * 3, adapter_names=rows)
        results = collected(manager, 4)
        steps.remove()
        assert steps.results == {1: None}
        wanted = [answer(stage, row) for row in (*rows, "other")]
        assert [results[name] for name in names] == wanted and wanted[1] != wanted[3]

    def test_removed_and_loaded_again(self, mux: Any, managed: Any, stage: Any) -> None:
        """Over and over, while requests of each of them are in flight."""
        manager = managed()
        names, rows = [], []
        folders = [stage.folder / "plain", stage.others / "plain"]
        for i in range(12):
            names.append(manager.add_request(PROMPT, adapter_names="plain"))
            rows.append("plain" if i % 2 == 0 else "other")
            mux.remove("plain")
            mux.load("plain", folders[(i + 1) % 2])
        results = collected(manager, 12)
        assert [results[name] for name in names] == [answer(stage, row) for row in rows]

    def test_the_sticky_rows_of_a_removed_name(self, mux: Any, managed: Any, stage: Any) -> None:
        manager = managed()
        ids, handle = torch.tensor([PROMPT]), mux.adapters["plain"]
        index = torch.tensor([[handle]])

        def remove() -> None:
            mux.set_adapter("plain")
            with mux.route(index):
                mux.remove("plain")
                with pytest.raises(UnknownAdapterError):
                    mux.model(ids)
            with pytest.raises(UnknownAdapterError):
                mux.model(ids)
            mux.set_adapter(None)

        steps = Steps(mux.model, s0=remove)
        name = manager.add_request(PROMPT, adapter_names="plain")
        assert collected(manager, 1)[name] == answer(stage, "plain")
        steps.remove()
        assert steps.results == {0: None}


class TestRoom:
    def test_more_than_fit(self, stage: Any, tmp_path: Path) -> None:
        """They take turns; requests of the base model need not wait."""
        mux = crowded(stage.base, tmp_path)
        rows: list[Any] = [*NAMES, None, "rslora", {"plain": 1.0, "rslora": 0.5}, "biased", None]
        steps = Steps(mux.model)
        with mux.model.continuous_batching_context_manager(**settings()) as manager:
            names = manager.add_requests([PROMPT] * 8, adapter_names=rows)
            results = collected(manager, 8)
        steps.remove()
        assert [results[name] for name in names] == [answer(stage, row) for row in rows]
        assert len({tuple(sorted(batch)) for batch in steps.batches}) > 1
        assert all(len(batch) < 3 for batch in steps.batches)

    def test_what_never_fits_is_refused_alone(self, stage: Any, tmp_path: Path) -> None:
        mux = crowded(stage.base, tmp_path)
        with mux.model.continuous_batching_context_manager(**settings()) as manager:
            first = manager.add_request(PROMPT, adapter_names="plain")
            for add, row in ((manager.add_request, list(NAMES)), (manager.add_requests, [NAMES])):
                with pytest.raises(PoolCapacityError, match="for one request"):
                    inputs = PROMPT if add == manager.add_request else [PROMPT]
                    add(inputs, adapter_names=row if add != manager.add_request else NAMES)
            mux.pin("biased")
            with pytest.raises(PoolCapacityError, match="pinned and trained adapters keep"):
                manager.add_request(PROMPT, adapter_names=("plain", "rslora"))
            mux.unpin("biased")
            second = manager.add_request(PROMPT, adapter_names=("plain", "rslora"))
            results = collected(manager, 2)
        assert results[first] == answer(stage, "plain")
        assert results[second] == answer(stage, {"plain": 1.0, "rslora": 1.0})

    def test_room_that_others_keep_for_a_while(self, stage: Any, tmp_path: Path) -> None:
        """Another's block leaves none: the request waits, nobody else."""
        mux = crowded(stage.base, tmp_path)
        with mux.model.continuous_batching_context_manager(**settings()) as manager:
            with mux.route(["plain", "biased"]):
                waits = manager.add_request(PROMPT, adapter_names="rslora")
                goes = [manager.add_request(PROMPT, adapter_names=n) for n in ("__base__", "plain")]
                results = collected(manager, 2)
                assert results == {goes[0]: answer(stage, None), goes[1]: answer(stage, "plain")}
                assert manager.get_result(timeout=0.3) is None
            results = collected(manager, 1)
        assert results == {waits: answer(stage, "rslora")}

    def test_nobody_overtakes_for_ever(self, stage: Any, tmp_path: Path) -> None:
        """One that needs all the room is answered before those that came after it."""
        mux = crowded(stage.base, tmp_path)
        order: list[str] = []
        with mux.model.continuous_batching_context_manager(**settings()) as manager:
            manager.add_request(PROMPT, "first", adapter_names="biased")
            manager.add_request(PROMPT, "large", adapter_names=("plain", "rslora"))
            for i in range(8):
                manager.add_request(PROMPT, f"small{i}", adapter_names="biased")
            manager.add_request(PROMPT, "base", adapter_names="__base__")
            while len(order) < 11:
                result = manager.get_result(timeout=20)
                assert result is not None and result.error is None
                order.append(result.request_id)
        assert order.index("large") < min(order.index(f"small{i}") for i in range(8))
        assert order.index("base") < order.index("large")

    def test_a_batch_that_is_being_made_keeps_its_adapters(
        self, stage: Any, tmp_path: Path
    ) -> None:
        """From when the scheduler has got its requests until it is computed."""
        adapters = (mux := crowded(stage.base, tmp_path))._adapters
        handles = {mux.adapters["plain"], mux.adapters["biased"]}
        promises = adapters.promise(lambda: [handles])
        held = adapters.hold(handles)
        with pytest.raises(PoolCapacityError):
            mux.prefetch(["rslora"])
        assert all(map(mux._slots.is_live, handles)) and promises[0].handles == held.handles
        del held
        mux.prefetch(["rslora"])
        assert not all(map(mux._slots.is_live, handles))

    def test_a_file_that_has_changed(self, stage: Any, tmp_path: Path) -> None:
        """Its request fails, and says why; the others, and later ones, are answered."""
        mux = crowded(stage.base, tmp_path)
        with mux.model.continuous_batching_context_manager(**settings()) as manager:
            weights = tmp_path / "rslora" / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"x")
            rows = ["plain", "rslora", None, ("plain", "rslora")]
            names = [manager.add_request(PROMPT, adapter_names=row or "__base__") for row in rows]
            outputs = {}
            while len(outputs) < 4:
                result = manager.get_result(timeout=20)
                outputs[result.request_id] = result
            for i in (0, 2):
                assert outputs[names[i]].generated_tokens == answer(stage, rows[i])
            for i in (1, 3):
                assert "must be the file that was loaded" in outputs[names[i]].error
            mux.load("rslora", stage.folder / "rslora", replace=True)
            again = manager.add_request(PROMPT, adapter_names="rslora")
            assert collected(manager, 1)[again] == answer(stage, "rslora")
            wait_for(lambda: not len(manager.mux_requests))


class TestRequests:
    def test_cancelled_at_any_time(self, mux: Any, managed: Any, stage: Any) -> None:
        """Before the first batch, in it, while it waits, twice, and when it is over."""
        manager = managed(max_requests_per_batch=2)
        kept = manager.add_request(PROMPT, adapter_names="plain")
        for i in range(20):
            manager.add_request(PROMPT, f"gone{i}", adapter_names=NAMES[i % 3])
            manager.cancel_request(f"gone{i}")
        steps = Steps(mux.model, s1=lambda: manager.cancel_request("in it"))
        manager.add_request(PROMPT, "in it", adapter_names="plain")
        last = manager.add_request(PROMPT, adapter_names="biased")
        results = {}
        while not {kept, last} <= results.keys():
            result = manager.get_result(timeout=20)
            assert result is not None, results
            results[result.request_id] = result.generated_tokens
        steps.remove()
        assert results[kept] == answer(stage, "plain") and results[last] == answer(stage, "biased")
        manager.cancel_request(kept)
        manager.cancel_request("never there")
        wait_for(lambda: not len(manager.mux_requests))

    def test_before_the_manager_starts(self, mux: Any, stage: Any) -> None:
        manager = mux.model.init_continuous_batching(**settings())
        names = [manager.add_request(PROMPT, adapter_names=row) for row in ("plain", "biased")]
        mux.remove("plain")
        manager.start()
        results = collected(manager, 2)
        manager.stop(block=True)
        assert [results[name] for name in names] == [answer(stage, r) for r in ("plain", "biased")]
        assert not len(manager.mux_requests)

    def test_four_threads_of_two_hundred(self, stage: Any) -> None:
        mux = lora_mux.Mux.of(copy.deepcopy(stage.model))
        rows = ["plain", None, "rslora", {"plain": 0.5, "biased": -1.5}]
        wanted = [answer(stage, row, new=1) for row in rows]
        names: list[dict[str, int]] = [{} for _ in rows]
        refused: list[BaseException] = []
        with mux.model.continuous_batching_context_manager(
            **settings(max_batch_tokens=256)
        ) as manager:

            def add(i: int) -> None:
                for _ in range(200):
                    try:
                        with mux.route([rows[i]]):
                            names[i][manager.add_request(PROMPT, max_new_tokens=1)] = i
                    except lora_mux.LoraMuxError as error:
                        refused.append(error)

            threads = [threading.Thread(target=add, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            results = collected(manager, 800)
        assert not refused and len(results) == 800
        for i, of_thread in enumerate(names):
            assert all(results[name] == wanted[i] for name in of_thread)

    def test_a_name_that_is_in_flight(self, mux: Any, managed: Any, stage: Any) -> None:
        manager = managed()

        def again() -> None:
            manager.add_request(PROMPT, "x", adapter_names="biased")

        steps = Steps(mux.model, s0=again)
        manager.add_request(PROMPT, "x", adapter_names="plain")
        assert collected(manager, 1) == {"x": answer(stage, "plain")}
        steps.remove()
        assert isinstance(steps.results[0], RoutingError)
        assert "`request_id` must be new, got 'x'" in str(steps.results[0])
        again()  # it is over
        assert collected(manager, 1) == {"x": answer(stage, "biased")}

    def test_a_name_that_is_in_the_queue(self, mux: Any, stage: Any) -> None:
        manager = mux.model.init_continuous_batching(**settings())
        manager.add_request(PROMPT, "x", adapter_names="plain")
        with pytest.raises(RoutingError, match="still in flight"):
            manager.add_request(PROMPT, "x", adapter_names="biased")
        manager.start()
        assert collected(manager, 1) == {"x": answer(stage, "plain")}
        manager.stop(block=True)

    def test_refused_by_transformers(self, mux: Any, managed: Any, stage: Any) -> None:
        """A full queue, a wrong argument, a manager that stops: nothing of the request is kept."""
        manager = mux.model.init_continuous_batching(**settings())
        with pytest.raises(TypeError):
            manager.add_request(7, adapter_names="plain")
        assert not len(manager.mux_requests)
        manager.start()
        manager.stop(block=False)
        assert manager.add_request(PROMPT, adapter_names="plain") is None
        assert not len(manager.mux_requests)
        manager.stop(block=True)
        gc.collect()
        assert not mux._adapters.has_promises

    def test_stopped_at_once(self, mux: Any, stage: Any) -> None:
        """transformers fails what it has; the adapters are free afterwards."""
        manager = mux.model.init_continuous_batching(**settings(max_requests_per_batch=1))
        manager.add_requests([PROMPT] * 9, adapter_names=["plain", "biased", "rslora"] * 3)
        mux.remove("plain")
        manager.start()
        wait_for(lambda: manager.get_result(timeout=1) is not None)
        manager.stop(block=True, hard_stop=True)
        assert not len(manager.mux_requests) and not mux._adapters.has_promises

    def test_one_that_was_added_past_us(self, mux: Any, managed: Any, stage: Any) -> None:
        """Whose rows it has cannot be known: it is refused, and no other."""
        manager = managed()
        past = type(manager).__mro__[2].add_request
        past(manager, PROMPT, "past")
        name = manager.add_request(PROMPT, adapter_names="plain")
        outputs = [manager.get_result(timeout=20) for _ in range(2)]
        found = {output.request_id: output for output in outputs}
        assert "past this model's adapters" in found["past"].error
        assert found[name].generated_tokens == answer(stage, "plain")


def test_what_is_in_the_queue_is_kept() -> None:
    """The manager's thread forgets what is nowhere: not what is about to be put, or was."""
    requests = InFlight()
    queued, alive = set[str](), set[str]()
    added = [Request(NOBODY, (name, f"{name}__child#0")) for name in ("put", "putting", "there")]
    for request in added:
        requests.add(request, alive.__contains__)
    added[0].is_put = added[2].is_put = True
    queued.add("put")
    alive.add("there__child#0")
    requests.forget(lambda: queued, alive.__contains__)
    assert len(requests) == 6
    queued.clear(), alive.clear()
    requests.forget(lambda: queued, alive.__contains__)
    assert [*requests] == ["putting", "putting__child#0"]
    requests.drop(added[0])  # once more changes nothing
    requests.drop(added[1])
    assert not len(requests)


class TestDetach:
    def test_beside_requests(self, mux: Any, stage: Any) -> None:
        manager = mux.model.init_continuous_batching(**settings())
        name = manager.add_request(PROMPT, adapter_names="plain")
        with pytest.raises(RoutingBusyError, match="requests of continuous batching have adapters"):
            mux.detach()
        manager.start()
        assert collected(manager, 1) == {name: answer(stage, "plain")}
        base = manager.add_request(PROMPT)
        wait_for(lambda: len(manager.mux_requests) < 2)
        assert collected(manager, 1) == {base: answer(stage, None)}
        wait_for(lambda: not len(manager.mux_requests))
        mux.detach()
        with pytest.raises(lora_mux.errors.DetachedError):
            manager.add_request(PROMPT, adapter_names="plain")
        base = manager.add_request(PROMPT)
        assert collected(manager, 1) == {base: answer(stage, None)}
        manager.stop(block=True)


def test_a_trained_adapter_that_is_removed(stage: Any, tmp_path: Path) -> None:
    """With little memory it goes out and comes back as it was learnt, not as it was loaded."""
    mux = crowded(stage.base, tmp_path)
    trained = mux.train("plain")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(-1.5)
    mux.publish("plain")
    with torch.no_grad(), mux.route(["plain"]):
        ids = torch.tensor([PROMPT])
        want = mux.model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, 4:].tolist()
    assert want != answer(stage, "plain")
    manager = mux.model.init_continuous_batching(**settings(max_requests_per_batch=1))
    rows = ["rslora", "biased", "plain", "biased", "plain"]
    names = manager.add_requests([PROMPT] * 5, adapter_names=rows)
    mux.remove("plain")
    with mux.route(["rslora", "biased"]):
        pass  # it had to go for these
    assert not mux._slots.is_live(manager.mux_requests.row(names[2]).index.item())
    manager.start()
    results = collected(manager, 5)
    manager.stop(block=True)
    wanted = [want if row == "plain" else answer(stage, row) for row in rows]
    assert [results[name] for name in names] == wanted


def test_unequal_dropouts_in_a_row(stage: Any, tmp_path: Path) -> None:
    """While adapters are trained with them, a request with both cannot be answered; others can."""
    mux = lora_mux.Mux.of(copy.deepcopy(stage.model))
    trained = [mux.train(name, dropout=p) for name, p in (("plain", 0.1), ("rslora", 0.2))]
    manager = mux.model.init_continuous_batching(**settings())
    rows: list[Any] = [("plain", "rslora"), "biased", None]
    names = manager.add_requests([PROMPT] * 3, adapter_names=rows)
    manager.start()
    outputs = {o.request_id: o for o in (manager.get_result(timeout=20) for _ in names)}
    assert "adapters of one dropout in each row" in outputs[names[0]].error
    for module in trained:
        module.eval()
    again = manager.add_request(PROMPT, adapter_names=rows[0])
    assert collected(manager, 1)[again] == answer(stage, {"plain": 1.0, "rslora": 1.0})
    manager.stop(block=True)
    for name, row in zip(names[1:], rows[1:], strict=True):
        assert outputs[name].generated_tokens == answer(stage, row)


def test_a_copy_has_promised_nothing(stage: Any, tmp_path: Path) -> None:
    mux = crowded(stage.base, tmp_path)
    manager = mux.model.init_continuous_batching(**settings())
    manager.add_request(PROMPT, adapter_names="plain")
    mux.remove("plain")
    twin = lora_mux.Mux.of(copy.deepcopy(mux.model))
    twin.model.set_attn_implementation("sdpa")  # the manager's is wrong for others in 5.15
    assert not twin._adapters.has_promises and mux._adapters.has_promises
    twin.memory()
    assert twin._slots.tenants == {*twin.adapters.values()}
    with twin.route(["rslora"]), torch.no_grad():
        got = twin.model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False)
    assert got[0, 4:].tolist() == answer(stage, "rslora")
