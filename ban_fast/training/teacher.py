"""The teacher: the generation before, frozen."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError


class LiveTeacher:
    """A finished network that gives its logits for each batch as it comes, and is not changed by it.

    In eval mode, without gradients, and checked: `check` raises if any parameter or buffer differs from what it was.
    """

    mode = "live"

    def __init__(self, network: nn.Module, forward: Callable[[Tensor], Tensor] | None = None) -> None:
        """`forward` computes what `network` does, where that is compiled; None: the network itself."""
        self.network = network.eval().requires_grad_(False)
        self._forward = network if forward is None else forward
        self.fingerprint = fingerprint(network)
        self.forward_images = 0
        self.dtype: torch.dtype | None = None

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:  # [B, ...] -> [B, C]
        """The teacher's outputs for the very images that the student sees."""
        logits = self._forward(images)
        self.forward_images += len(images)
        self.dtype = logits.dtype
        return logits.detach()

    def record(self) -> dict[str, Any]:
        """What results.json says of a student's teacher."""
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return {"mode": self.mode, "dtype": dtype, "forward_images": self.forward_images}

    def state(self) -> dict[str, Any]:
        """Its part of a checkpoint."""
        return {"fingerprint": self.fingerprint, "forward_images": self.forward_images, "dtype": self.dtype}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a `state`. UserError if it was another teacher's."""
        if state["fingerprint"] != self.fingerprint:
            raise UserError("this checkpoint's student had another teacher: the generation before it was replaced")
        self.forward_images, self.dtype = state["forward_images"], state["dtype"]

    def check(self) -> None:
        """RuntimeError if the network is not what it was when this teacher was made."""
        if fingerprint(self.network) != self.fingerprint:
            raise RuntimeError(
                "the teacher changed while it taught: a layer updates its parameters or buffers in eval mode, or "
                "shares them with the student"
            )


def fingerprint(network: nn.Module) -> str:
    """A hash of every parameter and buffer, by name, shape, type and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
