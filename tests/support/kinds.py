"""One layer of each kind beside linear ones, and batches for it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peft_oracle import transformers

# name -> (layer, one sample's shape)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1x1": (lambda: nn.Conv2d(6, 4, 1), (6, 5, 3)),
    "1x1, no bias": (lambda: nn.Conv2d(6, 4, 1, bias=False), (6, 5, 4)),
    "1x1, every second": (lambda: nn.Conv2d(6, 4, 1, stride=2), (6, 5, 3)),
    "3x2, padded": (lambda: nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (6, 5, 4)),
    "same, even": (lambda: nn.Conv2d(6, 4, (4, 3), padding="same"), (6, 5, 4)),
    "valid": (lambda: nn.Conv2d(6, 4, 2, padding="valid", bias=False), (6, 5, 4)),
    "circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (6, 5, 4)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (6, 5, 4)),
    "one dimension": (lambda: nn.Conv1d(6, 4, 3, stride=2, padding=2), (6, 7)),
    "three dimensions": (lambda: nn.Conv3d(3, 4, (1, 2, 3)), (3, 2, 3, 4)),
    "embedding": (lambda: nn.Embedding(11, 6, padding_idx=0), (5,)),
    "scaled embedding": (
        lambda: transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding(
            11, 6, 0, embed_scale=2.5
        ),
        (5,),
    ),
}


def batch_for(name: str, samples: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch for one of the layers: numbers for an embedding."""
    shape = samples, *LAYERS[name][1]
    return torch.randint(11, shape) if "embedding" in name else torch.randn(shape, dtype=dtype)
