"""attach and Mux: what a route means, how long it lasts, what it costs, and what detach leaves."""

import copy
import gc
import io
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from lora_mux.routes import route
from peft_oracle import gpt2, llama, peft, t5, transformers


class Blocks(nn.Module):
    """[samples, tokens, 8] -> the same; its last layer sees the tokens flattened."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.flat = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        shape = x.shape
        return self.flat(x.reshape(-1, 8)).reshape(shape)  # type: ignore[no-any-return]


def attached(
    adapters: tuple[str, ...] = ("a", "b", "c"), depth: int = 2
) -> tuple[Blocks, lora_mux.Mux]:
    model = Blocks(depth)
    mux = lora_mux.attach(model)
    for name in adapters:
        add(mux, name)
    return model, mux


def add(mux: lora_mux.Mux, name: str) -> int:
    return mux.add_adapter(
        name, {path: (torch.randn(2, 8), torch.randn(8, 2)) for path in mux.targets}, alpha=2
    )


def alone(model: nn.Module, mux: lora_mux.Mux, x: Tensor, entry: Any) -> Tensor:
    """x's answer when the whole batch has one entry."""
    mux.set_adapter(entry)
    try:
        return model(x)  # type: ignore[no-any-return]
    finally:
        mux.set_adapter(None)


X = torch.linspace(-1, 1, 3 * 5 * 8).reshape(3, 5, 8)


class TestRoutes:
    def test_one_entry_per_sample(self) -> None:
        model, mux = attached()
        rows: list[Any] = ["a", ("b", "c"), {"a": 0.5, "c": -1.0}]
        with mux.route(rows):
            got = model(X)
        for i, row in enumerate(rows):
            torch.testing.assert_close(got[i], alone(model, mux, X, row)[i])

    def test_index_tensor_with_weights(self) -> None:
        model, mux = attached()
        a, b, c = mux.adapters.values()
        index = torch.tensor([[a, -1], [b, c], [-1, -1]])
        weights = torch.tensor([[0.5, 9.0], [1.0, -1.0], [1.0, 1.0]])
        with mux.route(index, weights):
            got = model(X)
        with mux.route([{"a": 0.5}, {"b": 1.0, "c": -1.0}, None]):
            assert torch.equal(got, model(X))

    def test_index_written_after_routing_is_another_matter(self) -> None:
        model, mux = attached()
        index = torch.zeros(3, 1, dtype=torch.int64)
        with mux.route(index):
            want = model(X)
            index.fill_(1)
            assert torch.equal(model(X), want)

    def test_one_entry_per_token(self) -> None:
        model, mux = attached()
        rows = ["a", None, "b"] * 5
        with mux.route_tokens(rows):
            got = model(X).reshape(15, 8)
        for name, start in (("a", 0), ("b", 2)):
            want = alone(model, mux, X, name).reshape(15, 8)
            torch.testing.assert_close(got[start::3], want[start::3])

    def test_lengths_of_packed_samples(self) -> None:
        model, mux = attached()
        with mux.route_tokens(["a", None, ("b", "c"), "a"], lengths=[6, 0, 8, 1]):
            got = model(X)
        with mux.route_tokens(["a"] * 6 + [("b", "c")] * 8 + ["a"]):
            assert torch.equal(got, model(X))

    def test_set_route_stays(self) -> None:
        model, mux = attached()
        mux.set_route(["a", None, "b"])
        got = model(X)
        assert torch.equal(got, model(X)) and mux.active_adapters == ["a", "b"]
        with mux.route(["c"] * 3):
            assert mux.active_adapters == ["c"]
        assert torch.equal(got, model(X))
        mux.set_route(None)
        assert mux.active_adapters == []

    @pytest.mark.parametrize("entry", [None, "__base__", (), {}], ids=str)
    def test_every_way_to_say_base(self, entry: Any) -> None:
        model, mux = attached()
        base = model(X)
        mux.set_adapter(entry)
        assert torch.equal(model(X), base)
        with mux.route([entry] * 3):
            assert torch.equal(model(X), base)

    def test_set_adapter_with_weights(self) -> None:
        model, mux = attached()
        mux.set_adapter(["a", "b"], weights=[1.0, 0.5])
        got = model(X)
        mux.set_adapter({"a": 1.0, "b": 0.5})
        assert torch.equal(got, model(X))
        mux.set_adapter(["a", "b"], weights=0.5)
        got = model(X)
        mux.set_adapter({"a": 0.5, "b": 0.5})
        assert torch.equal(got, model(X))

    def test_an_empty_batch(self) -> None:
        model, mux = attached()
        with mux.route([]):
            assert model(X[:0]).shape == (0, 5, 8)

    @pytest.mark.parametrize("expand", ["interleave", "tile"])
    def test_repeated_samples_when_said(self, expand: Any) -> None:
        model, mux = attached()
        rows = ["a", None, "b"]
        with mux.route(rows):
            one = model(X)
        with mux.route(rows, expand=expand):
            if expand == "tile":
                assert torch.equal(model(X.repeat(2, 1, 1)), one.repeat(2, 1, 1))
            else:
                twice = model(X.repeat_interleave(2, 0))
                assert torch.equal(twice, one.repeat_interleave(2, 0))

    def test_an_explicit_routing_wins_for_one_layer(self) -> None:
        model, mux = attached()
        layer, a = model.layers[0], mux.adapters["a"]
        mux.set_adapter("b")
        got = layer(X, lora_mux.Routing(torch.tensor([[a], [-1], [a]])))
        mux.set_adapter("a")
        want = layer(X)
        mux.set_adapter(None)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], layer(X)[1])

    def test_disable_wins_over_an_explicit_routing(self) -> None:
        model, mux = attached()
        routing = lora_mux.Routing(torch.tensor([[mux.adapters["a"]]] * 3))
        base = model.layers[0](X)
        with mux.disable_adapter():
            assert torch.equal(model.layers[0](X, routing), base)
        assert not torch.equal(model.layers[0](X, routing), base)


