"""The command `ban-fast`: parse, build, call, print. Only `main` is public."""

import atexit
import os
import sys
from collections.abc import Sequence

from .ranks import takes_the_word
from .signals import Signals, Stopped

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (None: the process's arguments) and return its exit status.

    0; 2 for a user's mistake and 1 for another failure, each one line on stderr; 128 + the number of the signal
    that stopped it.
    """
    if sys.stdout is None or sys.stderr is None:  # closed by who started us (`>&-`)
        nowhere = open(os.devnull, "w")  # noqa: SIM115  for the rest of the process
        atexit.register(nowhere.close)  # or Python warns of it, on stderr, when it is gone
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    # Torch's threads wait for each other by spinning. Where other processes want the cores too, that made the demo 20
    # times slower (38 s for 1.9 s on two cores at load 7).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with Signals() as signals:
        try:
            status = _run(argv, signals)
            sys.stdout.flush()
            return status
        except Stopped:
            return _say(signals.line(), signals.status)
        except BrokenPipeError:
            # The reader has gone (`| head`): nothing is left to say. At exit Python would flush what is buffered.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1


def _run(argv: Sequence[str] | None, signals: Signals) -> int:
    # With the signals' handlers in place: until then Ctrl-C ends in a traceback.
    from .quiet import quiet_libraries

    with quiet_libraries():
        return _obey(argv, signals)


def _obey(argv: Sequence[str] | None, signals: Signals) -> int:
    from .app import Session, command
    from .quiet import debugging

    session = Session(signals)
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # a C locale, a path that isn't text
        return int(command().main(args=argv, prog_name="ban-fast", standalone_mode=False, obj=session) or 0)
    except SystemExit as error:  # the command-line library's own answer to a broken pipe
        return error.code if isinstance(error.code, int) else 1
    except (Stopped, BrokenPipeError):
        raise
    except Exception as error:
        if debugging():
            raise
        from .failures import explain

        return _say(*explain(error, session.request))


def _say(line: str, status: int) -> int:
    if takes_the_word():
        print(f"ban-fast: {line}", file=sys.stderr)
    return status
