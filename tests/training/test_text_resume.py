"""A language model's run that is stopped anywhere ends as if it had not been; one with another text is refused."""

from pathlib import Path

import pytest
from small_runs import Recorder, StopAt, footprint
from text_runs import text_config, write_text

from ban_fast.config import Config, TeacherConfig
from ban_fast.errors import OptionError, UserError
from ban_fast.training import Interrupted, evaluate_run, run, run_together


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "corpus", lines=40)


def short(text: Path, teacher: str = "live") -> Config:
    return text_config(text, generations=1, epochs=2, teacher=TeacherConfig(mode=teacher))


@pytest.mark.parametrize("teacher", ["live", pytest.param("cache", marks=pytest.mark.slow)])
def test_stopped_at_many_questions(text: Path, tmp_path: Path, teacher: str) -> None:
    """In the midst of a text, with hidden states of student and teacher; in evaluations; between generations."""
    settings = short(text, teacher)
    never = StopAt(10**9)
    run(settings, out=tmp_path / "whole", should_stop=never)
    count = 10**9 - never.left
    expected = footprint(tmp_path / "whole")
    for point in range(1, count + 1, 7):
        path = tmp_path / str(point)
        with pytest.raises(Interrupted):
            run(settings, out=path, should_stop=StopAt(point))
        last = Recorder()
        run(settings, out=path, resume=True, observer=last)
        assert footprint(path) == expected, point
        assert sum(last.steps.values()) + sum(done for *_, done in last.started) >= last.plan.steps


@pytest.mark.slow
def test_students_side_by_side_that_were_saved_apart(text: Path, tmp_path: Path) -> None:
    """A kill between two checkpoints leaves one student's text ahead of the other's: both teachers' states serve."""
    settings = text_config(text, students=("ban+l", "ban"), generations=2, epochs=2, teacher=TeacherConfig(mode="live"))
    run_together(settings, out=tmp_path / "whole")
    for number, early, more in ((1, 45, 6), (1, 47, 12), (2, 80, 7), (2, 84, 12)):
        path = tmp_path / f"{early}"
        behind = path / "ban" / f"generation-{number}" / "state.pt"
        with pytest.raises(Interrupted):
            run_together(settings, out=path, should_stop=StopAt(early))
        earlier = behind.read_bytes()
        with pytest.raises(Interrupted):
            run_together(settings, out=path, resume=True, should_stop=StopAt(more))
        assert behind.read_bytes() != earlier
        behind.write_bytes(earlier)
        run_together(settings, out=path, resume=True)
        for name in ("ban_l", "ban"):
            assert footprint(path / name) == footprint(tmp_path / "whole" / name), (early, name)


def test_another_vocabulary_is_refused(text: Path, tmp_path: Path) -> None:
    """Of another size, and of the same size with other words: a teacher's outputs would mean other words."""
    folder = write_text(tmp_path / "corpus", lines=40)
    with pytest.raises(Interrupted):
        run(short(folder), out=tmp_path / "run", should_stop=StopAt(40))
    run(text_config(folder, generations=0, epochs=1), out=tmp_path / "teacher")
    train = (folder / "train.txt").read_text()
    (folder / "train.txt").write_text(train.replace("dddd", "other"))
    with pytest.raises(
        UserError, match=r"began with vocabulary [0-9a-f]{16}, here it is [0-9a-f]{16}: resume with the"
    ):
        run(short(folder), out=tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="vocabulary"):
        run(text_config(folder, epochs=1), teacher_from=tmp_path / "teacher")
    with pytest.raises(UserError, match="vocabulary"):
        evaluate_run(tmp_path / "teacher", device="cpu")
    (folder / "train.txt").write_text(train + "something new\n")
    with pytest.raises(UserError, match="began with classes 14, here it is 16"):
        run(short(folder), out=tmp_path / "run", resume=True)


def test_another_reading_is_another_run(text: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(short(text), out=tmp_path / "run", should_stop=StopAt(5))
    other = short(text)
    other.text.window = 7
    with pytest.raises(OptionError, match="is 7 here, but 5 in the run in") as caught:
        run(other, out=tmp_path / "run", resume=True)
    assert caught.value.field == "text.window"
