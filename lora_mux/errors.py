"""Every error that lora_mux raises on purpose, in one tree.

    LoraMuxError
    |-- ArgumentTypeError    (TypeError)     an argument has the wrong type
    |-- AdapterError         (ValueError)    a name, A, B, alpha or scaling cannot make an adapter
    |-- CheckpointError      (ValueError)    a checkpoint is broken, unsafe, or not LoRA or DoRA
    |-- RoutingError         (ValueError)    an index, a weight or rows do not fit
    |-- InputError           (ValueError)    an input x does not fit the layer
    |-- TargetError          (ValueError)    a model or a layer cannot carry adapters
    |-- BackendError         (ValueError)    a backend does not exist, or cannot run here
    |-- UnknownAdapterError  (KeyError)      no loaded adapter has this name or handle
    |-- PoolCapacityError    (RuntimeError)  adapters do not fit, and their pool cannot grow
    |-- TrainingError        (RuntimeError)  an adapter cannot be trained, or not like this
    |-- RoutingBusyError     (RuntimeError)  beside others who use the model this cannot be right
    `-- DetachedError        (RuntimeError)  this Mux was detached from its model

Each message names the argument, what was expected, what was got, and the way out. A call that
raises one of these errors has changed nothing. A message is one line of at most 605 characters: of
a longer one the middle is left out, and characters that do not print are escaped, since names and
files may come from strangers.
"""

import reprlib
import sys
import warnings

HEAD, GAP, TAIL = 400, " ... ", 200  # of a long message
MAX_VALUE = 80  # characters of a value in a message
_VALUES = reprlib.Repr()  # looks at the first few items only, and never recurses far
_VALUES.maxlevel = 2
_VALUES.maxstring = _VALUES.maxother = _VALUES.maxlong = MAX_VALUE


def short(value: object) -> str:
    """The repr of a value, which may be a stranger's, in at most 80 characters."""
    try:
        text = _VALUES.repr(value)
    except ValueError:  # Python writes no int of more than 4,300 digits
        return "a huge int"
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 3]}..."


def warn(message: str) -> None:
    """Warn the caller of lora_mux, in one line like those of errors.

    Python keeps every text of `warnings.warn` for ever, to show it only once. These texts hold
    strangers' names, of which there is no end, so nothing is kept.
    """
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "lora_mux":
        frame = frame.f_back
    warnings.warn_explicit(
        _line(message),
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__"),
    )


def _line(message: str) -> str:
    text = _cut(message)
    if text.isprintable():
        return text
    return _cut(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )


def _cut(text: str) -> str:
    whole = len(text) <= HEAD + len(GAP) + TAIL
    return text if whole else f"{text[:HEAD]}{GAP}{text[-TAIL:]}"


class LoraMuxError(Exception):
    """The root of the tree.

    `except lora_mux.LoraMuxError` catches every error that lora_mux raises on purpose.
    """

    # No __init__, which torch.compile could not trace. Not super(), which may be KeyError: it shows
    # the repr of its argument.
    def __str__(self) -> str:
        return _line(Exception.__str__(self))


class ArgumentTypeError(LoraMuxError, TypeError):
    """An argument has the wrong type."""


class AdapterError(LoraMuxError, ValueError):
    """A name, a factor, an alpha or a scaling cannot make an adapter."""


class CheckpointError(LoraMuxError, ValueError):
    """A checkpoint is missing, broken or unsafe, or holds more than LoRA and DoRA."""


class RoutingError(LoraMuxError, ValueError):
    """An index, a weight or a list of rows does not fit the batch or the model."""


class InputError(LoraMuxError, ValueError):
    """An input tensor does not fit the layer."""


class TargetError(LoraMuxError, ValueError):
    """A model or a layer cannot carry adapters."""


class BackendError(LoraMuxError, ValueError):
    """A backend does not exist, or cannot run here."""


class UnknownAdapterError(LoraMuxError, KeyError):
    """No loaded adapter has this name or this handle."""


class PoolCapacityError(LoraMuxError, RuntimeError):
    """Adapters do not fit into a pool that cannot grow: it is bounded, or a CUDA graph reads it."""


class TrainingError(LoraMuxError, RuntimeError):
    """An adapter cannot be trained, or its gradients cannot be computed any more."""


class RoutingBusyError(LoraMuxError, RuntimeError):
    """Others are using the model, and beside them this cannot be right.

    That is a generate() without rows of its own beside others' blocks, since it may belong to one;
    a block while CUDA graphs read another's, which does not end; a pass of a compiled model whose
    rows another task has changed; or detach() while a block is open or a pass in progress.
    """


class DetachedError(LoraMuxError, RuntimeError):
    """This Mux was detached from its model."""
