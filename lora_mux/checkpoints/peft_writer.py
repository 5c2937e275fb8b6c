"""PEFT checkpoint folders, written: all of a new checkpoint, or the old one untouched.

Both files are complete in a subfolder, .saving-..., before the first of them takes its place. Two
files cannot change places at once, so:

- If the config stays the same, as while an adapter is trained, only the weights are replaced: one
  rename.
- Otherwise the old config goes first and the new one comes last. If the machine fails between the
  three renames, then the folder has no config, and nobody loads weights with a config that is not
  theirs. The subfolder has what is missing, old and new.
- If anything else fails, the old files are put back.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import torch
from torch import Tensor

from ..configs import MAX_ALPHA, MAX_CONFIG_BYTES, Strength, config_fields
from ..core import LoraWeights, check_number, check_shape, is_finite
from ..errors import AdapterError, ArgumentTypeError, CheckpointError, short
from .base_model import PREFIX
from .opened_folder import CONFIG_FILE, WEIGHTS_FILE
from .safetensors_file import FLOATING, MAX_KEY_BYTES, write_tensors

TASK_TYPES = (
    *("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS"),
    *("QUESTION_ANS", "FEATURE_EXTRACTION"),
)
MAX_PATH_BYTES = MAX_KEY_BYTES - 40  # what PEFT adds in front and behind is shorter
KEYS = {"A": ".lora_A.weight", "B": ".lora_B.weight", "bias": ".lora_B.bias"}


def saved_key(path: str, factor: str) -> str:
    """The key of a layer's factor in PEFT's files: "A", "B" or "bias"."""
    return f"{PREFIX}{path}{KEYS[factor]}"


def write_peft_folder(
    folder: str | PathLike[str],
    factors: Mapping[str, LoraWeights],
    *,
    base_model: str | None,
    dropout: float = 0.0,
    task_type: str | None = None,
    modules: Iterable[str] | None = None,
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them.

    The weights are byte for byte those of PEFT's save_pretrained. A folder is made if there is
    none. Of one that is there these two files are replaced, as PEFT does, and others stay.

    Args:
        factors: path of a linear layer in the base model -> its factors, in the dtypes that are
            written. If some have a bias, then the others get one of zeros, as the config has one
            lora_bias for all.
        base_model: the name or the path of the base, for whoever loads the adapter.
        dropout: what training goes on with.
        task_type: one of PEFT's, such as "CAUSAL_LM".
        modules: the paths of all modules of the base, so that the config names layers by their
            last names if those mean no other module. None = unknown: the config has whole paths.

    Returns:
        The folder.

    Raises:
        ArgumentTypeError: an argument has the wrong type.
        AdapterError: a factor has a wrong shape.
        CheckpointError: a value cannot be saved or is not finite, or the folder cannot be written.
            Nothing in it has changed.
    """
    place = _checked_place(folder)
    tensors = _tensors(factors)
    for argument, name in (("base_model", base_model), ("task_type", task_type)):
        if name is not None and not isinstance(name, str):
            raise ArgumentTypeError(f"`{argument}` must be a name or None, got {short(name)}")
    if task_type is not None and task_type not in TASK_TYPES:
        raise CheckpointError(
            f"`task_type` must be None or one of {', '.join(TASK_TYPES)}, got {short(task_type)}"
        )
    if not 0 <= check_number(dropout, "dropout", CheckpointError) <= 1:
        raise CheckpointError(f"`dropout` must be from 0 to 1, got {dropout}")
    strengths = {
        path: Strength(part.A.shape[0], float(part.scaling)) for path, part in factors.items()
    }
    fields = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "task_type": task_type,
        "inference_mode": True,
        "lora_dropout": float(dropout),
        "bias": "none",
        # PEFT finds out by itself which layers are transformers' Conv1D.
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        **config_fields(strengths, modules),
    }
    if any(part.bias is not None for part in factors.values()):
        fields["lora_bias"] = True  # older versions of PEFT do not know this field
    config = json.dumps(fields, indent=2, sort_keys=True).encode()
    if len(config) > MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"`factors` must have a config of at most {MAX_CONFIG_BYTES} bytes, got {len(config)} "
            f"for {len(factors)} layers; give `modules`, so that last names stand for them"
        )
    _write(place, config, tensors)
    return place


