"""Quantised bases: their own forward computes the base part; their weights are not looked at."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from oracle import make_adapter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb
    import torchao.quantization as ao

IN, OUT = 128, 64


def nf4(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear4bit(IN, OUT, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data.clone(), requires_grad=False, quant_type="nf4"
    )
    layer.bias = linear.bias
    return layer.to("cpu")  # type: ignore[no-any-return]  # which quantises


def int8(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(
        linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False
    )
    layer.bias = linear.bias
    return layer.to("cpu")  # type: ignore[no-any-return]


def by_torchao(config: str) -> Callable[[nn.Linear], nn.Module]:
    def quantise(linear: nn.Linear) -> nn.Module:
        model = nn.Sequential(linear)
        ao.quantize_(model, getattr(ao, config)())
        return model[0]

    return quantise


class Packed(nn.Module):
    """As those of HQQ, GPTQ and AWQ: sizes by name, int32 buffers, no weight to look at."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        assert isinstance(linear.bias, Tensor)
        scales = linear.weight.detach().abs().amax(1) / 7
        codes = (linear.weight.detach() / scales[:, None]).round().int() + 8
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        self.register_buffer("qweight", (codes.T.reshape(-1, 8, OUT) << shifts[:, None]).sum(1))
        self.register_buffer("shifts", shifts)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", linear.bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        raise AssertionError("a packed weight was looked at")

    def forward(self, x: Tensor) -> Tensor:
        codes = (self.qweight[:, None] >> self.shifts[:, None]) & 15
        return x @ ((codes.reshape(IN, OUT) - 8) * self.scales) + self.bias


BASES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bitsandbytes nf4": nf4,
    "bitsandbytes int8": int8,
    "torchao int8": by_torchao("Int8WeightOnlyConfig"),
    "torchao int8, dynamic": by_torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": by_torchao("Float8WeightOnlyConfig"),
    "packed int4 of any make": Packed,
}
pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes' and torchao's own


def check(model: nn.Module, mux: lora_mux.Mux, x: Tensor, base: Tensor) -> None:
    """A mixed batch: what is added to the quantised layer's answer is the delta, in fp64."""
    one, two = (make_adapter(rank, IN, OUT, 4, torch.float32) for rank in (3, 8))
    mux.add_adapter("one", {"0": (one.A, one.B)}, alpha=4)
    mux.add_adapter("two", {"0": (two.A, two.B)}, alpha=4)
    with mux.route(["one", None, {"one": 0.5, "two": -1.0}]):
        got = model(x)
    delta = [a.scaling * (x.double() @ a.A.double().T) @ a.B.double().T for a in (one, two)]
    unit = torch.finfo(torch.float32).eps * float(base.abs().max())
    wanted = torch.stack([delta[0][0], torch.zeros(OUT), 0.5 * delta[0][2] - delta[1][2]])
    assert (got.double() - base.double() - wanted).abs().max() <= 8 * unit
    assert torch.equal(got[1], base[1]) and torch.equal(model(x), base)


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_values(name: str) -> None:
    model = nn.Sequential(BASES[name](nn.Linear(IN, OUT)))
    kind, keys = type(model[0]), list(model.state_dict())
    x = torch.randn(3, IN)
    base = model(x)
    mux = lora_mux.attach(model)
    check(model, mux, x, base)
    assert list(model.state_dict()) == keys
    layer: Any = model[0]
    assert layer.mux_pool.A_rows.dtype == torch.float32
    twin = copy.deepcopy(model)
    with mux.route(["two"] * 3):
        assert not torch.equal(model(x), base)
    assert torch.equal(twin(x), base)
    mux.detach()
    assert type(model[0]) is kind and torch.equal(model(x), base)


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_dora(name: str) -> None:
    """Norms are those of the weight that the layer computes with, in spite of a large bias."""
    linear = nn.Linear(IN, OUT)
    linear.bias.data.mul_(30)
    base = BASES[name](linear)
    layer = lora_mux.MuxLinear(copy.deepcopy(base))
    made, magnitude = make_adapter(4, IN, OUT, 4, torch.float32), 0.5 + torch.rand(OUT)
    handle = layer.add_adapter("a", made.A, made.B, alpha=4, magnitude=magnitude)
    x = torch.randn(3, IN)
    got = layer(x, lora_mux.Routing(torch.tensor([[handle], [-1], [handle]])))
    # One by one, as a row of its own may choose scales of its own.
    weight = torch.cat([base(row[None]) - base.bias for row in torch.eye(IN)]).double().T
    own = base(x).double() - base.bias.double()
    whole = weight + made.scaling * made.B.double() @ made.A.double()
    g = magnitude.double() / whole.norm(dim=1)
    wanted = g * (own + made.scaling * (x.double() @ made.A.double().T) @ made.B.double().T)
    wanted = torch.stack([wanted[0], own[1], wanted[2]]) + base.bias.double()
    assert (got.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch.equal(got[1], base(x)[1])


@torch.no_grad()
def test_quantised_after_attaching() -> None:
    """torchao changes the weight, and leaves the layer's class alone."""
    model = nn.Sequential(nn.Linear(IN, OUT))
    mux = lora_mux.attach(model)
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    assert type(model[0].weight).__name__ == "Int8Tensor"
    x = torch.randn(3, IN)
    check(model, mux, x, model(x))


@pytest.mark.parametrize("name", ["bitsandbytes nf4", "torchao int8", "packed int4 of any make"])
def test_gradients_pass_through(name: str) -> None:
    model = nn.Sequential(BASES[name](nn.Linear(IN, OUT)))
    x = torch.randn(2, IN, requires_grad=True)
    (base,) = torch.autograd.grad(model(x).sum(), x)
    mux = lora_mux.attach(model)
    a = make_adapter(3, IN, OUT, 4, torch.float32)
    mux.add_adapter("a", {"0": (a.A, a.B)}, alpha=4)
    with mux.route(["a", None]):
        (got,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(got[0] - base[0], a.scaling * (a.B.T.sum(1) @ a.A))
    assert torch.equal(got[1], base[1])
