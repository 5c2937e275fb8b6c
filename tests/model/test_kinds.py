"""Embeddings and convolutions in mixed batches, against PEFT with one adapter after the other."""

import copy
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import differ
from kinds import LAYERS, batch_for
from torch import Tensor, nn

import lora_mux
from diffusion import unet
from lora_mux.errors import AdapterError, InputError, RoutingError, TargetError
from peft_oracle import gpt2, llama, peft, save_adapters, set_weights, t5, transformers

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:UserWarning:peft",
    "ignore:.*:FutureWarning",
    "ignore:Using padding='same' with even kernel lengths:UserWarning",
)

ROWS: list[Any] = ["a", None, {"b": 0.5}, {"a": -2.0, "b": 1.0}, "b", ("b", "a")]


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def case(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Model, Any, Tensor]:
    """A model of one layer, PEFT's with two adapters, which are saved in a folder, and a batch."""
    torch.manual_seed(0)
    base = Model(LAYERS[name][0]()).to(dtype)
    fields: dict[str, Any] = {"target_modules": ["layer"], "init_lora_weights": False}
    biased = {"lora_bias": True} if "embedding" not in name else {}
    wanted = {
        "a": peft.LoraConfig(r=4, lora_alpha=6, **fields),
        "b": peft.LoraConfig(r=2, lora_alpha=5, use_rslora=True, **biased, **fields),
    }
    theirs = save_adapters(base, wanted, folder, dtype)
    return base, theirs, batch_for(name, 6, dtype)


