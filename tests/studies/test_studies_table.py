"""Means and deviations over seeds, against numpy; what is missing; tasks that have other figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ban_fast.config import Config, DataConfig, ModelConfig
from ban_fast.studies import Study, StudyRun, summary, table

SEEDS = (0, 1, 2, 5)
METRICS = ("error", "nll", "ece")


def write(directory: Path, run: StudyRun, figures: dict[str, Any], metrics: tuple[str, ...] = METRICS) -> None:
    """A finished run whose `figures` are drawn, kept by the names that the table gives them."""
    rng = np.random.default_rng([run.config.seed, len(run.config.objective.name)])

    def drawn(name: str) -> dict[str, Any]:
        record = {metric: float(value) for metric, value in zip(metrics, rng.uniform(0, 20, len(metrics)), strict=True)}
        figures[name] = record
        return {"test": record, "reliability": {"count": [48], "confidence": [0.5], "accuracy": [0.5]}}

    path = directory / run.name
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(run.config.to_dict()))
    generations = [
        {"generation": number, **drawn(f"BAN-{number}" if number else "teacher")}
        for number in range(run.config.generations + 1)
    ]
    votes = [
        {"members": [1, 2], "average": average, **drawn(name)}
        for average, name in (("probabilities", "BAN-1+2"), ("logits", "BAN-1+2 (logits)"))
    ]
    results = {"format": 1, "generations": generations, "ensembles": votes}
    (path / "results.json").write_text(json.dumps(results))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    base = Config(generations=2, model=ModelConfig(name="mlp-8"))
    study = Study.vary(base, {"objective.name": ["ban", "cwtm"]}, seeds=SEEDS)
    study.save(tmp_path)
    return study


def shown(directory: Path) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table(directory))
    return capture.get()


def test_means_and_deviations_are_numpys(study: Study, tmp_path: Path) -> None:
    figures: dict[str, dict[str, Any]] = {}
    for run in study.runs:
        if not run.is_helper:
            write(tmp_path, run, figures.setdefault(run.name, {}))
    rows = summary(tmp_path)
    names = ["teacher", "BAN-1", "BAN-2", "BAN-1+2", "BAN-1+2 (logits)"]
    assert [(row.group["objective"], row.name) for row in rows] == [(o, n) for o in ("ban", "cwtm") for n in names]
    text = shown(tmp_path)
    for row in rows:
        runs = [figures[f"objective={row.group['objective']},seed={seed}"] for seed in SEEDS]
        for metric in METRICS:
            values = np.array([run[row.name][metric] for run in runs])
            spread = row.figures[metric]
            # Sums of 4 doubles: the last digits may differ between two ways to add them.
            assert np.allclose([spread.mean, spread.deviation], [values.mean(), values.std(ddof=1)], rtol=1e-12, atol=0)
            assert spread.n == 4
            decimals = 2 if metric == "error" else 4
            assert f"{values.mean():.{decimals}f} ± {values.std(ddof=1):.{decimals}f}" in text
        changes = np.array([run[row.name]["error"] - run["teacher"]["error"] for run in runs])
        if row.name == "teacher":
            assert row.change is None
        else:
            assert row.change is not None
            assert np.allclose([row.change.mean, row.change.deviation], [changes.mean(), changes.std(ddof=1)])
            assert f"{changes.mean():+.2f} ± {changes.std(ddof=1):.2f}" in text
    assert text.startswith(f"digits, mlp-8, 8 runs, 4 seeds: {tmp_path}")
    assert "unfinished" not in text


def test_one_seed_has_no_deviation_and_what_is_missing_is_said(study: Study, tmp_path: Path) -> None:
    figures: dict[str, Any] = {}
    write(tmp_path, study["objective=cwtm,seed=2"], figures)
    rows = summary(tmp_path)
    assert [row.figures["nll"].n for row in rows] == [1] * 5
    assert {spread.deviation for row in rows for spread in row.figures.values()} == {None}
    text = shown(tmp_path)
    assert "unfinished: 1 of 8 runs" in text
    assert f" {figures['BAN-2']['nll']:.4f} " in text
    assert "objective ban" not in text
    assert f"{figures['BAN-1']['error']:.2f} ±" not in text


def test_nothing_finished(study: Study, tmp_path: Path) -> None:
    assert summary(tmp_path) == []
    assert shown(tmp_path).splitlines()[1:] == ["unfinished: 0 of 8 runs"]


def test_a_task_with_other_figures(study: Study, tmp_path: Path) -> None:
    """Texts have perplexity first; a run without test samples has its validation split's."""
    run = study.runs[1]
    write(tmp_path, run, {})
    path = tmp_path / run.name / "results.json"
    generations: list[dict[str, Any]] = [
        {"generation": number, "validation": {"perplexity": 90.0 - number, "nll": 4.5}} for number in range(3)
    ]
    path.write_text(json.dumps({"format": 1, "generations": generations, "ensembles": []}))
    teacher, student, _ = summary(tmp_path)
    assert list(student.figures) == ["perplexity", "nll"]
    assert (teacher.figures["perplexity"].mean, student.figures["perplexity"].mean) == (90.0, 89.0)
    assert student.change is not None
    assert student.change.mean == -1.0
    assert "perplexity" in shown(tmp_path)
    without = [{"generation": number} for number in range(3)]
    path.write_text(json.dumps({"format": 1, "generations": without, "ensembles": []}))
    assert summary(tmp_path) == [], "no figures at all"


def test_groups_without_a_title(tmp_path: Path) -> None:
    """Seeds alone make one group."""
    study = Study.vary(Config(generations=2, max_steps=3), {}, seeds=[0, 1])
    study.save(tmp_path)
    for run in study.runs:
        write(tmp_path, run, {})
    assert {tuple(row.group) for row in summary(tmp_path)} == {()}
    text = shown(tmp_path)
    assert "scaled down: 3 steps a generation" in text
    assert "\n teacher" in text or "\nteacher" in text


def test_the_papers_errors_stand_beside_ours(tmp_path: Path) -> None:
    """Table 2, DenseNet-112-33: for the sequence where it has one, and for no average that it has not."""
    base = Config(generations=2, model=ModelConfig(name="densenet-112-33"), data=DataConfig(name="cifar100"))
    study = Study.vary(base, {"objective.name": ["ban", "cwtm"]})
    study.save(tmp_path)
    for run in study.runs:
        if not run.is_helper:
            write(tmp_path, run, {})
    found = {(row.group["objective"], row.name): row.published for row in summary(tmp_path)}
    assert found == {
        ("ban", "teacher"): 18.25,
        ("ban", "BAN-1"): 17.61,
        ("ban", "BAN-2"): 17.22,
        ("ban", "BAN-1+2"): 15.77,
        ("ban", "BAN-1+2 (logits)"): None,
        ("cwtm", "teacher"): 18.25,
        ("cwtm", "BAN-1"): 17.84,
        **{("cwtm", name): None for name in ("BAN-2", "BAN-1+2", "BAN-1+2 (logits)")},
    }
    lines = [line.split() for line in shown(tmp_path).splitlines()]
    assert next(line[-1] for line in lines if line[:1] == ["BAN-1+2"]) == "15.77"
