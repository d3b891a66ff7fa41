"""BANE: several networks as one (the paper's eq. 4)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

AVERAGES = ("probabilities", "logits")
"""What is averaged: the paper's output distributions, or, beside it, the logits."""


def ensemble(logits: Sequence[Tensor], average: str = "probabilities") -> Tensor:
    """The members' joint log-probabilities [N, C], float64 on the CPU, from each one's logits [N, C].

    "probabilities" is the mean of the softmaxes (eq. 4), "logits" the softmax of the mean of the logits: a geometric
    mean, whose argmax may differ. ValueError for no members, other shapes, or an unknown average.
    """
    if average not in AVERAGES:
        raise ValueError(f"average must be one of {', '.join(AVERAGES)}, got {average!r}")
    if not logits:
        raise ValueError("an ensemble needs at least one member's logits")
    shapes = {tuple(member.shape) for member in logits}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"members' logits must be [N, C] and alike, got {sorted(shapes)}")
    members = torch.stack([member.detach().cpu().double() for member in logits])  # [K, N, C]
    if average == "logits":
        return members.mean(dim=0).log_softmax(dim=1)
    joint = members.log_softmax(dim=2).logsumexp(dim=0) - math.log(len(logits))
    return joint.clamp_(max=0.0)  # the subtraction may round a certainty to 1e-16 above 0
