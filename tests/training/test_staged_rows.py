"""A teacher's rows that lie in another memory than the device's: the bits of rows in place, and no wait in a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_graphs import Emulated
from small_runs import BATCH, CLASSES, StopAt, but_for_steps, config, digits, footprint, own, samples
from text_runs import text_config, write_text
from torch import Tensor

from ban_fast.config import Config, TeacherConfig
from ban_fast.data import Batch
from ban_fast.training import Interrupted, run, run_together, teacher_cache
from ban_fast.training.cache_store import MemoryRows
from ban_fast.training.staged_rows import StagedRows
from ban_fast.training.teacher_cache import CachedTeacher

CPU = torch.device("cpu")
CACHE = TeacherConfig(mode="cache")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Has every table taken for one that the device can't read; how many rows were brought, each time."""
    brought: list[int] = []
    real = StagedRows.bring

    def bring(staged: StagedRows, keys: Tensor, *others: Any) -> None:
        brought.append(len(keys))
        real(staged, keys, *others)

    def install() -> list[int]:
        monkeypatch.setattr(teacher_cache, "_is_elsewhere", lambda *_: True)
        monkeypatch.setattr(StagedRows, "bring", bring)
        return brought

    return install


SETTINGS: dict[str, Callable[[], tuple[Config, dict[str, Any]]]] = {
    "logits": lambda: (config("ban+l", teacher=CACHE), own()),
    "permuted, rounded": lambda: (config("dkpp", teacher=TeacherConfig(mode="cache", cache_dtype="bf16")), own()),
    "confidences alone": lambda: (config("cwtm", teacher=CACHE), own()),
    "confidences beside rounded logits": lambda: (
        digits("cwtm", limit=64, epochs=6, teacher=TeacherConfig(mode="cache", cache_dtype="fp16")),
        {},
    ),
    "views of images": lambda: (digits("ban", epochs=6, teacher=CACHE), {}),
    "filled ahead": lambda: (digits("ban", epochs=3, teacher=TeacherConfig(mode="cache", cache_fill="ahead")), {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_bits_of_rows_in_place(tmp_path: Path, elsewhere: Callable[[], list[int]], name: str) -> None:
    """Of four batches an epoch, all are brought at once; whoever taught, and how often it was asked, is the same."""
    settings, arguments = SETTINGS[name]()
    run(settings, out=tmp_path / "here", **arguments)
    brought = elsewhere()
    run(settings, out=tmp_path / "there", **arguments)
    assert footprint(tmp_path / "there") == footprint(tmp_path / "here")
    assert brought == [4 * BATCH] * settings.epochs * settings.generations


@pytest.mark.parametrize("name", ["logits", "confidences beside rounded logits"])
def test_in_recorded_steps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    graphs: Callable[[int], Emulated],
    elsewhere: Callable[[], list[int]],
    name: str,
) -> None:
    """Four batches at a time, and replays of two steps: what they read stays where it is."""
    settings, arguments = SETTINGS[name]()
    settings.epochs = 8
    monkeypatch.setattr(teacher_cache, "_MOST_AHEAD", 4)
    run(settings, out=tmp_path / "served", **arguments)
    device, brought = graphs(2), elsewhere()
    run(settings, out=tmp_path / "replayed", **arguments)
    assert but_for_steps(tmp_path / "replayed") == but_for_steps(tmp_path / "served")
    assert device.replays.count(2) >= 8
    assert set(brought) == {4 * BATCH}
    assert device.lines.count("record 2") == settings.generations + 1  # once each


@pytest.mark.parametrize("question", [17, 29, *(pytest.param(q, marks=pytest.mark.slow) for q in range(14, 38, 4))])
def test_an_interrupted_run_goes_on(tmp_path: Path, elsewhere: Callable[[], list[int]], question: int) -> None:
    settings, arguments = SETTINGS["permuted, rounded"]()
    run(settings, out=tmp_path / "a", **arguments)
    elsewhere()
    with pytest.raises(Interrupted):
        run(settings, out=tmp_path / "b", should_stop=StopAt(question), **arguments)
    run(settings, out=tmp_path / "b", resume=True, **arguments)
    assert footprint(tmp_path / "b") == footprint(tmp_path / "a")


def test_students_side_by_side(tmp_path: Path, elsewhere: Callable[[], list[int]]) -> None:
    """One teacher's rows are brought for all of them, and each line's own from the second generation on."""
    settings = config(students=("ban", "cwtm"), teacher=TeacherConfig(mode="cache", cache_dtype="bf16"))
    run_together(settings, out=tmp_path / "here", **own())
    brought = elsewhere()
    run_together(settings, out=tmp_path / "there", **own())
    for folder in ("ban", "cwtm"):
        assert footprint(tmp_path / "there" / folder) == footprint(tmp_path / "here" / folder)
    assert len(brought) == settings.epochs * (1 + 2)


def test_a_text(tmp_path: Path, elsewhere: Callable[[], list[int]]) -> None:
    """A window at a time while they are read for the first time, then some at once."""
    settings = text_config(write_text(tmp_path / "text", lines=40), generations=1, teacher=CACHE)
    run(settings, out=tmp_path / "here")
    brought = elsewhere()
    run(settings, out=tmp_path / "there")
    assert footprint(tmp_path / "there") == footprint(tmp_path / "here")
    windows = brought.count(min(brought))
    assert windows > 3
    assert brought[:windows] == [min(brought)] * windows
    assert sum(brought) == settings.epochs * windows * min(brought)
    assert len(brought) < settings.epochs * windows


def teacher(**options: Any) -> tuple[CachedTeacher, Batch]:
    x, _ = samples(BATCH, 3)
    ids = torch.arange(BATCH)
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, CLASSES))
    rows = MemoryRows(CLASSES, torch.float32, CPU)
    made = CachedTeacher(
        flat, rows=rows, samples=4 * BATCH, views=1, batch_size=BATCH, device=CPU, on_device=False, **options
    )
    return made, Batch(x, ids % CLASSES, ids, torch.zeros_like(ids))


