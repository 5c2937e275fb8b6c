"""What a module must survive: patched forwards, the meta device, casts, and being let go."""

import copy
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from oracle import Adapter, assert_close, forward, make_adapter
from peft_oracle import qwen2

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import accelerate


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))


def adapters() -> dict[str, dict[str, Adapter]]:
    return {
        name: {
            "0": make_adapter(rank, 16, 24, 4, torch.float32),
            "2": make_adapter(rank, 24, 8, 4, torch.float32),
        }
        for name, rank in (("a", 2), ("b", 5))
    }


def add(mux: lora_mux.Mux, wanted: dict[str, dict[str, Adapter]]) -> None:
    for name, parts in wanted.items():
        mux.add_adapter(name, {path: (a.A, a.B) for path, a in parts.items()}, alpha=4)


ROWS: list[Any] = ["a", None, ("a", "b"), {"b": -0.5}]


def truth(model: nn.Sequential, x: Tensor, wanted: dict[str, dict[str, Adapter]]) -> Tensor:
    """The model's answer for ROWS in fp64."""
    chosen = [{"a": 1.0}, {}, {"a": 1.0, "b": 1.0}, {"b": -0.5}]

    def layer(path: str, x: Tensor) -> Tensor:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        return forward(linear, x, [[(wanted[n][path], w) for n, w in r.items()] for r in chosen])

    with torch.no_grad():
        return layer("2", torch.tanh(layer("0", x)))


class TestPatchedForward:
    def test_is_called_for_the_base_part(self) -> None:
        model, wanted, x = plain(), adapters(), torch.randn(4, 16)
        want = truth(model, x, wanted)
        calls = []
        own = model[0].forward

        def counted(x: Tensor) -> Tensor:
            calls.append(x.shape)
            return own(x)

        model[0].forward = counted
        base = model(x)
        mux = lora_mux.attach(model)
        add(mux, wanted)
        with mux.route(ROWS):
            got = model(x)
        assert_close(got, want)
        assert torch.equal(got[1], base[1]) and len(calls) == 2
        mux.detach()
        assert model[0].forward is counted and torch.equal(model(x), base)

    def test_what_it_returns_is_not_written_to(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2))
        kept = torch.zeros(1, 2)
        model[0].forward = lambda x: kept
        layer: Any = lora_mux.MuxLinear(model[0], backend="reference")
        a = layer.add_adapter("a", torch.ones(1, 2), torch.ones(2, 1), alpha=1)
        run = torch.compile(layer, backend="eager")  # operators, which write in place
        for of in (layer, run):
            with torch.no_grad():
                y = of(torch.ones(1, 2), lora_mux.Routing(torch.tensor([[a]])))
            assert y.tolist() == [[2.0, 2.0]] and kept.tolist() == [[0.0, 0.0]]

    @pytest.mark.parametrize("first", ["offload", "attach"])
    def test_accelerate_offload(self, first: str) -> None:
        """Weights live on the meta device, and are put in place by a forward on the instance."""
        model, wanted, x = plain(), adapters(), torch.randn(4, 16)
        want, base = truth(model, x, wanted), model(x)
        if first == "offload":
            accelerate.cpu_offload(model, torch.device("cpu"))
        mux = lora_mux.attach(model)
        if first == "attach":
            accelerate.cpu_offload(model, torch.device("cpu"))
        add(mux, wanted)
        assert model[0].weight.is_meta
        with torch.no_grad(), mux.route(ROWS):
            assert_close(model(x), want)
        if first == "offload":
            mux.detach()
            assert torch.equal(model(x), base)


class TestMeta:
    def materialised(self, how: str) -> tuple[nn.Sequential, lora_mux.Mux]:
        state = plain().state_dict()
        with torch.device("meta"):
            model = plain()
        mux = lora_mux.attach(model)
        with pytest.raises(lora_mux.LoraMuxError, match="meta device"):
            add(mux, adapters())
        if how == "to_empty":
            model.to_empty(device="cpu")
        model.load_state_dict(state, assign=how == "assign")
        return model, mux

    @pytest.mark.parametrize("how", ["to_empty", "assign"])
    def test_attach_then_materialise(self, how: str) -> None:
        model, mux = self.materialised(how)
        wanted, x = adapters(), torch.randn(4, 16)
        add(mux, wanted)
        with mux.route(ROWS):
            got = model(x)
        assert_close(got, truth(model, x, wanted))

    def test_a_layer_of_its_own(self) -> None:
        layer = lora_mux.MuxLinear(nn.Linear(4, 4, device="meta"))
        layer.load_state_dict(nn.Linear(4, 4).state_dict(), assign=True)
        layer.reserve(1, 1)
        a = layer.add_adapter("a", torch.ones(1, 4), torch.ones(4, 1), alpha=1)
        x = torch.randn(2, 4)
        y = layer(x, lora_mux.Routing(torch.tensor([[a], [-1]])))
        torch.testing.assert_close(y[0] - layer(x)[0], x[0].sum().expand(4))


