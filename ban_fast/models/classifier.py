"""The layer that makes logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.autocast import autocast_dtype


class Classifier(nn.Linear):
    """nn.Linear, but that it computes in its own precision under autocast, which would round logits.

    A bf16 logit is off by up to 0.4 %. A student that is close to its teacher differs by less, and what it learns from
    is that difference: a WRN-10-1 whose classifier is 1 % from its teacher's had gradients 62 % off.
    """

    def forward(self, input: Tensor) -> Tensor:  # [..., C] -> [..., classes]
        kind = input.device.type
        if autocast_dtype(kind) is None:
            return super().forward(input)
        with torch.autocast(kind, enabled=False):
            return F.linear(input.to(self.weight.dtype), self.weight, self.bias)
