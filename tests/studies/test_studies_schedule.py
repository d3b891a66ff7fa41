"""The order of a study's runs, retries and stops, with an engine that runs nothing."""

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from study_runs import Heard, small

from ban_fast.errors import UserError
from ban_fast.studies import Outcome, Study, finished, run_study, schedule
from ban_fast.training import Interrupted

DONE, DIED = Outcome(kind="done"), Outcome(kind="failed", text="killed by SIGKILL")
MISTAKE, STOPPED = Outcome(kind="mistake", text="lower --lr"), Outcome(kind="stopped")


class Puppets:
    """An engine whose runs end one by one, in the order in which they began, as `fate` says."""

    def __init__(self, room: int, fate: Callable[[str], Outcome]) -> None:
        self.room, self.fate = room, fate
        self.names: list[str] = []
        self.most = 0
        self.is_stopping = self.is_closed = False

    @property
    def running(self) -> int:
        return len(self.names)

    def has_room(self) -> bool:
        return self.running < self.room

    def start(self, name: str) -> None:
        self.names.append(name)
        self.most = max(self.most, self.running)

    def ended(self, seconds: float) -> list[tuple[str, Outcome]]:
        name = self.names.pop(0)
        return [(name, STOPPED if self.is_stopping else self.fate(name))]

    def ask_to_stop(self) -> None:
        self.is_stopping = True

    def close(self) -> None:
        self.is_closed = True


Play = Callable[..., tuple[Puppets, dict[str, str], Heard]]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    def execute(
        study: Study, fate: Callable[[str], Outcome] = lambda name: DONE, room: int = 2, retries: int = 2
    ) -> tuple[Puppets, dict[str, str], Heard]:
        puppets, heard = Puppets(room, fate), Heard()
        monkeypatch.setattr(schedule, "_engine", lambda *_: puppets)
        failed = run_study(study, tmp_path / "study", retries=retries, observer=heard)
        assert puppets.is_closed
        assert puppets.most <= room
        return puppets, failed, heard

    return execute


@pytest.fixture
def study() -> Study:
    """teacher 0, ban 0, cwtm 0, teacher 1, ban 1, cwtm 1."""
    return Study.vary(small(), {"objective.name": ["ban", "cwtm"]}, seeds=[0, 1])


def names(study: Study, *positions: int) -> list[str]:
    return [study.runs[position].name for position in positions]


def test_a_student_waits_for_its_teacher_and_nobody_else_does(study: Study, play: Play) -> None:
    _, failed, heard = play(study)
    assert failed == {}
    assert heard.started == [(name, 1) for name in names(study, 0, 3, 1, 2, 4, 5)]
    assert [name for name, _, _ in heard.ended] == names(study, 0, 3, 1, 2, 4, 5)


