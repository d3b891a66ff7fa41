"""Perplexity of one language model or of several as one, from what they gave each token of a text that came next."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGEST_NLL = 700.0
"""Nats; exp(709.8) is the largest float64."""


def perplexity_metrics(log_probabilities: Tensor) -> dict[str, float]:
    """{"perplexity": exp of the mean, "nll": mean nats a token} of the tokens' log-probabilities, float64 [N].

    ValueError for none, or for a mean whose perplexity no number holds.
    """
    if log_probabilities.dim() != 1 or not len(log_probabilities):
        raise ValueError(f"log_probabilities must be [N] with N at least 1, got {list(log_probabilities.shape)}")
    nll = -log_probabilities.double().mean().item()
    if not nll <= _LARGEST_NLL:
        raise ValueError(f"a mean of {nll:.3g} nats a token has no perplexity")
    return {"perplexity": math.exp(nll), "nll": nll}


def joint_log_probabilities(members: Sequence[Tensor]) -> Tensor:  # [N] each -> [N]
    """What the mean of the members' softmaxes gives each token (the paper's eq. 4), float64.

    Of a mean of distributions, the entry of one token needs the members' entries for that token alone: no member's
    distribution over all words is ever kept.
    """
    stacked = torch.stack([member.double() for member in members])
    return stacked.logsumexp(dim=0) - math.log(len(members))