class TestWrongBatches:
    """A batch with another number of samples raises, even if one number divides the other."""

    @pytest.mark.parametrize("tokens", [1, 5, 6])
    def test_a_layer_that_sees_tokens_first(self, tokens: int) -> None:
        """[tokens, samples, features], as torch's own attention has it: not rows of samples."""

        class TokensFirst(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]

        model = TokensFirst()
        mux = lora_mux.attach(model)
        add(mux, "a")
        x = torch.randn(3, tokens, 8)
        with mux.route(["a", None, "a"]):
            with pytest.raises(lora_mux.errors.RoutingError, match="begin with the batch of 3"):
                model(x)

    @pytest.mark.parametrize("samples", [1, 2, 4, 6])
    def test_samples_differ_from_rows(self, samples: int) -> None:
        model, mux = attached()
        x = torch.randn(samples, 9, 8)
        with mux.route(["a", "b", "c"]), pytest.raises(lora_mux.LoraMuxError, match="per sample"):
            model(x)

    def test_three_rows_on_four_times_nine_tokens(self) -> None:
        model = llama()
        mux = lora_mux.attach(model)
        mux.add_adapter("a", {mux.targets[0]: (torch.ones(1, 64), torch.ones(64, 1))}, alpha=1)
        with mux.route(["a"] * 3), pytest.raises(lora_mux.LoraMuxError, match="got 3"):
            model(torch.ones(4, 9, dtype=torch.int64))

    def test_tokens_that_equal_rows(self) -> None:
        """One prompt of three tokens under three routed samples: the flat layer cannot tell."""
        model, mux = attached()
        with mux.route(["a", "b", "c"]), pytest.raises(lora_mux.LoraMuxError):
            model(torch.randn(1, 3, 8))

    def test_generate_with_another_batch(self) -> None:
        model = llama()
        mux = lora_mux.attach(model)
        mux.add_adapter("a", {mux.targets[0]: (torch.ones(1, 64), torch.ones(64, 1))}, alpha=1)
        ids = torch.full((4, 3), 7)
        with mux.route(["a", None]), pytest.raises(lora_mux.LoraMuxError):
            model.generate(ids, max_new_tokens=2)

    def test_wrong_number_of_tokens(self) -> None:
        model, mux = attached()
        with mux.route_tokens(["a"] * 3), pytest.raises(lora_mux.LoraMuxError, match="per token"):
            model(X)


