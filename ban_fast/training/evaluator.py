"""A network's outputs for the images that are not trained on, and their figures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Loader
from ..errors import UserError
from ..evaluation import AVERAGES, classification_metrics, ensemble, reliability
from .observer import Interrupted
from .seeds import derived_seed, isolated

TEST, VALIDATION = "test", "validation"


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and on a GPU no TF32, which torch lets convolutions use unless told otherwise."""
    cudnn: Any = torch.backends.cudnn
    handles = [cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul] if device.type == "cuda" else []
    before = [handle.fp32_precision for handle in handles]
    try:
        for handle in handles:
            handle.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for handle, precision in zip(handles, before, strict=True):
            handle.fp32_precision = precision


class Evaluator:
    """Runs networks over the evaluation images: in eval mode, full precision and fixed order."""

    def __init__(
        self, loaders: dict[str, Loader], device: torch.device, run_seed: int, should_stop: Callable[[], bool]
    ) -> None:
        self._loaders = loaders
        self._device = device
        self._seed = derived_seed(run_seed, "evaluation")
        self._should_stop = should_stop
        self._labels: dict[str, Tensor] = {}

    @property
    def splits(self) -> list[str]:
        """ "test" and "validation", as far as there are such images."""
        return list(self._loaders)

    @property
    def curve(self) -> str | None:
        """The images that learning curves are drawn on: for validation if there are any, else the test images."""
        return next((split for split in (VALIDATION, TEST) if split in self._loaders), None)

    @torch.no_grad()
    def logits(self, network: nn.Module, split: str) -> Tensor:
        """[N, C] on the CPU. UserError where they are not finite; Interrupted where `should_stop` says so."""
        network.eval()
        outputs, labels = [], []
        # Seeded, so that even a user's shuffling DataLoader serves every network in the same order; isolated, so that
        # it draws nothing from the training's generators.
        with isolated(self._device, self._seed), full_precision(self._device):
            for batch in self._loaders[split].epoch(0):
                if self._should_stop():
                    raise Interrupted
                outputs.append(network(batch.images))
                labels.append(batch.labels)
        logits = torch.cat(outputs).cpu()
        if not logits.isfinite().all():
            raise UserError(f"the network's outputs for the {split} images are not finite: lower --lr")
        self._keep_labels(split, torch.cat(labels).cpu())
        return logits

    def figures(self, logits: Tensor, split: str) -> dict[str, float]:
        """Error, NLL and ECE of one network, from its logits [N, C]."""
        return classification_metrics(ensemble([logits]), self._labels[split])

    def record(self, logits: dict[str, Tensor]) -> dict[str, Any]:
        """A generation's figures on every split, from its logits there, as results.json has them."""
        record: dict[str, Any] = {split: self.figures(values, split) for split, values in logits.items()}
        if TEST in logits:
            record["reliability"] = reliability(ensemble([logits[TEST]]), self._labels[TEST])
        return record

    def ensembles(self, members: list[int], test_logits: list[Tensor]) -> list[dict[str, Any]]:
        """The members' votes on the test images, by either average, as results.json has them."""
        records = []
        for average in AVERAGES:
            predictions = ensemble(test_logits, average)
            records.append(
                {
                    "members": list(members),
                    "average": average,
                    TEST: classification_metrics(predictions, self._labels[TEST]),
                    "reliability": reliability(predictions, self._labels[TEST]),
                }
            )
        return records

    def _keep_labels(self, split: str, labels: Tensor) -> None:
        known = self._labels.setdefault(split, labels)
        if known.shape != labels.shape or not torch.equal(known, labels):
            raise UserError(f"the {split} DataLoader serves another order each time: use shuffle=False there")
