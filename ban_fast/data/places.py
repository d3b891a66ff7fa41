"""Where datasets lie."""

import os
from pathlib import Path


def data_directory(asked: str | Path | None) -> Path:
    """The directory that was asked for, or $BAN_FAST_DATA, or ~/.cache/ban_fast; there or not."""
    return Path(asked or os.environ.get("BAN_FAST_DATA") or "~/.cache/ban_fast").expanduser()
