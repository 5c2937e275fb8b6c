"""Which requests come when, and which adapters they name."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


class Requests(NamedTuple):
    """One entry, or row, for each request, in the order of their arrival."""

    at: Floats  # [n] seconds
    names: Ints  # [n, J] adapters by popularity, 0 the most popular; -1 = none
    prompt: Floats  # [n] tokens
    steps: Floats  # [n] steps of decoding after the first token


class Traffic(NamedTuple):
    """Assumptions about users, all of them."""

    adapters: int = 1_000_000
    zipf: float = 1.0  # an adapter of rank i is named in proportion to 1 / i ** zipf
    mix: Mapping[int, float] = {1: 1.0}  # adapters of a request -> how often
    prompt: float = 512  # tokens, the mean; both lengths are exponential
    answer: float = 128
    swing: float = 0.5  # the rate goes from 1 - swing to 1 + swing times its mean and back


def requests(traffic: Traffic, n: int, rate: float, rng: np.random.Generator) -> Requests:
    """A day of n requests, `rate` a second: shortened until that many fit."""
    return Requests(
        arrivals(n, rate, traffic.swing, rng),
        names(traffic, n, rng),
        rng.exponential(traffic.prompt, n),
        rng.exponential(traffic.answer, n),
    )


def arrivals(n: int, rate: float, swing: float, rng: np.random.Generator) -> Floats:
    """Poisson in rate * (1 - swing cos(2 pi t / T)) for T = n / rate, if n come: [n] seconds."""
    day = np.linspace(0, 1, 10_001)
    come = day - swing * np.sin(2 * np.pi * day) / (2 * np.pi)
    found: Floats = np.interp(np.sort(rng.random(n)), come, day) * n / rate
    return found


def names(traffic: Traffic, n: int, rng: np.random.Generator) -> Ints:
    """[n, J]: those of a request are drawn one by one and are distinct, -1 where it has fewer."""
    most = max(traffic.mix)
    if most > traffic.adapters:
        raise ValueError(f"mix has requests of {most} adapters, of {traffic.adapters} in all")
    chance = np.arange(1, traffic.adapters + 1) ** -traffic.zipf
    until = np.cumsum(chance / chance.sum())
    until[-1] = 1.0
    found = np.searchsorted(until, rng.random((n, most)), "right")
    for j in range(1, most):
        while (again := (found[:, :j] == found[:, j : j + 1]).any(1)).any():
            found[again, j] = np.searchsorted(until, rng.random(again.sum()), "right")
    sizes, shares = np.array([*traffic.mix]), np.array([*traffic.mix.values()])
    size = rng.choice(sizes, n, p=shares / shares.sum())
    return np.where(np.arange(most) < size[:, None], found, -1)


def scrambled(x: npt.NDArray[np.integer]) -> Keys:
    """splitmix64: numbers that look random, the same in every process."""
    z: Keys = (x.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def keys(names: Ints, by: str) -> Keys:
    """[n]: what a router hashes, of the whole set of a request's names or of its rarest one."""
    if by == "rarest":
        return scrambled(names.max(1))
    each = np.where(names < 0, np.uint64(0), scrambled(names))
    return scrambled(each.sum(1, dtype=np.uint64))
