"""A cache filled ahead: the same bits, no forward pass in training, stopped and resumed without loss."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import BATCH, Recorder, StopAt, but_for_teachers, config, digits, footprint, own

from ban_fast.config import Config, TeacherConfig
from ban_fast.errors import OptionError
from ban_fast.training import Interrupted, cache_fill, loop, run, run_together
from ban_fast.training.teacher_cache import CachedTeacher

LAZY, AHEAD = (TeacherConfig(mode="cache", cache_fill=fill) for fill in ("lazy", "ahead"))

SETTINGS: dict[str, tuple[Config, dict[str, Any]]] = {
    "one view": (config("ban"), own()),
    "nine views": (digits("dkpp", epochs=5), {}),
    "CWTM, its confidences": (config("cwtm"), own()),
    "a last epoch cut short": (digits("ban+l", epochs=5, max_steps=18), {}),
}


def settings(name: str, teacher: TeacherConfig) -> tuple[Config, dict[str, Any]]:
    chosen, arguments = SETTINGS[name]
    return Config.from_dict(chosen.to_dict() | {"teacher": Config(teacher=teacher).to_dict()["teacher"]}), arguments


@pytest.fixture
def asked_in_training(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images that a cached teacher was shown while a generation was trained."""
    shown: list[int] = []
    is_training = False
    logits, run_epoch = CachedTeacher.logits, loop.Loop.run_epoch

    def counted(teacher: CachedTeacher, images: torch.Tensor) -> torch.Tensor:
        if is_training:
            shown.append(len(images))
        return logits(teacher, images)

    def training(*arguments: Any) -> None:
        nonlocal is_training
        is_training = True
        try:
            run_epoch(*arguments)
        finally:
            is_training = False

    monkeypatch.setattr(CachedTeacher, "logits", counted)
    monkeypatch.setattr(loop.Loop, "run_epoch", training)
    return shown


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_bits_and_no_forward_pass_in_training(tmp_path: Path, asked_in_training: list[int], name: str) -> None:
    for fill, teacher in (("lazy", LAZY), ("ahead", AHEAD)):
        asked_in_training.clear()
        chosen, arguments = settings(name, teacher)
        run(chosen, out=tmp_path / fill, **arguments)
        assert bool(asked_in_training) == (fill == "lazy")
    one, other = footprint(tmp_path / "lazy"), footprint(tmp_path / "ahead")
    assert but_for_teachers(one) == but_for_teachers(other)
    # The same rows; only the batches that are filled up with images shown before are fewer.
    counts = [[r["teacher"]["forward_images"] for r in found["results"]["generations"][1:]] for found in (one, other)]
    assert all(lazy - ahead >= 0 for lazy, ahead in zip(*counts, strict=True))
    assert all(count % BATCH == 0 for count in counts[1])


def test_how_many_rows_is_said(tmp_path: Path) -> None:
    observer = Recorder()
    chosen, arguments = settings("one view", AHEAD)
    run(chosen, out=tmp_path, observer=observer, **arguments)
    said = [
        re.fullmatch(r"generation (\d): (\d+) rows of its teacher's cache were computed ahead", text)
        for text in observer.messages
    ]
    assert [match.group(1) for match in said if match] == ["1", "2"]
    # 72 samples in batches of 16 leave 8 out of an epoch, others in each: of the three, few or none.
    assert all(64 < int(match.group(2)) <= 72 for match in said if match)


