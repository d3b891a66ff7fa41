"""Error, NLL, ECE and reliability against independent computations; ensembles against hand computation."""

import math

import numpy as np
import pytest
import torch

from ban_fast.evaluation import classification_metrics, ensemble, reliability


def naive_bins(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> list[tuple[int, float, float]]:
    """(count, mean confidence, accuracy) of each bin, row by row with exact edges, as the definition reads."""
    found: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(probabilities, labels, strict=True):
        confidence = max(row)
        index = next(i for i in range(bins) if confidence <= (i + 1) / bins or i == bins - 1)
        found[index].append((confidence, int(np.argmax(row)) == label))
    return [
        (len(b), sum(c for c, _ in b) / len(b), sum(ok for _, ok in b) / len(b)) if b else (0, 0.0, 0.0) for b in found
    ]


def draw(rows: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 2
    return logits.softmax(dim=1), torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (7, 3), (500, 10), (300, 100)])
def test_metrics_against_the_definition(rows: int, classes: int) -> None:
    probabilities, labels = draw(rows, classes)
    figures = classification_metrics(probabilities, labels)
    p, y = probabilities.numpy(), labels.numpy()
    wrong = sum(int(np.argmax(row)) != label for row, label in zip(p, y, strict=True))
    assert figures["error"] == 100 * wrong / rows
    assert figures["nll"] == pytest.approx(np.mean([-math.log(p[i, y[i]]) for i in range(rows)]), rel=1e-12)
    ece = sum(n / rows * abs(accuracy - confidence) for n, confidence, accuracy in naive_bins(p, y, 15))
    assert figures["ece"] == pytest.approx(ece, rel=1e-12)  # float64 sums in another order


@pytest.mark.parametrize("bins", [1, 15, 20])
def test_reliability_against_the_definition(bins: int) -> None:
    probabilities, labels = draw(400, 5, seed=1)
    diagram = reliability(probabilities, labels, bins)
    expected = naive_bins(probabilities.numpy(), labels.numpy(), bins)
    assert diagram["count"] == [n for n, _, _ in expected]
    assert sum(diagram["count"]) == 400
    assert diagram["confidence"] == pytest.approx([c for _, c, _ in expected], rel=1e-12)
    assert diagram["accuracy"] == pytest.approx([a for _, _, a in expected], rel=1e-12)


def test_a_hand_made_ece() -> None:
    """Two rows at 0.9, one right: |0.5 - 0.9| of the half; two at 0.6, both right: |1 - 0.6| of the other half."""
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]], dtype=torch.float64)
    figures = classification_metrics(p, torch.tensor([0, 1, 0, 0]))
    assert figures["error"] == 25
    assert figures["ece"] == pytest.approx(0.4, rel=1e-12)
    assert figures["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.1) + 2 * math.log(0.6)) / 4, rel=1e-12)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below() -> None:
    p = torch.tensor([[0.4, 0.3, 0.3], [1.0, 0.0, 0.0]], dtype=torch.float64)  # 0.4 = 6 / 15
    counts = reliability(p, torch.tensor([0, 0]))["count"]
    assert (counts[5], counts[14]) == (1, 1)


def test_log_probabilities_keep_what_rounds_to_zero() -> None:
    logits = torch.tensor([[0.0, 2000.0], [2000.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0])
    assert classification_metrics(logits.log_softmax(1), labels)["nll"] == 1000.0
    assert classification_metrics(logits.softmax(1), labels)["nll"] == math.inf
    p, y = draw(50, 4)
    by_logs, by_values = classification_metrics(p.log(), y), classification_metrics(p, y)
    assert by_logs == pytest.approx(by_values, rel=1e-12)


def test_one_class_is_always_right() -> None:
    for predictions in (torch.ones(3, 1), torch.zeros(3, 1)):  # probabilities; log-probabilities
        figures = classification_metrics(predictions, torch.zeros(3, dtype=torch.int64))
        assert (figures["error"], figures["nll"], figures["ece"]) == (0, 0, 0)


P, Y = draw(4, 3)


@pytest.mark.parametrize(
    ("predictions", "labels", "said"),
    [
        (P.log() + 1, Y, "log_softmax first"),
        (P * 2, Y, "log_softmax first"),
        (-P, Y, "log_softmax first"),
        (P * float("nan"), Y, "NaN"),
        (P[0], Y, r"\[3\]"),
        (P[:0], Y[:0], r"with rows, got torch.float64 \[0, 3\]"),
        (P.long(), Y, "floating-point"),
        (P, Y[:2], r"int64 \[4\], got torch.int64 \[2\]"),
        (P, Y.float(), "got torch.float32"),
        (P, torch.tensor([0, 1, 3, 0]), r"0\.\.2, got 3"),
        (P, torch.tensor([0, 1, -100, 0]), r"0\.\.2, got -100"),
    ],
)
def test_what_is_no_prediction_is_refused(predictions: torch.Tensor, labels: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        classification_metrics(predictions, labels)


def test_bins_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        reliability(P, Y, 0)


def test_ensembles_by_hand() -> None:
    """Two members, two classes, p = (3/4, 1/4) and (1/10, 9/10)."""
    a = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, math.log(9.0)]], dtype=torch.float64)
    joint = ensemble([a, b]).exp()
    assert joint[0].tolist() == pytest.approx([(3 / 4 + 1 / 10) / 2, (1 / 4 + 9 / 10) / 2], rel=1e-14)
    geometric = ensemble([a, b], "logits").exp()
    assert geometric[0].tolist() == pytest.approx(
        [math.sqrt(3) / (math.sqrt(3) + 3), 3 / (math.sqrt(3) + 3)], rel=1e-14
    )


def test_the_two_averages_can_disagree() -> None:
    """One sure member outvotes two doubtful ones by logits, not by probabilities."""
    doubtful, sure = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 30.0]])
    members = [doubtful, doubtful, sure]
    assert ensemble(members)[0].argmax() == 0
    assert ensemble(members, "logits")[0].argmax() == 1


def test_ensembles_are_distributions_in_float64() -> None:
    members = [torch.randn(64, 10, generator=torch.Generator().manual_seed(s)).to(torch.bfloat16) for s in range(3)]
    for average in ("probabilities", "logits"):
        joint = ensemble(members, average)
        assert joint.dtype == torch.float64
        assert (joint <= 0).all()
        torch.testing.assert_close(joint.exp().sum(1), torch.ones(64, dtype=torch.float64), rtol=0, atol=1e-14)
    certain = [torch.tensor([[1000.0, 0.0, 0.0]])] * 3
    assert ensemble(certain).max() == 0
    alone = ensemble(members[:1])
    torch.testing.assert_close(alone, members[0].double().log_softmax(1), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("members", "average", "said"),
    [
        ([], "probabilities", "at least one"),
        ([P, P[:2]], "probabilities", "alike"),
        ([P[0]], "logits", r"\[N, C\]"),
        ([P], "median", "got 'median'"),
    ],
)
def test_what_is_no_ensemble_is_refused(members: list[torch.Tensor], average: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ensemble(members, average)
