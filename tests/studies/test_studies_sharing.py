"""Who of a study shares a teacher's outputs, when they are due, and how long they are kept."""

import json
from pathlib import Path
from typing import Any

import pytest
from study_runs import Heard, small

from ban_fast.config import TeacherConfig
from ban_fast.errors import UserError
from ban_fast.studies import Outcome, Study, run_study, schedule, sharing
from ban_fast.studies.study import StudyRun
from ban_fast.training import Interrupted, Observer
from ban_fast.training.locks import InUse

TEACHER, BAN, CWTM = "teacher,seed=0", "objective=ban,seed=0", "objective=cwtm,seed=0"
KEPT = {"mode": "cache", "forward_images": 96, "said": "cache"}


@pytest.fixture
def study() -> Study:
    return Study.vary(small(), {"objective.name": ["ban", "cwtm"]})


def put_down(directory: Path, record: dict[str, Any], *names: str) -> None:
    """As the teacher's run does."""
    (directory / TEACHER).mkdir(parents=True, exist_ok=True)
    text = json.dumps({"shared": [{"students": names, **record}]})
    (directory / TEACHER / sharing.SHARED).write_text(text)
    (sharing.outputs(directory, TEACHER) / "cache").mkdir(parents=True)


def test_groups() -> None:
    """Those that keep alike, of two at least, and never who wants it live, learns from labels or has no student."""
    axes = {"objective.name": ["ban", "label"], "teacher.mode": ["auto", "cache", "live"], "generations": [0, 1, 2]}
    study = Study.vary(small(), {**axes, "teacher.cache_dtype": ["fp32"]})
    teacher = next(run.teacher for run in study.runs if run.teacher is not None)
    found = [
        [(run.config.teacher.mode, run.config.generations) for run in group] for group in sharing.groups(study, teacher)
    ]
    assert found == [[("auto", 1), ("auto", 2)], [("cache", 1), ("cache", 2)]]
    alone = Study.vary(small(), {"objective.name": ["ban", "label"]})
    assert sharing.groups(alone, TEACHER) == []
    assert not sharing.is_due(Path("nowhere"), alone, TEACHER)


def test_where_a_student_finds_them(study: Study, tmp_path: Path) -> None:
    assert sharing.is_due(tmp_path, study, TEACHER)
    assert sharing.place_for(tmp_path, study[BAN]) is None, "not yet"
    put_down(tmp_path, KEPT, BAN)
    assert not sharing.is_due(tmp_path, study, TEACHER)
    assert sharing.place_for(tmp_path, study[BAN]) == sharing.outputs(tmp_path, TEACHER)
    assert sharing.place_for(tmp_path, study[CWTM]) is None, "not for that one"
    assert sharing.place_for(tmp_path, study[TEACHER]) is None
    assert sharing.note(tmp_path, study) == "teachers that several runs share were shown 96 images, once for 1 run"
    sharing.clear(tmp_path, TEACHER)
    assert sharing.place_for(tmp_path, study[BAN]) is None, "no more"
    assert not (tmp_path / "teacher-cache").exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"shared": [1]}', '{"shared": [{"mode": "cache"}]}'])
def test_a_damaged_record_is_none(study: Study, tmp_path: Path, content: str) -> None:
    put_down(tmp_path, KEPT, BAN)
    (tmp_path / TEACHER / sharing.SHARED).write_text(content)
    assert sharing.is_due(tmp_path, study, TEACHER)
    assert sharing.place_for(tmp_path, study[BAN]) is None
    assert sharing.note(tmp_path, study) is None


@pytest.mark.parametrize("mode", ["auto", "cache"])
def test_what_can_not_be_put_down_is_left_to_each(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of it stays; a place that another process fills is waited for where the cache was asked for."""
    study = Study.vary(small(teacher=TeacherConfig(mode=mode)), {"objective.name": ["ban", "cwtm"]})
    (tmp_path / TEACHER).mkdir()
    problem: UserError = InUse("it is in use")

    def fails(*_: Any) -> Any:
        (sharing.outputs(tmp_path, TEACHER) / "half").mkdir(parents=True)
        raise problem

    monkeypatch.setattr(sharing, "share_outputs", fails)
    if mode == "cache":
        with pytest.raises(InUse):
            sharing.share(tmp_path, study, TEACHER, Observer(), lambda: False)
        assert sharing.is_due(tmp_path, study, TEACHER)
        sharing.clear(tmp_path, TEACHER)
        problem = UserError("the disk is full")
    sharing.share(tmp_path, study, TEACHER, Observer(), lambda: False)
    (record,) = sharing.shared(tmp_path, TEACHER) or ()
    assert (record["mode"], record["said"]) == ("live", f"live: {problem}")
    assert not (tmp_path / "teacher-cache").exists()


class Puppets:
    """An engine whose runs end one by one as they began, and of which it is known what was kept then."""

    def __init__(self, directory: Path, failing: str = "") -> None:
        self.directory, self.failing, self.names, self.kept = directory, failing, [], {}  # type: ignore[var-annotated]

    @property
    def running(self) -> int:
        return len(self.names)

    def has_room(self) -> bool:
        return self.running < 2

    def start(self, name: str) -> None:
        self.kept[name] = sharing.outputs(self.directory, TEACHER).exists()
        self.names.append(name)

    def ended(self, seconds: float) -> list[tuple[str, Outcome]]:
        name = self.names.pop(0)
        if name == TEACHER:
            put_down(self.directory, KEPT, BAN, CWTM)
        return [(name, Outcome(kind="mistake" if name == self.failing else "done"))]

    def ask_to_stop(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("failing", ["", BAN, CWTM])
def test_kept_until_the_last_student_has_ended(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """However it ended; for a stopped study they stay."""
    puppets = Puppets(tmp_path / "a", failing)
    monkeypatch.setattr(schedule, "_engine", lambda *_: puppets)
    assert list(run_study(study, tmp_path / "a")) == [failing] * bool(failing)
    assert puppets.kept == {TEACHER: False, BAN: True, CWTM: True}
    assert not (tmp_path / "a" / "teacher-cache").exists()
    puppets, heard = Puppets(tmp_path / "b"), Heard()
    with pytest.raises(Interrupted):
        run_study(study, tmp_path / "b", observer=heard, should_stop=lambda: len(heard.ended) == 1)
    assert (tmp_path / "b" / "teacher-cache").exists()


def test_a_teachers_run_whose_outputs_are_due_is_gone_on_with(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its teacher was trained before the study was killed. Not so where nobody is left to teach."""
    done = {TEACHER}

    def is_finished(_: Path, run: StudyRun) -> bool:
        return run.name in done

    monkeypatch.setattr(schedule, "finished", is_finished)
    for before, started in (({TEACHER}, [TEACHER, BAN, CWTM]), ({TEACHER, BAN, CWTM}, [])):
        done.clear()
        done |= before
        out, heard = tmp_path / str(len(before)), Heard()
        puppets = Puppets(out)
        monkeypatch.setattr(schedule, "_engine", lambda *_, puppets=puppets: puppets)
        out.mkdir()
        study.save(out)
        assert run_study(None, out, resume=True, observer=heard) == {}
        assert [name for name, _ in heard.started] == started
        assert heard.before == (frozenset() if started else before)
