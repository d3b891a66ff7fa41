"""A run that takes its teacher from another one is the run that would have trained it, file by file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import EPOCHS, Recorder, StopAt, config, footprint, own

from ban_fast.config import TeacherConfig
from ban_fast.errors import UserError
from ban_fast.training import Interrupted, run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of generation 0 alone."""
    path = tmp_path_factory.mktemp("adoption") / "teacher"
    run(config(generations=0), out=path, **own())
    return path


def files(path: Path) -> set[Path]:
    return {file.relative_to(path) for file in path.rglob("*")}


@pytest.mark.parametrize("changes", [{}, {"generations": 1, "teacher": TeacherConfig(mode="live")}], ids=["", "live"])
@pytest.mark.parametrize("objective", ["ban+l", "label"])
def test_an_adopted_teacher_is_one_trained_here(
    teacher: Path, objective: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    settings, observer = config(objective, **changes), Recorder()
    run(settings, out=tmp_path / "adopted", teacher_from=teacher, observer=observer, **own())
    run(settings, out=tmp_path / "whole", **own())
    assert footprint(tmp_path / "adopted") == footprint(tmp_path / "whole")
    assert files(tmp_path / "adopted") == files(tmp_path / "whole")
    assert 0 not in observer.steps
    assert observer.messages == []
    again = Recorder()
    run(settings, out=tmp_path / "adopted", resume=True, teacher_from=teacher, observer=again, **own())
    assert not again.steps


def test_a_run_that_has_a_teacher_keeps_it(teacher: Path, tmp_path: Path) -> None:
    """Stopped in generation 1, it goes on without looking for the other directory; in generation 0, it looks."""
    settings = config("dkpp", checkpoint_seconds=0.0)
    run(settings, out=tmp_path / "whole", **own())
    for question, source in ((2, teacher), (EPOCHS * 4 + 5, tmp_path / "not there")):
        path = tmp_path / str(question)
        with pytest.raises(Interrupted):
            run(settings, out=path, should_stop=StopAt(question), **own())
        run(settings, out=path, resume=True, teacher_from=source, **own())
        assert footprint(path) == footprint(tmp_path / "whole")


def test_a_teacher_without_a_run_directory_of_its_own(teacher: Path) -> None:
    adopted = run(config("cwtm"), teacher_from=teacher, **own())
    whole = run(config("cwtm"), **own())
    for mine, theirs in zip(adopted.models, whole.models, strict=True):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name])


def test_another_teacher_is_refused(teacher: Path, tmp_path: Path) -> None:
    for changes, words in (({"seed": 1}, "seed is 0 there, and 1 here"), ({"epochs": 4}, "epochs is 3 there, and 4")):
        with pytest.raises(UserError, match=words):
            run(config(**changes), teacher_from=teacher, **own())
    with pytest.raises(UserError, match="is not a run directory"):
        run(config(), teacher_from=tmp_path / "nothing", **own())


def test_a_teacher_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(config(), out=tmp_path / "begun", should_stop=StopAt(3), **own())
    with pytest.raises(UserError, match="is not trained yet: finish that run first"):
        run(config("cwtm"), teacher_from=tmp_path / "begun", **own())


def test_a_damaged_teacher_is_refused(teacher: Path, tmp_path: Path) -> None:
    run(config(generations=0), out=tmp_path / "teacher", **own())
    file = tmp_path / "teacher" / "generation-0" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="is not the file that the run wrote"):
        run(config(), out=tmp_path / "run", teacher_from=tmp_path / "teacher", **own())
    assert not (tmp_path / "run" / "generation-0" / "model.safetensors").exists()


def test_another_footing_is_said(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "teacher"
    run(config(generations=0), out=path, **own())
    environment = json.loads((path / "environment.json").read_text())
    environment["threads"] += 1
    (path / "environment.json").write_text(json.dumps(environment))
    observer = Recorder()
    run(config(generations=1), out=tmp_path / "run", teacher_from=path, observer=observer, **own())
    assert any("was trained on another footing (CPU threads 2 then, 1 now)" in text for text in observer.messages)
