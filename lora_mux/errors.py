"""Every error that lora_mux raises on purpose, in one tree.

    LoraMuxError
    |-- ArgumentTypeError    (TypeError)     an argument of the wrong type
    |-- AdapterError         (ValueError)    a name, A, B, alpha or scaling that does not do
    |-- CheckpointError      (ValueError)    a PEFT folder that is broken, unsafe or not plain LoRA
    |-- RoutingError         (ValueError)    an index, a weight or rows that do not fit
    |-- InputError           (ValueError)    an x that the layer cannot take
    |-- TargetError          (ValueError)    a model or a layer that cannot carry adapters
    |-- BackendError         (ValueError)    a backend that does not exist or cannot run here
    |-- UnknownAdapterError  (KeyError)      a name or a handle that no adapter has (any more)
    |-- PoolCapacityError    (RuntimeError)  adapters too many for a pool that can not grow
    |-- RoutingBusyError     (RuntimeError)  another thread is in a `with` block or forward pass
    `-- DetachedError        (RuntimeError)  a Mux that was used after detach()

Each message names the argument, what was expected, what was got and the way out. Whatever raises
one of these has changed nothing.
"""


class LoraMuxError(Exception):
    """The root: `except lora_mux.LoraMuxError` catches everything below."""


class ArgumentTypeError(LoraMuxError, TypeError):
    """An argument has the wrong type."""


class AdapterError(LoraMuxError, ValueError):
    """A name, factor, alpha or scaling cannot make an adapter."""


class CheckpointError(LoraMuxError, ValueError):
    """A checkpoint folder is missing, broken, unsafe, or says more than plain LoRA."""


class RoutingError(LoraMuxError, ValueError):
    """An index, a weight or a list of rows does not fit."""


class InputError(LoraMuxError, ValueError):
    """An input tensor does not fit the layer."""


class TargetError(LoraMuxError, ValueError):
    """A model or a layer cannot carry adapters."""


class BackendError(LoraMuxError, ValueError):
    """A backend does not exist, or cannot run here."""


class UnknownAdapterError(LoraMuxError, KeyError):
    """A name or a handle belongs to no adapter, or no longer does."""

    # KeyError shows the repr of its argument, which would put the whole message in quotes.
    __str__ = Exception.__str__


class PoolCapacityError(LoraMuxError, RuntimeError):
    """Adapters do not fit into a pool that can not grow: bounded, or read by a CUDA graph."""


class RoutingBusyError(LoraMuxError, RuntimeError):
    """Another thread is inside a `with` block, or a forward pass, of the same model."""


class DetachedError(LoraMuxError, RuntimeError):
    """The Mux was detached from its model."""
