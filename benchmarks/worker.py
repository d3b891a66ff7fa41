"""A process that measures: `python -m benchmarks.worker`, started by session.py once for each allocator's settings.

It reads requests from standard input and answers on standard output, one line of JSON each. Whatever else is printed
goes to standard error. When its input ends it does too, in the middle of a case if need be: its session is gone.
"""

import json
import os
import queue
import sys
import threading
import traceback
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.inputs import TORCH_DTYPE
from benchmarks.measure import measure_case
from benchmarks.providers import automatic, providers


def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the case that a request names."""
    case = Case(**request["case"])
    device = torch.device(request["device"])
    candidates = providers(case.objective, case.dtype, request["device"], autotune=request["autotune"])
    records = measure_case(case, candidates, device, request["settings"], seconds=request["seconds"])
    ours = automatic(case.objective, request["device"], TORCH_DTYPE[case.dtype], (case.rows, case.classes))
    return [record | {"automatic": ours} for record in records]


def _read(requests: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    while True:
        line = requests.get()
        try:
            reply: dict[str, Any] = {"records": answer(json.loads(line))}
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
