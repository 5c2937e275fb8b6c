"""DoRA: PEFT is the oracle for one adapter, and the formula in fp64 where PEFT cannot mix."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kinds import LAYERS, batch_for
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lora_mux
from interpreter import note_launches
from lora_mux import Routing
from lora_mux.core import LoraWeights
from lora_mux.errors import AdapterError, CheckpointError, PoolCapacityError
from lora_mux.layers import with_gain
from oracle import Adapter, assert_close, forward, magnitude_by_norm, make_adapter
from peft_oracle import peft, set_weights, transformers, with_adapters
from tenants import WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")

BACKENDS = ["auto", "reference", pytest.param("triton", marks=pytest.mark.interpreter)]


class Net(nn.Module):
    """A layer with a bias, one without, and one whose weight is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(24, 40)
        self.b = nn.Linear(40, 20, bias=False)
        self.c = transformers.pytorch_utils.Conv1D(12, 20)
        nn.init.normal_(self.c.weight, std=0.2)
        nn.init.normal_(self.c.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))  # type: ignore[no-any-return]


def configs() -> dict[str, Any]:
    def config(**fields: Any) -> Any:
        common = {"target_modules": ["a", "b", "c"], "init_lora_weights": False}
        return peft.LoraConfig(**{**common, **fields})

    return {
        "dora": config(r=4, lora_alpha=9, use_dora=True),
        "rslora": config(r=5, lora_alpha=3, use_dora=True, use_rslora=True),
        "some": config(r=1, use_dora=True, target_modules=["b"], rank_pattern={"b": 17}),
        "plain": config(r=3),
        "biased": config(r=2, lora_bias=True),
        "big": config(r=16, lora_alpha=4),
    }


def peft_model(base: nn.Module, wanted: dict[str, Any]) -> Any:
    """With magnitudes and biases as training would leave them."""
    model = with_adapters(base, wanted)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(0.5 + torch.rand_like(parameter))
        if "lora_B" in name and name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """PEFT's model, and the folder in which it has saved its adapters."""
    torch.manual_seed(0)
    base, folder = Net(), tmp_path_factory.mktemp("dora")
    theirs = peft_model(base, configs())
    theirs.save_pretrained(folder)
    return SimpleNamespace(base=base, peft=theirs, folder=folder, x=torch.randn(7, 24))


def loaded(stage: SimpleNamespace, **how: Any) -> tuple[nn.Module, lora_mux.Mux]:
    model = copy.deepcopy(stage.base)
    mux = lora_mux.attach(model, **how)
    for name in configs():
        mux.load(name, stage.folder / name)
    return model, mux


def taken_over(stage: SimpleNamespace, **how: Any) -> tuple[nn.Module, lora_mux.Mux]:
    mux = lora_mux.attach_peft(copy.deepcopy(stage.peft), **how)
    return mux.model, mux


# DoRA first, because PEFT applies it to what the others have added before.
ROWS = [("dora",), ("plain",), None, ("rslora", "plain", "biased"), ("some", "plain"), ("biased",)]
ROWS.append(("rslora",))


@torch.no_grad()
def of_peft(stage: SimpleNamespace) -> Tensor:
    """What PEFT answers to each row alone."""
    answers = []
    for row, x in zip(ROWS, stage.x, strict=True):
        if row is None:
            answers.append(stage.base(x[None]))
        else:
            stage.peft.base_model.set_adapter(list(row))
            answers.append(stage.peft(x[None]))
    return torch.cat(answers)


def close(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("way", "backend"),
    [
        (loaded, "auto"),
        (taken_over, "auto"),
        (taken_over, "reference"),
        pytest.param(loaded, "triton", marks=pytest.mark.interpreter),
    ],
)
@torch.no_grad()
def test_mixed_rows_are_what_peft_answers_to_each(
    stage: SimpleNamespace, way: Callable[..., Any], backend: str
) -> None:
    want = of_peft(stage)
    model, mux = way(stage, backend=backend)
    with mux.route(ROWS):
        got = model(stage.x)
    close(got, want)
    mux.set_adapter(None)
    assert torch.equal(got[2], model(stage.x)[2])
    assert not torch.equal(got[0], got[2])


