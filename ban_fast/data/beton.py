"""Files of FFCV's: the images of one part of a dataset, raw, with their labels; written and checked without FFCV.

The layout is version 2 of FFCV's own (`ffcv/types.py`): a header, one descriptor a field, a row a sample, pages of
pixels, and a table of where each sample's pixels lie. Any FFCV reads it. What the file is of, how long it must be, and
a checksum of all other bytes are noted in the part of the label's descriptor that FFCV leaves empty. FFCV's writer is
not used: it waits for ever where one of its processes fails, on a full disk for example.
"""

import contextlib
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .checksum import checksum, is_whole, put_stamp
from .dataset import Part, Shape
from .download import Progress
from .scratch import scratch

if TYPE_CHECKING:
    from .ffcv_reader import Reader

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
ARRAY = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])
"""What an array's descriptor begins with; the name of its type follows."""
SAMPLE = np.dtype([("f0", "<u8"), ("f1", "<i8")], align=True)
"""Where the image's pixels begin in the file, and its label."""
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

_VERSION, _ARRAY_FIELD, _INT_FIELD = 2, 4, 1
_SMALLEST_PAGE = 1 << 23
"""FFCV's own default, 8 MiB; larger where an image is."""
_LARGEST_PAGE = 1 << 31
_NOTE, _NOTE_FORMAT = "ban_fast", 2
_NOTED = {_NOTE: int, "what": str, "bytes": int, "fingerprint": str, "checksum": str}
_LABEL = slice(HEADER.itemsize + FIELD.itemsize, HEADER.itemsize + 2 * FIELD.itemsize)
"""Where the label's descriptor is: behind the image's, and before the samples."""


class Beton:
    """A file of one part of a dataset, looked at closely enough to be read without surprises."""

    def __init__(
        self,
        path: Path,
        part: Part,
        what: str,
        command: str,
        *,
        trust_stamp: bool = True,
        progress: Progress | None = None,
    ) -> None:
        """`what` the file should hold ("cifar100 train"); `command` writes it.

        All of it is read, to see that it is what was written, and `progress` told. With `trust_stamp`, not if that was
        done before, and the file is large and was not touched since.

        Raises:
            UserError: not there, cut short, damaged, of other images, or no file of ours; the line names `command`.
        """
        self.path = path
        self._readers: dict[int, Reader] = {}
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(_LABEL.stop)
        except FileNotFoundError:
            raise UserError(f"there is no {path} for FFCV to read; write it with `{command}`") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; move it away and run `{command}`") from None
        note = _note(head)
        if note is None:
            problem = "is cut short" if len(head) < _LABEL.stop else "is not a file of this version of ban-fast's"
            raise UserError(f"{path} {problem}; write it again with `{command}`")
        if size < note["bytes"]:
            raise UserError(
                f"{path} is cut short, {size:,} of {note['bytes']:,} bytes; write it again with `{command}`"
            )
        if note["what"] != what:
            raise UserError(f"{path} holds {note['what']}, not {what}; write it with `{command}`")
        if size != note["bytes"] or note["fingerprint"] != part.fingerprint():
            raise UserError(
                f"{path} was written from other images than {what} has now; write it again with `{command}`"
            )
        if head[_LABEL] != _descriptor(_INT_FIELD, "label", _encoded(note)) or not self._is_whole(
            note["checksum"], trust_stamp, progress
        ):
            raise UserError(f"{path} is damaged: its checksum is another; write it again with `{command}`")
        self._shape: Shape = part.shape
        self._pointers = np.fromfile(path, SAMPLE, len(part.labels), offset=len(head))["f0"]

    def read(self, ids: Tensor) -> Tensor:
        """Sample ids, int64 [M], in any order, to images, uint8 [M, H, W, C]; without FFCV."""
        size = int(np.prod(self._shape))
        content = np.memmap(self.path, np.uint8, "r")
        images = np.empty((len(ids), size), np.uint8)
        for image, begin in zip(images, self._pointers[ids.numpy()].tolist(), strict=True):
            image[:] = content[begin : begin + size]
        return torch.from_numpy(images).view(-1, *self._shape)

    def reader(self, batch_size: int) -> "Reader":
        """FFCV's reader of batches of that size, compiled once: it takes seconds."""
        if batch_size not in self._readers:
            self._readers[batch_size] = _open(self.path, batch_size)
        return self._readers[batch_size]

    def _is_whole(self, wanted: str, trust_stamp: bool, progress: Progress | None) -> bool:
        try:
            return is_whole(self.path, _LABEL, wanted, trust_stamp=trust_stamp, progress=progress)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None


