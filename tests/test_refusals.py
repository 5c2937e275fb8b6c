"""Every refusal raises an error of ours that names argument, expected and got, and changes nothing.

Checkpoint folders have tables of their own, in tests/checkpoints.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_mux
from lora_mux import Routing


class Stage:
    """A stand-alone layer with adapters "sql" and "gone" (removed), and an attached model with
    "sql" routed: what the refusals must leave alone."""

    def __init__(self) -> None:
        self.layer = lora_mux.MuxLinear(nn.Linear(8, 4))
        self.sql = self.layer.add_adapter("sql", *self.pair(8, 4), alpha=2)
        self.gone = self.layer.add_adapter("gone", *self.pair(8, 4), alpha=2)
        self.layer.remove_adapter("gone")
        self.model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.mux = lora_mux.attach(self.model)
        self.mux.add_adapter("sql", {"0": self.pair(8, 8), "2": self.pair(8, 4)}, alpha=2)
        self.mux.add_adapter("french", {"2": self.pair(8, 4)}, alpha=2)
        self.mux.set_adapter("sql")
        self.plain = nn.Sequential(nn.Linear(8, 8))
        self.x = torch.linspace(-1, 1, 24).reshape(3, 8)

    @staticmethod
    def pair(in_features: int, out_features: int, rank: int = 2) -> tuple[Tensor, Tensor]:
        return torch.ones(rank, in_features), torch.ones(out_features, rank)

    def add(self, name: Any = "new", A: Any = None, B: Any = None, **how: Any) -> None:
        ones_A, ones_B = self.pair(8, 4)
        A, B = ones_A if A is None else A, ones_B if B is None else B
        self.layer.add_adapter(name, A, B, **({"alpha": 2} | how))

    def call(self, index: Any, weight: Any = None, x: Tensor | None = None) -> None:
        self.layer(self.x if x is None else x, Routing(index, weight))

    def routed(self, rows: Any, weights: Any = None, **how: Any) -> None:
        with self.mux.route(rows, weights, **how):
            self.model(self.x)

    def given(self, rows: Any) -> None:
        self.model(self.x, adapter_names=rows)

    def routed_tokens(self, rows: Any, lengths: Any = None) -> None:
        with self.mux.route_tokens(rows, lengths=lengths):
            self.model(self.x)

    def state(self) -> list[Any]:
        """All that can be seen: names, handles, buffers, routes, classes, answers."""
        index = torch.tensor([[self.sql], [-1], [self.sql]])
        return [
            dict(self.layer.adapters),
            dict(self.mux.adapters),
            self.mux.active_adapters,
            [type(m) for root in (self.model, self.plain) for m in root.modules()],
            *(b.clone() for root in (self.layer, self.model) for b in root.buffers()),
            self.layer(self.x, Routing(index)).detach(),
            self.model(self.x).detach(),
        ]


@dataclass(frozen=True)
class Refusal:
    act: Callable[[Stage], object]
    says: tuple[str, ...]  # the argument, what was expected, what was got
    kind: type[Exception]


def index(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def without_gpu(act: Callable[[], object]) -> None:
    """As on a machine without a GPU, and without Triton's interpreter, which the tests set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_mux.ops.dispatch._interpreted", lambda: False)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        act()