def test_one_at_a_time(study: Study, play: Play) -> None:
    assert [name for name, _ in play(study, room=1)[2].started] == names(study, 0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_what_dies_is_tried_again_so_often_and_no_more(study: Study, play: Play, retries: int) -> None:
    (fated,) = names(study, 1)
    _, failed, heard = play(study, lambda name: DIED if name == fated else DONE, retries=retries)
    assert failed == {fated: "killed by SIGKILL"}
    assert [attempt for name, attempt in heard.started if name == fated] == list(range(1, retries + 2))
    assert [again for name, _, again in heard.ended if name == fated] == [True] * retries + [False]
    assert sum(kind == "done" for _, kind, _ in heard.ended) == 5


def test_what_died_goes_on_before_others_begin(study: Study, play: Play) -> None:
    fates = {names(study, 1)[0]: [DIED, DIED, DONE]}
    _, _, heard = play(study, lambda name: fates[name].pop(0) if name in fates else DONE, room=1)
    assert [name for name, _ in heard.started] == names(study, 0, 1, 1, 1, 2, 3, 4, 5)


def test_a_second_try_may_do(study: Study, play: Play) -> None:
    fates = {name: [DIED, STOPPED, DONE] for name in names(study, 0, 4)}
    _, failed, heard = play(study, lambda name: fates[name].pop(0) if name in fates else DONE)
    assert failed == {}
    assert fates == {name: [] for name in fates}
    assert len(heard.started) == 6 + 4


def test_what_can_not_be_started_keeps_nobody_from_it(
    study: Study, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fated,) = names(study, 1)
    start = Puppets.start

    def refusing(puppets: Puppets, name: str) -> None:
        if name == fated:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        start(puppets, name)

    monkeypatch.setattr(Puppets, "start", refusing)
    _, failed, heard = play(study, retries=1)
    assert failed == {fated: "could not be started: Resource temporarily unavailable"}
    assert sum(kind == "done" for _, kind, _ in heard.ended) == 5


def test_a_mistake_is_not_tried_again(study: Study, play: Play) -> None:
    (fated,) = names(study, 2)
    _, failed, heard = play(study, lambda name: MISTAKE if name == fated else DONE)
    assert failed == {fated: "lower --lr"}
    assert len(heard.started) == 6


def test_students_of_a_teacher_that_failed_are_not_begun(study: Study, play: Play) -> None:
    teacher, *pupils = names(study, 0, 1, 2)
    _, failed, heard = play(study, lambda name: MISTAKE if name == teacher else DONE)
    reason = f"not run, as its teacher's run, {teacher}, failed"
    assert failed == {teacher: "lower --lr", **dict.fromkeys(pupils, reason)}
    assert sorted(name for name, _ in heard.started) == sorted(names(study, 0, 3, 4, 5))


def test_stopped(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more is begun, those that run are waited for; once nothing is left, a stop comes too late."""
    puppets, heard = Puppets(2, lambda name: DONE), Heard()
    monkeypatch.setattr(schedule, "_engine", lambda *_: puppets)
    with pytest.raises(Interrupted):
        run_study(study, tmp_path / "a", observer=heard, should_stop=lambda: len(heard.ended) == 2)
    assert (puppets.running, puppets.is_closed) == (0, True)
    assert len(heard.started) == 3
    assert heard.ended[2:] == [(*names(study, 1), "stopped", True)]
    puppets, heard = Puppets(2, lambda name: DONE), Heard()
    assert run_study(study, tmp_path / "b", observer=heard, should_stop=lambda: len(heard.ended) == 6) == {}


def test_directories_that_are_taken(study: Study, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("study", "config"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.json").write_text("{}")
    for name, words in (
        ("study", "holds a study already: continue it with --resume, or choose another --out"),
        ("config", "holds a run already: choose another --out"),
        ("file", "is not a directory: choose another --out"),
    ):
        with pytest.raises(UserError, match=words):
            run_study(study, tmp_path / name)
    with pytest.raises(UserError, match=r"there is no study in .*; start one without --resume"):
        run_study(None, tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_what_is_asked_for_is_checked_before_anything_is_written(study: Study, tmp_path: Path) -> None:
    for asked, words in (
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"retries": -1}, "--retries must be at least 0, got -1"),
        ({"engine": "slurm"}, "--engine must be one of auto, local, ray, got 'slurm'"),
        ({"gpus_per_run": 3.0}, "--gpus-per-run is 3"),
    ):
        with pytest.raises(UserError, match=words):
            run_study(study, tmp_path / "out", **asked)
    with pytest.raises(UserError, match="pass study=, or resume=True"):
        run_study(None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ray_that_is_not_installed(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Ray is not installed; pip install 'ban_fast\[ray\]', or use --engine local"):
        run_study(study, tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "127.0.0.1:70000"])
def test_a_ray_cluster_that_is_not_there(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr("ban_fast.studies.on_ray._ray", lambda: SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"^no Ray cluster answers at {re.escape(address)}, .* or use --engine local$"):
        run_study(study, tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()


def test_finished_is_what_the_directory_says(study: Study, tmp_path: Path) -> None:
    run = study.runs[1]
    assert not finished(tmp_path, run)
    (tmp_path / run.name).mkdir()
    (tmp_path / run.name / "config.json").write_text(json.dumps(run.config.to_dict()))
    assert not finished(tmp_path, run)
    figures = {"error": 1.0, "nll": 1.0, "ece": 0.1}
    bins = {"count": [1], "confidence": [0.5], "accuracy": [1.0]}
    records = [{"generation": number, "test": figures, "reliability": bins} for number in range(2)]
    results = {"format": 1, "generations": records[:1], "ensembles": []}
    (tmp_path / run.name / "results.json").write_text(json.dumps(results))
    assert not finished(tmp_path, run)
    results["generations"] = records
    (tmp_path / run.name / "results.json").write_text(json.dumps(results))
    assert finished(tmp_path, run)
    (tmp_path / run.name / "config.json").write_text(json.dumps(study.runs[2].config.to_dict()))
    assert not finished(tmp_path, run), "another run's directory: going on with it will tell"
