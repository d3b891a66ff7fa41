"""The table: every figure where it belongs, the paper's only where they compare, and what a reader must know."""

import pytest
from report_runs import MakeRun
from rich.console import Console

from ban_fast import recipes, report
from ban_fast.evaluation import RunDirectory
from ban_fast.report import describe, paper


def text(run: RunDirectory, width: int = 120) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(report.table(run))
    return capture.get()


def cells(run: RunDirectory) -> dict[str, list[list[str]]]:
    """Rows by their first word."""
    rows: dict[str, list[list[str]]] = {}
    for line in text(run).splitlines():
        if words := line.split():
            rows.setdefault(words[0], []).append(words[1:])
    return rows


def heading(run: RunDirectory) -> str:
    """The table's own first line."""
    return next(line for line in text(run).splitlines() if line.startswith(" ") and "test" in line)


def test_teacher_students_and_ensembles(make_run: MakeRun) -> None:
    run = make_run(recipes.get("demo"), [2.78, 2.22, 3.06], votes={(1, 2): 1.67})
    rows = cells(run)
    assert rows["teacher"] == [["2.78", "0.1112", *rows["teacher"][0][2:3], "9.5", "s"]]
    assert rows["BAN-1"][0][:3] == ["2.22", "-0.56", "0.0888"]
    assert rows["BAN-2"][0][:3] == ["3.06", "+0.28", "0.1224"]
    assert [row[:2] for row in rows["BAN-1+2"]] == [["1.67", "-1.11"]] * 2, "by probabilities, and by logits"
    assert "digits, convnet-24, BAN, seed 0" in text(run)
    assert "360 test images: one is 0.28 points of error" in text(run)
    assert "paper" not in heading(run)


def test_the_papers_figures_stand_beside_the_same_data_and_network(make_run: MakeRun) -> None:
    config = recipes.get("cifar100")
    run = make_run(config, [30.0, 29.5, 29.0], images=10000)
    rows = cells(run)
    assert rows["teacher"][0][-1] == "30.05"
    assert rows["BAN-1"][0][-1] == "29.43"
    assert rows["BAN-2"][0][-1] == "s", "the paper has no second student of wrn-28-1"
    config.model.name = "densenet-90-60"
    votes = {(1, 2): 15.0, (1, 2, 3): 15.1}
    rows = cells(make_run(config, [17.0, 16.8, 16.7, 16.6], votes=votes, images=10000))
    assert [rows[f"BAN-{n}"][0][-1] for n in (1, 2, 3)] == ["16.62", "16.44", "16.72"]
    assert [row[-1] for row in rows["BAN-1+2+3"]] == ["15.74", rows["BAN-1+2+3"][1][-1]]
    assert rows["BAN-1+2+3"][1][-1] != "15.74", "the paper averaged probabilities"
    config.model.name = "wrn-10-1"
    assert "paper" not in heading(make_run(config, [60.0], images=10000))


def test_objectives_have_their_own_figures() -> None:
    config = recipes.get("cifar100").to_dict()
    config["model"]["name"] = "densenet-80-120"
    row = paper.row(config)
    assert row is not None
    assert [row.generation(1, objective) for objective in ("ban", "ban+l", "cwtm", "dkpp", "label")] == [
        16.13,
        16.41,
        17.12,
        16.34,
        None,
    ]
    assert row.generation(3, "ban") is None, "the paper trained no BAN-3 there"
    assert row.ensemble((0, 1, 2), "probabilities", "ban") == 14.9
    assert row.ensemble((1, 2, 3), "probabilities", "ban") is None


def test_a_scaled_down_run_says_so(make_run: MakeRun) -> None:
    config = recipes.get("cifar100")
    config.epochs, config.max_steps, config.data.limit_train, config.data.limit_test = 2, 6, 512, 256
    shown = text(make_run(config, [97.0], images=256))
    assert (
        "scaled down: 512 training images, 256 test images, 6 steps a generation, 2 of the paper's 200 epochs" in shown
    )
    assert "unfinished: 1 of 4 generations" in shown
    config = recipes.get("cifar10")
    config.data.val_fraction = 0.125
    assert "scaled down: 12.5 % of the training images held out" in text(make_run(config, [7.0], validation=True))
    assert "scaled down" not in text(make_run(recipes.get("demo"), [2.0]))


def test_a_run_with_nothing_finished(make_run: MakeRun) -> None:
    shown = text(make_run(recipes.get("demo"), [], begun=1))
    assert "unfinished: 0 of 4 generations" in shown
    assert "teacher" not in shown


def test_validation_has_a_column(make_run: MakeRun) -> None:
    config = recipes.get("demo")
    config.generations, config.data.val_fraction = 0, 0.1
    rows = cells(make_run(config, [2.5], validation=True))
    assert "3.00" in rows["teacher"][0]


def test_it_fits_a_terminal_of_eighty_columns(make_run: MakeRun) -> None:
    config = recipes.get("demo")
    config.data.val_fraction = 0.1
    shown = text(make_run(config, [12.5] * 4, votes={(1, 2): 1.0, (1, 2, 3): 1.0}, validation=True), width=80)
    assert "…" not in shown


@pytest.mark.parametrize(
    ("members", "name"),
    [
        ([1, 2], "BAN-1+2"),
        ([0, 1], "teacher+BAN-1"),
        ([0], "teacher"),
        ([1, 3, 5, 7, 9], "BAN-1+3+5+7+9"),
        ([1, 2, 3, 4, 5], "BAN-1..5"),
    ],
)
def test_names_of_ensembles(members: list[int], name: str) -> None:
    assert describe.members(members) == name


@pytest.mark.parametrize(("seconds", "shown"), [(9.84, "9.8 s"), (99.96, "1.7 min"), (5999, "1.7 h"), (0.0, "0.0 s")])
def test_durations(seconds: float, shown: str) -> None:
    assert describe.duration(seconds) == shown


def test_the_standard_error_is_the_binomial_one() -> None:
    record = {"test": {"error": 50.0}, "reliability": {"count": [40, 60]}}
    assert describe.standard_error(record) == pytest.approx(5.0)  # 100 * sqrt(0.25 / 100)