@torch.no_grad()
def test_a_batch_without_dora_has_the_bits_that_it_had_before(stage: SimpleNamespace) -> None:
    model = copy.deepcopy(stage.base)
    mux = lora_mux.attach(model)
    mux.load("plain", stage.folder / "plain")
    mux.set_adapter("plain")
    before = model(stage.x)
    mux.load("dora", stage.folder / "dora")
    assert torch.equal(model(stage.x), before)


@torch.no_grad()
def test_an_adapter_in_force_is_taken_over_with_the_scale_that_it_has_now(
    stage: SimpleNamespace,
) -> None:
    """PEFT's norms hold the scale, so that no weight can stand for it."""
    theirs = copy.deepcopy(stage.peft)
    set_weights(theirs, {"dora": 0.25, "plain": -2.0})
    want = theirs(stage.x)
    mux = lora_mux.attach_peft(theirs)
    close(mux.model(stage.x), want)
    mux.set_adapter({"dora": 1.0, "plain": -2.0})
    close(mux.model(stage.x), want)


def test_dora_on_what_others_have_added_is_refused(stage: SimpleNamespace) -> None:
    theirs = copy.deepcopy(stage.peft)
    for active in (["plain", "dora"], ["dora", "rslora"], ["plain", "some"]):
        theirs.base_model.set_adapter(active)
        with pytest.raises(CheckpointError, match=f"DoRA of adapter '{active[1]}' must be the fir"):
            lora_mux.attach_peft(theirs)


class Layer:
    """One layer, whose adapters of DoRA and others the oracle knows as well."""

    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = True, **how: Any) -> None:
        self.linear = nn.Linear(40, 33, bias=bias).to(dtype)
        self.layer = lora_mux.MuxLinear(self.linear, **how)
        self.adapters, self.handles = [], []
        for i, rank in enumerate((3, 16, 2, 5)):
            made = make_adapter(rank, 40, 33, alpha=rank + 3, dtype=dtype)
            magnitude = (0.3 + torch.rand(33)).to(dtype) if i % 2 == 0 else None
            self.adapters.append(Adapter(made.A, made.B, made.scaling, magnitude=magnitude))
            self.handles.append(
                self.layer.add_adapter(
                    str(i), made.A, made.B, scaling=made.scaling, magnitude=magnitude
                )
            )

    def routing(self, index: Tensor, weight: Tensor | None = None) -> Routing:
        return Routing(torch.tensor([*self.handles, -1])[index], weight)

    def truth(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        rows = [
            [(self.adapters[a], w) for a, w in zip(chosen, ws, strict=True) if a >= 0]
            for chosen, ws in zip(index.tolist(), weight.tolist(), strict=True)
        ]
        with torch.no_grad():
            return forward(self.linear, x, rows)


INDEX = torch.tensor([[0, -1], [-1, -1], [2, 0], [0, 2], [1, 3], [3, 0], [2, 2], [-1, 1]])
WEIGHT = torch.tensor([1.0, 0.5, -1.5, 0.0, 2.0, 1.0, 0.25, 1.0])[:, None] * torch.tensor([1, 0.5])


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    *((b, d, bias) for b in BACKENDS[:2] for d in DTYPES for bias in (True, False)),
    pytest.param("triton", torch.float32, False, marks=pytest.mark.interpreter),
    pytest.param("triton", torch.bfloat16, True, marks=pytest.mark.interpreter),
    pytest.param(
        *("triton", torch.float16, True), marks=[pytest.mark.interpreter, pytest.mark.slow]
    ),
]


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize(("backend", "dtype", "bias"), CASES, ids=str)
@torch.no_grad()
def test_weights_are_shares_of_what_an_adapter_changes(
    backend: Any, dtype: torch.dtype, bias: bool
) -> None:
    case = Layer(dtype, bias, backend=backend)
    x = torch.randn(8, 40).to(dtype)
    y = case.layer(x, case.routing(INDEX, WEIGHT))
    assert_close(y, case.truth(x, INDEX, WEIGHT))
    assert torch.equal(y[1], case.linear(x)[1])
    if backend != "triton":  # whose interpreter takes its time
        swapped = case.layer(x, case.routing(INDEX.flip(1), WEIGHT.flip(1)))
        assert_close(swapped, case.truth(x, INDEX, WEIGHT))
        assert_close(case.layer(x, case.routing(INDEX)), case.truth(x, INDEX, WEIGHT * 0 + 1))


