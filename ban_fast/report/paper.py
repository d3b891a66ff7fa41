"""Test errors and perplexities that the paper printed, for runs whose data and network have a row in its tables.

Source: Furlanello et al., "Born-Again Neural Networks" (2018), Table 1 (CIFAR-10), Table 2 (CIFAR-100, DenseNets) and
Table 3 (CIFAR-100, Wide-ResNets), in percent, each from one run. Columns: Teacher, BAN (one student on the teacher's
outputs alone), BAN+L, CWTM, DKPP, BAN-1 to BAN-3 (the sequence, with seeds of its own: for the DenseNets BAN-1 and BAN
are two measurements of one thing), Ens*2 and Ens*3 (BAN-1 and 2; BAN-1, 2 and 3). Table 6 (Penn Treebank): validation
and test perplexity of a teacher and one student, which learned from outputs and labels (section 5.3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DATASETS = ("cifar10", "cifar100")
EPOCHS = 200
"""Passes over the training images for each generation, in every row."""
TEXT = "ptb"
TEXT_EPOCHS = 40
"""Passes over Penn Treebank (section 4.2)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the tables; None where the paper has no figure."""

    teacher: float
    students: Mapping[str, float]
    """The first student's error by objective: "ban", "ban+l", "cwtm", "dkpp"."""
    sequence: tuple[float, ...] = ()
    """BAN-1, BAN-2, ... where they were trained."""
    ensembles: Mapping[tuple[int, ...], float]
    """Ensembles by members, probabilities averaged."""

    def generation(self, number: int, objective: str) -> float | None:
        """The error of generation `number` (0 is the teacher) of a run whose students learn by `objective`."""
        if number == 0:
            return self.teacher
        if objective == "ban" and number <= len(self.sequence):
            return self.sequence[number - 1]
        return self.students.get(objective) if number == 1 else None

    def ensemble(self, members: tuple[int, ...], average: str, objective: str) -> float | None:
        """The error of an ensemble of these generations."""
        return self.ensembles.get(members) if average == "probabilities" and objective == "ban" else None


def _single(teacher: float, ban: float) -> Row:
    return Row(teacher=teacher, students={"ban": ban}, ensembles={})


def _dense(
    teacher: float,
    ban: float,
    label: float,
    cwtm: float,
    dkpp: float,
    sequence: tuple[float, ...],
    ensembles: Mapping[tuple[int, ...], float],
) -> Row:
    return Row(
        teacher=teacher,
        students={"ban": ban, "ban+l": label, "cwtm": cwtm, "dkpp": dkpp},
        sequence=sequence,
        ensembles=ensembles,
    )


_ROWS: dict[tuple[str, str], Row] = {
    ("cifar10", "wrn-28-1"): _single(6.69, 6.64),
    ("cifar10", "wrn-28-2"): _single(5.06, 4.86),
    ("cifar10", "wrn-28-5"): _single(4.13, 4.03),
    ("cifar10", "wrn-28-10"): _single(3.77, 3.86),
    ("cifar10", "densenet-112-33"): _single(3.84, 3.61),
    ("cifar10", "densenet-90-60"): _single(3.81, 3.5),
    ("cifar10", "densenet-80-80"): _single(3.48, 3.49),
    ("cifar10", "densenet-80-120"): _single(3.37, 3.54),
    ("cifar100", "wrn-28-1"): _single(30.05, 29.43),
    ("cifar100", "wrn-28-2"): _single(25.32, 24.38),
    ("cifar100", "wrn-28-5"): _single(20.88, 20.93),
    ("cifar100", "wrn-28-10"): _single(19.08, 18.25),
    ("cifar100", "densenet-112-33"): _dense(
        18.25, 16.95, 17.68, 17.84, 17.84, (17.61, 17.22, 16.59), {(1, 2): 15.77, (1, 2, 3): 15.68}
    ),
    ("cifar100", "densenet-90-60"): _dense(
        17.69, 16.69, 16.93, 17.42, 17.43, (16.62, 16.44, 16.72), {(1, 2): 15.39, (1, 2, 3): 15.74}
    ),
    ("cifar100", "densenet-80-80"): _dense(
        17.16, 16.36, 16.50, 17.16, 16.84, (16.26, 16.30, 15.5), {(1, 2): 15.46, (1, 2, 3): 15.14}
    ),
    # Its Ens*3 is of the teacher, BAN-1 and BAN-2: there was no BAN-3.
    ("cifar100", "densenet-80-120"): _dense(
        16.87, 16.00, 16.41, 17.12, 16.34, (16.13, 16.13), {(1, 2): 15.13, (0, 1, 2): 14.9}
    ),
}


def row(config: Mapping[str, Any]) -> Row | None:
    """The paper's row for a run's config.json, or None where its tables have none for that dataset and network."""
    return _ROWS.get((config["data"]["name"], config["model"]["name"]))


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Of one language model."""

    valid: float
    test: float


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """One row of Table 6."""

    teacher: Perplexity
    student: Perplexity

    def generation(self, number: int, objective: str) -> Perplexity | None:
        """The perplexities of generation `number` (0 is the teacher) of a run whose students learn by `objective`."""
        if number == 0:
            return self.teacher
        return self.student if (number, objective) == (1, "ban+l") else None


_LSTM = TextRow(teacher=Perplexity(valid=75.11, test=71.87), student=Perplexity(valid=71.19, test=68.56))
_CNN_LSTM = TextRow(teacher=Perplexity(valid=83.69, test=80.05), student=Perplexity(valid=80.27, test=76.97))
TEXT_ROWS = {"lstm-1500": _LSTM, "cnn-lstm": _CNN_LSTM, "cnn-lstm-650": _CNN_LSTM}
"""By network, each without options."""


def text_row(config: Mapping[str, Any]) -> TextRow | None:
    """Table 6's row for a run's config.json: of Penn Treebank by words, and a network as the paper has it, or None."""
    is_ptb = config["data"]["name"] == TEXT and config["text"]["level"] == "word"
    return TEXT_ROWS.get(config["model"]["name"]) if is_ptb and not config["model"]["options"] else None
