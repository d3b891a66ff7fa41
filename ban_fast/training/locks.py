"""A directory held by one process at a time."""

import errno
import fcntl
import functools
import os
import weakref
from pathlib import Path

from ..errors import UserError


class InUse(UserError):
    """Another process has the directory."""


class DirectoryLock:
    """The kernel's lock on a directory itself: it ends with the process, and leaves no file."""

    def __init__(self, path: Path, remedy: str) -> None:
        """InUse, which ends in `remedy`, where another process has it; UserError where it can't be read."""
        self._descriptor: int | None = None
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise InUse(f"{path} is in use by another process: {remedy}") from error
            # a file system without locks, NFS for one: the run goes on unguarded
        self._descriptor = descriptor
        # A DataLoader's forked workers would hold the lock on behalf of a run that was killed.
        os.register_at_fork(after_in_child=functools.partial(_release_in_child, weakref.ref(self)))

    def release(self) -> None:
        """Let others have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _release_in_child(reference: "weakref.ref[DirectoryLock]") -> None:
    lock = reference()
    if lock is not None:
        lock.release()