def write(path: Path, part: Part, what: str, progress: Progress | None = None) -> None:
    """Write the images of a part, whole or not at all; `progress` is called with bytes written and to be written.

    Raises:
        UserError: no space, no permission; images that cannot be read. Nothing half-written stays behind.
    """
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a directory; move it away")
    try:
        with scratch(path.parent) as place:
            unfinished = place / path.name
            with unfinished.open("wb") as file:
                _write(file, part, progress)
                file.flush()
                note = _noted(part, what, file.tell(), checksum(unfinished, _LABEL))
                file.seek(_LABEL.start)
                file.write(_descriptor(_INT_FIELD, "label", _encoded(note)))
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            put_stamp(path, note["checksum"])
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; make room there, or allow it") from None


def missing() -> str | None:
    """What FFCV lacks here to be used, and where to get it; None: nothing."""
    if importlib.util.find_spec("ffcv") is None:
        return "not installed; `apt-get install libopencv-dev libturbojpeg0-dev pkg-config`, then `pip install ffcv`"
    if importlib.util.find_spec("distutils") is None:
        return "without the module distutils, which Python 3.12 dropped; `pip install setuptools` brings it"
    return None


def _open(path: Path, batch_size: int) -> "Reader":
    threads = torch.get_num_threads()
    try:
        from .ffcv_reader import Reader

        return Reader(path, batch_size)
    except ImportError as error:  # a shared library that is gone, say
        raise UserError(f"FFCV cannot be imported: {error}; install it again, or use another loader") from error
    finally:
        torch.set_num_threads(threads)  # FFCV sets it to its own number of workers


def _note(head: bytes) -> dict[str, Any] | None:
    """What a file of ours says of itself at its beginning; None where it is none."""
    if len(head) < _LABEL.stop:
        return None
    label = np.frombuffer(head[_LABEL], FIELD)[0]
    with contextlib.suppress(ValueError, RecursionError):  # neither text nor JSON
        note = json.loads(label["arguments"].tobytes().rstrip(b"\0").decode("utf-8", "surrogateescape"))
        is_ours = isinstance(note, dict) and note.get(_NOTE) == _NOTE_FORMAT
        if is_ours and {key: type(value) for key, value in note.items()} == _NOTED:
            return dict(note)
    return None


def _noted(part: Part, what: str, size: int, checksum: str) -> dict[str, Any]:
    fingerprint = part.fingerprint()
    return {_NOTE: _NOTE_FORMAT, "what": what, "bytes": size, "fingerprint": fingerprint, "checksum": checksum}


def _encoded(note: dict[str, Any]) -> bytes:
    """UTF-8, in which any folder's name fits beside the rest."""
    return json.dumps(note, ensure_ascii=False).encode("utf-8", "surrogateescape")


def _write(file: Any, part: Part, progress: Progress | None) -> None:
    """All of a file but the label's descriptor, for which room is left."""
    count, size = len(part.labels), int(np.prod(part.shape))
    page = max(_SMALLEST_PAGE, 1 << (size - 1).bit_length())
    if page > _LARGEST_PAGE:
        height, width, _ = part.shape
        raise UserError(f"an image of {height} x {width} pixels does not fit FFCV's pages of 2 GiB; use a smaller one")
    each = page // size  # images a page
    begin = _LABEL.stop + count * SAMPLE.itemsize
    begin += -begin % page
    end = begin + -(-count // each) * page
    total = end + count * ALLOCATION.itemsize

    index = np.arange(count)
    samples = np.zeros(count, SAMPLE)
    samples["f0"] = begin + index // each * page + index % each * size
    samples["f1"] = part.labels.numpy()
    file.write(np.array([(_VERSION, 2, page, count, end)], HEADER).tobytes())
    file.write(_descriptor(_ARRAY_FIELD, "image", _array(part.shape)))
    file.write(bytes(FIELD.itemsize))
    file.write(samples.tobytes())
    file.seek(begin)
    for first in range(0, count, each):
        pixels = part.read(torch.arange(first, min(first + each, count))).numpy()
        file.write(pixels.tobytes())
        file.write(bytes(page - pixels.nbytes))
        if progress is not None:
            progress(file.tell(), total)
    table = np.zeros(count, ALLOCATION)
    table["sample_id"], table["ptr"], table["size"] = index, samples["f0"], size
    file.write(table.tobytes())


def _descriptor(kind: int, name: str, arguments: bytes) -> bytes:
    field = np.zeros(1, FIELD)[0]
    field["type_id"] = kind
    for key, content in (("name", name.encode()), ("arguments", arguments)):
        field[key][: len(content)] = np.frombuffer(content, np.uint8)
    return bytes(field.tobytes())


def _array(shape: Shape) -> bytes:
    """The arguments of an array of bytes: its shape, and numpy's name of its type."""
    kind = json.dumps(np.dtype(np.uint8).descr).encode()
    head = np.zeros(1, ARRAY)[0]
    head["shape"][: len(shape)], head["type_length"] = shape, len(kind)
    return bytes(head.tobytes()) + kind