class TestState:
    def test_restored_after_an_exception(self) -> None:
        """PEFT leaks here (its issue 3475): the next plain call runs the old routing."""
        model, mux = attached()
        mux.set_adapter("b")
        want = model(X)
        for block in (mux.route(["a"] * 3), mux.disable_adapter(), mux.route(["a"] * 2)):
            with pytest.raises(RuntimeError), block:  # noqa: PT012
                raise RuntimeError("in the middle")
            assert torch.equal(model(X), want)

    def test_restored_after_an_exception_inside_the_forward(self) -> None:
        model, mux = attached()
        base = model(X)
        with pytest.raises(lora_mux.LoraMuxError), mux.route(["a"] * 3):
            model(X[..., :7])
        assert torch.equal(model(X), base)
        with mux.route(["a"] * 2):  # nothing of the failed batch is remembered
            model(X[:2])

    def test_restored_after_generate_raises(self) -> None:
        model = gpt2()
        mux = lora_mux.attach(model)
        handle = mux.add_adapter(
            "a", {mux.targets[0]: (torch.ones(1, 32), torch.ones(96, 1))}, alpha=1
        )
        assert handle == 0
        with mux.route(["a", None]):
            with pytest.raises(ValueError):
                model.generate(torch.full((2, 3), 7), max_new_tokens=2, no_such_argument=1)
            with pytest.raises(lora_mux.LoraMuxError):  # repetition was for generate alone
                model(torch.full((4, 3), 7))

    def test_blocks_nest(self) -> None:
        model, mux = attached()
        with mux.route(["a"] * 3):
            outer = model(X)
            with mux.route(["b"] * 3):
                assert mux.active_adapters == ["b"]
            assert torch.equal(model(X), outer)
        assert mux.active_adapters == []

    @pytest.mark.parametrize("how", ["route", "set_adapter", "disable"])
    def test_another_thread_changes_nothing_here(self, how: str) -> None:
        model, mux = attached()
        answers: dict[str, Tensor] = {}

        def other() -> None:
            if how == "set_adapter":
                mux.set_adapter("b")
                answers["other"] = model(X)
                return
            with mux.route(["b"] * 3) if how == "route" else mux.disable_adapter():
                answers["other"] = model(X)
                in_block.set()
                go.wait(20)

        base, wanted = model(X), {"route": "b", "set_adapter": "b", "disable": None}[how]
        in_block, go = threading.Event(), threading.Event()
        with mux.route(["a", "c", None]):
            want = model(X)
            thread = threading.Thread(target=other)
            thread.start()
            if how != "set_adapter":
                assert in_block.wait(20)
                assert torch.equal(model(X), want)
                go.set()
            thread.join()
            assert torch.equal(model(X), want)
        left = "b" if how == "set_adapter" else None
        assert mux.active_adapters == ([left] if left else [])
        torch.testing.assert_close(answers["other"], alone(model, mux, X, wanted))
        assert torch.equal(model(X), base)

    def test_detach_waits_for_nobody_and_refuses(self) -> None:
        """While a block is open or a pass in progress, anywhere; not after one was interrupted."""
        model, mux = attached()
        busy = lora_mux.errors.RoutingBusyError
        in_block, go = threading.Event(), threading.Event()

        def other() -> None:
            with mux.route(["a"] * 3):
                in_block.set()
                go.wait(20)

        thread = threading.Thread(target=other, name="a tenant")
        thread.start()
        assert in_block.wait(20)
        with pytest.raises(busy, match="detached while the block of thread 'a tenant' is open"):
            mux.detach()
        go.set()
        thread.join()

        def detach(*_: Any) -> None:
            with pytest.raises(busy, match="detached while a forward pass is in progress"):
                mux.detach()

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = model.layers[1].register_forward_hook(detach)
        model(X)
        hook.remove()
        hook = model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(X)
        hook.remove()
        mux.detach()

    def test_generate_in_a_thread_has_the_block_that_it_was_started_in(self) -> None:
        """As transformers documents its streamers. A forward there has the sticky rows."""
        model = llama()
        mux = lora_mux.attach(model)
        layer = model.get_submodule(mux.targets[0])
        pair = torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4)
        mux.add_adapter("a", {mux.targets[0]: pair}, alpha=8)
        ids, got = torch.tensor([[5, 17, 99]]), []
        how = {"max_new_tokens": 6, "do_sample": False}

        def generate() -> None:
            got.append(model.generate(ids, **how))
            got.append(model(ids).logits)

        base = model(ids).logits, model.generate(ids, **how)
        with mux.route(["a"]):
            want = model.generate(ids, **how)
            thread = threading.Thread(target=generate)
            thread.start()
            thread.join()
        assert torch.equal(got[0], want) and not torch.equal(want, base[1])
        assert torch.equal(got[1], base[0])