def answers(theirs: Any, base: nn.Module, x: Tensor) -> Tensor:
    """PEFT's, row by row; it cannot give one batch several adapters a row."""
    found = []
    for i, row in enumerate(ROWS):
        if row is None:
            found.append(base(x[i : i + 1]))
            continue
        names = {row: 1.0} if isinstance(row, str) else row
        set_weights(theirs, names if isinstance(names, dict) else dict.fromkeys(names, 1.0))
        found.append(theirs(x[i : i + 1]))
    set_weights(theirs, {"a": 1.0, "b": 1.0})
    return torch.cat(found)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_mixed_rows(name: str, backend: Any, tmp_path: Path) -> None:
    base, theirs, x = case(name, tmp_path)
    want = answers(theirs, base, x)
    model = copy.deepcopy(base)
    mux = lora_mux.attach(model, ["layer"], backend=backend)
    mux.load_many({"a": tmp_path / "a", "b": tmp_path / "b"})
    with mux.route(ROWS):
        got = model(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[1], base(x)[1]) and got.is_contiguous()
    assert torch.equal(model(x), base(x))
    taken = lora_mux.attach_peft(theirs, backend=backend)
    with taken.route(ROWS):
        torch.testing.assert_close(taken.model(x), got)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_kernels(name: str, tmp_path: Path) -> None:
    base, theirs, x = case(name, tmp_path)
    want = answers(theirs, base, x)
    mux = lora_mux.attach(base, ["layer"], backend="triton")
    mux.load_many({"a": tmp_path / "a", "b": tmp_path / "b"})
    with mux.route(ROWS):
        torch.testing.assert_close(base(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["3x2, padded", "groups", "embedding", "scaled embedding"])
@torch.no_grad()
def test_bf16(name: str, tmp_path: Path) -> None:
    base, theirs, x = case(name, tmp_path, torch.bfloat16)
    want = answers(theirs.double(), base.double(), x if x.dtype == torch.long else x.double())
    model = base.bfloat16()
    mux = lora_mux.attach(model, ["layer"])
    mux.load_many({"a": tmp_path / "a", "b": tmp_path / "b"})
    with mux.route(ROWS):
        got = model(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("name", ["1x1", "3x2, padded", "groups", "one dimension", "embedding"])
def test_gradients(name: str, backend: Any, tmp_path: Path) -> None:
    """To x against PEFT's autograd, and to the rows' weights against what PEFT's scales do."""
    base, theirs, x = case(name, tmp_path)
    given = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    set_weights(theirs, {"a": 1.0, "b": 0.5})
    theirs(given[0]).square().sum().backward()
    with torch.no_grad():
        delta = {}
        for adapter in "ab":
            set_weights(theirs, {adapter: 1.0})
            delta[adapter] = theirs(x) - base(x)

    mux = lora_mux.attach(base, ["layer"], backend=backend)
    handles = mux.load_many({"a": tmp_path / "a", "b": tmp_path / "b"})
    index = torch.tensor([[handles["a"], handles["b"]]] * 6)
    weight = torch.tensor([[1.0, 0.5]] * 6, requires_grad=True)
    with mux.route(index, weight):
        y = base(given[1])
    y.square().sum().backward()
    if x.is_floating_point():
        torch.testing.assert_close(given[1].grad, given[0].grad, rtol=1e-4, atol=1e-4)
    want = torch.stack([(2 * y * delta[adapter]).flatten(1).sum(1) for adapter in "ab"], 1)
    torch.testing.assert_close(weight.grad, want.detach(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layout_of_the_output_is_the_bases() -> None:
    layer = lora_mux.MuxLinear(nn.Conv2d(3, 4, 3, padding=1))
    A, B = torch.randn(2, 3, 3, 3), torch.randn(4, 2, 1, 1)
    handle = layer.add_adapter("a", A, B, alpha=3)
    x = torch.randn(5, 3, 6, 7)
    routing = lora_mux.Routing(torch.tensor([[handle], [-1], [handle], [-1], [-1]]))
    plain, last = layer(x, routing), layer(x.to(memory_format=torch.channels_last), routing)
    assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain, last)
    low = nn.functional.conv2d(x, A, padding=1)
    delta = 1.5 * nn.functional.conv2d(low, B)
    torch.testing.assert_close(plain[::2][:2] - layer(x)[::2][:2], delta[::2][:2])
    one = layer(x[0], lora_mux.Routing(torch.tensor([[handle]])))
    torch.testing.assert_close(one, plain[0])
    assert not torch.equal(one, layer(x[0]))


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=pytest.mark.interpreter)])
@torch.no_grad()
def test_no_samples_and_short_ints(backend: Any) -> None:
    conv = lora_mux.MuxLinear(nn.Conv2d(3, 4, 3), backend=backend)
    conv.add_adapter("a", torch.randn(2, 3, 3, 3), torch.randn(4, 2), alpha=2)
    assert conv(torch.ones(0, 3, 5, 5), lora_mux.Routing(torch.zeros(0, 1).int())).numel() == 0
    table = lora_mux.MuxLinear(nn.Embedding(9, 4), backend=backend)
    handle = table.add_adapter("a", torch.randn(2, 9), torch.randn(4, 2), alpha=2)
    ids, routing = torch.tensor([[1, 8], [0, 3]]), lora_mux.Routing(torch.tensor([[-1], [handle]]))
    assert torch.equal(table(ids.int(), routing), table(ids, routing))


@torch.no_grad()
def test_nobody_elses_values_reach_a_row() -> None:
    layer = lora_mux.MuxLinear(nn.Conv2d(3, 4, 3, padding=1))
    handles = [
        layer.add_adapter(name, torch.randn(2, 27), torch.randn(4, 2), alpha=2) for name in "ab"
    ]
    x = torch.randn(3, 3, 6, 7)
    routing = lora_mux.Routing(torch.tensor([[handles[0]], [handles[1]], [-1]]))
    want = layer(x, routing)
    x[1] = torch.nan
    got = layer(x, routing)
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2]) and got[1].isnan().all()


