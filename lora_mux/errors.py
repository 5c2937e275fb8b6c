"""Every error that lora_mux raises on purpose, in one tree.

    LoraMuxError
    |-- ArgumentTypeError    (TypeError)     an argument has the wrong type
    |-- AdapterError         (ValueError)    a name, A, B, alpha or scaling cannot make an adapter
    |-- CheckpointError      (ValueError)    a checkpoint is broken, unsafe, or not plain LoRA
    |-- RoutingError         (ValueError)    an index, a weight or rows do not fit
    |-- InputError           (ValueError)    an input x does not fit the layer
    |-- TargetError          (ValueError)    a model or a layer cannot carry adapters
    |-- BackendError         (ValueError)    a backend does not exist, or cannot run here
    |-- UnknownAdapterError  (KeyError)      no loaded adapter has this name or handle
    |-- PoolCapacityError    (RuntimeError)  adapters do not fit, and their pool cannot grow
    |-- RoutingBusyError     (RuntimeError)  beside others who use the model this cannot be right
    `-- DetachedError        (RuntimeError)  this Mux was detached from its model

Each message names the argument, what was expected, what was got, and the way out. A call that
raises one of these errors has changed nothing.
"""


class LoraMuxError(Exception):
    """The root of the tree.

    `except lora_mux.LoraMuxError` catches every error that lora_mux raises on purpose.
    """


class ArgumentTypeError(LoraMuxError, TypeError):
    """An argument has the wrong type."""


class AdapterError(LoraMuxError, ValueError):
    """A name, a factor, an alpha or a scaling cannot make an adapter."""


class CheckpointError(LoraMuxError, ValueError):
    """A checkpoint is missing, broken or unsafe, or holds more than plain LoRA."""


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

    # KeyError shows the repr of its argument, which would put the whole message in quotes.
    __str__ = Exception.__str__


class PoolCapacityError(LoraMuxError, RuntimeError):
    """Adapters do not fit into a pool that cannot grow: it is bounded, or a CUDA graph reads it."""


class RoutingBusyError(LoraMuxError, RuntimeError):
    """Others are using the model, and beside them this cannot be right.

    That is a generate() without rows of its own beside others' blocks, since it may belong to one;
    a block while CUDA graphs read another's, which does not end; a pass of a compiled model whose
    rows another task has changed; or detach() while a block is open or a pass in progress.
    """


class DetachedError(LoraMuxError, RuntimeError):
    """This Mux was detached from its model."""