def python_calls(act: Callable[[], object]) -> int:
    """How many Python and C functions `act` calls: a cost that no other process disturbs."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("how", ["set_adapter", "route", "disable_adapter"])
def test_switching_costs_the_same_for_any_number_of_targets_and_adapters(how: str) -> None:
    def cost(targets: int, adapters: int) -> int:
        model, mux = attached((), depth=targets)
        for i in range(adapters):
            tiny = (torch.ones(1, 8), torch.ones(8, 1))
            mux.add_adapter(f"a{i}", {mux.targets[0]: tiny}, alpha=1)

        def act() -> None:
            if how == "set_adapter":
                mux.set_adapter("a0")
            elif how == "route":
                with mux.route(["a0", None]):
                    pass
            else:
                with mux.disable_adapter():
                    pass

        # The least of a few: a garbage collection calls finalizers of other tests' objects.
        return min(python_calls(act) for _ in range(4))

    small = cost(10, 1)
    assert cost(1000, 1) == small
    assert cost(10, 1000) == small


def test_a_name_that_comes_back_is_not_the_adapter_of_before() -> None:
    """set_adapter reuses its routes: that of a removed adapter would hold a dead handle."""
    model, mux = attached()
    mux.set_adapter("a")
    before = model(X)
    mux.remove("a")
    add(mux, "a")
    mux.set_adapter("a")
    after = model(X)
    with mux.route(["a"] * len(X)):
        torch.testing.assert_close(after, model(X))
    assert not torch.allclose(after, before)


class TestDropIn:
    @pytest.mark.parametrize("build", [llama, gpt2, t5])
    def test_detach_gives_the_plain_model_back(self, build: Callable[[], Any]) -> None:
        model = build()
        before = {path: (module, type(module)) for path, module in model.named_modules()}
        keys = list(model.state_dict())
        attributes = {path: set(vars(module)) for path, (module, _) in before.items()}
        mux = lora_mux.attach(model)
        assert list(model.state_dict()) == keys
        assert all(isinstance(model.get_submodule(p), lora_mux.MuxLinear) for p in mux.targets)
        mux.detach()
        after = {path: (module, type(module)) for path, module in model.named_modules()}
        assert after == before
        assert {path: set(vars(module)) for path, (module, _) in after.items()} == attributes
        assert not model._forward_hooks and not model._forward_pre_hooks
        lora_mux.attach(model).detach()

    def test_detach_frees_everything(self) -> None:
        model, mux = attached()
        watched = weakref.ref(mux._router)
        mux.detach()
        del mux
        gc.collect()
        assert watched() is None

    @pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
    def test_copies_keep_their_route_and_go_their_own_way(self, how: str) -> None:
        model, mux = attached()
        mux.set_route(["a", None, "b"])
        want = model(X)
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        mux.set_adapter(None)
        assert torch.equal(twin(X), want) and not torch.equal(model(X), want)

    def test_a_copied_model_generates_with_its_own_weights(self) -> None:
        model = llama()
        lora_mux.attach(model)
        twin = copy.deepcopy(model)
        assert twin.generate.model is twin and model.generate.model is model

    def test_save_pretrained_stays_a_plain_checkpoint(self, tmp_path: Any) -> None:
        model = llama()
        keys = set(model.state_dict())
        lora_mux.attach(model)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert set(again.state_dict()) == keys

    def test_half_model(self) -> None:
        model, mux = attached()
        model.to(torch.bfloat16)
        with mux.route(["a", None, "b"]):
            assert model(X.bfloat16()).dtype == torch.bfloat16

    def test_gradient_reaches_the_input(self) -> None:
        model, mux = attached()
        x = X.clone().requires_grad_()
        with mux.route(["a", None, "b"]):
            model(x).sum().backward()
        assert x.grad is not None and bool((x.grad != 0).any())


class TestTargets:
    @pytest.mark.parametrize(
        ("targets", "count"),
        [
            ("all-linear", 14),
            (["q_proj", "v_proj"], 4),
            (("layers.1.mlp.down_proj",), 1),
            (r".*layers\.0\..*_proj", 7),
            (["lm_head"], 1),
        ],
    )
    def test_forms(self, targets: Any, count: int) -> None:
        assert len(lora_mux.attach(llama(), targets).targets) == count

    def test_all_linear_leaves_the_output_head_out(self) -> None:
        model = llama()
        lora_mux.attach(model)
        assert not isinstance(model.lm_head, lora_mux.MuxLinear)

    def test_layers_that_their_parent_bypasses_are_left_out_or_refused(self) -> None:
        """torch's fast path reads these weights itself: adapters there would do nothing."""
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        wrapped = nn.ModuleDict({"encoder": model, "head": nn.Linear(8, 8)})
        assert lora_mux.attach(wrapped).targets == ["head"]
        other = nn.ModuleDict({"encoder": copy.deepcopy(model)})
        with pytest.raises(lora_mux.errors.TargetError, match="bypass|hide"):
            lora_mux.attach(other, ["linear1"])


