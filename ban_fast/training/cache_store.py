"""Where a teacher's rows are kept: in memory, or in a file that is read in place and survives a kill.

Rows lie in the order in which they were computed, and are never changed. On disk that is an appended log:

    cache.json   what the rows are of; another description is another cache
    rows.bin     the rows, one after the other, mapped into memory to be read
    confidence.bin  beside rows that are rounded logits: CWTM's number of each, fp32, from the logits before that
    index.bin    a record for each append: checksums, how many rows, how many images the teacher was shown for them,
                 who computed them, and their keys; its checksum begins with the description, as no other cache's does

Rows are written before the record that speaks of them, both with pwrite: a full disk is an error of that call, where a
store through the mapping would be a fatal signal. When a cache is opened, the records up to the first that is cut short
or does not fit its checksums (a torn page, after a power failure) count, and the files are cut back to them. So what is
there is always the beginning of what was computed, and a resumed run computes the rest as an uninterrupted one would.
"""

import contextlib
import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .checkpoint import TEMPORARY, make_directories, write_json
from .locks import DirectoryLock

DESCRIPTION, ROWS, CONFIDENCE, INDEX = "cache.json", "rows.bin", "confidence.bin", "index.bin"
_HEAD = struct.Struct(
    "<IIII8s"
)  # CRC-32 of description, rest and keys, of rows and confidences; rows; images forwarded; owner
NOBODY = bytes(8)
"""The owner of rows that no run has to tell from others'."""
_KEY_BYTES = 8
_CONFIDENCE_BYTES = 4
_FIRST_CAPACITY = 1024


def owner_of(directory: Path) -> bytes:
    """8 bytes that tell the rows of a run in this directory from those of others."""
    return hashlib.blake2b(str(directory.resolve()).encode(), digest_size=8).digest()


class Rows(Protocol):
    """Rows of one width that are appended to, and read in place."""

    count: int
    """How many there are."""
    forwards: int
    """Images that the teacher was shown for those that this owner computed."""

    @property
    def table(self) -> Tensor:
        """[count, width]; good until the next `append`."""
        ...

    def append(self, values: Tensor, forwards: int, keys: Tensor, confidence: Tensor | None = None) -> None:
        """`values` [n, width] under `keys` int64 [n], for which the teacher was shown `forwards` images.

        `confidence`, fp32 [n, 1]: what is kept beside them, where they are rounded.
        """
        ...

    def sync(self) -> None:
        """Wait until the disk has them."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...


class MemoryRows:
    """Rows in the memory of one device, which grows by doubling beyond what was reserved."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.count = 0
        self.forwards = 0
        self._table = torch.empty(0, width, dtype=dtype, device=device)

    @property
    def table(self) -> Tensor:
        """[count, width]."""
        return self._table[: self.count]

    @property
    def room(self) -> Tensor:
        """[capacity, width]: the table, and what is not written yet below it."""
        return self._table

    def reserve(self, count: int) -> None:
        """Have room for so many rows: growing holds two tables at once, and what was recorded with one is void."""
        if count > len(self._table):
            grown = self._table.new_empty(count, self._table.shape[1])
            grown[: self.count] = self.table
            self._table = grown

    def append(
        self, values: Tensor, forwards: int, keys: Tensor | None = None, confidence: Tensor | None = None
    ) -> None:  # [n, width], [n], [n, 1]
        """Keep `values`; their keys and confidences are the caller's affair."""
        end = self.count + len(values)
        if end > len(self._table):
            self.reserve(max(end, 2 * len(self._table), _FIRST_CAPACITY))
        self._table[self.count : end] = values
        self.count = end
        self.forwards += forwards

    def sync(self) -> None:
        """There is no disk."""

    def close(self) -> None:
        """There are no files."""


