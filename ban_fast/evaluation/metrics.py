"""Error, NLL, expected calibration error and the reliability diagram behind it, in float64 on the CPU."""

import torch
from torch import Tensor

ECE_BINS = 15
"""Bins of equal width over the confidence, as in Guo et al. (2017), "On Calibration of Modern Neural Networks"."""


def classification_metrics(predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """{"error": percent of rows whose most probable class is not the label, "nll": mean nats, "ece": in [0, 1]}.

    `predictions` [N, C] are probabilities, or log-probabilities (told by their sign; they keep what would round to 0);
    `labels` [N] int64. The ECE has 15 equal-width bins. ValueError for what is neither, logits for example.
    """
    log_probabilities = _log_probabilities(predictions, labels)  # [N, C]
    labels = labels.cpu()
    wrong = log_probabilities.argmax(dim=1) != labels
    nll = -log_probabilities.gather(1, labels[:, None]).mean()
    count, confidence, accuracy = _bins(log_probabilities, labels, ECE_BINS)
    ece = (count / len(labels) * (accuracy - confidence).abs()).sum()
    return {"error": 100 * int(wrong.sum()) / len(labels), "nll": nll.item(), "ece": ece.item()}


def reliability(predictions: Tensor, labels: Tensor, bins: int = ECE_BINS) -> dict[str, list[float]]:
    """{"count", "confidence", "accuracy"}, a number for each of `bins` equal-width bins of the confidence.

    Bin i holds the rows with i / bins < max probability <= (i + 1) / bins; "confidence" and "accuracy" are its means,
    in [0, 1], and 0 where it is empty. Arguments and errors as for `classification_metrics`.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    count, confidence, accuracy = _bins(_log_probabilities(predictions, labels), labels.cpu(), bins)
    return {
        "count": [int(n) for n in count.tolist()],
        "confidence": confidence.tolist(),
        "accuracy": accuracy.tolist(),
    }


def _bins(log_probabilities: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    top, predicted = log_probabilities.max(dim=1)
    confidence = top.exp()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    index = torch.bucketize(confidence, edges)
    count = torch.bincount(index, minlength=bins).double()
    filled = count.clamp(min=1)
    mean_confidence = torch.bincount(index, weights=confidence, minlength=bins) / filled
    accuracy = torch.bincount(index, weights=(predicted == labels).double(), minlength=bins) / filled
    return count, mean_confidence, accuracy


def _log_probabilities(predictions: Tensor, labels: Tensor) -> Tensor:
    if predictions.dim() != 2 or not predictions.is_floating_point() or predictions.numel() == 0:
        raise ValueError(
            f"predictions must be a floating-point [N, C] with rows, got {predictions.dtype} {list(predictions.shape)}"
        )
    rows, classes = predictions.shape
    if labels.shape != (rows,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{rows}], got {labels.dtype} {list(labels.shape)}")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= classes:
        raise ValueError(f"labels must be in 0..{classes - 1}, got {low if low < 0 else high}")
    values = predictions.detach().cpu().double()
    if values.isnan().any():
        raise ValueError("predictions hold NaN")
    are_probabilities = bool((values >= 0).all()) and bool((values > 0).any())
    logs = values.log() if are_probabilities else values
    # half-precision probabilities of 1,000 classes sum to 1 within 2e-2 at worst; logits miss by far more
    off = (logs.exp().sum(dim=1) - 1).abs().max().item()
    if off > 0.05 or (not are_probabilities and values.max().item() > 0):
        raise ValueError("predictions must be probabilities or log-probabilities (logits need log_softmax first)")
    return logs