@pytest.mark.usefixtures("mended", "quiet")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_rows_without_dora_keep_what_they_had(backend: Any, dtype: torch.dtype) -> None:
    """Base rows bit for bit, whatever they hold; plain ones do not become NaN by times 0."""
    case = Layer(dtype, backend=backend)
    x = torch.randn(6, 40).to(dtype)
    answer = torch.randn(6, 33).to(dtype)
    answer[0, :5] = torch.tensor([-0.0, torch.nan, -torch.nan, torch.inf, -torch.inf])
    answer[1, 0], answer[2, 0], x[3] = torch.inf, torch.nan, torch.nan
    twin = case.layer
    vars(twin)["mux_patched"], vars(twin)["mux_owns_output"] = lambda x: answer.clone(), False
    y = twin(x, case.routing(torch.tensor([[-1], [1], [0], [0], [0], [-1]])))
    integer = torch.int16 if dtype.itemsize == 2 else torch.int32
    for m in (0, 5):
        assert torch.equal(y[m].view(integer), answer[m].view(integer))
    assert y[1, 0] == torch.inf and y[1, 1:].isfinite().all()
    assert y[2, 0].isnan() and y[2, 1:].isfinite().all()
    assert y[3].isnan().all() and y[4].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS[:2])
@torch.no_grad()
def test_a_slot_for_another(backend: Any) -> None:
    """One with a bias in the slot of one of DoRA, whose gain lay where its bias is now."""
    case = Layer(backend=backend)
    case.layer.remove_adapter("0")
    made, bias = make_adapter(3, 40, 33, 4, torch.float32), torch.randn(33)
    case.adapters[0] = Adapter(made.A, made.B, made.scaling, bias)
    case.handles[0] = case.layer.add_adapter("new", made.A, made.B, scaling=made.scaling, bias=bias)
    x = torch.randn(8, 40)
    assert_close(case.layer(x, case.routing(INDEX, WEIGHT)), case.truth(x, INDEX, WEIGHT))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[:2])
@torch.no_grad()
def test_shapes_of_x(backend: Any, shape: tuple[int, ...]) -> None:
    case, x = Layer(backend=backend), torch.randn(*shape, 40)
    rows = x.reshape(-1, 40)
    index = INDEX[: len(rows)]
    y = case.layer(x, case.routing(index))
    assert y.shape == (*shape, 33)
    assert_close(y.reshape(-1, 33), case.truth(rows, index, torch.ones(index.shape)))


