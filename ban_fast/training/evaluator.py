"""A network's outputs for what is not trained on, and their figures: of images here, of texts in `text_evaluator`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data import Batch, Loader
from ..errors import UserError
from ..evaluation import AVERAGES, classification_metrics, ensemble, reliability
from .distributed import ALONE, Ranks
from .observer import Interrupted
from .seeds import derived_seed, isolated

TEST = "test"


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and no products, convolutions or LSTMs of operands rounded to bf16 or TF32: a caller may have
    allowed it by torch's older settings or by its newer ones, and on a GPU torch does it unless told otherwise."""
    backends: Any = torch.backends
    handles = [backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    if device.type == "cuda":
        handles += [backends.cudnn.conv, backends.cudnn.rnn]
    before = [handle.fp32_precision for handle in handles]
    try:
        for handle in handles:
            if handle.fp32_precision != "none":  # which is full precision, and goes with what is set for all
                handle.fp32_precision = "ieee"
        # torch refuses products where its older setting allows more than these; asked before, it could refuse to say.
        allowed = torch.get_float32_matmul_precision()
        if allowed != "highest":
            torch.set_float32_matmul_precision("highest")
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            if allowed != "highest":
                torch.set_float32_matmul_precision(allowed)
    finally:
        for handle, precision in zip(handles, before, strict=True):
            if handle.fp32_precision != precision:
                handle.fp32_precision = precision


class Evaluator:
    """Runs networks over what is not trained on: in eval mode, full precision and fixed order.

    Several ranks run one together.

    A network's outputs are all that its figures, and those of a vote with others, need.
    """

    figure: ClassVar[str]
    """The figure that counts, the lower the better."""
    validation: ClassVar[str]
    """What the split is called that may choose."""
    keeps_best: ClassVar[bool]
    """Whether the figures of the epoch that was best on it are reported, beside the last one's."""

    def __init__(
        self,
        loaders: dict[str, Loader],
        device: torch.device,
        run_seed: int,
        should_stop: Callable[[], bool],
        ranks: Ranks = ALONE,
    ) -> None:
        self._loaders = loaders
        self._device = device
        self._seed = derived_seed(run_seed, "evaluation")
        self._should_stop = should_stop
        self._ranks = ranks

    @property
    def splits(self) -> list[str]:
        """The test and the validation split, as far as there are such samples."""
        return list(self._loaders)

    @property
    def selection(self) -> str | None:
        """The split that a learning rate, or an epoch, may be chosen by: never the test split."""
        return self.validation if self.validation in self._loaders else None

    @property
    def curve(self) -> str | None:
        """What learning curves are drawn on: the validation split if there is one, else the test split."""
        return self.selection or (TEST if TEST in self._loaders else None)

    @torch.no_grad()
    def outputs(self, network: nn.Module, split: str) -> Tensor:
        """[N, ...] on the CPU. UserError where they are not finite; Interrupted where `should_stop` says so."""
        network.eval()
        # Seeded, so that even a user's shuffling DataLoader serves every network in the same order; isolated, so that
        # it draws nothing from the training's generators.
        with isolated(self._device, self._seed), full_precision(self._device):
            outputs = self._outputs(network, split, self._batches(split))
        if not outputs.isfinite().all():
            raise UserError(f"the network's outputs for the {split} {self._samples} are not finite: lower --lr")
        return outputs

    def _batches(self, split: str) -> Iterator[Batch]:
        for number, batch in enumerate(self._loaders[split].epoch(0)):
            if number % self._ranks.size == 0 and self._should_stop():  # all ranks ask, with a batch for each between
                raise Interrupted
            yield batch

    _samples: ClassVar[str]

    def _outputs(self, network: nn.Module, split: str, batches: Iterator[Batch]) -> Tensor:
        raise NotImplementedError

    def figures(self, outputs: Tensor, split: str) -> dict[str, float]:
        """A split's figures of one network, from its outputs there."""
        raise NotImplementedError

    def record(self, outputs: dict[str, Tensor]) -> dict[str, Any]:
        """A generation's figures on every split, from its outputs there, as results.json has them."""
        return {split: self.figures(values, split) for split, values in outputs.items()}

    def ensembles(self, members: list[int], test_outputs: list[Tensor]) -> list[dict[str, Any]]:
        """The members' votes on the test split, as results.json has them."""
        raise NotImplementedError


class ImageEvaluator(Evaluator):
    """Error, NLL and calibration; a network's outputs are its logits [N, C]."""

    figure = "error"
    validation = "validation"
    keeps_best = False
    _samples = "images"

    def __init__(
        self,
        loaders: dict[str, Loader],
        device: torch.device,
        run_seed: int,
        should_stop: Callable[[], bool],
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(loaders, device, run_seed, should_stop, ranks)
        self._labels: dict[str, Tensor] = {}

    def _outputs(self, network: nn.Module, split: str, batches: Iterator[Batch]) -> Tensor:
        outputs, labels = [], []
        for number, batch in enumerate(batches):
            if number % self._ranks.size == self._ranks.rank:  # whole batches: the arithmetic is one process's
                outputs.append(network(batch.images))
            labels.append(batch.labels)
        self._keep_labels(split, torch.cat(labels).cpu())
        return torch.cat(self._ranks.in_turns(outputs)).cpu()

    def figures(self, outputs: Tensor, split: str) -> dict[str, float]:
        """Error, NLL and ECE."""
        return classification_metrics(ensemble([outputs]), self._labels[split])

    def record(self, outputs: dict[str, Tensor]) -> dict[str, Any]:
        """Those, and the reliability diagram of the test images."""
        record = super().record(outputs)
        if TEST in outputs:
            record["reliability"] = reliability(ensemble([outputs[TEST]]), self._labels[TEST])
        return record

    def ensembles(self, members: list[int], test_outputs: list[Tensor]) -> list[dict[str, Any]]:
        """By either average."""
        records = []
        for average in AVERAGES:
            predictions = ensemble(test_outputs, average)
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
