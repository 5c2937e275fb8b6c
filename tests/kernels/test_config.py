"""The choice of tiles: a pure function, whose configs check themselves."""

import dataclasses
import itertools

import pytest

from lora_mux.kernels.config import Architecture, Config, choose, tile_rows

H200 = Architecture("sm_90", 132)
ARCHITECTURES = [Architecture("sm_80", 108), H200, Architecture("sm_100", 148)]
ARCHITECTURES.append(Architecture("gfx942", 304))


def chosen(rows: int = 32, K: int = 4096, N: int = 4096, **others: object) -> Config:
    given = {"rank": 16, "selections": 1, "itemsize": 2, "architecture": H200, **others}
    return choose(rows, K, N, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_no_split_without_work(architecture: Architecture, itemsize: int) -> None:
    for rows, K in itertools.product((0, 1, 17, 64, 65, 600, 9000), (1, 64, 700, 4096, 28672)):
        config = chosen(rows, K, itemsize=itemsize, architecture=architecture)
        steps = -(-K // config.block_k)
        assert config.split_k == 1 or steps >= 2 * config.split_k
        tiles = -(-rows // config.block_m)
        assert config.split_k == 1 or tiles * config.split_k <= architecture.processors


def test_splits_follow_k_and_the_machine() -> None:
    assert chosen(1, 4096).split_k == 8
    assert chosen(1, 512).split_k == 2
    assert chosen(1, 128).split_k == 1
    assert chosen(4096, 4096).split_k == 2  # 64 tiles on 132 processors
    assert chosen(8192, 4096, architecture=Architecture("sm_90", 264)).split_k == 2
    assert chosen(16384, 4096).split_k == 1


def test_tiles_follow_the_rows() -> None:
    sizes = [tile_rows(rows, 2) for rows in (0, 1, 64, 65, 512, 513, 10**6)]
    assert sizes == [16, 16, 16, 32, 32, 64, 64]
    assert {tile_rows(rows, 4) for rows in (513, 10**6)} == {32}
    assert {tile_rows(rows, 2, batch_invariant=True) for rows in (1, 100, 10**6)} == {16}
    assert chosen(1, block_m=64).block_m == 64


def test_full_precision_has_no_tiles_that_blackwell_would_compute_in_tf32() -> None:
    """M = 64 and more of a product of fp32: triton #10176."""
    for architecture, rows in itertools.product(ARCHITECTURES, (1, 65, 600, 10**5)):
        config = chosen(rows, itemsize=4, architecture=architecture)
        assert config.block_m < 64 and config.block_n < 64


def test_narrow_layers_get_narrow_blocks() -> None:
    assert chosen(1, N=1024).block_n == 32
    assert chosen(1, N=28672).block_n == 64
    assert chosen(600, N=1024).block_n == 64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("block_m", 8), ("block_m", 48), ("block_m", 256), ("block_k", 0), ("block_n", 24)),
        *(("split_k", 3), ("split_k", 32), ("shrink_group", 0), ("expand_warps", 6)),
        *(("shrink_stages", 0), ("expand_stages", 2.0), ("registers", 16), ("registers", "all")),
    ],
)
def test_a_config_that_cannot_be(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"`{field}` must be (a power of two|an int) from.*got"):
        dataclasses.replace(chosen(), **{field: value})  # type: ignore[arg-type]


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen().block_m = 32  # type: ignore[misc]
