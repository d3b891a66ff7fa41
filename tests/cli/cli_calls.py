"""What the tests of the command share: what a call left behind, small runs, snapshots of a directory."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SMALL = ("--model", "mlp-8", "--limit-train", "128", "--limit-test", "64", "--epochs", "2", "--generations", "1")
"""Flags of a run that takes a second."""


@dataclass
class Said:
    """What a call of the command left behind."""

    status: int
    out: str
    err: str

    def mistake(self, *fragments: str) -> str:
        """The line about a user's mistake, which is all that was said."""
        assert self.status == 2, self
        return self.only_line(*fragments)

    def only_line(self, *fragments: str) -> str:
        """The one line on stderr, with nothing on stdout."""
        assert self.out == "", self
        return self.line(*fragments)

    def line(self, *fragments: str) -> str:
        """The one line on stderr, with every fragment in it."""
        assert self.err.startswith("ban-fast: "), self
        assert self.err.endswith("\n"), self
        assert self.err.count("\n") == 1, self
        for fragment in fragments:
            assert fragment in self.err, self
        return self.err


Call = Callable[..., Said]
Start = Callable[..., "subprocess.Popen[str]"]


def finish(process: "subprocess.Popen[str]") -> Said:
    """Wait for it; not for ever, but on a machine that has much else to do."""
    out, err = process.communicate(timeout=1200)
    return Said(process.returncode, out, err)


def await_there(path: Path, process: "subprocess.Popen[str]") -> None:
    """Until the process, which makes it, has done so."""
    while not path.exists():
        has_ended = process.poll() is not None
        assert path.exists() or not has_ended, process.communicate()
        time.sleep(0.01)


def tree(directory: Path) -> dict[str, bytes]:
    """Every file and folder under a directory, with contents."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in sorted(directory.rglob("*"))
    }