class Exported(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return self.layer(x, Routing(index, weight))  # type: ignore[no-any-return]


@torch.no_grad()
def test_exported_with_the_routing_as_an_input() -> None:
    case, x = Layer(), torch.randn(8, 40)
    given = case.routing(INDEX, WEIGHT)
    program = torch.export.export(
        Exported(case.layer), (x, given.index, given.weight), strict=False
    ).module()
    turned = program(x, given.index.flip(0), given.weight)
    assert_close(turned, case.truth(x, INDEX.flip(0), WEIGHT))


@pytest.mark.interpreter
@pytest.mark.usefixtures("mended")
@torch.no_grad()
def test_a_layer_in_one_launch_until_the_first_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.Linear(64, 32).bfloat16()
    layer = lora_mux.MuxLinear(linear, backend="triton", fused=True)
    plain = make_adapter(4, 64, 32, 4, torch.bfloat16)
    made = make_adapter(4, 64, 32, 4, torch.bfloat16)
    dora = Adapter(made.A, made.B, made.scaling, magnitude=(0.3 + torch.rand(32)).bfloat16())
    first = layer.add_adapter("plain", plain.A, plain.B, scaling=plain.scaling)
    x, launches = torch.randn(3, 64).bfloat16(), note_launches(monkeypatch)
    layer(x, Routing(torch.tensor([[first], [-1], [first]])))
    assert "fused" in launches
    launches.clear()
    second = layer.add_adapter(
        "dora", dora.A, dora.B, scaling=dora.scaling, magnitude=dora.magnitude
    )
    y = layer(x, Routing(torch.tensor([[first], [-1], [second]])))
    assert "fused" not in launches
    assert_close(y, forward(linear, x, [[(plain, 1.0)], [], [(dora, 1.0)]]))


class Rounding(nn.Linear):
    """A base of any make, whose weight nobody reads and whose bias is much larger."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@torch.no_grad()
def test_norms_of_a_base_that_is_asked() -> None:
    linear = Rounding(256, 32).bfloat16()
    linear.bias.data.fill_(3.0)
    magnitude = torch.ones(32)
    weights = LoraWeights(torch.zeros(1, 256), torch.zeros(32, 1), 1.0)
    got = with_gain(linear, weights, magnitude, torch.bfloat16, "it").gain
    assert got is not None
    norm = linear.weight.double().norm(dim=1)
    assert ((got.double() + 1) * norm - 1).abs().max() <= 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_formula(backend: Any) -> None:
    """To x, through the base as well, and to weights that are 0."""
    case = Layer(backend=backend)
    x, weight = torch.randn(8, 40), WEIGHT.clone()
    x[3] = 0  # which leaves a base's bias alone
    ours = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    upstream = torch.randn(8, 33)
    case.layer(ours[0], case.routing(INDEX, ours[1])).backward(upstream)

    W, b = case.linear.weight.detach().double(), case.linear.bias.detach().double()
    theirs = [t.double().requires_grad_() for t in (x, weight)]
    own, rows = theirs[0] @ W.T, []
    for m, chosen in enumerate(INDEX.tolist()):
        y = own[m] + b
        for j, a in enumerate(chosen):
            if a < 0:
                continue
            adapter = case.adapters[a]
            delta = adapter.scaling * adapter.B.double() @ (adapter.A.double() @ theirs[0][m])
            if adapter.magnitude is not None:
                g = magnitude_by_norm(case.linear, adapter)
                delta = (g - 1) * own[m] + g * delta
            y = y + theirs[1][m, j] * delta
        rows.append(y)
    torch.stack(rows).backward(upstream.double())
    for got, want in zip(ours, theirs, strict=True):
        assert got.grad is not None and want.grad is not None
        selected = want.grad if got.ndim == 2 and got.shape[1] > 2 else want.grad * (INDEX >= 0)
        assert (got.grad - selected).abs().max() <= 1e-5 * selected.abs().max()


@pytest.fixture
def no_graphs(no_old_graphs: None) -> Iterator[None]:
    yield


@pytest.mark.usefixtures("no_graphs")
@torch.no_grad()
def test_one_graph_more_when_the_first_adapter_of_dora_comes(stage: SimpleNamespace) -> None:
    model = copy.deepcopy(stage.base)
    mux = lora_mux.attach(model)
    mux.reserve(adapters=8, rank=20)
    mux.load("plain", stage.folder / "plain")
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    with mux.route(["plain", None]):
        close(run(stage.x[:2]), model(stage.x[:2]))
    before = counters["stats"]["unique_graphs"]
    for name in ("dora", "some"):
        mux.load(name, stage.folder / name)
        with mux.route([name, (name, "plain")]):
            close(run(stage.x[:2]), model(stage.x[:2]))
        with mux.route(["plain", None]):
            close(run(stage.x[:2]), model(stage.x[:2]))
    mux.remove("dora")
    with mux.route(["some", None]):
        close(run(stage.x[:2]), model(stage.x[:2]))
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.parametrize("backend", BACKENDS[:2])
@torch.no_grad()
def test_pools_for_a_few(backend: str, stage: SimpleNamespace) -> None:
    """Adapters of DoRA go and come back, and slide; a magnitude takes a rank row."""
    want = of_peft(stage)
    row = sum(4 * (-(-k // 16) + -(-n // 16)) * 16 + 1 for k, n in ((24, 40), (40, 20), (20, 12)))
    model, mux = loaded(stage, memory=22 * row, backend=backend)
    assert mux.memory().targets["a"].capacity == 22
    order = [0, 1, 3, 4, 5, 6, 0, 4, 6, 1]
    for m in order:
        row_names = ROWS[m]
        assert row_names is not None
        with mux.route([row_names]):
            close(model(stage.x[m : m + 1]), want[m : m + 1])
    mux.prefetch(["dora"])
    assert mux.memory().adapters["dora"].rank_rows == 15  # 4 and 1 in each of three layers
    model, mux = loaded(stage, memory=22 * row, backend=backend)
    mux.prefetch(["plain"])
    mux.pin("dora")  # it lies behind "plain", and has to make room for "big"
    mux.prefetch(["big"])
    assert [s.offset for s in model.a.mux_pool.spans.values() if s.gain] == [0]
    with mux.route(["dora"]):
        close(model(stage.x[:1]), want[:1])


KEYS = {
    "with .weight": (".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    "of a live model": (".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"),
}


def rewritten(
    stage: SimpleNamespace, folder: Path, change: Callable[[dict[str, Tensor]], Any]
) -> Path:
    """A copy of the folder of "dora" with other tensors."""
    source = stage.folder / "dora"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    state = load_file(source / WEIGHTS)
    save_file(change(state), folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("what", KEYS)
@torch.no_grad()
def test_other_names_of_the_magnitude(what: str, stage: SimpleNamespace, tmp_path: Path) -> None:
    model, mux = loaded(stage)
    here, there = KEYS[what]
    folder = rewritten(
        stage, tmp_path, lambda state: {k.replace(here, there): v for k, v in state.items()}
    )
    mux.load("again", folder)
    with mux.route([name for name in ("dora", "again") for _ in range(3)]):
        y = model(stage.x[:3].repeat(2, 1))
    close(y[:3], y[3:])


@pytest.mark.parametrize("kind", ["all", "lora_only"])
@torch.no_grad()
def test_biases_that_were_trained_along(kind: str, tmp_path: Path) -> None:
    base = Net()
    config = peft.LoraConfig(
        target_modules=["a"], init_lora_weights=False, use_dora=True, bias=kind
    )
    theirs = peft_model(base, {"x": config})
    theirs.base_model.model.a.base_layer.bias.data.add_(torch.randn(40))
    theirs.save_pretrained(tmp_path)
    mux = lora_mux.attach(base)
    mux.load("x", tmp_path / "x")
    mux.set_adapter("x")
    x = torch.randn(3, 24)
    close(base(x), theirs(x))


@torch.no_grad()
def test_a_file_of_diffusers(stage: SimpleNamespace, tmp_path: Path) -> None:
    """alpha = rank there, and the magnitudes are PEFT's."""
    config = peft.LoraConfig(
        target_modules=["a", "b"], r=3, lora_alpha=3, init_lora_weights=False, use_dora=True
    )
    theirs = peft_model(stage.base, {"x": config})
    state = peft.get_peft_model_state_dict(theirs, adapter_name="x")
    names = {k: k.replace("base_model.model.", "transformer.") for k in state}
    save_file(
        {names[k]: v.clone() for k, v in state.items()},
        tmp_path / "pytorch_lora_weights.safetensors",
    )
    model = copy.deepcopy(stage.base)
    mux = lora_mux.attach(model)
    mux.load("x", tmp_path)
    mux.set_adapter("x")
    close(model(stage.x), theirs(stage.x))


KINDS = ["3x2, padded", "1x1, no bias", "one dimension", "groups", "three dimensions"]
KINDS += ["embedding", "scaled embedding"]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "auto") for name in KINDS),
        pytest.param("3x2, padded", "triton", marks=pytest.mark.interpreter),
        pytest.param("scaled embedding", "triton", marks=pytest.mark.interpreter),
    ],
)
@torch.no_grad()
def test_embeddings_and_convolutions(name: str, backend: Any, tmp_path: Path) -> None:
    base = nn.Sequential(LAYERS[name][0]())
    common = {"target_modules": ["0"], "init_lora_weights": False}
    wanted = {
        "a": peft.LoraConfig(r=4, use_dora=True, **common),
        "b": peft.LoraConfig(r=2, use_dora=True, use_rslora=True, **common),
        "c": peft.LoraConfig(r=2, **common),
    }
    theirs = peft_model(base, wanted)
    theirs.save_pretrained(tmp_path)
    x = batch_for(name, 5)
    rows: list[Any] = ["a", None, ("b", "c"), "c", "b"]
    want = base(x).clone()
    for m, row in enumerate(rows):
        if row is not None:
            theirs.base_model.set_adapter([row] if isinstance(row, str) else list(row))
            want[m] = theirs(x[m : m + 1])[0]
    model = copy.deepcopy(base)
    mux = lora_mux.attach(model, ["0"], backend=backend)
    for adapter in wanted:
        mux.load(adapter, tmp_path / adapter)
    over = lora_mux.attach_peft(copy.deepcopy(theirs), backend=backend)
    for run, routes in ((model, mux), (over.model, over)):
        with routes.route(rows):
            got = run(x)
        close(got, want)
        assert torch.equal(got[1], base(x)[1])


