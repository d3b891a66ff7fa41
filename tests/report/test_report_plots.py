"""The plots: every series with its numbers, titles that say what was run, and files that are whole pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from report_runs import MakeRun, series

from ban_fast import recipes, report
from ban_fast.errors import UserError
from ban_fast.report import figures, style

ALL = ["error-by-generation.png", "learning-curves.png", "reliability.png"]


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def test_files_are_pictures_with_something_in_them(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(recipes.get("demo"), [2.78, 2.22, 1.94, 1.94], votes={(1, 2): 1.67, (1, 2, 3): 1.94})
    paths = report.plots(run, tmp_path / "new" / "report")
    assert [path.name for path in paths] == ALL
    assert sorted(path.name for path in (tmp_path / "new" / "report").iterdir()) == ALL, "and nothing half-written"
    for path in paths:
        picture = imread(path)[..., :3]
        assert min(picture.shape[:2]) > 600
        coloured = (picture.max(axis=2) - picture.min(axis=2) > 0.3).mean()
        assert 0.001 < coloured < 0.5, f"{path.name}: {coloured:.4f} of it is in colour"
        edge = np.concatenate([picture[:6].reshape(-1, 3), picture[-6:].reshape(-1, 3), picture[:, -6:].reshape(-1, 3)])
        assert (edge == 1).all(), f"{path.name}: something is cut off at the edge"


def test_the_same_run_draws_the_same_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(recipes.get("demo"), [2.78])
    first = [path.read_bytes() for path in report.plots(run, tmp_path / "a")]
    assert first == [path.read_bytes() for path in report.plots(run, tmp_path / "b")]


def test_error_by_generation(make_run: MakeRun) -> None:
    config = recipes.get("cifar100")
    config.model.name = "densenet-90-60"
    votes = {(1, 2): 15.5, (1, 2, 3): 15.1}
    run = make_run(config, [17.9, 16.9, 16.3, 16.5], votes=votes, images=10000)
    figure = figures.error_by_generation(run.config(), run.results())
    drawn = series(figure.axes[0])
    assert drawn["one network (grey: ±1 standard error)"] == [(0, 17.9), (1, 16.9), (2, 16.3), (3, 16.5)]
    assert drawn["ensemble of BAN-1 up to here"] == [(2, 15.5), (3, 15.1)]
    assert [y for _, y in drawn["the paper's network"]] == [17.69, 16.62, 16.44, 16.72]
    assert [y for _, y in drawn["the paper's ensemble"]] == [15.39, 15.74]
    assert figure.axes[0].get_ylabel() == "test error (%)"
    assert "CIFAR-100, densenet-90-60, BAN" in words(figure)


def test_a_scaled_down_run_is_labelled_and_not_held_against_the_paper(make_run: MakeRun) -> None:
    config = recipes.get("cifar100")
    config.max_steps = 6
    run = make_run(config, [97.0, 96.0], images=256)
    curves = {number: run.metrics(number) for number in run.generations()}
    drawn = [
        figures.error_by_generation(run.config(), run.results()),
        figures.learning_curves(run.config(), run.results(), curves),
        figures.reliability(run.config(), run.results()),
    ]
    for figure in drawn:
        assert "scaled down: 6 steps a generation" in words(figure)
        assert "unfinished: 2 of 4 generations" in words(figure)
    assert not [name for name in series(drawn[0].axes[0]) if "paper" in name]


def test_learning_curves(make_run: MakeRun) -> None:
    config = recipes.get("demo")
    config.generations, config.epochs, config.evaluate_every, config.data.val_fraction = 1, 10, 3, 0.2
    run = make_run(config, [2.5, 2.0], validation=True)
    curves: dict[int, Any] = {number: run.metrics(number) for number in run.generations()}
    curves[1][4]["train"]["loss"] = None  # a term that was not finite
    figure = figures.learning_curves(run.config(), run.results(), curves)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "validation error (%)",
        "training error (%)",
        "training loss (nats)",
    ]
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}
    evaluated, training, loss = map(series, figure.axes)
    assert [x for x, _ in evaluated["teacher"]] == [3, 6, 9, 10], "the last epoch is always evaluated"
    assert training["BAN-1"] == [(r["epoch"], r["train"]["error"]) for r in curves[1]]
    assert [x for x, _ in loss["BAN-1"]] == [1, 2, 3, 4, 6, 7, 8, 9, 10]


def test_learning_curves_keep_the_end_in_view(make_run: MakeRun) -> None:
    """The first tenth of the epochs may leave the frame, the rest may not; one point is no range."""
    config = recipes.get("demo")
    config.generations = 1
    run = make_run(config, [2.5, 2.0])
    curves: dict[int, Any] = {number: run.metrics(number) for number in run.generations()}
    for axes in figures.learning_curves(run.config(), run.results(), curves).axes[:2]:
        bottom, top = axes.get_ylim()
        later = [y for points in series(axes).values() for x, y in points if x > config.epochs // 10]
        assert bottom == 0
        assert max(later) < top < 1.1 * max(later)
    single: dict[int, Any] = {0: curves[0][:1]}
    for axes in figures.learning_curves(run.config(), run.results(), single).axes[:2]:
        bottom, top = axes.get_ylim()
        assert bottom < series(axes)["teacher"][0][1] < top


def test_reliability_shows_teacher_last_student_and_largest_ensemble(make_run: MakeRun) -> None:
    votes = {(1, 2): 1.67, (1, 2, 3): 1.94}
    run = make_run(recipes.get("demo"), [2.78, 2.22, 1.94, 1.94], votes=votes)
    results = run.results()
    figure = figures.reliability(run.config(), results)
    upper, lower = figure.axes[:3], figure.axes[3:]
    assert [axes.get_title().split("\n")[0] for axes in upper] == ["teacher", "BAN-3", "ensemble BAN-1+2+3"]
    assert upper[0].get_title().endswith(f"ECE {100 * results['generations'][0]['test']['ece']:.1f} %")
    shape = results["generations"][3]["reliability"]
    heights = sorted(bar.get_height() for bar in upper[1].patches)  # type: ignore[attr-defined]
    filled = [100 * a for a, count in zip(shape["accuracy"], shape["count"], strict=True) if count]
    assert heights == pytest.approx(sorted(filled))
    assert sum(bar.get_height() for bar in lower[1].patches) == pytest.approx(100)  # type: ignore[attr-defined]


def test_the_legend_of_reliability_names_what_is_drawn(make_run: MakeRun) -> None:
    """Bins of few images are pale, and are in the legend whichever network has them, and only then."""
    run = make_run(recipes.get("demo"), [2.78, 2.22])
    results = run.results()
    for record, counts in zip(results["generations"], ([0, 50], [4, 46]), strict=True):
        record["reliability"] = {"count": counts, "confidence": [0.3, 0.9], "accuracy": [0.4, 0.8]}
    for shown, pale in ((results["generations"], 1), (results["generations"][:1], 0)):
        figure = figures.reliability(run.config(), {"generations": shown, "ensembles": []})
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert texts.count("the same, under 10 images") == pale
        assert texts.count("accuracy in a bin") == texts.count("calibrated") == 1


def test_an_unfinished_run_draws_what_is_there(make_run: MakeRun, tmp_path: Path) -> None:
    begun = make_run(recipes.get("demo"), [], begun=1)
    assert [path.name for path in report.plots(begun, tmp_path)] == ["learning-curves.png"]
    started = make_run(recipes.get("demo"), [], begun=0)
    assert report.plots(started, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_a_teacher_alone(make_run: MakeRun, tmp_path: Path) -> None:
    config = recipes.get("demo")
    config.generations = 0
    assert len(report.plots(make_run(config, [2.5]), tmp_path)) == 3


def test_a_place_that_cannot_be_written(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*error-by-generation\.png: .*; choose another .*--out"):
        report.plots(make_run(recipes.get("demo"), [2.5]), tmp_path / "file")


def test_one_epoch_has_one_tick(make_run: MakeRun) -> None:
    config = recipes.get("demo")
    config.epochs = 1
    run = make_run(config, [2.5])
    figure = figures.learning_curves(run.config(), run.results(), {0: run.metrics(0)})
    low, high = figure.axes[0].get_xlim()
    assert [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high] == [1]


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        '{"epoch": 1, "train": {"error": 1}}',
        '{"epoch": 1, "train": null}',
        '{"epoch": "a", "train": {"error": 1, "loss": 1}}',
        '{"epoch": 1, "train": {"error": 1, "loss": "x"}}',
        '{"epoch": 1, "train": {"error": 1, "loss": 1}, "evaluation": 3}',
        '{"epoch": 1, "train": {"error": 1, "loss": 1}, "evaluation": {"error": 3}}',
        '{"epoch": 1, "train": {"error": 1, "loss": 1}, "evaluation": {"split": "test"}}',
    ],
)
def test_metrics_that_no_run_writes(make_run: MakeRun, tmp_path: Path, line: str) -> None:
    run = make_run(recipes.get("demo"), [2.5])
    (run.path / "generation-0" / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"generation 0 of .*: metrics\.jsonl is not what a run writes"):
        report.plots(run, tmp_path)


def test_students_colours_grow_lighter() -> None:
    """Told apart in grey, and so by every eye: relative luminance rises by a visible step."""
    colors = style.generation_colors(4)
    rgb = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in colors])
    luminance = rgb**2.2 @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0.05).all(), luminance