NAN = float("nan")
# The methods that take the name of one loaded adapter, and what else they need.
ONE_NAME: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("remove", "pin", "unpin", "train", "publish", "freeze")},
    "save": {"folder": "nowhere"},
}
REFUSALS = {
    # an adapter for a layer
    "name: type": Refusal(lambda s: s.add(3), ("`name`", "str", "int"), TypeError),
    "name: empty": Refusal(lambda s: s.add(""), ("`name`", "non-empty", "''"), ValueError),
    "name: base": Refusal(lambda s: s.add("__base__"), ("`name`", "__base__"), ValueError),
    "name: taken": Refusal(lambda s: s.add("sql"), ("`name`", "new", "'sql'"), ValueError),
    "A: type": Refusal(lambda s: s.add(A=[[1.0]]), ("A`", "tensor", "list"), TypeError),
    "A: dtype": Refusal(
        lambda s: s.add(A=torch.ones(2, 8, dtype=torch.int32)),
        ("A`", "floating", "torch.int32"),
        TypeError,
    ),
    "A: in_features": Refusal(
        lambda s: s.add(A=torch.ones(2, 7)), ("A`", "[r, 8]", "[2, 7]"), ValueError
    ),
    "A: one dimension": Refusal(
        lambda s: s.add(A=torch.ones(8)), ("A`", "[r, 8]", "[8]"), ValueError
    ),
    "A: rank 0": Refusal(
        lambda s: s.add(A=torch.ones(0, 8), B=torch.ones(4, 0), alpha=None, scaling=1),
        ("A`", "at least 1", "got 0"),
        ValueError,
    ),
    "A: rank 0 with alpha": Refusal(
        lambda s: s.add(A=torch.ones(0, 8), B=torch.ones(4, 0)),
        ("A`", "at least 1", "got 0"),
        ValueError,
    ),
    "A: not finite": Refusal(
        lambda s: s.add(A=torch.full((2, 8), NAN)), ("A`", "finite", "16 values"), ValueError
    ),
    "A: no values": Refusal(
        lambda s: s.add(A=torch.ones(2, 8, device="meta")), ("A`", "values", "meta"), ValueError
    ),
    "B: rank": Refusal(lambda s: s.add(B=torch.ones(4, 3)), ("B`", "[4, 2]", "[4, 3]"), ValueError),
    "B: transposed": Refusal(
        lambda s: s.add(B=torch.ones(2, 4)), ("B`", "[4, 2]", "[2, 4]"), ValueError
    ),
    "bias: shape": Refusal(
        lambda s: s.add(bias=torch.ones(5)), ("bias`", "[4]", "[5]"), ValueError
    ),
    "alpha and scaling": Refusal(
        lambda s: s.add(scaling=1.0), ("`alpha`", "exactly one", "scaling=1.0"), ValueError
    ),
    "neither alpha nor scaling": Refusal(
        lambda s: s.add(alpha=None), ("`scaling`", "exactly one", "alpha=None"), ValueError
    ),
    "alpha: type": Refusal(lambda s: s.add(alpha="2"), ("`alpha`", "number", "str"), TypeError),
    "alpha: nan": Refusal(lambda s: s.add(alpha=NAN), ("`alpha`", "finite", "nan"), ValueError),
    "alpha: beyond fp32": Refusal(
        lambda s: s.add(alpha=10**400), ("`alpha`", "finite in fp32", "beyond 1.7e308"), ValueError
    ),
    "remove_adapter: unknown": Refusal(
        lambda s: s.layer.remove_adapter("sqk"),
        ("'sqk'", "did you mean 'sql'", "loaded"),
        KeyError,
    ),
    # a routing for a layer
    "index: type": Refusal(lambda s: s.call([[0]]), ("`index`", "int tensor", "list"), TypeError),
    "index: dtype": Refusal(
        lambda s: s.call(torch.zeros(3, 1)), ("`index`", "int32 or int64", "float32"), TypeError
    ),
    "index: one dimension": Refusal(
        lambda s: s.call(torch.tensor([0, 0, 0])), ("`index`", "[rows, J]", "[3]"), ValueError
    ),
    "index: below -1": Refusal(
        lambda s: s.call(index([0], [-2], [0])),
        ("`index`", "or -1", "got -2 at [1, 0]"),
        ValueError,
    ),
    "index: unknown handle": Refusal(
        lambda s: s.call(index([0], [77], [0])),
        ("`index[1, 0]`", "loaded adapter or -1", "got 77"),
        KeyError,
    ),
    "index: freed handle": Refusal(
        lambda s: s.call(index([0], [s.gone], [0])), ("`index[1, 0]`", "was removed"), KeyError
    ),
    "index: rows": Refusal(
        lambda s: s.call(index([0], [0])), ("`routing`", "3 rows", "got 2"), ValueError
    ),
    "weight: type": Refusal(
        lambda s: s.call(index([0], [0], [0]), 1.0),
        ("`weight`", "floating tensor", "float"),
        TypeError,
    ),
    "weight: dtype": Refusal(
        lambda s: s.call(index([0], [0], [0]), index([1], [1], [1])),
        ("`weight`", "floating dtype", "int64"),
        TypeError,
    ),
    "weight: shape": Refusal(
        lambda s: s.call(index([0], [0], [0]), torch.ones(3)),
        ("`weight`", "[3, 1]", "[3]"),
        ValueError,
    ),
    "weight: nan": Refusal(
        lambda s: s.call(index([0], [0]), torch.tensor([[1.0], [NAN]])),
        ("`weight`", "finite", "nan at [1, 0]"),
        ValueError,
    ),
    "weight: beyond fp32": Refusal(
        lambda s: s.call(index([0], [0]), torch.tensor([[1.0], [1e300]], dtype=torch.float64)),
        ("`weight`", "finite in fp32", "1e+300 at [1, 0]"),
        ValueError,
    ),
    "routing: type": Refusal(
        lambda s: s.layer(s.x, ["sql"]), ("`routing`", "lora_mux.Routing", "list"), TypeError
    ),
    "x: in_features": Refusal(
        lambda s: s.call(index([0]), x=torch.ones(1, 9)),
        ("`x`", "in_features=8", "[1, 9]"),
        ValueError,
    ),
    # a layer
    "linear: type": Refusal(
        lambda s: lora_mux.MuxLinear("linear"), ("`linear`", "linear layer", "str"), TypeError
    ),
    "linear: no linear": Refusal(
        lambda s: lora_mux.MuxLinear(nn.ReLU()), ("`linear`", "nn.Linear", "ReLU"), ValueError
    ),
    "linear: a MuxLinear": Refusal(
        lambda s: lora_mux.MuxLinear(s.layer), ("`linear`", "plain", "MuxLinear"), ValueError
    ),
    "backend: unknown": Refusal(
        lambda s: lora_mux.MuxLinear(nn.Linear(2, 2), backend="cuda"),
        ("`backend`", "'auto', 'triton' or 'reference'", "'cuda'"),
        ValueError,
    ),
    "backend: triton": Refusal(
        lambda s: without_gpu(lambda: lora_mux.MuxLinear(nn.Linear(2, 2), backend="triton")),
        ("`backend`", "CUDA or ROCm GPU", "torch sees none", "'auto' or 'reference'"),
        ValueError,
    ),
    "reserve: type": Refusal(
        lambda s: s.layer.reserve(2.0, 8), ("`adapters`", "int", "float"), TypeError
    ),
    "reserve: rank": Refusal(
        lambda s: s.mux.reserve(2, 0), ("`rank`", "at least 1", "got 0"), ValueError
    ),
    "reserve: of an attached layer": Refusal(
        lambda s: s.model[0].reserve(2, 8), ("`reserve`", "attached model", "Mux"), ValueError
    ),
    # attach
    "model: type": Refusal(
        lambda s: lora_mux.attach("gpt2"), ("`model`", "nn.Module", "str"), TypeError
    ),
    "model: attached": Refusal(
        lambda s: lora_mux.attach(s.model), ("`model`", "plain", "detach"), ValueError
    ),
    "targets: type": Refusal(
        lambda s: lora_mux.attach(s.plain, targets=3), ("`targets`", "'all-linear'", "3"), TypeError
    ),
    "targets: no match": Refusal(
        lambda s: lora_mux.attach(s.plain, targets=["q_proj"]),
        ("`targets`", "at least one", "q_proj"),
        ValueError,
    ),
    "targets: regex": Refusal(
        lambda s: lora_mux.attach(s.plain, targets="("), ("`targets`", "regular", "'('"), ValueError
    ),
    "targets: no linear": Refusal(
        lambda s: lora_mux.attach(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), targets=["0", "1"]),
        ("targets: 0", "linear layer", "ReLU"),
        ValueError,
    ),
    "attach: backend": Refusal(
        lambda s: without_gpu(lambda: lora_mux.attach(s.plain, backend="triton")),
        ("`backend`", "CUDA or ROCm GPU"),
        ValueError,
    ),
    # adapters of a model
    "weights: type": Refusal(
        lambda s: s.mux.add_adapter("new", [s.pair(8, 8)], alpha=1),
        ("`weights`", "map target paths", "list"),
        TypeError,
    ),
    "weights: empty": Refusal(
        lambda s: s.mux.add_adapter("new", {}, alpha=1), ("`weights`", "at least one"), ValueError
    ),
    "weights: no pair": Refusal(
        lambda s: s.mux.add_adapter("new", {"0": torch.ones(2, 8)}, alpha=1),
        ("`weights['0']`", "pair (A, B)", "Tensor"),
        TypeError,
    ),
    "weights: no target": Refusal(
        lambda s: s.mux.add_adapter("new", {"0": s.pair(8, 8), "1": s.pair(8, 8)}, alpha=1),
        ("`weights`", "'1' must be a target", "1 of 2"),
        ValueError,
    ),
    "weights: second does not fit": Refusal(
        lambda s: s.mux.add_adapter("new", {"0": s.pair(8, 8), "2": s.pair(8, 8)}, alpha=1),
        ("weights['2'].B`", "[4, 2]", "[8, 2]"),
        ValueError,
    ),
    "layer of a model": Refusal(
        lambda s: s.model[0].add_adapter("new", *s.pair(8, 8), alpha=1),
        ("`add_adapter`", "the Mux that attach() returned"),
        ValueError,
    ),
    **{
        f"{method}: several names": Refusal(
            lambda s, method=method, more=more: getattr(s.mux, method)(["sql", "french"], **more),
            ("`name`", "one adapter, a str", "got list"),
            TypeError,
        )
        for method, more in ONE_NAME.items()
    },
    "pin: a handle": Refusal(lambda s: s.mux.pin(0), ("`name`", "a str", "got int"), TypeError),
    "remove: bytes": Refusal(
        lambda s: s.mux.remove(b"sql"), ("`name`", "a str", "got bytes"), TypeError
    ),
    "train: several names with weights": Refusal(
        lambda s: s.mux.train(["sql"], weights={}), ("`name`", "a str", "got list"), TypeError
    ),
    "prefetch: one name": Refusal(
        lambda s: s.mux.prefetch("sql"),
        ("`names`", "sequence of names", "got str", "[name]"),
        TypeError,
    ),
    "prefetch: a name that is none": Refusal(
        lambda s: s.mux.prefetch(["sql", ["french"]]),
        ("`names[1]`", "a str", "got list"),
        TypeError,
    ),
    "load_many: no mapping": Refusal(
        lambda s: s.mux.load_many(["sql"]), ("`folders`", "map names", "got list"), TypeError
    ),
    "load: several names": Refusal(
        lambda s: s.mux.load(["new"], "nowhere"), ("`name`", "a str", "got list"), TypeError
    ),
    "create: several names": Refusal(
        lambda s: s.mux.create(["new"], r=1, alpha=1), ("`name`", "a str", "got list"), TypeError
    ),
    "remove_adapter: several names": Refusal(
        lambda s: s.layer.remove_adapter(["sql"]), ("`name`", "a str", "got list"), TypeError
    ),
    "towers: no mapping": Refusal(
        lambda s: s.routed(["sql"], towers=["sql"]),
        ("`towers`", "map names", "got list"),
        TypeError,
    ),
    "remove: unknown": Refusal(lambda s: s.mux.remove("x"), ("'x'", "loaded"), KeyError),
    "load: taken name": Refusal(
        lambda s: s.mux.load("sql", "nowhere"), ("`name`", "new", "'sql'"), ValueError
    ),
    # routes
    "rows: type": Refusal(lambda s: s.routed("sql"), ("`rows`", "one entry per sample"), TypeError),
    "rows: entry": Refusal(lambda s: s.routed([3]), ("`rows[0]`", "a name", "int"), TypeError),
    "rows: unknown": Refusal(
        lambda s: s.routed(["sql", "frnch", None]), ("'frnch'", "did you mean 'french'"), KeyError
    ),
    "rows: twice": Refusal(
        lambda s: s.routed([("sql", "sql")]), ("`rows[0]`", "once", "use a weight"), ValueError
    ),
    "rows: base among others": Refusal(
        lambda s: s.routed([("sql", "__base__")]), ("`rows[0]`", "__base__", "alone"), ValueError
    ),
    "rows: weight": Refusal(
        lambda s: s.routed([{"sql": "1"}]), ("`rows[0]['sql']`", "number", "str"), TypeError
    ),
    "rows: weight nan": Refusal(
        lambda s: s.routed([{"sql": NAN}]), ("`rows[0]['sql']`", "finite", "nan"), ValueError
    ),
    "rows: weight beyond fp32": Refusal(
        lambda s: s.routed([None, {"french": 1.0, "sql": 1e300}]),
        ("`rows[1]['sql']`", "finite in fp32", "1e+300"),
        ValueError,
    ),
    "rows: count": Refusal(
        lambda s: s.routed(["sql"]),
        ("`rows`", "one entry per sample of the batch (3)", "got 1"),
        ValueError,
    ),
    "rows: handle": Refusal(
        lambda s: s.routed(index([0], [99], [0])), ("`index[1, 0]`", "got 99"), KeyError
    ),
    "weights with names": Refusal(
        lambda s: s.routed(["sql"], torch.ones(1, 1)), ("`weights`", "mapping"), ValueError
    ),
    "expand": Refusal(
        lambda s: s.routed(["sql"], expand="repeat"), ("`expand`", "'tile'", "'repeat'"), ValueError
    ),
    "route_tokens: count": Refusal(
        lambda s: s.routed_tokens(["sql"]),
        ("`rows`", "one entry per token of the batch (3)", "got 1"),
        ValueError,
    ),
    "lengths: type": Refusal(
        lambda s: s.routed_tokens(["sql"], lengths=[1.5]),
        ("`lengths`", "sequence of ints", "[1.5]"),
        TypeError,
    ),
    "lengths: count": Refusal(
        lambda s: s.routed_tokens(["sql", None], lengths=[3]),
        ("`lengths`", "2 ints", "got [3]"),
        ValueError,
    ),
    "lengths: negative": Refusal(
        lambda s: s.routed_tokens(["sql", None], lengths=[4, -1]),
        ("`lengths`", "at least 0", "got [4, -1]"),
        ValueError,
    ),
    "rows: [samples, tokens, J] of another batch": Refusal(
        lambda s: s.routed(torch.full((2, 1, 1), -1)),
        ("`rows` of shape [samples, tokens, J]", "(3)", "got 2"),
        ValueError,
    ),
    "rows: [samples, tokens, J] with expand": Refusal(
        lambda s: s.routed(torch.full((3, 1, 1), -1), expand="tile"),
        ("`expand`", "None if `rows` is [samples, tokens, J]", "'tile'"),
        ValueError,
    ),
    "weights: of another shape than [samples, tokens, J]": Refusal(
        lambda s: s.routed(torch.full((3, 1, 1), -1), torch.ones(3, 1)),
        ("`weights`", "[3, 1, 1]", "got [3, 1]"),
        ValueError,
    ),
    # rows with the call
    "adapter_names: type": Refusal(
        lambda s: s.given("sql"), ("`adapter_names`", "one entry per sample"), TypeError
    ),
    "adapter_names: entry": Refusal(
        lambda s: s.given([None, 3, None]), ("`adapter_names[1]`", "a name", "int"), TypeError
    ),
    "adapter_names: count": Refusal(
        lambda s: s.given(["sql"]),
        ("`adapter_names`", "one entry per sample of the batch (3)", "got 1"),
        ValueError,
    ),
    "adapter_names: unknown": Refusal(
        lambda s: s.given(["sql", "frnch", None]), ("'frnch'", "did you mean 'french'"), KeyError
    ),
    "call: a generator": Refusal(
        lambda s: s.mux.call(["sql"])(lambda: (x for x in ())),
        ("`function`", "must have run", "generator"),
        TypeError,
    ),
    "call: count": Refusal(
        lambda s: s.mux.call(["sql"])(s.model, s.x), ("`rows`", "(3)", "got 1"), ValueError
    ),
    # the Mux of a model
    "Mux.of: type": Refusal(
        lambda s: lora_mux.Mux.of(3), ("`model`", "nn.Module", "int"), TypeError
    ),
    "Mux.of: plain": Refusal(
        lambda s: lora_mux.Mux.of(s.plain), ("`model`", "attached", "plain Sequential"), ValueError
    ),
    "detach: plain": Refusal(
        lambda s: lora_mux.detach(s.plain), ("`model`", "attached", "plain Sequential"), ValueError
    ),
    "set_adapter: unknown": Refusal(
        lambda s: s.mux.set_adapter("x"), ("unknown adapter 'x'", "loaded"), KeyError
    ),
    "set_adapter: type": Refusal(
        lambda s: s.mux.set_adapter(3), ("`adapter`", "a name", "int"), TypeError
    ),
    "set_adapter: weights": Refusal(
        lambda s: s.mux.set_adapter(["sql", "french"], weights=[1.0]),
        ("`weights`", "each of the 2", "got 1"),
        ValueError,
    ),
    "set_adapter: weights and mapping": Refusal(
        lambda s: s.mux.set_adapter({"sql": 1.0}, weights=[1.0]), ("`weights`", "None"), ValueError
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str) -> None:
    stage, refusal = Stage(), REFUSALS[name]
    before = stage.state()
    with pytest.raises(lora_mux.LoraMuxError) as caught:
        refusal.act(stage)
    assert isinstance(caught.value, refusal.kind)
    for part in refusal.says:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"
    after = stage.state()
    assert len(after) == len(before)
    for was, now in zip(before, after, strict=True):
        assert torch.equal(was, now) if isinstance(was, Tensor) else was == now