@pytest.mark.parametrize(
    "kind", ["BertForSequenceClassification", "LlamaForSequenceClassification"]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers
def test_the_head_of_a_classifier_is_left_out_as_by_peft(kind: str) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "vocab_size": 64}
    config = getattr(transformers, kind.replace("ForSequenceClassification", "Config"))(**small)
    model = getattr(transformers, kind)(config)
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    )
    layers = theirs.base_model.model.named_modules()
    want = {path for path, layer in layers if isinstance(layer, peft.tuners.lora.Linear)}
    assert set(lora_mux.attach(model).targets) == want


def test_it_says_what_it_holds() -> None:
    model, mux = attached(("a", "b"))
    assert repr(mux) == "Mux(targets=3, adapters=['a', 'b'])"
    mux.detach()
    assert repr(mux).endswith(", detached)")


def test_weights_that_change_all_the_time_are_not_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a fader that an adapter is mixed in with."""
    monkeypatch.setattr(route, "MAX_ROUTES", 4)
    model, mux = attached(("a",))
    base, full = model(X), alone(model, mux, X, "a")
    for step in range(11):
        mux.set_adapter("a", weights=[step / 10])
        got = model(X)
        assert torch.equal(got, base) == (step == 0)
        assert len(mux._uniform_routes._routes) <= 4
    torch.testing.assert_close(got, full)


class Drawing(nn.Module):
    """A model that is given how much to make, and no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, samples: int, tokens: list[int]) -> Tensor:
        return self.layer(torch.ones(samples, len(tokens), 8))  # type: ignore[no-any-return]


def test_a_model_that_takes_no_tensor() -> None:
    """Its layers show how many samples there are."""
    model = Drawing()
    mux = lora_mux.attach(model)
    add(mux, "a")
    add(mux, "b")
    with mux.route(["a", None, "b"]):
        got = model(3, [7, 7])
        with pytest.raises(lora_mux.errors.RoutingError, match=r"\(4\), got 3"):
            model(4, [7, 7])
    for i, row in enumerate(["a", None, "b"]):
        mux.set_adapter(row)
        torch.testing.assert_close(got[i], model(3, [7, 7])[i])
    assert not torch.equal(got[0], got[2])


class Table(nn.Module):
    """A layer that sees the batch, and one that sees a table of five positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Linear(8, 8), nn.Linear(8, 8)
        self.table = torch.linspace(-1, 1, 5 * 8).reshape(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x) + self.positions(self.table)  # type: ignore[no-any-return]


def test_equal_rows_with_weights_that_are_trained() -> None:
    """The first row would stand for all, and alone have a gradient."""
    model = Table()
    mux = lora_mux.attach(model)
    index, weights = torch.full((3, 1), add(mux, "a")), torch.full((3, 1), 0.5)
    with mux.route(index, weights):
        got = model(X)
    torch.testing.assert_close(got, alone(model, mux, X, {"a": 0.5}))
    with mux.route(index, weights.requires_grad_()):
        with pytest.raises(lora_mux.errors.RoutingError, match="unless all `rows` are equal"):
            model(X)


def test_two_models_do_not_share_a_route() -> None:
    first, mux = attached()
    second, other = attached()
    base = second(X)
    with mux.route(["a"] * 3):
        assert torch.equal(second(X), base)
    assert other.active_adapters == []