def test_stopped_while_it_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed is not computed again."""
    chosen, arguments = settings("nine views", AHEAD)
    run(chosen, out=tmp_path / "a", **arguments)
    stop = StopAt(5)
    real = cache_fill.fill_ahead

    def stopped(*given: Any) -> int:
        return real(*given[:-1], stop)

    with monkeypatch.context() as patch:
        patch.setattr("ban_fast.training.generations.fill_ahead", stopped)
        with pytest.raises(Interrupted):
            run(chosen, out=tmp_path / "b", **arguments)
    (rows,) = (tmp_path / "b").glob("teacher-cache/*/rows.bin")
    assert rows.stat().st_size == 4 * BATCH * 10 * 4
    run(chosen, out=tmp_path / "b", resume=True, **arguments)
    assert but_for_teachers(footprint(tmp_path / "b")) == but_for_teachers(footprint(tmp_path / "a"))
    asked = [footprint(tmp_path / name)["results"]["generations"][1]["teacher"] for name in ("a", "b")]
    assert asked[0] == asked[1]


@pytest.mark.parametrize(("then", "now"), [(LAZY, AHEAD), (AHEAD, LAZY)])
def test_a_run_may_go_on_the_other_way(tmp_path: Path, then: TeacherConfig, now: TeacherConfig) -> None:
    run(settings("nine views", then)[0], out=tmp_path / "a")
    with pytest.raises(Interrupted):
        run(settings("nine views", then)[0], out=tmp_path / "b", should_stop=StopAt(40))
    run(settings("nine views", now)[0], out=tmp_path / "b", resume=True)
    assert but_for_teachers(footprint(tmp_path / "b")) == but_for_teachers(footprint(tmp_path / "a"))


def test_students_side_by_side_share_it() -> None:
    observer = Recorder()
    run_together(config(students=("ban", "dkpp"), generations=1, teacher=AHEAD), observer=observer, **own())
    assert len([text for text in observer.messages if "computed ahead" in text]) == 1


@pytest.mark.slow
def test_loaders_that_read_files_fill_it_too(tmp_path: Path, asked_in_training: list[int]) -> None:
    chosen, _ = settings("nine views", AHEAD)
    run(chosen, out=tmp_path / "memory")
    chosen.data.loader = "torch"
    run(chosen, out=tmp_path / "torch")
    assert not asked_in_training
    assert but_for_teachers(footprint(tmp_path / "torch")) == but_for_teachers(footprint(tmp_path / "memory"))


def test_large_batches_where_they_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the probe decides, and a last part is made of batches of training."""
    sizes: list[int] = []
    compute = CachedTeacher.compute

    def counted(teacher: CachedTeacher, keys: torch.Tensor, images: torch.Tensor) -> None:
        sizes.append(len(images))
        compute(teacher, keys, images)

    monkeypatch.setattr(CachedTeacher, "compute", counted)
    monkeypatch.setattr(cache_fill, "_LARGE", 3)
    monkeypatch.setattr(cache_fill, "_LARGE_ON", "cpu")
    chosen, arguments = settings("nine views", AHEAD)
    run(chosen, **arguments)
    assert set(sizes) == {BATCH, 3 * BATCH}
    assert sizes.index(BATCH) > 0
    sizes.clear()
    monkeypatch.setattr(cache_fill, "_same_bits", lambda *_: False)
    run(chosen, **arguments)
    assert set(sizes) == {BATCH}


def test_a_live_teacher_has_none() -> None:
    with pytest.raises(OptionError, match=r"teacher\.cache_fill: a live teacher has no cache; leave it out"):
        run(config(teacher=TeacherConfig(mode="live", cache_fill="ahead")), **own())


def test_stopped_in_the_last_evaluation(tmp_path: Path) -> None:
    """Where nothing is left to be read, nothing is filled."""
    chosen, arguments = settings("one view", AHEAD)
    arguments = arguments | {"validation": arguments["test"]}
    run(chosen, out=tmp_path / "whole", **arguments)
    expected = footprint(tmp_path / "whole")

    class InTheLastEvaluation:
        """`should_stop`, once the student of generation 1 has made its last step and closed its last epoch."""

        def __call__(self) -> bool:
            journal = tmp_path / "run" / "generation-1" / "metrics.jsonl"
            return journal.is_file() and len(journal.read_text().splitlines()) == chosen.epochs

    with pytest.raises(Interrupted):
        run(chosen, out=tmp_path / "run", should_stop=InTheLastEvaluation(), **arguments)
    run(chosen, out=tmp_path / "run", resume=True, **arguments)
    assert footprint(tmp_path / "run") == expected
