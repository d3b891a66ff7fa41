"""Perplexities: a network along a whole split of a text, its state carried from the first token to the last."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import IGNORED, Batch
from ..errors import UserError
from ..evaluation import joint_log_probabilities, perplexity_metrics
from .evaluator import TEST, Evaluator
from .reader import Carried


class TextEvaluator(Evaluator):
    """Perplexity and NLL; a network's outputs are the log-probabilities of the tokens that came, float64 [N].

    They are all that a vote by the mean of probabilities needs. A vote by the mean of logits would need every
    network's logits for all words at every place, and is left out.
    """

    figure = "perplexity"
    validation = "valid"
    keeps_best = True
    _samples = "tokens"

    def _outputs(self, network: nn.Module, split: str, batches: Iterator[Batch]) -> Tensor:
        reader = Carried(network)
        found, kept = [], []
        for batch in batches:
            if self._ranks.is_first:  # one stream has no parts; what GPUs make of it may differ in the last digit
                nll = F.cross_entropy(reader(batch.images), batch.labels, ignore_index=IGNORED, reduction="none")
                found.append(-nll)
                kept.append(batch.labels != IGNORED)
        return self._ranks.first(lambda: torch.cat(found).double()[torch.cat(kept)].cpu())

    def figures(self, outputs: Tensor, split: str) -> dict[str, float]:
        """Perplexity and NLL, per token."""
        try:
            return perplexity_metrics(outputs)
        except ValueError as error:
            raise UserError(f"on the {split} tokens {error}: lower --lr") from error

    def ensembles(self, members: list[int], test_outputs: list[Tensor]) -> list[dict[str, Any]]:
        """By the mean of probabilities, the paper's."""
        figures = self.figures(joint_log_probabilities(test_outputs), TEST)
        return [{"members": list(members), "average": "probabilities", TEST: figures}]
