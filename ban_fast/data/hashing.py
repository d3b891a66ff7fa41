"""What tells tensors from others, as a hash takes it: the same on every machine of one byte order."""

from typing import Any, Protocol

import torch
from torch import Tensor


class Digest(Protocol):
    """One of hashlib's."""

    def update(self, data: Any, /) -> None:
        """Take more bytes."""


def add(digest: Digest, *tensors: Tensor) -> None:
    """Type, shape and bytes of each, on whatever device."""
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
