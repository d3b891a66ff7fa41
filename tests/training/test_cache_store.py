"""Rows on disk: whatever is cut off, torn or foreign, what is read is what was written, from its beginning on."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ban_fast.errors import UserError
from ban_fast.training.cache_store import CONFIDENCE, DESCRIPTION, INDEX, ROWS, FileRows, MemoryRows

WIDTH, CHUNK, CHUNKS = 3, 4, 5
IS: dict[str, Any] = {"format": 1, "teacher": "abc", "dtype": "float32"}
MINE, THEIRS = b"11111111", b"22222222"


def chunk(number: int) -> tuple[Tensor, Tensor]:
    """(values, keys) of one append."""
    values = torch.randn(CHUNK, WIDTH, generator=torch.Generator().manual_seed(number))
    return values, torch.arange(CHUNK) + 100 * number


def opened(path: Path, owner: bytes = MINE, **changes: Any) -> FileRows:
    return FileRows(path, IS | changes, WIDTH, torch.float32, owner)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Five appends of four rows, for which the teacher was shown seven images each."""
    rows = opened(tmp_path / "cache")
    for number in range(CHUNKS):
        values, keys = chunk(number)
        rows.append(values, 7, keys)
    rows.sync()
    rows.close()
    return tmp_path / "cache"


def check(rows: FileRows, chunks: int) -> None:
    """That the first so many appends are there, and nothing else."""
    assert rows.count == chunks * CHUNK
    assert rows.forwards == chunks * 7
    expected = [chunk(number) for number in range(chunks)]
    empty = (torch.empty(0, WIDTH), torch.empty(0, dtype=torch.int64))
    assert torch.equal(rows.table, torch.cat([values for values, _ in expected] or [empty[0]]))
    assert torch.equal(rows.keys, torch.cat([keys for _, keys in expected] or [empty[1]]))


def test_rows_come_back(filled: Path) -> None:
    rows = opened(filled)
    check(rows, CHUNKS)
    assert rows.note is None
    rows.close()
    assert (filled / ROWS).stat().st_size == CHUNKS * CHUNK * WIDTH * 4, "room ahead is cut off"
    others = opened(filled, THEIRS)
    assert others.count == CHUNKS * CHUNK
    assert others.forwards == 0, "images that another run's teacher was shown"
    others.append(*[chunk(9)[0], 5, chunk(9)[1]])
    others.close()
    again = opened(filled)
    assert (again.count, again.forwards) == ((CHUNKS + 1) * CHUNK, CHUNKS * 7)
    again.close()


def test_rows_grow_beyond_the_first_room(tmp_path: Path) -> None:
    values = torch.arange(3000.0 * WIDTH).view(3000, WIDTH)
    stores = (opened(tmp_path / "cache"), MemoryRows(WIDTH, torch.float32, torch.device("cpu")))
    for rows in stores:
        for start in range(0, 3000, 100):
            rows.append(values[start : start + 100], 100, torch.arange(start, start + 100))
        assert torch.equal(rows.table, values)
        assert rows.forwards == 3000
    stores[0].close()
    assert torch.equal(opened(tmp_path / "cache").table, values)


@pytest.mark.parametrize("name", [INDEX, ROWS])
def test_cut_short_anywhere_the_beginning_counts(filled: Path, tmp_path: Path, name: str) -> None:
    """A record is 24 bytes and 8 a row; a row 12. Afterwards it goes on as if nothing had been."""
    whole = (filled / name).read_bytes()
    step = len(whole) // CHUNKS
    for length in (0, 1, step - 1, step, step + 1, 2 * step + 24, 3 * step, len(whole) - 1):
        path = tmp_path / str(length)
        shutil.copytree(filled, path)
        (path / name).write_bytes(whole[:length])
        rows = opened(path)
        chunks = length // step
        check(rows, chunks)
        for number in range(chunks, CHUNKS):
            values, keys = chunk(number)
            rows.append(values, 7, keys)
        rows.close()
        for file in (INDEX, ROWS):
            rest = (filled / file).read_bytes()
            assert (path / file).read_bytes()[: len(rest)] == rest
        rows = opened(path)
        check(rows, CHUNKS)
        rows.close()


@pytest.mark.parametrize("name", [INDEX, ROWS])
def test_any_flipped_bit_is_found(filled: Path, name: str) -> None:
    index, data = (filled / INDEX).read_bytes(), (filled / ROWS).read_bytes()
    whole = index if name == INDEX else data
    step = len(whole) // CHUNKS
    for position in range(2 * step, 3 * step):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (filled / name).write_bytes(damaged)
        rows = opened(filled)
        check(rows, 2)
        assert rows.note is not None
        assert "damaged after 8 rows" in rows.note
        rows.close()
        for file, content in ((INDEX, index), (ROWS, data)):
            (filled / file).write_bytes(content)


def test_damage_is_said(filled: Path) -> None:
    data = bytearray((filled / ROWS).read_bytes())
    data[70] ^= 4
    (filled / ROWS).write_bytes(data)
    rows = opened(filled)
    assert rows.note == f"{filled} was damaged after 4 rows: those behind are computed again"


