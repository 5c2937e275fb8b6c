"""What is trained in the rank rows: rounded, all at once, and what is not finite for itself.

On the host, and as on a GPU, where the fixture `place` lets nothing race.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from cuda_streams import CUDA, Launch, cuda_streams
from lora_mux.adapters import writing
from lora_mux.adapters.writing import Learnt, current_streams, publish
from lora_mux.core import LoraWeights, Masters, Pool

HOST = torch.device("cpu")
RANKS = (4, 1, 3, 7)


@pytest.fixture(params=["host", "device"])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    with nullcontext() if request.param == "host" else cuda_streams():
        yield request.param


def learnt(dtype: torch.dtype, biased: bool = True) -> list[Learnt]:
    """Adapters in two layers of unlike sizes, none a multiple of 16; every second has a bias."""
    torch.manual_seed(1)
    made = []
    for K, N in ((12, 20), (9, 5)):
        pool = Pool(K, N, dtype, HOST)
        for slot, r in enumerate(RANKS):
            A, B = torch.randn(r, K), torch.randn(N, r)
            bias = torch.randn(N) if biased and slot % 2 else None
            weights = LoraWeights(A, B, (K + slot) / 4, bias)
            pool.write(slot, weights, len(RANKS))
            made.append(Learnt(pool, slot, Masters.of(weights, HOST)))
    for one in made:
        for parameter in one.masters.parameters:
            CUDA.put(parameter.data)
            parameter.data.normal_()
    return made


def whole(one: Learnt) -> list[torch.Tensor]:
    """All that a slot has in its pool."""
    span = one.pool.spans[one.slot]
    held = slice(span.offset, span.offset + span.rows)
    return [one.pool.A_rows[held].clone(), one.pool.B_rows[held].clone()]


def expected(one: Learnt, dtype: torch.dtype) -> list[torch.Tensor]:
    A, B, *bias = (parameter.detach().to(dtype) for parameter in one.masters.parameters)
    rows = (
        [A, *(torch.zeros(1, A.shape[1], dtype=dtype) for _ in bias)],
        [B.T, *(b[None] for b in bias)],
    )
    return [torch.nn.functional.pad(torch.cat(part), (0, -part[0].shape[1] % 16)) for part in rows]


def write(those: list[Learnt]) -> None:
    publish(those, current_streams(one.pool for one in those), ())


@pytest.mark.parametrize("at_once", [1 << 22, 100, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rounded(
    place: str, dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all slots but one, which keeps every bit."""
    monkeypatch.setattr(writing, "AT_ONCE", at_once)
    made = learnt(dtype)
    left = [one for one in made if one.slot == 2]
    before = [whole(one) for one in left]
    write([one for one in made if one.slot != 2])
    for one in made:
        want = before[left.index(one)] if one in left else expected(one, dtype)
        assert all(map(torch.equal, whole(one), want))
        assert one.pool.scaling[one.slot] == one.masters.scaling


@pytest.mark.parametrize("bad", ["A", "B", "bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e5])
def test_what_is_not_finite(place: str, value: float, bad: str) -> None:
    """In a pool of fp16, where 1e5 is infinite: zeros and a scaling of NaN, until it is mended."""
    made = learnt(torch.float16)
    ill = made[1]
    broken = getattr(ill.masters, bad).data
    kept = broken.clone()
    for _ in range(2):
        broken.view(-1)[-1] = value
        write(made)
        assert ill.pool.scaling.isnan().tolist() == [False, True, False, False]
        assert not any(rows.any() for rows in whole(ill))
        for one in made:
            if one is not ill:
                assert all(map(torch.equal, whole(one), expected(one, torch.float16)))
    broken.copy_(kept)
    write(made)
    assert all(map(torch.equal, whole(ill), expected(ill, torch.float16)))
    assert ill.pool.scaling[1] == ill.masters.scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_values_are_finite(place: str, dtype: torch.dtype) -> None:
    """Whose norm is not."""
    made = learnt(dtype)
    for one in made:
        one.masters.A.data.fill_(torch.finfo(dtype).max)
    write(made)
    for one in made:
        assert all(map(torch.equal, whole(one), expected(one, dtype)))
        assert one.pool.scaling[one.slot] == one.masters.scaling


def test_what_the_host_knows() -> None:
    """Its forms go by the span's scaling, and by the version."""
    made = learnt(torch.float32)
    one = made[0]
    version = one.pool.version
    write(made)
    assert one.pool.version is version and one.pool.spans[0].scaling == 12 / 4
    one.masters.A.data[0, 0] = math.nan
    write(made)
    assert one.pool.version is not version and math.isnan(one.pool.spans[0].scaling)
    assert one.pool.spans[1].scaling == 13 / 4


@pytest.mark.parametrize("place", ["device"], indirect=True)
def test_as_many_operators_for_all_as_for_one(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's host takes 5 us or more for each. Nothing lets it wait."""
    ran: list[str] = []
    note = Launch.note
    monkeypatch.setattr(Launch, "note", lambda one: (ran.append(one.func._schema.name), note(one)))
    counts = []
    for number in (1, 4):
        made = [one for one in learnt(torch.bfloat16) if one.slot < number]
        ran.clear(), CUDA.syncs.clear()
        write(made)
        counts.append(len(ran))
        assert not CUDA.syncs
    assert counts[0] == counts[1] <= 12 + 2
