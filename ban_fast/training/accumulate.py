"""A batch in parts that fit into memory, whose losses and gradients add up to the whole batch's."""

from typing import NamedTuple

from torch import Tensor

from ..data import Batch
from .distributed import ALONE, Ranks
from .objectives import Terms
from .teacher import Taught


class Part(NamedTuple):
    """Some samples of a batch, and what their loss counts for."""

    batch: Batch
    taught: Taught | None
    share: float
    """Of the whole batch's samples. A mean over the part, times this, is its term in the mean over the batch."""


def parts(batch: Batch, taught: Taught | None, size: int, whole: int, ranks: int = 1) -> list[Part]:
    """At most `size` samples each, as even as can be: batch norm has no statistics of a single one left over.

    `batch` is one rank's of a batch of `whole` samples, which all have as many parts. CWTM's weights are normalised
    over the whole batch: each part knows the sum of all its confidences.
    """
    own, count = len(batch.labels), parts_of(whole, size, ranks)
    if count == 1:
        return [Part(batch, taught, own / whole)]
    found = []
    for number in range(count):
        part = slice(number * own // count, (number + 1) * own // count)
        some = Batch(*(tensor[part] for tensor in batch))
        found.append(Part(some, None if taught is None else _of(taught, part), len(some.labels) / whole))
    return found


def parts_of(whole: int, size: int, ranks: int = 1) -> int:
    """In how many parts of `size` samples at most each of so many ranks goes through a batch of `whole` samples."""
    largest = -(-whole // ranks)
    return -(-largest // size)


def with_total(taught: Taught, ranks: Ranks = ALONE) -> Taught:
    """With the sum of the teacher's largest outputs over all ranks' samples: CWTM's normaliser (eq. 10)."""
    if taught.confidence is not None:
        c = taught.confidence if taught.rows is None else taught.confidence[taught.rows]
    else:
        assert taught.logits is not None
        logits = taught.logits if taught.rows is None else taught.logits[taught.rows]
        c = logits.double().softmax(1).amax(1)
    return taught._replace(total=ranks.sum(c.double().sum()))


def added(sum_so_far: Terms | None, terms: Terms, share: float) -> Terms:
    """The terms of the parts up to this one, each weighted by its share."""
    weighted = Terms(*(term.detach() if share == 1 else term.detach() * share for term in terms))
    if sum_so_far is None:
        return weighted
    return Terms(*(one + other for one, other in zip(sum_so_far, weighted, strict=True)))


def _of(taught: Taught, part: slice) -> Taught:
    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[part]

    if taught.rows is None:
        return taught._replace(logits=cut(taught.logits), confidence=cut(taught.confidence))
    return taught._replace(rows=taught.rows[part])
