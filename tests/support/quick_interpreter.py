"""Triton's NumPy interpreter without three repetitions that have no effect.

A launch of the fused kernel then takes a third of the time. What is computed, read and written is
the same.
"""

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import triton.language as tl
import triton.runtime.interpreter as interpreter


@contextmanager
def without_repetitions() -> Iterator[None]:
    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        # Sums and products of ints are computed once more in 64 bits, for an assertion that only
        # debug=True makes.
        assert not builder.options.debug
        options = dataclasses.replace(builder.options, sanitize_overflow=False)
        patch.setattr(builder, "options", options)
        _patch_once(patch)
        _know_types(patch)
        yield


def _patch_once(patch: pytest.MonkeyPatch) -> None:
    """Patch triton.language once for a launch, and not for each call of a function in the kernel.

    What is patched stays so until the launch ends.
    """
    plain, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    patched: set[str] = set()

    @functools.cache
    def languages(fn: Any) -> frozenset[str]:
        values = {id(value) for value in fn.__globals__.values()}
        return frozenset(module.__name__ for module in (tl, tl.core) if id(module) in values)

    def patch_lang(fn: Any) -> Any:
        if languages(fn) <= patched:
            return None
        patched.update(languages(fn))
        return plain(fn)

    def restored(self: Any) -> None:
        restore(self)
        patched.clear()

    patch.setattr(interpreter, "_patch_lang", patch_lang)
    patch.setattr(interpreter._LangPatchScope, "restore", restored)


def _know_types(patch: pytest.MonkeyPatch) -> None:
    """Remember numpy's type for each of triton's; the plain function makes a table to look into."""
    plain = interpreter._get_np_dtype
    known: dict[str, np.dtype[Any]] = {}

    def np_dtype(type_: Any) -> np.dtype[Any]:
        name = type_.scalar.name
        if name not in known:
            known[name] = plain(type_)
        return known[name]

    patch.setattr(interpreter, "_get_np_dtype", np_dtype)
