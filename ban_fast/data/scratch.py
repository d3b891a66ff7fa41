"""Directories for what is not finished, beside where it will be; a killed process's are removed by the next one."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".ban-fast-"
_ANY = _PREFIX + "[a-z0-9_]" * 8
"""What `tempfile` makes of it."""


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A directory in `parent` that is this process's own, and gone at the end of the block. OSError as `mkdtemp`."""
    remove_abandoned(parent)
    with contextlib.ExitStack() as stack:
        while True:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent)))
            with contextlib.suppress(OSError):  # a file system without locks: there nobody removes what isn't his
                if not stack.enter_context(_locked(place)):
                    continue  # another process had it for abandoned, before it was locked
            break
        yield place


def remove_abandoned(parent: Path) -> None:
    """Remove what processes that are no more have left in `parent`, as far as that can be told and is allowed."""
    for place in parent.glob(_ANY):
        with contextlib.suppress(OSError), _locked(place) as is_abandoned:
            if is_abandoned:
                shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[bool]:
    """Until the end of the block, or of this process, the lock on a directory; or False: it has gone, or is another's.

    OSError for no directory, and where there are no locks.
    """
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = place.exists()
        except BlockingIOError:
            is_ours = False
        yield is_ours
    finally:
        os.close(descriptor)
