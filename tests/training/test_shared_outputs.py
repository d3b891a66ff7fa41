"""A teacher's outputs put down once for the students of several runs, who read them at the same time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Heard, StopAt, but_for_teachers, config, digits, footprint, own

from ban_fast.config import Config, DataConfig, ModelConfig, TeacherConfig
from ban_fast.errors import OptionError
from ban_fast.training import Interrupted, run
from ban_fast.training.adoption import teacher_settings
from ban_fast.training.cache_store import FileRows
from ban_fast.training.generations import never
from ban_fast.training.shared import share_outputs

OBJECTIVES = ("ban", "ban+l", "cwtm", "dkpp")


def taught(path: Path, settings: Config) -> Path:
    """The run of a teacher alone."""
    run(teacher_settings(settings), out=path)
    return path


def rows(place: Path) -> dict[str, bytes]:
    """What is kept, whoever made it."""
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in place.glob("*/*.bin")}


@pytest.mark.parametrize(
    "teacher",
    [
        TeacherConfig(),
        pytest.param(TeacherConfig(mode="cache"), marks=pytest.mark.slow),
        pytest.param(TeacherConfig(mode="cache", cache_dtype="fp16", cache_fill="ahead"), marks=pytest.mark.slow),
    ],
)
def test_students_ask_nothing_and_are_those_of_separate_runs(teacher: TeacherConfig, tmp_path: Path) -> None:
    settings = [digits(objective, teacher=teacher) for objective in OBJECTIVES]
    taught(tmp_path / "teacher", settings[0])
    record = share_outputs(tmp_path / "teacher", settings, tmp_path / "kept", never)
    # 72 images in at most 9 views, in batches of 16, where four students would ask for 24 x 64 each
    assert record["mode"] == "cache"
    assert 0 < record["forward_images"] <= 72 * 9 + 16
    assert "24 epochs show 8.27 of 9 views of an image to 4 students: 90% fewer" in record["said"]
    before = rows(tmp_path / "kept")
    for each in settings:
        name = each.objective.name
        from_teacher: dict[str, Any] = {"teacher_from": tmp_path / "teacher", "outputs_from": tmp_path / "kept"}
        made = run(each, out=tmp_path / name, **from_teacher).generations[1]["teacher"]
        assert (made["mode"], made["forward_images"]) == ("cache", 0)
        is_rounded = teacher.cache_dtype == "fp16" and name != "cwtm"
        assert made["dtype"] == ("float16" if is_rounded else "float32"), "what it learned from"
        assert not (tmp_path / name / "teacher-cache").exists()
        run(each, out=tmp_path / f"{name} alone")
        assert but_for_teachers(footprint(tmp_path / name)) == but_for_teachers(footprint(tmp_path / f"{name} alone"))
    assert rows(tmp_path / "kept") == before


def test_later_generations_have_teachers_of_their_own(tmp_path: Path) -> None:
    settings = digits("dkpp", generations=2, epochs=12)
    taught(tmp_path / "teacher", settings)
    share_outputs(tmp_path / "teacher", [settings, digits("ban", epochs=12)], tmp_path / "kept", never)
    before = rows(tmp_path / "kept")
    made = run(settings, out=tmp_path / "run", outputs_from=tmp_path / "kept").generations
    assert made[1]["teacher"]["forward_images"] == 0 < made[2]["teacher"]["forward_images"]
    assert rows(tmp_path / "kept") == before


def test_stopped_while_it_fills(tmp_path: Path) -> None:
    """The rows and the count are those of one that was not stopped, what is whole already costs nothing."""
    settings = [digits("ban"), digits("cwtm")]
    taught(tmp_path / "teacher", settings[0])
    whole = share_outputs(tmp_path / "teacher", settings, tmp_path / "a", never)
    for question in (3, 7):
        with pytest.raises(Interrupted):
            share_outputs(tmp_path / "teacher", settings, tmp_path / "b", StopAt(question))
    for _ in range(2):
        again = share_outputs(tmp_path / "teacher", settings, tmp_path / "b", never)
        assert again["forward_images"] == whole["forward_images"]
    assert {key: value for key, value in rows(tmp_path / "b").items() if "index" not in key} == {
        key: value for key, value in rows(tmp_path / "a").items() if "index" not in key
    }


def test_kernels_that_are_not_batch_invariant(tmp_path: Path) -> None:
    """Asked for, rows are computed in the very batches of a student that computes them itself; "auto" leaves it."""
    changes: dict[str, Any] = {"model": ModelConfig(name="densenet-bc-10-4"), "epochs": 6}
    settings = [digits(name, teacher=TeacherConfig(mode="cache"), **changes) for name in ("ban", "dkpp")]
    taught(tmp_path / "teacher", settings[0])
    share_outputs(tmp_path / "teacher", settings, tmp_path / "kept", never)
    run(settings[0], out=tmp_path / "run", outputs_from=tmp_path / "kept")
    run(settings[0], out=tmp_path / "alone")
    assert but_for_teachers(footprint(tmp_path / "run")) == but_for_teachers(footprint(tmp_path / "alone"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"epochs": 2, "teacher": TeacherConfig(cache_dtype="bf16")},
            "live: 2 epochs show 1.7 of 9 views of an image: 5%",
        ),
        (
            {"data": DataConfig(name="digits", limit_train=72, limit_test=40, loader="torch")},
            "live: images would be read from their files once more",
        ),
    ],
)
def test_what_auto_leaves_to_each(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Too little is saved: of rounded rows by one student, whose bits they would change; or loading costs too much."""
    settings = [digits(name, **changes) for name in ("ban", "dkpp")]
    taught(tmp_path / "teacher", replace(settings[0], data=replace(settings[0].data, loader="memory")))
    record = share_outputs(tmp_path / "teacher", settings, tmp_path / "kept", never)
    assert (record["mode"], record["said"][: len(said)]) == ("live", said)
    assert not (tmp_path / "kept").exists()


