"""Keeping libraries off stderr: it carries this command's own lines and nothing else."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_PACKAGE = str(Path(__file__).resolve().parent.parent)


def debugging() -> bool:
    """Whether BAN_FAST_DEBUG asks for tracebacks and for everything that libraries say."""
    return os.environ.get("BAN_FAST_DEBUG", "") not in ("", "0")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Drop warnings and log records of other packages; our own warnings become one line each.

    Enter it before torch is imported. Without effect where BAN_FAST_DEBUG is set; -W, PYTHONWARNINGS and TORCH_LOGS
    keep what they ask for.
    """
    if debugging():
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    level = logging.root.manager.disable
    if "TORCH_LOGS" not in os.environ:
        logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("default")
                warnings.showwarning = _show_ours
            yield
    finally:
        logging.disable(level)


def one_line(text: str) -> str:
    """The text with line ends as spaces, and what a terminal would obey instead of printing escaped."""
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)


def _show_ours(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if Path(filename).resolve().is_relative_to(_PACKAGE):
        print(f"ban-fast: warning: {one_line(str(message))}", file=sys.stderr)
