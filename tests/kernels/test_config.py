"""The choice of tiles: a pure function, whose configs check themselves."""

import dataclasses
import itertools

import pytest

from lora_mux.kernels import config
from lora_mux.kernels.config import (
    Architecture,
    Config,
    FusedConfig,
    GradientConfig,
    choose,
    choose_fused,
    choose_gradient,
    tile_rows,
)

H200 = Architecture("wgmma", 132, 232448)
CARDS = {
    "T4": Architecture("none", 40, 65536),
    "A100": Architecture("mma", 108, 166912),
    "RTX 4090": Architecture("mma", 128, 101376),
    "H200": H200,
    "B200": Architecture("tcgen05", 148, 232448),
    "RTX 5090": Architecture("mma", 170, 101376),
    "MI300X": Architecture("mfma", 304, 65536),
}
every_card = pytest.mark.parametrize("architecture", CARDS.values(), ids=CARDS)


def chosen(rows: int = 32, K: int = 4096, N: int = 4096, **others: object) -> Config:
    given = {"itemsize": 2, "architecture": H200, **others}
    return choose(rows, K, N, **given)  # type: ignore[arg-type]


def fused(rows: int, N: int = 4096, architecture: Architecture = H200) -> FusedConfig:
    return choose_fused(rows, N, architecture)