def test_what_does_not_fit_is_named(stage: SimpleNamespace, tmp_path: Path) -> None:
    key = "base_model.model.a.lora_magnitude_vector"

    def without(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in state.items() if k != key}

    changes: dict[str, tuple[Callable[[dict[str, Tensor]], Any], Any]] = {
        "module 'a' must have lora_magnitude_vector": (without, CheckpointError),
        r"must be as long as lora_B, got shape \[41\]": (
            lambda state: {**state, key: torch.ones(41)},
            CheckpointError,
        ),
        "must be finite": (lambda s: {**s, key: torch.full((40,), torch.nan)}, CheckpointError),
    }
    model = copy.deepcopy(stage.base)
    mux = lora_mux.attach(model)
    for message, (change, kind) in changes.items():
        with pytest.raises(kind, match=message):
            mux.load("x", rewritten(stage, tmp_path, change))
    with pytest.raises(AdapterError, match="'c' must be a target"):
        lora_mux.attach(copy.deepcopy(stage.base), targets=["a", "b"]).load(
            "x", stage.folder / "dora"
        )
    assert not mux.adapters


def test_bases_whose_weight_cannot_be_read(stage: SimpleNamespace) -> None:
    A, B, magnitude = torch.ones(2, 8), torch.zeros(4, 2), torch.ones(4)

    def refused(linear: nn.Module, message: str, **how: Any) -> None:
        layer = lora_mux.MuxLinear(linear)
        with pytest.raises(AdapterError, match=message):
            layer.add_adapter("x", A, B, **{"alpha": 2, "magnitude": magnitude, **how})
        assert not layer.adapters and not layer.mux_pool.spans

    zero = nn.Linear(8, 4)
    zero.weight.data[1:3] = 0
    refused(zero, r"rows of W \+ scaling \* B A that are not 0, got 2 of 4")
    refused(nn.Linear(8, 4), "None for DoRA", bias=torch.ones(4))
    part = nn.Linear(8, 4)
    part.register_parameter("more", nn.Parameter(torch.empty(1, device="meta")))
    refused(part, "offloaded or not materialised")
    flat = nn.Linear(8, 4)
    flat.weight = nn.Parameter(torch.zeros(0))  # as FSDP leaves it between calls
    refused(flat, r"one of shape \[0\]")

    class Shifted(nn.Module):
        in_features, out_features = 8, 4

        def forward(self, x: Tensor) -> Tensor:
            return x[..., :4] + 1

    refused(Shifted(), "answers something else to zeros")
    refused(nn.Linear(8, 4), r"magnitude` must have shape .* = \[4\]", magnitude=torch.ones(5))
    refused(nn.Linear(8, 4), "must hold values", magnitude=torch.ones(4, device="meta"))
    refused(nn.Linear(8, 4), "must be finite", magnitude=torch.full((4,), torch.inf))
    for what in ([1.0] * 4, torch.ones(4).int()):
        with pytest.raises(lora_mux.errors.ArgumentTypeError, match="magnitude` must"):
            lora_mux.MuxLinear(nn.Linear(8, 4)).add_adapter("x", A, B, alpha=2, magnitude=what)  # type: ignore[arg-type]


def test_a_graph_that_knows_no_gains(stage: SimpleNamespace) -> None:
    """It would go on without them; one adapter of DoRA before is enough."""
    model = copy.deepcopy(stage.base)
    mux = lora_mux.attach(model)
    mux.reserve(adapters=8, rank=20)
    mux.load("plain", stage.folder / "plain")
    mux._slots.captured = True  # noqa: SLF001
    with pytest.raises(PoolCapacityError, match="must not be DoRA's, because a captured CUDA gr"):
        mux.load("dora", stage.folder / "dora")
    mux._slots.captured = False  # noqa: SLF001
    mux.load("dora", stage.folder / "dora")
    mux.remove("dora")
    mux._slots.captured = True  # noqa: SLF001
    mux.load("dora", stage.folder / "dora")
