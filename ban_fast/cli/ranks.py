"""Being one of torchrun's processes: which one, and who of them has the word. Imports no torch until it must."""

import os
import signal

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SECONDS_TO_CONNECT = 10


def is_one_of_several() -> bool:
    """Whether torchrun started other processes beside this one."""
    return all(name in os.environ for name in _NEEDED) and _number("WORLD_SIZE", 1) > 1


def is_first() -> bool:
    """Whether this is the process that reports: rank 0, or one that is alone."""
    return not is_one_of_several() or _number("RANK", 0) == 0


def is_restarted(out: str | None) -> bool:
    """Whether torchrun started this process again, after a failure, on a run that had begun in `out`."""
    if out is None or _number("TORCHELASTIC_RESTART_COUNT", 0) == 0:
        return False
    return os.path.exists(os.path.join(out, "config.json"))


def takes_the_word() -> bool:
    """Whether it is this process that says how the run ended: of all of them, the first to ask.

    Whatever torchrun sends to those that outlive the others is not heeded any more.
    """
    if not is_one_of_several():
        return True
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # nothing that outlives rank 0 to ask
        return is_first()
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            _number("MASTER_PORT", 0),
            is_master=False,
            timeout=timedelta(seconds=_SECONDS_TO_CONNECT),
            wait_for_workers=False,
        )
        return int(store.add(f"ban_fast/{attempt}/word", 1)) == 1
    except RuntimeError:  # torchrun itself has gone
        return is_first()


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else otherwise
