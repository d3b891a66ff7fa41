"""Being one of several processes of torchrun's, or of a scheduler's: which one, and who of them has the word.

Imports no torch until it must.
"""

import atexit
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SECONDS_TO_CONNECT = 10


def is_one_of_several() -> bool:
    """Whether torchrun, or a scheduler, started other processes beside this one."""
    return all(name in os.environ for name in _NEEDED) and _number("WORLD_SIZE", 1) > 1


def is_first() -> bool:
    """Whether this is the process that reports: rank 0, or one that is alone."""
    return not is_one_of_several() or _number("RANK", 0) == 0


def settled(out: Path) -> tuple[Path, bool]:
    """The directory of a run that is to be in `out`, and whether torchrun, after a failure, starts that run again.

    `out` may be named after the time: the first process to ask decides for all, and for those of later starts. A run
    that was there before the first start is another one, and not to be gone on with unasked.
    """
    is_held = (out / "config.json").exists()
    store = _agents_store()
    if store is not None:
        found = store.compare_set(_key("out"), "", json.dumps([str(out), is_held]))
        (name, was_held) = json.loads(found)
        out = Path(name)
        is_held = not was_held and (out / "config.json").exists()
    return out, is_held and _number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def takes_the_word() -> bool:
    """Whether it is this process that says how the run ended: of all of them, the first to ask.

    Whatever torchrun sends to those that outlive the others is not heeded any more.
    """
    if not is_one_of_several():
        return True
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # a scheduler's: nobody gathers what they say, and rank 0 may be none
        return True
    store = _agents_store()
    if store is None:  # nothing that outlives rank 0 to ask
        return is_first()
    try:
        return int(store.add(_key(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/word"), 1)) == 1
    except RuntimeError:  # torchrun has gone by now
        return is_first()


def leave(status: int) -> NoReturn:
    """End this process, which has done its work and said so.

    One of several is not torn down as Python does it: threads of gloo's may still have a tensor to release, and for
    that wait for an interpreter that is no more. That aborted 3 runs of 17, which torchrun took for failed.
    """
    if not is_one_of_several():
        sys.exit(status)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def _agents_store() -> "Store | None":
    """What torchrun itself keeps for its processes, through all restarts; None where it has none, or has gone."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(
            os.environ["MASTER_ADDR"],
            _number("MASTER_PORT", 0),
            is_master=False,
            timeout=timedelta(seconds=_SECONDS_TO_CONNECT),
            wait_for_workers=False,
        )
    except RuntimeError:
        return None


def _key(name: str) -> str:
    return f"ban_fast/{os.environ.get('TORCHELASTIC_RUN_ID')}/{name}"


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else otherwise