class FileRows:
    """Rows in a directory that one process at a time adds to, while any number read what is there.

    Readers hold no lock: rows that are whole are never changed or cut off by who fills the cache, only added to.
    """

    def __init__(
        self,
        path: Path,
        description: dict[str, Any],
        width: int,
        dtype: torch.dtype,
        owner: bytes = NOBODY,
        with_confidence: bool = False,
        is_reader: bool = False,
    ) -> None:
        """`owner`: 8 bytes; `with_confidence`: the confidence that comes with a row is kept too.

        `is_reader`: nothing is written or appended, and nobody kept from it: the rows are those of this moment.
        UserError: the directory can't be made or written, is in use (InUse), holds another cache, or, to be read, none.
        """
        self.path, self.is_reader = path, is_reader
        self.count = 0
        self.forwards = 0
        self.keys = torch.empty(0, dtype=torch.int64)
        """[count], as they were when the cache was opened."""
        self.note: str | None = None
        """What a person should know of damage that was found."""
        self._width, self._dtype, self._owner = width, dtype, owner
        self._row_bytes = width * dtype.itemsize
        self._index_bytes = 0
        self._seed = zlib.crc32(json.dumps(description, sort_keys=True).encode())
        self._mapped: Tensor = torch.empty(0, width, dtype=dtype)
        self._dirty = False
        self._files: list[FileIO] = []
        self._lock: DirectoryLock | None = None
        if not is_reader:
            make_directories(path)
            self._lock = DirectoryLock(path, "wait for it, or choose another --cache-dir; --resume takes either")
        try:
            self._describe(description)
            self._rows = self._open(ROWS)
            self._beside = self._open(CONFIDENCE) if with_confidence else None
            self._index = self._open(INDEX)  # last, to be synced last
            self._read()
        except BaseException:
            self._let_go()
            raise

    @property
    def table(self) -> Tensor:
        """[count, width], mapped from the file."""
        return self._mapped[: self.count]

    @property
    def confidences(self) -> Tensor | None:
        """fp32 [count, 1], read from the file; None where there is none."""
        if self._beside is None:
            return None
        found = torch.empty(self.count, 1)
        os.preadv(self._beside.fileno(), [_bytes(found)], 0)
        return found

    def append(
        self, values: Tensor, forwards: int, keys: Tensor, confidence: Tensor | None = None
    ) -> None:  # [n, width], [n], [n, 1]
        """Write rows, then the record of them. UserError where the disk refuses; the rows before stay as they are."""
        assert not self.is_reader
        data = _bytes(values.to("cpu", self._dtype))
        beside = memoryview(b"")
        if self._beside is not None:
            assert confidence is not None
            beside = _bytes(confidence.to("cpu", torch.float32))
        named = _bytes(keys.cpu())
        tail = struct.pack("<III8s", zlib.crc32(beside, zlib.crc32(data)), len(keys), forwards, self._owner)
        record = struct.pack("<I", zlib.crc32(named, zlib.crc32(tail, self._seed))) + tail + named.tobytes()
        try:
            _write_at(self._rows, data, self.count * self._row_bytes)
            if self._beside is not None:
                _write_at(self._beside, beside, self.count * _CONFIDENCE_BYTES)
            self._reserve(self.count + len(keys))
            _write_at(self._index, record, self._index_bytes)
        except OSError as error:
            raise UserError(f"cannot write {self.path / ROWS}: {error.strerror}") from error
        self._index_bytes += len(record)
        self.count += len(keys)
        self.forwards += forwards
        self._dirty = True

    def sync(self) -> None:
        """Wait until the disk has rows and records."""
        if not self._dirty:
            return
        try:
            for file in self._files:
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path / ROWS}: {error.strerror}") from error
        self._dirty = False

    def close(self) -> None:
        """Let go of the files, without the room ahead. `table` must not be read any more."""
        if self._rows.closed:
            return
        self._mapped = self._mapped.new_empty(0, self._width)
        if not self.is_reader:
            with contextlib.suppress(OSError):
                os.ftruncate(self._rows.fileno(), self.count * self._row_bytes)
        self._let_go()

    def remove(self) -> None:
        """`close`, and delete the directory; the one around it too, if this was the last in it."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()

    def _describe(self, description: dict[str, Any]) -> None:
        file = self.path / DESCRIPTION
        remedy = f"delete the directory {self.path} to compute it again, or choose another --cache-dir"
        if not self.is_reader:
            (self.path / (DESCRIPTION + TEMPORARY)).unlink(missing_ok=True)
        if not self.is_reader and not file.exists():
            for name in (ROWS, CONFIDENCE, INDEX):  # without a description they are nobody's
                (self.path / name).unlink(missing_ok=True)
            write_json(file, description)
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}; {remedy}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is cut short or corrupted: not JSON; {remedy}") from error
        if not isinstance(found, dict):
            raise UserError(f"{file} is corrupted: not a JSON object; {remedy}")
        for name in [*description, *found]:
            if found.get(name) != description.get(name):
                raise UserError(
                    f"{self.path} is the cache of another {name}: {found.get(name)} there, {description.get(name)} "
                    f"here; {remedy}"
                )

    def _open(self, name: str) -> FileIO:
        flags, mode = (os.O_RDONLY, "rb") if self.is_reader else (os.O_RDWR | os.O_CREAT, "r+b")
        try:
            file = FileIO(os.open(self.path / name, flags, 0o666), mode)
        except OSError as error:
            raise UserError(
                f"cannot {'read' if self.is_reader else 'write'} {self.path / name}: {error.strerror}"
            ) from error
        self._files.append(file)
        return file

    def _let_go(self) -> None:
        for file in self._files:
            file.close()
        if self._lock is not None:
            self._lock.release()

    def _read(self) -> None:
        """Take up the records that are whole, and cut the files back to them, if they are to be added to."""
        try:
            index = (self.path / INDEX).read_bytes()
            keys = []
            while (record := self._record(index)) is not None:
                named, forwards, is_mine = record
                keys.append(torch.frombuffer(bytearray(named), dtype=torch.int64))
                self._index_bytes += _HEAD.size + len(named)
                self.count += len(keys[-1])
                self.forwards += forwards if is_mine else 0
            self.keys = torch.cat(keys) if keys else self.keys
            if self.is_reader:
                self._mapped = self._map(self.count) if self.count else self._mapped
                return
            os.ftruncate(self._index.fileno(), self._index_bytes)
            os.ftruncate(self._rows.fileno(), self.count * self._row_bytes)
            if self._beside is not None:
                os.ftruncate(self._beside.fileno(), self.count * _CONFIDENCE_BYTES)
            if self.count:
                self._reserve(self.count)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error

    def _record(self, index: bytes) -> tuple[bytes, int, bool] | None:
        """(keys, forwards, whether this owner's) of the next record, if it is whole and its rows are what it says."""
        start = self._index_bytes
        if len(index) - start < _HEAD.size:
            return None
        checksum, rows_checksum, count, forwards, owner = _HEAD.unpack_from(index, start)
        end = start + _HEAD.size + count * _KEY_BYTES
        is_whole = end <= len(index) and zlib.crc32(index[start + 4 : end], self._seed) == checksum
        if is_whole:
            data, wanted = _read_at(self._rows, self.count, count, self._row_bytes), count * self._row_bytes
            if self._beside is not None:
                data += _read_at(self._beside, self.count, count, _CONFIDENCE_BYTES)
                wanted += count * _CONFIDENCE_BYTES
            is_whole = len(data) == wanted and zlib.crc32(data) == rows_checksum
        if not is_whole and not self.is_reader:
            self.note = f"{self.path} was damaged after {self.count:,} rows: those behind are computed again"
        if not is_whole:
            return None
        return index[start + _HEAD.size : end], forwards, owner == self._owner

    def _reserve(self, count: int) -> None:
        """Map room for so many rows: a hole in the file until they are written, and cut off when it is next opened."""
        if count <= len(self._mapped):
            return
        capacity = max(count, 2 * len(self._mapped), _FIRST_CAPACITY)
        os.ftruncate(self._rows.fileno(), capacity * self._row_bytes)
        self._mapped = self._map(capacity)

    def _map(self, count: int) -> Tensor:
        mode: Any = "c" if self.is_reader else "r+"  # torch wants what it may write: a reader would write a copy
        mapped = np.memmap(self.path / ROWS, np.uint8, mode, shape=(count * self._row_bytes,))
        return torch.from_numpy(mapped).view(self._dtype).view(count, self._width)


def descriptions(parent: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The directories of the caches below `parent` whose description can be read, and what it says."""
    for file in sorted(parent.glob(f"*/{DESCRIPTION}")):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if isinstance(found := json.loads(file.read_text(encoding="utf-8")), dict):
                yield file.parent, found


def count_rows(path: Path) -> int:
    """Rows that the records in a cache's directory speak of. Unchecked, and while another process may add to them."""
    count = 0
    with contextlib.suppress(OSError), open(path / INDEX, "rb") as index:
        size = os.fstat(index.fileno()).st_size
        while len(head := index.read(_HEAD.size)) == _HEAD.size:
            here = _HEAD.unpack(head)[2]
            if index.seek(here * _KEY_BYTES, os.SEEK_CUR) > size:
                break
            count += here
    return count


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _read_at(file: FileIO, first: int, count: int, size: int) -> bytes:
    """`count` entries of `size` bytes each, or what there is of them."""
    return os.pread(file.fileno(), count * size, first * size)


def _write_at(file: FileIO, data: memoryview | bytes, position: int) -> None:
    """pwrite of everything: it may take less than it is given."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file.fileno(), rest, position)
        rest, position = rest[written:], position + written
