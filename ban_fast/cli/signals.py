"""What SIGINT, SIGTERM and SIGHUP do to a command: one line and status 128 + number, saved first where it can be."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Literal

from .ranks import is_first, is_one_of_several

Answer = Literal["exit", "raise", "ask"]


class Stopped(BaseException):
    """A signal came while `Signals.answer` was "raise": unwinds the command, so that temporary files are removed."""


class Signals:
    """Handlers of the stop signals for as long as a command runs (a context manager; main thread only).

    `answer` decides what the first signal does. "exit" leaves the process at once: during the imports of large
    libraries, whose extension modules make something else of an exception. "raise" raises `Stopped`. "ask" only
    records it: the training loop asks `requested()` after each step, saves, and ends. A second signal always
    leaves at once.
    """

    # SIGINT is taken over even where a shell script's `&` has it ignored: who sends it by hand wants the run saved.
    STOP = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self.answer: Answer = "exit"
        self.received: signal.Signals | None = None
        self.remark = ""
        """What the line says after "stopped by SIGINT"."""
        self._previous: dict[int, Any] = {}
        self._pid = os.getpid()
        self._is_one_of_several, self._is_first = is_one_of_several(), is_first()
        self._is_elsewhere = False

    def __enter__(self) -> "Signals":
        for number in self.STOP:
            previous = signal.getsignal(number)
            if number == getattr(signal, "SIGHUP", None) and previous is signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:  # not by now ignored, at the end of one of several processes
                signal.signal(number, previous)

    def requested(self) -> bool:
        """Whether the training loop should save and end."""
        return self.received is not None

    def follow(self) -> None:
        """Training was interrupted: if not by a signal to this process, then by one to another of the same run.

        All is saved by then: torchrun's SIGTERM to those that outlive the first to end is no second signal.
        """
        if self.received is None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.received, self._is_elsewhere = signal.SIGTERM, True

    @property
    def status(self) -> int:
        """The exit status of the signal that came: 130 for SIGINT, 143 for SIGTERM."""
        assert self.received is not None
        return 128 + self.received

    def line(self) -> str:
        """The one line that is said about it, without "ban-fast: "."""
        assert self.received is not None
        by = "a signal to another of its processes" if self._is_elsewhere else self.received.name
        return f"stopped by {by}{self.remark}"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked worker: the parent speaks
            os._exit(128 + number)
        first = self.received is None
        self.received = signal.Signals(number)
        if first and self.answer == "ask":
            return
        if first and self.answer == "raise":
            raise Stopped
        if sys.stderr.isatty():
            os.write(2, b"\x1b[?25h\n")  # the progress bar may have hidden the cursor
        # Before training begins torchrun sends SIGTERM to those that outlive another, which has said why.
        is_torchruns = self._is_one_of_several and number == signal.SIGTERM and self.answer == "exit"
        if self._is_first and not is_torchruns:
            os.write(2, f"ban-fast: {self.line()}\n".encode())
        os._exit(self.status)
