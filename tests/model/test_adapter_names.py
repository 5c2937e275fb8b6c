"""Rows that are given with the call by PEFT's own keyword, against PEFT."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lora_mux
from lora_mux.errors import ArgumentTypeError, RoutingError, UnknownAdapterError
from peft_oracle import attached_llama, t5
from tenants import SIZES, Model, attached, check, tenant

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:FutureWarning")

NAMES = ["plain", "__base__", "rslora", "biased"]  # as PEFT takes them
IDS = torch.tensor([[5, 17, 99], [201, 4, 8], [64, 65, 9], [90, 80, 70]])
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return attached_llama(tmp_path_factory.mktemp("adapters"))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


class TestAsPeft:
    @torch.no_grad()
    @pytest.mark.parametrize("form", [list, tuple])
    def test_forward(self, form: Any, stage: SimpleNamespace) -> None:
        close(
            stage.model(IDS, adapter_names=form(NAMES)).logits,
            stage.peft(IDS, adapter_names=NAMES).logits,
        )

    @pytest.mark.parametrize(
        "how",
        [
            GREEDY,
            {"num_beams": 3, **GREEDY},
            {"num_beams": 3, "num_return_sequences": 2, **GREEDY},
            {"prompt_lookup_num_tokens": 2, **GREEDY},
        ],
    )
    def test_generate(self, how: dict[str, Any], stage: SimpleNamespace) -> None:
        ids, names = IDS, NAMES
        if "prompt_lookup_num_tokens" in how:  # which takes one sample
            ids, names = IDS[:1], NAMES[:1]
        want = stage.peft.generate(input_ids=ids, adapter_names=names, **how)
        assert torch.equal(stage.model.generate(ids, adapter_names=names, **how), want)
        assert torch.equal(stage.model.generate(inputs=ids, adapter_names=names, **how), want)
        assert not torch.equal(stage.model.generate(ids, **how), want)

    def test_several_samples_of_each_prompt(self, stage: SimpleNamespace) -> None:
        """Sampled from the likeliest token only, because PEFT cannot repeat its list here."""
        how = {"do_sample": True, "top_k": 1, "num_return_sequences": 3, "max_new_tokens": 4}
        got = stage.model.generate(IDS, adapter_names=NAMES, **how)
        want = stage.peft.generate(
            input_ids=IDS, adapter_names=NAMES, max_new_tokens=4, do_sample=False
        )
        assert torch.equal(got, want.repeat_interleave(3, 0))

    @torch.no_grad()
    def test_an_encoder_and_a_decoder(self) -> None:
        model = t5()
        mux = lora_mux.attach(model)
        for name in "ab":
            pairs = {}
            for path in mux.targets:
                layer: Any = model.get_submodule(path)
                A, B = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
                pairs[path] = A, B
            mux.add_adapter(name, pairs, scaling=0.2)
        rows = ["a", None, "b"]
        how = {"num_beams": 2, "max_new_tokens": 5, "min_new_tokens": 5}
        got = model.generate(IDS[:3], adapter_names=rows, **how)
        logits = model(IDS[:3], decoder_input_ids=IDS[:3], adapter_names=rows).logits
        for i, row in enumerate(rows):
            mux.set_adapter(row)
            assert torch.equal(got[i], model.generate(IDS[i : i + 1], **how)[0])
            alone = model(IDS[i : i + 1], decoder_input_ids=IDS[i : i + 1]).logits[0]
            close(logits[i], alone)


class TestOtherForms:
    @torch.no_grad()
    def test_all_that_a_route_takes(self, stage: SimpleNamespace) -> None:
        rows = [("plain", "rslora"), None, {"biased": -0.5, "plain": 2.0}, "biased"]
        with stage.mux.route(rows):
            want = stage.model(IDS).logits
            tokens = stage.model.generate(IDS, **GREEDY)
        assert torch.equal(stage.model(IDS, adapter_names=rows).logits, want)
        assert torch.equal(stage.model.generate(IDS, adapter_names=rows, **GREEDY), tokens)

    @torch.no_grad()
    def test_an_index_tensor(self, stage: SimpleNamespace) -> None:
        handles = stage.mux.adapters
        index = torch.tensor([[handles.get(name, -1)] for name in NAMES])
        want = stage.peft(IDS, adapter_names=NAMES).logits
        close(stage.model(IDS, adapter_names=index).logits, want)
        per_token = index[:, None].expand(4, 3, 1)
        close(stage.model(IDS, adapter_names=per_token).logits, want)
        tokens = stage.model.generate(IDS, adapter_names=index, **GREEDY)
        assert torch.equal(tokens, stage.model.generate(IDS, adapter_names=NAMES, **GREEDY))

    @torch.no_grad()
    def test_none_is_as_if_it_were_not_given(self, stage: SimpleNamespace) -> None:
        """As in PEFT, where the active adapter then counts."""
        with stage.mux.route(NAMES):
            want = stage.model(IDS).logits
            tokens = stage.model.generate(IDS, **GREEDY)
            assert torch.equal(stage.model(IDS, adapter_names=None).logits, want)
            got = stage.model.generate(IDS, adapter_names=None, **GREEDY)
        assert torch.equal(got, tokens)

    @torch.no_grad()
    def test_it_goes_before_whatever_is_in_force(self, stage: SimpleNamespace) -> None:
        want = stage.model(IDS, adapter_names=NAMES).logits
        tokens = stage.model.generate(IDS, adapter_names=NAMES, **GREEDY)
        stage.mux.set_adapter("biased")
        try:
            for block in (
                stage.mux.route(["rslora"] * 4),
                stage.mux.disable_adapter(),
                stage.mux.route(["plain"] * 7),  # of another batch
            ):
                with block:
                    assert torch.equal(stage.model(IDS, adapter_names=NAMES).logits, want)
                    got = stage.model.generate(IDS, adapter_names=NAMES, **GREEDY)
                    assert torch.equal(got, tokens)
            assert stage.mux.active_adapters == ["biased"]
        finally:
            stage.mux.set_adapter(None)
        assert stage.mux.active_adapters == []


def test_the_keyword_never_reaches_the_model() -> None:
    class Recording(nn.Sequential):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            seen.append(sorted(kwargs))
            return super().forward(x)  # type: ignore[no-any-return]

    seen: list[list[str]] = []
    model = Recording(nn.Linear(8, 8))
    mux = lora_mux.attach(model)
    mux.add_adapter("a", {"0": (torch.ones(1, 8), torch.ones(8, 1))}, alpha=1)
    x = torch.randn(2, 8)
    base = model(x, other=1)
    got = model(x, adapter_names=["a", "__base__"], other=1)
    model(x, adapter_names=None, other=1)
    assert seen == [["other"]] * 3
    assert torch.equal(got[1], base[1]) and not torch.equal(got[0], base[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing(reentrant: bool, stage: SimpleNamespace) -> None:
    """The layers run again in the backward, when no call has the rows any more."""
    model = copy.deepcopy(stage.model)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.train()
        model.zero_grad()
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, adapter_names=NAMES).logits
        lora_mux.Mux.of(model).set_adapter("rslora")
        logits.square().sum().backward()
        lora_mux.Mux.of(model).set_adapter(None)
        grads.append(embedded.grad)
    close(grads[1], grads[0])
    assert bool((grads[0] != 0).any())


def test_bounded_memory(tmp_path: Any) -> None:
    """The rows of a call bring their adapters in, and keep them while the call runs."""
    model, mux = attached(rank_rows=8)
    tenants = {n: tenant(tmp_path / n, {"first": 4, "second": 4}, i) for i, n in enumerate("abc")}
    for name, made in tenants.items():
        mux.load(name, made.folder)
    x = torch.randn(2, 12)
    for first, second in ("ab", "bc", "ca"):
        rows = [[(tenants[first], 1.0)], [(tenants[second], 1.0)]]
        check(WithRows(model, [first, second]), x, rows)
    with pytest.raises(lora_mux.errors.PoolCapacityError):
        model(torch.randn(3, 12), adapter_names=["a", "b", "c"])
    check(model, x, [[], []])


class WithRows(nn.Module):
    """A model that is called with rows."""

    def __init__(self, model: Model, rows: Any) -> None:
        super().__init__()
        self.model, self.rows = model, rows
        self.first, self.second = model.first, model.second

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, adapter_names=self.rows)  # type: ignore[no-any-return]


class TestRefusals:
    CASES: dict[str, tuple[Any, type[Exception], str]] = {
        "too few": (NAMES[:3], RoutingError, r"`adapter_names` .*\(4\), got 3; .*mux.call"),
        "too many": ([*NAMES, None], RoutingError, r"`adapter_names` .*\(4\), got 5"),
        "none": ([], RoutingError, r"`adapter_names` .*\(4\), got 0"),
        "unknown": (["plain", "x", None, None], UnknownAdapterError, "unknown adapter 'x'"),
        "one name": ("plain", ArgumentTypeError, "`adapter_names` must be a sequence"),
        "an entry": (["plain", 3, None, None], ArgumentTypeError, r"`adapter_names\[1\]`"),
        "a handle": (torch.tensor([[99]] * 4), UnknownAdapterError, "99, which was never given"),
        "tokens": (
            torch.full((2, 6, 1), -1),
            RoutingError,
            r"`adapter_names` of shape \[samples, tokens, J\] .*\(4\), got 2",
        ),
    }

    @pytest.mark.parametrize("case", CASES)
    @torch.no_grad()
    def test_names_the_argument_and_changes_nothing(
        self, case: str, stage: SimpleNamespace
    ) -> None:
        rows, kind, message = self.CASES[case]
        want = stage.peft(IDS, adapter_names=NAMES).logits
        for call in (stage.model, stage.model.generate):
            with pytest.raises(kind, match=message):
                call(IDS, adapter_names=rows)
        assert stage.mux.active_adapters == []
        close(stage.model(IDS, adapter_names=NAMES).logits, want)


class TestCompiled:
    ROWS: tuple[Any, ...] = (["a", None], ["b", "b"], [None, "a"], [{"a": 2.0}, "b"], [None, None])

    @pytest.fixture(autouse=True)
    def no_old_graphs(self) -> Any:
        torch._dynamo.reset()
        counters.clear()
        yield
        torch._dynamo.reset()

    @staticmethod
    def made() -> tuple[Model, lora_mux.Mux]:
        model = Model()
        mux = lora_mux.attach(model)
        mux.reserve(adapters=4, rank=4)
        for name in "ab":
            pairs = {p: (torch.randn(2, k), torch.randn(n, 2)) for p, (k, n) in SIZES.items()}
            mux.add_adapter(name, pairs, alpha=2)
        return model, mux

    @torch.no_grad()
    def test_each_list_without_a_graph_of_its_own(self) -> None:
        model, mux = self.made()
        run, x = torch.compile(model, backend="aot_eager"), torch.randn(2, 12)
        made = []
        for rows in self.ROWS:
            torch.testing.assert_close(run(x, adapter_names=rows), model(x, adapter_names=rows))
            with mux.route(rows[::-1]):  # afterwards, and beside it
                torch.testing.assert_close(run(x), model(x))
                torch.testing.assert_close(run(x, adapter_names=rows), model(x, adapter_names=rows))
            made.append(counters["stats"]["unique_graphs"])
            mux._router.refuse_in_use()  # every pass has ended
        assert made[1:] == made[:-1]

    @torch.no_grad()
    def test_one_graph_for_all_says_what_to_do(self) -> None:
        model, mux = self.made()
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 12)
        # dynamo puts an error of its own around ours.
        with pytest.raises(Exception, match=r"`adapter_names` must be None where .*mux\.route"):
            run(x, adapter_names=["a", None])
        for rows in self.ROWS:
            with mux.route(rows):
                torch.testing.assert_close(run(x), model(x))
                torch.testing.assert_close(run(x, adapter_names=None), model(x))
        assert counters["stats"]["unique_graphs"] == 1

    @torch.no_grad()
    def test_a_refusal_is_ours(self) -> None:
        model, mux = self.made()
        run = torch.compile(model, backend="aot_eager")
        with pytest.raises(RoutingError, match=r"`adapter_names` .*\(2\), got 3"):
            run(torch.randn(2, 12), adapter_names=["a", None, "b"])
        with mux.route(["a", "b"]):  # after which the model's own hooks still begin its passes
            with pytest.raises(RoutingError, match=r"`rows` .*\(3\), got 2"):
                run(torch.randn(3, 12))
            x = torch.randn(2, 12)
            torch.testing.assert_close(run(x), model(x))
            with pytest.raises(RoutingError, match=r"`rows` .*\(4\), got 2"):
                run(torch.randn(4, 12))
        mux.detach()

    @pytest.mark.slow
    def test_generate_with_a_compiled_forward(self, stage: SimpleNamespace) -> None:
        model = copy.deepcopy(stage.model)
        model.forward = torch.compile(model.forward, backend="aot_eager")
        for names in (NAMES, NAMES[::-1]):
            want = stage.peft.generate(input_ids=IDS, adapter_names=names, **GREEDY)
            assert torch.equal(model.generate(IDS, adapter_names=names, **GREEDY), want)
