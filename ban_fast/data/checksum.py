"""A checksum of a file of any size, and a stamp beside it that says when it was last found right."""

import contextlib
import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .download import Progress
from .folder import cores

SUMMED_ALWAYS = 1 << 30
"""Bytes of a file that is summed whenever it is opened: at 1 to 6 GB/s a core, CIFAR's 154 MB are 30 to 150 ms. Of a
larger one a stamp is kept, and it is summed when it was touched since."""
_AT_ONCE = 1 << 23


def checksum(path: Path, own: slice, progress: Progress | None = None) -> str:
    """Of all bytes of a file but `own`, in its first 8 MiB: there it keeps the checksum, say.

    A CRC-32 of every 8 MiB, which the cores share, and a hash of those. `progress` is called with the bytes that were
    summed, and all. OSError where the file can't be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    pool = ThreadPoolExecutor(cores())
    try:
        size = os.fstat(descriptor).st_size

        def piece(begin: int) -> int:
            data = os.pread(descriptor, _AT_ONCE, begin)
            return zlib.crc32(data[: own.start] + data[own.stop :] if begin == 0 else data)

        sums = []
        for one in pool.map(piece, range(0, size, _AT_ONCE)):
            sums.append(one)
            if progress is not None:
                progress(min(len(sums) * _AT_ONCE, size), size)
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(descriptor)
    return hashlib.blake2b(np.array(sums, "<u4").tobytes(), digest_size=16).hexdigest()


def is_whole(path: Path, own: slice, wanted: str, *, trust_stamp: bool, progress: Progress | None = None) -> bool:
    """Whether a file has the checksum `wanted`; not computed where a stamp is trusted that says so."""
    stamp = _stamp(path, wanted)
    if trust_stamp and path.stat().st_size > SUMMED_ALWAYS:
        with contextlib.suppress(OSError, ValueError):  # none, or one that can't be read
            if _beside(path).read_text(encoding="utf-8") == stamp:
                return True
    if checksum(path, own, progress) != wanted:
        return False
    put_stamp(path, wanted, stamp)
    return True


def put_stamp(path: Path, found: str, stamp: str | None = None) -> None:
    """Note beside a large file that `found` is its checksum, as it is now or was at the time of `stamp`.

    Where nothing can be written it is summed again next time.
    """
    if path.stat().st_size > SUMMED_ALWAYS:
        with contextlib.suppress(OSError):
            _beside(path).write_text(stamp or _stamp(path, found), encoding="utf-8")


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.checked")


def _stamp(path: Path, checksum: str) -> str:
    """Changes whenever the file does: nobody sets a ctime at will."""
    status = path.stat()
    return f"{checksum} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}\n"