def _checked_place(folder: object) -> Path:
    if not isinstance(folder, str | PathLike) or isinstance(os.fspath(folder), bytes):
        raise ArgumentTypeError(f"`folder` must be a path, got {type(folder).__name__}")
    if os.fspath(folder) == "":
        raise CheckpointError("`folder` must be a path, got ''; write '.' for the current folder")
    place = Path(folder)
    try:
        place.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long; with a NUL or half a character
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"`folder` must be one that can be written, got {short(str(place))} ({reason}); "
            "nothing in it has changed"
        ) from None
    if os.path.lexists(place) and not place.is_dir():
        raise CheckpointError(
            f"`folder` must be a folder or a new path, got a file, {short(str(place))}; name the "
            "folder that it is in, or another"
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (place / name).is_dir():
            raise CheckpointError(
                f"`folder` must be a folder for a checkpoint, got {short(str(place))}, in which "
                f"{name} is a folder; name another"
            )
    return place


def _tensors(factors: object) -> dict[str, Tensor]:
    """Checked tensors by PEFT's keys."""
    if not isinstance(factors, Mapping):
        raise ArgumentTypeError(
            f"`factors` must be a mapping of path -> LoraWeights, got {type(factors).__name__}"
        )
    if not factors:
        raise CheckpointError("`factors` must hold one layer at least, got none")
    biased = any(getattr(part, "bias", None) is not None for part in factors.values())
    tensors = {}
    for path, part in factors.items():
        _check_part(path, part)
        named = part.tensors()
        if biased and part.bias is None:
            named["bias"] = torch.zeros_like(part.B[:, 0])
        for name, tensor in named.items():
            _check_values(tensor, f"factors[{short(path)}].{name}")
            tensors[saved_key(path, name)] = tensor
    return tensors


def _check_part(path: object, part: object) -> None:
    if not isinstance(path, str):
        raise ArgumentTypeError(f"`factors` must have paths as keys, got {short(path)}")
    if not path.isprintable() or not 0 < len(path.encode()) <= MAX_PATH_BYTES:
        raise CheckpointError(
            f"`factors` must have the paths of layers as keys, printable and of at most "
            f"{MAX_PATH_BYTES} bytes, got {short(path)}; a bare layer has no path to be saved "
            "under, so put it into a module"
        )
    argument = f"factors[{short(path)}]"
    if not isinstance(part, LoraWeights):
        raise ArgumentTypeError(f"`{argument}` must be LoraWeights, got {type(part).__name__}")
    if part.gain is not None:
        raise CheckpointError(
            f"`{argument}.gain` must be None, got that of DoRA, whose magnitude cannot be told "
            "from it; keep the folder that the adapter was loaded from"
        )
    check_shape(part.A, f"{argument}.A", (None, None), "[r, in_features]")
    r = part.A.shape[0]
    if r < 1:
        raise AdapterError(f"`{argument}.A` must have a rank of at least 1, got 0")
    check_shape(part.B, f"{argument}.B", (None, r), "[out_features, r]")
    if part.bias is not None:
        check_shape(part.bias, f"{argument}.bias", (part.B.shape[0],), "[out_features]")
    scaling = check_number(part.scaling, f"{argument}.scaling", CheckpointError)
    if not abs(scaling * r) < MAX_ALPHA:
        raise CheckpointError(
            f"`{argument}.scaling` must be less than {MAX_ALPHA:.0e} / r, got {scaling}; multiply "
            "B with it, and save a scaling of 1"
        )


def _check_values(tensor: Tensor, argument: str) -> None:
    if tensor.dtype not in FLOATING.values():
        raise CheckpointError(
            f"`{argument}` must have a dtype that is read again, {', '.join(FLOATING)}, got "
            f"{tensor.dtype}; convert it with .to()"
        )
    if tensor.is_meta:
        raise CheckpointError(f"`{argument}` must hold values, got a tensor on the meta device")
    if not is_finite(tensor, tensor.dtype):
        raise CheckpointError(
            f"`{argument}` must be finite, got NaN or infinity; go back to values before it "
            "diverged"
        )


def _write(place: Path, config: bytes, tensors: Mapping[str, Tensor]) -> None:
    """Write both files, or change nothing."""
    new = [path for path in (place, *place.parents) if not path.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".saving-", dir=place) as spare:
            with open(Path(spare, WEIGHTS_FILE), "wb") as file:
                write_tensors(file, tensors)
                _flush(file)
            with open(Path(spare, CONFIG_FILE), "wb") as file:
                file.write(config)
                _flush(file)
            _put_in_place(Path(spare), place, config)
    except BaseException as error:
        for path in new:
            with suppress(OSError):
                path.rmdir()
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"`folder` must be one that can be written, got {short(str(place))} "
            f"({error.strerror or error}); nothing in it has changed"
        ) from error


def _flush(file: BinaryIO) -> None:
    """Wait until the content of a file is on the disk, which may be found full only now."""
    file.flush()
    os.fsync(file.fileno())


def _put_in_place(spare: Path, place: Path, config: bytes) -> None:
    """Move both files from `spare` to `place`, and those that were there to `spare`/old."""
    old = spare / "old"
    old.mkdir()
    there = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if os.path.lexists(place / name)]
    try:
        if len(there) == 2 and _holds(place / CONFIG_FILE, config):
            os.replace(spare / WEIGHTS_FILE, place / WEIGHTS_FILE)
            return
        for name in there:
            os.replace(place / name, old / name)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(spare / name, place / name)
    except BaseException:
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            if os.path.lexists(old / name):
                os.replace(old / name, place / name)
            elif name not in there:
                (place / name).unlink(missing_ok=True)
        raise


def _holds(file: Path, content: bytes) -> bool:
    return file.is_file() and file.stat().st_size == len(content) and file.read_bytes() == content
