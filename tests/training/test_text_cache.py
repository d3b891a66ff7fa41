"""A language model's kept outputs are its live ones, to the bit, wherever the text was left and whatever was kept."""

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Heard, StopAt, but_for_teachers, footprint
from text_runs import STREAMS, WINDOW, text_config, write_text

from ban_fast.config import Config, ModelConfig, TeacherConfig
from ban_fast.data import load_corpus
from ban_fast.training import Interrupted, run
from ban_fast.training.adoption import teacher_settings
from ban_fast.training.generations import never
from ban_fast.training.jobs import make_task
from ban_fast.training.seeds import generation_seed
from ban_fast.training.shared import share_outputs
from ban_fast.training.teacher_choice import choose_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "corpus", lines=40)


def settings(text: Path, mode: str = "cache", **teacher: Any) -> Config:
    return text_config(text, generations=1, teacher=TeacherConfig(mode=mode, **teacher))


def test_kept_outputs_are_the_live_ones(text: Path, tmp_path: Path) -> None:
    observer = Heard()
    run(settings(text, "live"), out=tmp_path / "live")
    run(settings(text), out=tmp_path / "cache", observer=observer)
    live, kept = footprint(tmp_path / "live"), footprint(tmp_path / "cache")
    assert but_for_teachers(kept) == but_for_teachers(live)
    windows = observer.plan.steps_per_epoch
    teacher = kept["results"]["generations"][1]["teacher"]
    assert teacher == {"mode": "cache", "dtype": "float32", "forward_tokens": windows * STREAMS * WINDOW}
    assert observer.said[0][1].startswith("cache: 3 epochs show the same windows: 67% fewer forward passes than live")
    assert "the same bits as live" in observer.said[0][1]
    assert not (tmp_path / "cache" / "teacher-cache").exists()


@pytest.mark.slow
def test_put_down_for_several_runs(text: Path, tmp_path: Path) -> None:
    """Once, also where it is stopped between two windows; students read them, and ask nothing."""
    students = [
        text_config(text, name, generations=1, teacher=TeacherConfig(mode="cache")) for name in ("ban", "ban+l")
    ]
    run(teacher_settings(students[0]), out=tmp_path / "teacher")
    with pytest.raises(Interrupted):
        share_outputs(tmp_path / "teacher", students, tmp_path / "kept", StopAt(5))
    record = share_outputs(tmp_path / "teacher", students, tmp_path / "kept", never)
    assert record["said"].startswith("cache: 3 epochs show the same windows to 2 students, ")
    for student in students:
        name = student.objective.name
        run(student, out=tmp_path / name, teacher_from=tmp_path / "teacher", outputs_from=tmp_path / "kept")
        run(student, out=tmp_path / f"{name} alone")
        one, alone = footprint(tmp_path / name), footprint(tmp_path / f"{name} alone")
        assert but_for_teachers(one) == but_for_teachers(alone)
        teachers = [found["results"]["generations"][1]["teacher"] for found in (one, alone)]
        assert (teachers[0]["mode"], teachers[0]["forward_tokens"]) == ("cache", 0)
        assert teachers[1]["forward_tokens"] == record["forward_tokens"] > 0


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_rounded_outputs_teach_nearly_the_same(text: Path, dtype: str) -> None:
    live = run(settings(text, "live")).generations[1]["test"]
    kept = run(settings(text, cache_dtype=dtype)).generations[1]["test"]
    assert kept != live
    assert kept["nll"] == pytest.approx(live["nll"], rel=1e-3)  # 2^-8 of small logits, both ways


def test_a_cache_that_another_run_left_unfinished(text: Path, tmp_path: Path) -> None:
    """Its windows are read, not computed again; the text is followed from its start to where they end."""
    place = str(tmp_path / "place")
    whole = settings(text, cache_directory=place)
    run(whole, out=tmp_path / "whole")
    shutil.rmtree(place)
    with pytest.raises(Interrupted):
        run(whole, out=tmp_path / "first", should_stop=StopAt(55))
    left = [file.stat().st_size for file in Path(place).glob("*/rows.bin")]
    assert len(left) == 1
    assert 0 < left[0] < 14 * 4 * STREAMS * WINDOW * len(load_corpus(text).train)
    run(whole, out=tmp_path / "second")
    assert but_for_teachers(footprint(tmp_path / "second")) == but_for_teachers(footprint(tmp_path / "whole"))


@pytest.mark.parametrize("point", [52, pytest.param(64, marks=pytest.mark.slow)])
def test_rows_that_were_lost_are_computed_again(text: Path, tmp_path: Path, point: int) -> None:
    """In the first epoch, and in the second, when every window had been read: the same rows come again."""
    run(settings(text), out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(settings(text), out=tmp_path / "lost", should_stop=StopAt(point))
    shutil.rmtree(tmp_path / "lost" / "teacher-cache")
    run(settings(text), out=tmp_path / "lost", resume=True)
    assert but_for_teachers(footprint(tmp_path / "lost")) == but_for_teachers(footprint(tmp_path / "whole"))


def test_a_window_out_of_turn_is_read_after_all_before_it(text: Path) -> None:
    """A state that some other window has left is not carried into it, nor into the rows that are kept."""
    config = settings(text)
    task = make_task(config, CPU)
    network = task.network(generation_seed(0, 0))
    windows = list(islice(task.train(0).epoch(0), 7))
    teacher, _ = choose_teacher(network, config, task, task.train(0), ["ban+l"], None, bytes(8))
    for number in (5, 0, 6):
        taught, state = teacher(windows[number]), None
        for window in windows[: number + 1]:
            with torch.no_grad():
                logits, state = network(window.images, state)
        assert taught.logits is not None
        assert torch.equal(taught.logits[taught.rows], logits.flatten(0, 1))
    teacher.close()


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        (8, "live: a network of 1,278 parameters computes its outputs as fast as 56 B a token are read"),
        (64, "cache: 3 epochs show the same windows"),
    ],
)
def test_auto_keeps_what_is_read_sooner_than_computed(text: Path, tmp_path: Path, hidden: int, said: str) -> None:
    config = settings(text, "auto")
    config.model = ModelConfig(name=f"lstm-{hidden}")
    task = make_task(config, CPU)
    network = task.network(generation_seed(0, 0))
    teacher, words = choose_teacher(network, config, task, task.train(0), ["ban+l"], tmp_path, bytes(8))
    teacher.close()
    assert words is not None
    assert words.startswith(said)
