"""Runs of language models: perplexities where they belong, Table 6 only beside runs that compare with it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from report_runs import series
from rich.console import Console

from ban_fast import recipes, report
from ban_fast.config import Config
from ban_fast.errors import UserError
from ban_fast.evaluation import RunDirectory
from ban_fast.recipes import changes
from ban_fast.report import describe, paper, text_figures


def figures(perplexity: float) -> dict[str, float]:
    return {"perplexity": perplexity, "nll": math.log(perplexity)}


def write(
    path: Path, config: Config, perplexities: list[float], votes: dict[tuple[int, ...], float] | None = None
) -> RunDirectory:
    """A run whose generations have finished; the validation perplexities are 4 above, and fell to their best before."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    generations: list[dict[str, Any]] = []
    for number, test in enumerate(perplexities):
        best = {"epoch": 3, "valid": figures(test + 3), "test": figures(test - 1)}
        generations.append({"generation": number, "test": figures(test), "valid": figures(test + 4), "best": best})
        generations[-1] |= {"objective": config.objective.name, "train_seconds": 9.5}
        (path / f"generation-{number}").mkdir()
        lines = []
        for epoch in range(1, 5):
            valid = figures(test + (3 if epoch == 3 else 4 + 40 / epoch))
            train = {"loss": 5.0, "kd": 0.1, "label": 4.9, "error": 80.0}
            line = {"epoch": epoch, "step": epoch, "lr": 0.25**epoch, "train": train, "seconds": 1.0}
            lines.append(json.dumps({**line, "evaluation": {"split": "valid", **valid}}) + "\n")
        (path / f"generation-{number}" / "metrics.jsonl").write_text("".join(lines))
    ensembles = [
        {"members": list(members), "average": "probabilities", "test": figures(value)}
        for members, value in (votes or {}).items()
    ]
    results = {"format": 1, "generations": generations, "ensembles": ensembles}
    (path / "results.json").write_text(json.dumps(results))
    return RunDirectory(path)


def text(run: RunDirectory) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report.table(run))
    return capture.get()


def rows(run: RunDirectory) -> dict[str, list[str]]:
    return {words[0]: words[1:] for line in text(run).splitlines() if (words := line.split())}


def test_the_table(tmp_path: Path) -> None:
    run = write(tmp_path / "run", recipes.get("ptb-lstm"), [73.0, 69.5, 68.0], {(1, 2): 66.0})
    found = rows(run)
    nll = f"{math.log(73):.4f}"
    assert found["teacher"] == ["73.00", nll, "77.00", "3", "72.00", "76.00", "9.5", "s", "71.87", "75.11"]
    assert found["BAN-1"][:2] == ["69.50", "-3.50"]
    assert found["BAN-1"][-2:] == ["68.56", "71.19"]
    assert found["BAN-2"][-1] == "s", "the paper has one student"
    assert found["BAN-1+2"] == ["66.00", "-7.00", f"{math.log(66):.4f}"]
    assert "Penn Treebank, lstm-1500, BAN+L, seed 0" in text(run)
    assert "scaled down" not in text(run)
    assert "state carried over the whole split" in text(run)


def test_what_compares_with_table_6() -> None:
    for name, teacher, student in (
        ("ptb-cnn-lstm", (83.69, 80.05), (80.27, 76.97)),
        ("ptb-lstm", (75.11, 71.87), (71.19, 68.56)),
    ):
        row = paper.text_row(recipes.get(name).to_dict())
        assert row is not None
        assert row.generation(0, "ban+l") == paper.Perplexity(valid=teacher[0], test=teacher[1])
        assert row.generation(1, "ban+l") == paper.Perplexity(valid=student[0], test=student[1])
        assert row.generation(1, "ban") is None
    for change in ("options", "level", "data", "model"):
        config = recipes.get("ptb-lstm")
        if change == "options":
            config.model.options = {"layers": 1}
        elif change == "level":
            config.text.level = "character"
        elif change == "data":
            config.data.name = "other"
        else:
            config.model.name = "lstm-200"
        assert paper.text_row(config.to_dict()) is None, change


def test_a_scaled_down_run_says_so(tmp_path: Path) -> None:
    small = text(write(tmp_path / "small", recipes.get("ptb-small"), [150.0]))
    assert "scaled down: lstm-200 is no network of the paper's, 6 of the paper's 40 epochs" in " ".join(small.split())
    assert "paper\n" not in small
    for field, value, said in (
        ("text.level", "character", "scaled down: read by characters, not by words as the paper's"),
        ("model.options", {"layers": 1}, "scaled down: lstm-1500 with layers=1 is no network of the paper's"),
    ):
        config = recipes.get("ptb-lstm")
        changes.change(config, {field: value})
        assert describe.scaled_down(config.to_dict()) == said
    config = recipes.get("ptb-lstm")
    config.epochs = 5
    run = write(tmp_path / "short", config, [100.0, 98.0])
    assert "scaled down: 5 of the paper's 40 epochs" in text(run)
    drawn = series(text_figures.perplexity_by_generation(run.config(), run.results()).axes[0])
    assert not any("paper" in name for name in drawn)


def test_the_plots(tmp_path: Path) -> None:
    run = write(tmp_path / "run", recipes.get("ptb-lstm"), [73.0, 69.5], {(0, 1): 66.0})
    names = ["perplexity-by-generation.png", "learning-curves.png"]
    assert [path.name for path in report.plots(run, tmp_path / "out")] == names
    drawn = series(text_figures.perplexity_by_generation(run.config(), run.results()).axes[0])
    assert drawn["test, one network"] == [(0, 73.0), (1, 69.5)]
    assert drawn["validation, one network"] == [(0, 77.0), (1, 73.5)]
    assert [y for _, y in drawn["the paper's, test"]] == [71.87, 68.56]
    assert [y for _, y in drawn["the paper's, validation"]] == [75.11, 71.19]
    curves = {number: run.metrics(number) for number in (0, 1)}
    left, middle, right = text_figures.learning_curves(run.config(), run.results(), curves).axes
    assert [x for x, _ in series(left)["teacher"]] == [1, 2, 3, 4]
    assert series(left)["teacher"][2][1] == 76.0
    assert series(middle)["BAN-1"] == [(x, pytest.approx(math.exp(4.9))) for x in (1, 2, 3, 4)]
    assert [y for _, y in series(right)["teacher"]] == [0.25**epoch for epoch in (1, 2, 3, 4)]


def test_an_unfinished_run_has_its_curves(tmp_path: Path) -> None:
    run = write(tmp_path / "run", recipes.get("ptb-lstm"), [73.0])
    (tmp_path / "run" / "results.json").unlink()
    assert [path.name for path in report.plots(run, tmp_path / "out")] == ["learning-curves.png"]
    assert "unfinished: 0 of 2 generations" in text(run)


@pytest.mark.parametrize("damage", ["test", "valid", "best"])
def test_a_record_without_its_figures(tmp_path: Path, damage: str) -> None:
    run = write(tmp_path / "run", recipes.get("ptb-lstm"), [73.0])
    results = json.loads((run.path / "results.json").read_text())
    results["generations"][0][damage].pop("perplexity" if damage != "best" else "test")
    (run.path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="a record in it has not the figures that a run writes"):
        report.table(run)