def test_a_call_reads_the_device_alone(elsewhere: Callable[[], list[int]]) -> None:
    """The table may be gone by then. A batch that was brought again is where it was."""
    elsewhere()
    cached, batch = teacher(with_confidence=True)
    with torch.no_grad():
        wanted = cached.network(batch.images)
    other = batch._replace(sample_ids=batch.sample_ids + BATCH)
    cached.prepare([batch, other])
    before = cached.addresses()
    cached.prepare([other, batch])
    assert cached.addresses() == before
    cached._rows.table.fill_(torch.nan)
    for each in (batch, other):
        said = cached(each)
        assert said.logits is not None
        assert said.confidence is not None
        assert torch.equal(said.logits[said.rows], wanted)
        assert torch.equal(said.confidence[said.rows], wanted.softmax(1).amax(1))


def test_a_batch_is_prepared_each_time(elsewhere: Callable[[], list[int]]) -> None:
    """Known rows are still to be brought; those in place are not."""
    here, batch = teacher()
    here.prepare([batch])
    assert not here.lacks(batch.sample_ids, batch.views).any()
    elsewhere()
    there, _ = teacher()
    there.prepare([batch])
    assert there.lacks(batch.sample_ids, batch.views).all()


def test_rows_count_towards_what_is_brought_at_once() -> None:
    """64 MiB with images and rows: three batches of 20 rows of 1 MiB."""
    _, batch = teacher()
    rows = MemoryRows(2**18, torch.float32, CPU)
    wide = CachedTeacher(torch.nn.Identity(), rows=rows, samples=20, views=1, batch_size=20, device=CPU)
    assert wide.ahead(batch) == 3
    narrow = CachedTeacher(
        torch.nn.Identity(), rows=MemoryRows(4, torch.float32, CPU), samples=20, views=1, batch_size=20, device=CPU
    )
    assert narrow.ahead(batch) == 16
