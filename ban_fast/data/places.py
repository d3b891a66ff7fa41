"""Where datasets lie."""

import os
from pathlib import Path


def data_directory(asked: str | Path | None) -> Path:
    """The directory that was asked for, or $BAN_FAST_DATA, or ~/.cache/ban_fast; there or not."""
    return Path(asked or os.environ.get("BAN_FAST_DATA") or "~/.cache/ban_fast").expanduser()


def directory_of(name: str | Path, root: Path) -> Path | None:
    """The directory that `name` means: a path, a name below the data directory `root`, or that directory itself.

    Of a path that is gone its last name counts: what a run recorded may have been moved. None where none is there.
    """
    path = Path(name).expanduser()
    candidates = [path, root / path, root / path.name, *([root] if root.name == path.name else [])]
    return next((candidate for candidate in candidates if candidate.is_dir()), None)