def test_the_state_sees_a_change() -> None:
    """The check above can fail: each of these leaves another state."""
    changes: list[Callable[[Stage], object]] = [
        lambda s: s.add("new"),
        lambda s: s.mux.set_adapter(None),
        lambda s: s.mux.remove("french"),
        lambda s: s.mux.detach(),
        lambda s: lora_mux.attach(s.plain),
    ]
    for change in changes:
        stage = Stage()
        before = stage.state()
        change(stage)
        same = [
            was.shape == now.shape and torch.equal(was, now)
            if isinstance(was, Tensor)
            else was == now
            for was, now in zip(before, stage.state(), strict=False)
        ]
        assert not all(same)


def test_a_detached_mux() -> None:
    stage = Stage()
    stage.mux.detach()
    calls: list[Callable[[], object]] = [
        lambda: stage.mux.load("new", "folder"),
        lambda: stage.mux.add_adapter("new", {"0": stage.pair(8, 8)}, alpha=1),
        lambda: stage.mux.remove("sql"),
        lambda: stage.mux.load_many({"new": "folder"}),
        lambda: stage.mux.prefetch(["sql"]),
        lambda: stage.mux.pin("sql"),
        lambda: stage.mux.unpin("sql"),
        lambda: stage.mux.memory(),
        lambda: stage.mux.reserve(1, 1),
        lambda: stage.mux.route(["sql"]),
        lambda: stage.mux.route_tokens(["sql"]),
        lambda: stage.mux.set_route(None),
        lambda: stage.mux.call(["sql"]),
        lambda: stage.mux.set_adapter("sql"),
        lambda: stage.mux.disable_adapter(),
        lambda: stage.mux.detach(),
    ]
    for call in calls:
        with pytest.raises(lora_mux.errors.DetachedError, match=re.escape("attach()")):
            call()
