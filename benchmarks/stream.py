"""What memory gives at its best: the denominators of every share. A copy, and two reads with one write.

On a CPU they are stream.c, with stores that pass the caches by as the kernels' do (a plain store reads its line first,
a fourth unit that nobody counts); without a C compiler torch's copy and add. On a GPU torch's.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cuda import synchronized

# 128 MB a tensor passes by the L3 that a few cores have; 1 GB keeps a GPU busy for half a millisecond.
FLOATS = {"cpu": 2**25, "cuda": 2**28}
GPU_PASSES = 10
"""Passes that a GPU is waited for once: the wait is 10 us."""
LINE = 16  # floats


@cache
def streams(device: torch.device) -> dict[str, tuple[Callable[[], object], int]]:
    """name -> (a run of it, waited for, and the bytes of that)."""
    a, b, to = (torch.full((FLOATS[device.type],), 1.0, device=device) for _ in range(3))
    size = a.nbytes
    copy, add = partial(to.copy_, a), partial(torch.add, a, b, out=to)
    if device.type == "cuda":
        n = GPU_PASSES
        return {"copy": (synchronized(copy, n), 2 * size * n), "2R1W": (synchronized(add, n), 3 * size * n)}
    library = _library()
    if library is None:
        return {"copy": (copy, 2 * size), "2R1W": (add, 3 * size)}
    return {
        "copy": (_in_threads(library.stream_copy, to, a), 2 * size),
        "2R1W": (_in_threads(library.stream_add, to, a, b), 3 * size),
    }


def by(device: torch.device) -> str:
    """What runs them, in words."""
    if device.type == "cuda":
        return "torch's copy_ and add"
    return "stream.c, stores past the caches" if _library() else "torch's copy_ and add: no C compiler was found"


def _in_threads(function: Callable[..., None], *tensors: Tensor) -> Callable[[], object]:
    """The function over the tensors' lines, a part for each of torch's threads; ctypes lets go of the interpreter."""
    threads = torch.get_num_threads()
    lines = tensors[0].numel() // LINE
    bounds = [lines * i // threads for i in range(threads + 1)]
    pool = ThreadPoolExecutor(threads)

    def run() -> object:
        addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        parts = [
            pool.submit(function, *addresses, ctypes.c_size_t(first), ctypes.c_size_t(last))
            for first, last in pairwise(bounds)
        ]
        return [part.result() for part in parts]

    return run


@cache
def _library() -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "stream.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(target)]
        subprocess.run([*command, str(Path(__file__).with_name("stream.c"))], check=True)
        return ctypes.CDLL(str(target))