CASTS: dict[str, Callable[[nn.Module], object]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.float16),
    "double and back": lambda m: m.double().float(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_take_the_adapters_along(cast: str) -> None:
    model, wanted = plain(), adapters()
    mux = lora_mux.attach(model)
    add(mux, wanted)
    mux.set_route(ROWS)
    CASTS[cast](model)
    dtype = model[0].weight.dtype
    x = torch.randn(4, 16).to(dtype)
    got = model(x)
    twin = copy.deepcopy(model).double()
    # Rounded weights, exact arithmetic: two layers deep, each rounds its own answer.
    error = (got.double() - twin(x.double())).abs().max() / twin(x.double()).abs().max()
    assert got.dtype == dtype and error <= 4 * torch.finfo(dtype).eps
    late = plain().to(dtype)
    other = lora_mux.attach(late)
    late.load_state_dict(model.state_dict())
    add(other, wanted)
    other.set_route(ROWS)
    torch.testing.assert_close(late(x), got, rtol=0, atol=0)


def test_state_dict_of_the_plain_model_loads() -> None:
    model, source = plain(), plain()
    keys = list(model.state_dict())
    mux = lora_mux.attach(model)
    add(mux, adapters())
    assert list(model.state_dict()) == keys
    model.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(4, 16)
    assert torch.equal(model(x), source(x))


def test_a_replica_as_torch_makes_it() -> None:
    """Of the class, without arguments, and with the layer's attributes."""
    model, x = plain(), torch.randn(4, 16)
    mux = lora_mux.attach(model)
    add(mux, adapters())
    mux.set_route(ROWS)
    layer: Any = model[0]
    replica = layer._replicate_for_data_parallel()
    replica._parameters = layer._parameters
    assert torch.equal(replica(x), layer(x))


@torch.no_grad()
def test_a_head_that_shares_its_weight_with_the_embedding(tmp_path: Path) -> None:
    """The adapter is the head's alone; the tie stays, also in what is saved."""
    model = qwen2()
    model.save_pretrained(tmp_path / "before")
    ids = torch.randint(2, 250, (2, 5))
    base = model(ids, output_hidden_states=True)
    head = make_adapter(3, 64, 256, 6, torch.float32)
    mux = lora_mux.attach(model, ["lm_head"])
    mux.add_adapter("a", {"lm_head": (head.A, head.B)}, alpha=6)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with mux.route(["a", None]):
        got = model(ids, output_hidden_states=True)
    hidden = base.hidden_states[-1]
    assert torch.equal(got.hidden_states[-1], hidden)
    rows = [[(head, 1.0)]] * 5 + [[]] * 5
    truth = forward(model.lm_head, hidden.reshape(10, 64), rows)
    assert_close(got.logits.reshape(10, 256), truth)
    model.save_pretrained(tmp_path / "after")
    file = "model.safetensors"
    assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()


class TestLetGo:
    def test_attaching_and_detaching_leaves_nothing(self) -> None:
        model, wanted, x = plain(), adapters(), torch.randn(4, 16)

        def cycle() -> None:
            mux = lora_mux.attach(model)
            add(mux, wanted)
            with mux.route(ROWS):
                model(x).sum().backward()
            mux.remove("a")
            mux.detach()

        def objects(cycles: int) -> int:
            for _ in range(cycles):
                cycle()
            gc.collect()
            return len(gc.get_objects())

        before = objects(3)
        assert objects(200) <= before + 20

    def test_rank_rows_of_a_removed_adapter_are_used_again(self) -> None:
        model, wanted = plain(), adapters()
        mux = lora_mux.attach(model)
        add(mux, wanted)
        layer: Any = model[0]
        size = layer.mux_pool.A_rows.shape
        kept = layer.mux_pool.A_rows.clone()
        for _ in range(200):
            mux.remove("b")
            assert torch.count_nonzero(layer.mux_pool.A_rows.any(1)) == 2
            add(mux, {"b": wanted["b"]})
        assert layer.mux_pool.A_rows.shape == size
        assert torch.equal(layer.mux_pool.A_rows, kept)
