"""A process that measures: `python -m benchmarks.worker`, started by session.py once for each allocator's settings.

It reads requests from standard input and answers on standard output, one line of JSON each; before a reply come lines
that say whose turn it is. Whatever else is printed goes to standard error. When its input ends it does too, in the
middle of a case if need be: its session is gone.
"""

import json
import os
import queue
import resource
import sys
import threading
import traceback
from typing import Any

import torch

from ban_fast.backends import table
from benchmarks.cases import Case
from benchmarks.cuda import Lost
from benchmarks.inputs import TORCH_DTYPE
from benchmarks.measure import Bench
from benchmarks.providers import automatic, providers


def answer(bench: Bench, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the case that a request names."""
    case = Case(**request["case"])
    candidates = providers(case.objective, case.dtype, request["device"], autotune=request["autotune"])
    records = bench.measure(
        case, candidates, request["settings"], seconds=request["seconds"], excluded=request["excluded"]
    )
    ours = automatic(case.objective, request["device"], TORCH_DTYPE[case.dtype], (case.rows, case.classes))
    followed = table.measured(request["device"]) is not None
    return [record | {"automatic": ours, "auto_measured": followed} for record in records]


def _read(requests: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=replies, flush=True)

    benches: dict[str, Bench] = {}
    while True:
        request = json.loads(requests.get())
        device = request["device"]
        if device not in benches:
            if request["most_bytes"] is not None:  # what asks for more fails, and is its provider's own failure
                resource.setrlimit(resource.RLIMIT_DATA, (request["most_bytes"], request["most_bytes"]))
            benches[device] = Bench(torch.device(device), lambda name: say({"at": name}))
        try:
            reply: dict[str, Any] = {"records": answer(benches[device], request)}
        except Lost:
            raise  # and end: the session starts another process, and leaves out whose turn it was
        except Exception:
            reply = {"error": traceback.format_exc()}
        say(reply | {"peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss})


if __name__ == "__main__":
    main()