@torch.no_grad()
def test_a_unet_with_convolutions(tmp_path: Path) -> None:
    """As kohya's and LoCon files have them: attention, projections, and the blocks' own."""
    base = unet()
    shared: dict[str, Any] = {"init_lora_weights": False}
    wanted = {
        "ink": peft.LoraConfig(r=4, target_modules=["to_q", "proj_in", "conv1", "conv"], **shared),
        "pixel": peft.LoraConfig(r=2, target_modules=["to_v", "conv2", "conv_in"], **shared),
    }
    theirs = save_adapters(base, wanted, tmp_path)
    model = copy.deepcopy(base)
    mux = lora_mux.attach(model)
    for name in wanted:
        mux.load(name, tmp_path / name)
    torch.manual_seed(0)
    sample, states = torch.randn(4, 4, 8, 8), torch.randn(4, 7, 32)

    def run(model: Any, rows: slice = slice(None)) -> Tensor:
        return model(sample[rows], torch.tensor(5), states[rows]).sample  # type: ignore[no-any-return]

    with mux.route(["ink", None, {"pixel": 0.7}, ("ink", "pixel")]):
        got = run(model)
    assert differ(got[2], run(base)[2])
    for i, weights in enumerate([{"ink": 1.0}, {}, {"pixel": 0.7}, {"ink": 1.0, "pixel": 1.0}]):
        if weights:
            set_weights(theirs, weights)
        want = run(theirs if weights else base, slice(i, i + 1))
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [llama, gpt2, t5], ids=["llama", "gpt2", "t5"])
@torch.no_grad()
def test_embeddings_of_language_models(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = make()
    name = {"llama": "embed_tokens", "gpt2": "wte", "t5": "shared"}[make.__name__]
    attention = {"llama": "q_proj", "gpt2": "c_attn", "t5": "q"}[make.__name__]
    wanted = {
        n: peft.LoraConfig(r=r, target_modules=targets, init_lora_weights=False)
        for n, r, targets in (("both", 4, [name, attention]), ("table", 2, [name]))
    }
    theirs = save_adapters(base, wanted, tmp_path)
    model = copy.deepcopy(base)
    mux = lora_mux.attach(model)
    for adapter in wanted:
        mux.load(adapter, tmp_path / adapter)
    ids = torch.randint(2, 250, (3, 6))
    more = {"decoder_input_ids": ids[:, :4]} if make is t5 else {}
    with mux.route(["both", None, "table"]):
        got = model(input_ids=ids, **more).logits
        written = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    names = ["both", "__base__", "table"]
    want = theirs(input_ids=ids, adapter_names=names, **more).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(got[1], base(input_ids=ids, **more).logits[1])
    by_peft = theirs.generate(input_ids=ids, max_new_tokens=4, do_sample=False, adapter_names=names)
    assert torch.equal(written, by_peft)


@torch.no_grad()
def test_embeddings_of_other_numbers_have_no_rows_of_their_own() -> None:
    """GPT-2 asks wpe for [1, tokens] or, in a batch of as many, for what looks like its rows."""
    model = gpt2()
    mux = lora_mux.attach(model, ["wpe", "c_attn"])
    factors = torch.randn(2, 1024), torch.randn(32, 2)
    mux.add_adapter("a", {"transformer.wpe": factors}, alpha=2)
    ids = torch.randint(2, 250, (6, 6))
    with mux.route(["a", None, "a", None, None, "a"]), pytest.raises(RoutingError, match="wpe"):
        model(ids)
    with mux.route(["a"] * 6):  # all rows are equal
        got = model(ids).logits
    plain = gpt2()
    plain.load_state_dict(model.state_dict())
    plain.transformer.wpe.weight += (factors[1] @ factors[0]).T
    torch.testing.assert_close(got, plain(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attach_leaves_them_alone_until_an_adapter_touches_them() -> None:
    model = Net()
    kinds = {path: type(module) for path, module in model.named_modules()}
    mux = lora_mux.attach(model)
    assert mux.targets == ["out"] and type(model.table) is nn.Embedding
    wrong = {"conv": (torch.ones(2, 4, 2), torch.ones(4, 2, 1))}
    with pytest.raises(AdapterError, match=r"A` must have shape \[r, 4, 3\] .* got \[2, 4, 2\]"):
        mux.add_adapter("a", wrong, alpha=2)
    assert mux.targets == ["out"] and type(model.conv) is nn.Conv1d
    mux.add_adapter("a", {"conv": (torch.ones(2, 4, 3), torch.ones(6, 1, 1))}, alpha=2)
    mux.add_adapter("b", {"table": (torch.ones(2, 9), torch.ones(4, 2))}, alpha=2)
    assert mux.targets == ["out", "conv", "table"]
    ids = torch.randint(9, (3, 5))
    with mux.route(["a", None, "b"]):
        assert [differ(*pair) for pair in zip(model(ids), base(model, mux, ids), strict=True)] == [
            True,
            False,
            True,
        ]
    mux.detach()
    assert {path: type(module) for path, module in model.named_modules()} == kinds


def base(model: nn.Module, mux: lora_mux.Mux, x: Tensor) -> Tensor:
    with mux.disable_adapter():
        return model(x)  # type: ignore[no-any-return]


@torch.no_grad()
def test_bounded_pool(tmp_path: Path) -> None:
    """Two adapters over memory for one: files with kernels and tables come and go."""
    names = "3x2, padded", "embedding"
    for name in names:
        plain, theirs, x = case(name, tmp_path / name)
        model = copy.deepcopy(plain)
        probe = lora_mux.attach(copy.deepcopy(plain), ["layer"])
        memory = 5 * probe.memory().targets["layer"].row_bytes
        mux = lora_mux.attach(model, ["layer"], memory=memory)
        mux.load_many({n: tmp_path / name / n for n in "ab"})
        for adapter in "abba":
            mux.set_adapter(adapter)
            set_weights(theirs, {adapter: 1.0})
            torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1, groups=2)
        self.out = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.conv(self.table(ids).mT).mT)  # type: ignore[no-any-return]

    def truth(self, ids: Tensor, row: dict[str, float], held: dict[str, Any]) -> Tensor:
        """The answer for one sample [1, tokens], adapter by adapter."""
        parts = [(held[name], weight) for name, weight in row.items()]
        h = nn.functional.embedding(ids, self.table.weight)
        for factors, weight in parts:
            A, B = factors["table"]
            h = h + weight * nn.functional.embedding(ids, A.T) @ B.T
        y = nn.functional.conv1d(h.mT, self.conv.weight, self.conv.bias, padding=1, groups=2)
        for factors, weight in parts:
            A, B = factors["conv"]
            low = nn.functional.conv1d(h.mT, A, padding=1)
            y = y + weight * nn.functional.conv1d(low, B, groups=2)
        y = nn.functional.linear(y.mT, self.out.weight, self.out.bias)
        return y


@torch.no_grad()
def test_many_come_and_go() -> None:
    """Adapters that are loaded, removed, evicted and moved, over memory for three of eight."""
    draw, model = random.Random(0), Net()
    targets = ["table", "conv", "out"]
    probe = lora_mux.attach(copy.deepcopy(model), targets)
    row_bytes = sum(pool.row_bytes for pool in probe.memory().targets.values())
    plain = copy.deepcopy(model)
    mux = lora_mux.attach(model, targets, memory=12 * row_bytes)
    held: dict[str, Any] = {}
    mixed = 0
    for _ in range(120):
        name = draw.choice("abcdefgh")
        if name in held:
            mux.remove(name)
            del held[name]
        else:
            r = draw.choice([2, 4])
            held[name] = {
                "table": (torch.randn(r, 9), torch.randn(4, r)),
                "conv": (torch.randn(r, 4, 3), torch.randn(6, r // 2, 1)),
            }
            mux.add_adapter(name, held[name], scaling=1)
        chosen = draw.sample(sorted(held), min(3, len(held)))
        rows = [{n: draw.choice([1.0, -0.5])} for n in chosen] + [
            {},
            dict.fromkeys(chosen[:2], 1.0),
        ]
        ids = torch.randint(9, (len(rows), 5))
        with mux.route(rows):
            got = model(ids)
        for i, row in enumerate(rows):
            want = plain.truth(ids[i : i + 1], row, held)
            torch.testing.assert_close(got[i : i + 1], want, rtol=1e-4, atol=1e-4)
        mixed += len(chosen)
    assert mixed > 200


@torch.no_grad()
def test_one_graph_for_every_route(tmp_path: Path) -> None:
    torch._dynamo.reset()
    for name in ("3x2, padded", "embedding"):
        plain, _, x = case(name, tmp_path / name)
        mux = lora_mux.attach(plain, ["layer"])
        mux.load_many({n: tmp_path / name / n for n in "ab"})
        graphs: list[Any] = []

        def counted(graph: Any, inputs: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(plain, fullgraph=True, backend=counted)
            first = 0
            for rows in (ROWS, ROWS[::-1], ["a"] * 6):
                with mux.route(rows):
                    torch.testing.assert_close(compiled(x), plain(x))
                first = first or len(graphs)
        assert len(graphs) == first


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (self.kernel_size[0] - 1, 0)))


class Normed(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(ids), dim=-1)


@torch.no_grad()
def test_an_embedding_with_a_forward_of_its_own_stays_what_it_was() -> None:
    """OPT's positions are counted from an attention mask: no row of the batch is a number there."""
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.OPTModel(config).eval()
    ids = torch.randint(2, 60, (2, 4))
    before = model(ids).last_hidden_state
    with pytest.raises(TargetError, match="with a forward of its own"):
        lora_mux.attach(model, ["q_proj", "embed_positions"])
    mux = lora_mux.attach(model)
    table = model.decoder.embed_positions
    factors = torch.ones(2, table.num_embeddings), torch.ones(16, 2)
    with pytest.raises(AdapterError, match="'decoder.embed_positions' must be a target"):
        mux.add_adapter("a", {"decoder.embed_positions": factors}, alpha=2)
    assert torch.equal(model(ids).last_hidden_state, before) and not mux.adapters


@torch.no_grad()
def test_numbers_of_one_dimension_may_be_positions() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.frames = nn.Embedding(9, 4), nn.Embedding(9, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) + self.frames(torch.arange(ids.shape[1]))  # type: ignore[no-any-return]

    model = Positions()
    mux = lora_mux.attach(model, ["table", "frames"])
    factors = torch.randn(2, 9), torch.randn(4, 2)
    mux.add_adapter("ids", {"table": factors}, alpha=2)
    mux.add_adapter("frames", {"frames": factors}, alpha=2)
    ids = torch.randint(9, (5, 5))  # as many samples as tokens
    rows = ["ids", None, "ids", None, None]
    with mux.route(rows):
        assert torch.equal(model(ids)[1], base(model, mux, ids)[1])
    with mux.route(["frames", *rows[1:]]), pytest.raises(RoutingError, match="positions"):
        model(ids)
    with mux.route(["frames"] * 5):
        assert differ(model(ids), base(model, mux, ids))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Causal(3, 3, 3), "a forward of its own"),
        (Normed(4, 3), "a forward of its own"),
        (nn.Embedding(4, 3, max_norm=1.0), "max_norm"),
        (nn.Conv2d(3, 3, 3, dilation=2), "dilation"),
        (nn.ConvTranspose2d(3, 3, 3), "a linear layer .* an nn.Embedding or a convolution"),
        (nn.EmbeddingBag(4, 3), "a linear layer .* an nn.Embedding or a convolution"),
    ],
    ids=["causal", "normed", "max_norm", "dilation", "transposed", "bag"],
)
def test_what_cannot_carry_adapters(layer: nn.Module, why: str) -> None:
    with pytest.raises(TargetError, match=why):
        lora_mux.MuxLinear(layer)


def test_inputs_that_do_not_fit() -> None:
    conv, table = lora_mux.MuxLinear(nn.Conv2d(3, 4, 1)), lora_mux.MuxLinear(nn.Embedding(5, 4))
    routing = lora_mux.Routing(torch.tensor([[-1]]))
    with pytest.raises(InputError, match=r"\[samples, 3, size, size\], got \[1, 2, 5, 5\]"):
        conv(torch.ones(1, 2, 5, 5), routing)
    with pytest.raises(InputError, match="the numbers of tokens, got torch.float32"):
        table(torch.ones(1, 2), routing)