@pytest.mark.parametrize("content", [b"", b"{", b"garbage\xff", b"[]", b'"x"'])
def test_a_damaged_description_is_one_line(filled: Path, content: bytes) -> None:
    (filled / DESCRIPTION).write_bytes(content)
    with pytest.raises(UserError, match=r"cache\.json is .*corrupted.*delete the directory .* to compute it again"):
        opened(filled)
    shutil.rmtree(filled)
    check(opened(filled), 0)


@pytest.mark.parametrize("name", ["teacher", "dtype", "format", "new"])
def test_another_cache_is_refused_and_kept(filled: Path, name: str) -> None:
    before = {file.name: file.read_bytes() for file in filled.iterdir()}
    with pytest.raises(UserError, match=f"is the cache of another {name}: .* there, other here; delete"):
        opened(filled, **{name: "other"})
    assert {file.name: file.read_bytes() for file in filled.iterdir()} == before
    rows = opened(filled)
    check(rows, CHUNKS)


def test_files_without_a_description_are_nobodys(filled: Path) -> None:
    (filled / DESCRIPTION).unlink()
    rows = opened(filled)
    check(rows, 0)
    assert json.loads((filled / DESCRIPTION).read_text()) == IS


def test_one_process_at_a_time(filled: Path) -> None:
    rows = opened(filled)
    with pytest.raises(UserError, match="in use by another process: wait for it, or choose another --cache-dir"):
        opened(filled)
    rows.close()
    opened(filled).close()


@pytest.mark.parametrize("nth", [1, 2])
def test_a_full_disk_costs_one_append(filled: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """At the rows, or at the record of them; with half of it written."""
    rows = opened(filled)
    calls = 0
    pwrite = os.pwrite

    def full(descriptor: int, data: memoryview, position: int) -> int:
        nonlocal calls
        calls += 1
        if calls == nth:
            return pwrite(descriptor, data[: len(data) // 2], position)
        if calls > nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match=r"cannot write .*rows\.bin: No space left on device"):
            rows.append(chunk(9)[0], 7, chunk(9)[1])
    check_rows = rows.table.clone()
    assert len(check_rows) == CHUNKS * CHUNK
    rows.close()
    rows = opened(filled)
    check(rows, CHUNKS)
    rows.append(chunk(9)[0], 7, chunk(9)[1])
    assert torch.equal(rows.table[-CHUNK:], chunk(9)[0])


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="cannot make"):
        opened(tmp_path / "file" / "cache")
    assert (tmp_path / "file").read_text() == "precious"
    opened(tmp_path / "cache").close()
    real = os.open

    def read_only(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *more, **others)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(UserError, match=r"cannot write .*rows\.bin: Read-only file system"):
        opened(tmp_path / "cache")


def test_removal_takes_the_empty_folder_along(tmp_path: Path) -> None:
    one, two = opened(tmp_path / "caches" / "one"), opened(tmp_path / "caches" / "two")
    one.remove()
    assert (tmp_path / "caches" / "two").exists()
    two.remove()
    assert not (tmp_path / "caches").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    values, keys = chunk(0)
    rows = FileRows(tmp_path / "cache", IS, WIDTH, dtype)
    rows.append(values.to(dtype), 4, keys)
    rows.close()
    rows = FileRows(tmp_path / "cache", IS, WIDTH, dtype)
    assert rows.table.dtype == dtype
    assert torch.equal(rows.table, values.to(dtype))


def test_confidences_beside_rounded_rows(tmp_path: Path) -> None:
    """They are those that were given, and of a row whose confidence is lost or damaged nothing counts."""

    def rounded() -> FileRows:
        return FileRows(tmp_path / "cache", IS, WIDTH, torch.float16, with_confidence=True)

    rows = rounded()
    given = [torch.rand(CHUNK, 1, generator=torch.Generator().manual_seed(number)) for number in range(CHUNKS)]
    for number, confidence in enumerate(given):
        values, keys = chunk(number)
        rows.append(values, 7, keys, confidence)
    rows.sync()
    rows.close()
    file = tmp_path / "cache" / CONFIDENCE
    whole = file.read_bytes()
    assert len(whole) == 4 * CHUNK * CHUNKS
    rows = rounded()
    assert rows.confidences is not None
    assert torch.equal(rows.confidences, torch.cat(given))
    rows.close()
    flipped = bytearray(whole)
    flipped[2 * 4 * CHUNK] ^= 1
    for content, chunks in ((bytes(flipped), 2), (whole[: 4 * CHUNK + 3], 1), (b"", 0)):
        file.write_bytes(content)
        rows = rounded()
        assert rows.count == chunks * CHUNK
        assert rows.confidences is not None
        assert torch.equal(rows.confidences, torch.cat([*given[:chunks], torch.empty(0, 1)]))
        rows.close()


def test_records_of_another_cache_do_not_count(filled: Path, tmp_path: Path) -> None:
    """Rows and records that were copied below another description: as if damaged from the first."""
    rows = opened(tmp_path / "other", teacher="xyz")
    rows.close()
    for name in (ROWS, INDEX):
        shutil.copy(filled / name, tmp_path / "other" / name)
    rows = opened(tmp_path / "other", teacher="xyz")
    check(rows, 0)
    assert rows.note is not None
    assert "damaged after 0 rows" in rows.note
    rows.close()
