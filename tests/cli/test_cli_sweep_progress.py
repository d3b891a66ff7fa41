"""What a sweep says of its runs, told by hand."""

import io
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from ban_fast.cli import sweep_progress
from ban_fast.cli.signals import Signals
from ban_fast.cli.sweep_progress import SweepBars, SweepNarrator
from ban_fast.config import Config
from ban_fast.studies import Outcome, Study
from ban_fast.studies.progress import share


@pytest.fixture
def study() -> Study:
    return Study.vary(Config(epochs=6, generations=1), {"objective.name": ["ban", "cwtm"]})


def tell(narrator: SweepNarrator, study: Study) -> None:
    """One run was done before; one dies and is done; one is a mistake."""
    teacher, ban, cwtm = study.runs
    narrator.study_started(study, frozenset({teacher.name}))
    for attempt, outcome, again in (
        (1, Outcome(kind="failed", text="killed by SIGKILL", notes=("another\nfooting",)), True),
        (2, Outcome(kind="done"), False),
    ):
        narrator.run_started(ban, attempt)
        narrator.tick()
        narrator.run_ended(ban, outcome, again)
    narrator.run_started(cwtm, 1)
    narrator.run_ended(cwtm, Outcome(kind="mistake", text="lower --lr"), False)


def test_one_line_a_run(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is from begin to end, of a clock that goes on by 1.5 s whenever it is looked at."""
    clock = itertools.count(step=1.5)
    monkeypatch.setattr(sweep_progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with SweepNarrator(Signals(), tmp_path, "go on") as narrator:
        tell(narrator, study)
    assert capsys.readouterr().out.splitlines() == [
        f"3 runs, 1 of them for a teacher that several share, in {tmp_path}; 1 done before",
        "objective=ban,seed=0: note: another footing",
        "[1/3] objective=ban,seed=0: killed by SIGKILL; trying again from its checkpoint",
        "[2/3] objective=ban,seed=0: done in 1.5 s",
        "[3/3] objective=cwtm,seed=0: failed: lower --lr",
    ]
    assert narrator.counts() == "2 of 3 runs done, 1 failed"


def test_bars(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same lines above them, and how many are done, running and failed."""
    monkeypatch.setenv("TERM", "xterm")  # rich draws no bars where it is "dumb"
    out = io.StringIO()
    with SweepBars(Signals(), tmp_path, "go on", Console(file=out, force_terminal=True, width=100)) as narrator:
        tell(narrator, study)
        narrator.run_started(study.runs[0], 1)
    shown = out.getvalue()
    assert "[3/3] objective=cwtm,seed=0: failed: lower --lr" in shown
    assert "2 of 3 runs done, 1 failed, 1 running" in shown


def test_how_far_a_run_has_come(study: Study, tmp_path: Path) -> None:
    """Its generations that are finished, and epochs of the next."""
    run = study.runs[1]
    path = tmp_path / run.name
    assert share(tmp_path, run) == 0
    (path / "generation-0").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(run.config.to_dict()))
    assert share(tmp_path, run) == 0
    (path / "generation-0" / "metrics.jsonl").write_text("{}\n" * 3)
    assert share(tmp_path, run) == 0.25
    figures = {"error": 1.0, "nll": 1.0, "ece": 0.1}
    bins = {"count": [1], "confidence": [0.5], "accuracy": [1.0]}
    records = [{"generation": number, "test": figures, "reliability": bins} for number in range(2)]
    for count in (1, 2):
        results = {"format": 1, "generations": records[:count], "ensembles": []}
        (path / "results.json").write_text(json.dumps(results))
        assert share(tmp_path, run) == count / 2
    (path / "results.json").write_text("{")
    assert share(tmp_path, run) == 0