def test_no_room_is_said_and_damage_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [digits(name, teacher=TeacherConfig(mode="cache")) for name in ("ban", "dkpp")]
    taught(tmp_path / "teacher", settings[0])
    with monkeypatch.context() as patch:
        patch.setattr("ban_fast.training.cache_worth.SHARE", 0)
        with pytest.raises(OptionError, match="a cache of its outputs needs about"):
            share_outputs(tmp_path / "teacher", settings, tmp_path / "kept", never)
    share_outputs(tmp_path / "teacher", settings, tmp_path / "kept", never)
    (file,) = (tmp_path / "kept").glob("*/rows.bin")
    file.write_bytes(file.read_bytes()[:-1])
    observer = Heard()
    made = run(settings[0], out=tmp_path / "run", outputs_from=tmp_path / "kept", observer=observer)
    assert "was damaged after" in observer.said[0][1]
    assert 0 < made.generations[1]["teacher"]["forward_images"] <= 64, "the last record's rows, in whole batches"
    assert run(settings[1], outputs_from=tmp_path / "kept").generations[1]["teacher"]["forward_images"] == 0
    run(settings[0], out=tmp_path / "alone")
    assert but_for_teachers(footprint(tmp_path / "run")) == but_for_teachers(footprint(tmp_path / "alone"))


def test_a_place_that_has_gone_is_none(tmp_path: Path) -> None:
    """As it has where a study that failed in part is resumed."""
    made = run(config(generations=1), outputs_from=tmp_path / "gone", **own()).generations[1]["teacher"]
    assert made["forward_images"] > 0
    assert not (tmp_path / "gone").exists()


def test_whole_caches_are_read_by_many_and_while_one_is_filled(tmp_path: Path) -> None:
    """Readers see the rows of the moment, for good; who fills is alone, and keeps nobody from reading."""

    def opened(**options: Any) -> FileRows:
        return FileRows(tmp_path / "cache", {"format": 0}, 2, torch.float32, **options)

    def values(first: int) -> tuple[torch.Tensor, int, torch.Tensor]:
        return torch.full((1500, 2), float(first)), 1500, torch.arange(first, first + 1500)

    filler = opened()
    filler.append(*values(0))
    readers = [opened(is_reader=True) for _ in range(2)]
    for first in (1500, 3000):
        filler.append(*values(first))
    filler.close()
    late = opened(is_reader=True)
    again = opened()
    again.append(*values(4500))
    for reader, count in ((readers[0], 1500), (readers[1], 1500), (late, 4500)):
        assert (reader.count, len(reader.keys), reader.note) == (count, count, None)
        assert torch.equal(reader.table[:, 0], reader.keys // 1500 * 1500.0)
        reader.table.zero_()  # in its own copy
        reader.close()
    again.close()
    last = opened(is_reader=True)
    assert torch.equal(last.table[:, 0], torch.arange(6000) // 1500 * 1500.0)
    last.close()