def gradient(
    pairs: int = 8192,
    adapters: int = 1,
    rank: int = 16,
    columns: int = 4096,
    **others: object,
) -> GradientConfig:
    given = {"itemsize": 2, "architecture": H200, **others}
    blocks = adapters * -(-rank // 16)
    return choose_gradient(pairs, adapters, blocks, columns, **given)  # type: ignore[arg-type]


@every_card
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
    assert chosen(128, 4096).split_k == 8  # 8 tiles on 132 processors
    assert chosen(256, 4096).split_k == 4
    assert chosen(256, 4096, architecture=dataclasses.replace(H200, processors=264)).split_k == 8
    assert chosen(4096, 4096).split_k == 1


def test_tiles_follow_the_rows() -> None:
    assert [tile_rows(rows, 2) for rows in (0, 1, 256, 257, 10**6)] == [16, 16, 16, 64, 64]
    assert {tile_rows(rows, 4) for rows in (257, 10**6)} == {32}
    assert {tile_rows(rows, 2, batch_invariant=True) for rows in (1, 100, 10**6)} == {16}
    assert chosen(1, block_m=64).block_m == 64


def test_full_precision_has_no_tiles_that_blackwell_would_compute_in_tf32() -> None:
    """M = 64 and more of a product of fp32: triton #10176."""
    for architecture, rows in itertools.product(CARDS.values(), (1, 65, 600, 10**5)):
        config = chosen(rows, itemsize=4, architecture=architecture)
        assert config.block_m < 64 and config.block_n < 64


def test_narrow_layers_get_narrow_blocks() -> None:
    assert chosen(1, N=1024).block_n == 32
    assert chosen(1, N=28672).block_n == 128
    assert chosen(600, N=1024).block_n == 128


# Compute capability: tensor cores as Triton 3.7 uses them, from the machine code of a product.
CAPABILITIES = {
    **{(7, 0): "none", (7, 5): "none", (8, 0): "mma", (8, 6): "mma", (8, 7): "mma", (8, 9): "mma"},
    **{(9, 0): "wgmma", (10, 0): "tcgen05", (10, 3): "tcgen05", (12, 0): "mma", (12, 1): "mma"},
}


@pytest.mark.parametrize(("capability", "cores"), CAPABILITIES.items(), ids=str)
def test_tensor_cores_follow_the_capability(capability: tuple[int, int], cores: str) -> None:
    assert config.nvidia_tensor_cores(capability[0]) == cores


@pytest.mark.parametrize(
    ("capability", "modern", "problem"),
    [
        ((6, 1), False, "compute capability 7.0 or newer, got 6.1"),
        ((7, 0), False, ""),
        ((7, 5), False, ""),
        ((7, 5), True, "compute capability 8.0 or newer, got 7.5"),
        ((8, 0), True, ""),
        ((12, 0), True, ""),
    ],
)
def test_gpus_that_are_too_old(capability: tuple[int, int], modern: bool, problem: str) -> None:
    assert config.obstacle(capability, modern) == problem


def test_an_h100_gets_what_was_measured_on_it() -> None:
    """The tiles of kernels/README.md, whatever other cards need."""
    common = {"registers": 255, "shrink_warps": 4, "expand_stages": 2, "block_k": 128}
    few = {"block_m": 16, "shrink_group": 4, "shrink_stages": 3, **common}
    wide = {"block_n": 128, "expand_group": 8, "expand_warps": 8, "walk": 1}
    assert chosen(32) == Config(split_k=8, **few, **wide)  # type: ignore[arg-type]
    assert chosen(256) == Config(split_k=4, **few, **wide)  # type: ignore[arg-type]
    many = {"block_m": 64, "split_k": 1, "shrink_group": 2, "shrink_stages": 4, **common}
    one = {"block_n": 128, "expand_group": 1, "expand_warps": 4}
    assert chosen(512) == Config(walk=1, **many, **one)  # type: ignore[arg-type]
    assert chosen(8192) == Config(walk=4, **many, **one)  # type: ignore[arg-type]
    found = [
        ((c := fused(rows, N)).block_m, c.block_n, c.block_k, c.expand_group, c.stages, c.warps)
        for rows, N in itertools.product((1, 32), (4096, 6144, 28672))
    ]
    assert found == [
        *((16, 32, 256, 4, 4, 4), (16, 64, 256, 4, 4, 4), (16, 64, 128, 4, 4, 4)),
        *((32, 64, 128, 8, 6, 4), (32, 64, 128, 8, 6, 4), (32, 128, 128, 8, 4, 8)),
    ]
    batches = itertools.product((1, 32), (1, 4))
    assert [choose_fused(rows, 4096, H200, J).split_k for rows, J in batches] == [2, 2, 4, 1]
    tiles = [
        (c.group, c.block_p, c.block_c, c.stages, c.warps)
        for c in (gradient(rank=64), gradient(rank=32, pairs=100), gradient(adapters=4))
    ]
    assert tiles == [(4, 32, 256, 5, 8), (2, 32, 256, 2, 4), (1, 32, 256, 5, 4)]
    mixed = choose_gradient(8192, 4, 1 + 1 + 1 + 4, 4096, 2, H200)
    assert mixed.group == 1  # three of four would be padded


def test_rows_that_are_read_by_the_element_get_small_blocks() -> None:
    assert chosen(8192, N=4095).block_n == chosen(32, K=4095).block_n == 64


def test_one_generation_gets_the_same_tiles() -> None:
    """Cards that differ in shared memory alone: those of shrink and expand fit them all."""
    for rows, itemsize in itertools.product((1, 65, 600), (2, 4)):
        a100, ada = (
            chosen(rows, 512, itemsize=itemsize, architecture=Architecture("mma", 108, shared))
            for shared in (166912, 101376)
        )
        assert a100 == ada


@pytest.mark.parametrize("card", ["A100", "RTX 4090", "H200", "B200", "RTX 5090"])
def test_loads_of_the_fused_kernel_fit_the_shared_memory(card: str) -> None:
    """Triton keeps as many tiles as there are stages; one less with mma."""
    architecture = CARDS[card]
    for rows, N in itertools.product((1, 17), (64, 4096, 28672)):
        c = fused(rows, N, architecture=architecture)
        tiles = c.stages - (architecture.tensor_cores == "mma")
        assert 2 <= tiles
        assert tiles * 2 * (c.block_m + c.block_n) * c.block_k <= architecture.shared
    stages = {
        c: fused(32, 14336, architecture=CARDS[c]).stages for c in ("A100", "RTX 4090", "H200")
    }
    assert stages == {"A100": 4, "RTX 4090": 3, "H200": 4}


def test_without_tensor_cores_fp16_is_cut_as_fp32_is() -> None:
    for rows in (1, 65):
        half, full = (chosen(rows, itemsize=size, architecture=CARDS["T4"]) for size in (2, 4))
        assert half == full
    assert chosen(600, itemsize=2, architecture=CARDS["T4"]).block_n == 32


class TestGradient:
    def test_groups_follow_the_ranks(self) -> None:
        found = [gradient(rank=rank) for rank in (1, 16, 17, 32, 33, 512)]
        assert [c.group for c in found] == [1, 1, 2, 2, 4, 4]

    def test_full_precision_is_not_computed_in_tf32(self) -> None:
        for architecture, rank in itertools.product(CARDS.values(), (16, 64)):
            assert gradient(rank=rank, itemsize=4, architecture=architecture).block_c < 64

    def test_without_tensor_cores_fp16_is_cut_as_fp32_is(self) -> None:
        half, full = (gradient(itemsize=size, architecture=CARDS["T4"]) for size in (2, 4))
        assert half == full

    def test_splits_follow_the_batch_and_the_machine(self) -> None:
        assert gradient().split == 8  # 16 blocks of columns on 132 processors
        assert gradient(columns=14336).split == 2
        assert gradient(columns=28672).split == 1
        assert gradient(adapters=4).split == 2
        assert gradient(rank=512).split == 1  # eight groups of rank blocks
        assert gradient(pairs=512).split == 4  # 16 steps
        assert gradient(pairs=100).split == 1
        assert gradient(adapters=0, pairs=0, rank=0).split == 1

    @every_card
    @pytest.mark.parametrize("itemsize", [2, 4])
    def test_a_split_has_work(self, architecture: Architecture, itemsize: int) -> None:
        for pairs, adapters in itertools.product((0, 64, 1000, 8192, 10**6), (1, 8, 1100)):
            c = gradient(pairs, adapters, itemsize=itemsize, architecture=architecture)
            assert c.split == 1 or pairs >= 4 * c.block_p * c.split * adapters

    @every_card
    @pytest.mark.parametrize("itemsize", [2, 4])
    def test_batch_invariance(self, architecture: Architecture, itemsize: int) -> None:
        """Neither the batch nor what else is trained decides."""
        how = {"architecture": architecture, "itemsize": itemsize, "batch_invariant": True}
        for columns in (64, 1024, 4096, 28672):
            sizes = itertools.product((0, 100, 10**6), (1, 1100), (1, 32, 512))
            found = {gradient(*some, columns=columns, **how) for some in sizes}
            assert len(found) == 1 and found.pop().split <= 4


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
