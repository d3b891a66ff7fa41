"""The paper's figures, copied from its tables a second time, row by row as they are printed."""

from typing import Any

from ban_fast.report import paper

# Furlanello et al. (2018). Table 1: network, teacher, BAN.
CIFAR10 = """
wrn-28-1         6.69  6.64
wrn-28-2         5.06  4.86
wrn-28-5         4.13  4.03
wrn-28-10        3.77  3.86
densenet-112-33  3.84  3.61
densenet-90-60   3.81  3.5
densenet-80-80   3.48  3.49
densenet-80-120  3.37  3.54
"""
# Table 2: network, teacher, BAN, BAN+L, CWTM, DKPP, BAN-1, BAN-2, BAN-3, Ens*2, Ens*3 (its last with the teacher).
CIFAR100_DENSENET = """
densenet-112-33  18.25  16.95  17.68  17.84  17.84  17.61  17.22  16.59  15.77  15.68
densenet-90-60   17.69  16.69  16.93  17.42  17.43  16.62  16.44  16.72  15.39  15.74
densenet-80-80   17.16  16.36  16.5   17.16  16.84  16.26  16.30  15.5   15.46  15.14
densenet-80-120  16.87  16.00  16.41  17.12  16.34  16.13  16.13  /      15.13  14.9
"""
# Table 3: network, teacher, BAN.
CIFAR100_WIDE_RESNET = """
wrn-28-1   30.05  29.43
wrn-28-2   25.32  24.38
wrn-28-5   20.88  20.93
wrn-28-10  19.08  18.25
"""
# Table 6: network, teacher's validation, BAN's validation, teacher's test, BAN's test.
PTB = """
cnn-lstm   83.69  80.27  80.05  76.97
lstm-1500  75.11  71.19  71.87  68.56
"""


def printed(table: str) -> list[tuple[str, list[float | None]]]:
    """(network, its figures) of each row; None for a dash."""
    rows = [line.split() for line in table.strip().splitlines()]
    return [(name, [None if figure == "/" else float(figure) for figure in figures]) for name, *figures in rows]


def row(data: str, name: str) -> paper.Row:
    found = paper.row({"data": {"name": data}, "model": {"name": name}})
    assert found is not None
    return found


def test_a_teacher_and_a_student() -> None:
    for data, table in (("cifar10", CIFAR10), ("cifar100", CIFAR100_WIDE_RESNET)):
        for name, figures in printed(table):
            found = row(data, name)
            assert [found.generation(number, "ban") for number in (0, 1)] == figures, (data, name)
            assert found.students == {"ban": figures[1]}
            assert not found.sequence
            assert not found.ensembles


def test_objectives_a_sequence_and_its_votes() -> None:
    for name, figures in printed(CIFAR100_DENSENET):
        found = row("cifar100", name)
        students = [found.students[objective] for objective in ("ban", "ban+l", "cwtm", "dkpp")]
        sequence = [found.generation(number, "ban") for number in (1, 2, 3)]
        three = (0, 1, 2) if figures[7] is None else (1, 2, 3)
        votes = [found.ensembles[members] for members in ((1, 2), three)]
        assert [found.teacher, *students, *sequence, *votes] == figures, name
        assert len(found.ensembles) == 2


def test_perplexities() -> None:
    for name, figures in printed(PTB):
        config: dict[str, Any] = {"data": {"name": "ptb"}, "text": {"level": "word"}}
        found = paper.text_row(config | {"model": {"name": name, "options": {}}})
        assert found is not None
        both = found.teacher, found.student
        assert [one.valid for one in both] + [one.test for one in both] == figures, name


def test_no_other_row() -> None:
    tables = (("cifar10", CIFAR10), ("cifar100", CIFAR100_DENSENET), ("cifar100", CIFAR100_WIDE_RESNET))
    assert paper._ROWS.keys() == {(data, name) for data, table in tables for name, _ in printed(table)}
