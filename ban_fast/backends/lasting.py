"""Device memory that is kept for good, whichever pool the thread that first needs it allocates from."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def lasting(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """What `make` returns, on `device`, to be used on the current stream. Not while a CUDA graph is captured.

    It is made in a thread of its own. While torch.compile's CUDA graphs warm up, and under `torch.cuda.use_mem_pool`,
    all that this thread allocates comes from a pool that is taken back afterwards, and would be another's.
    """
    if device.type != "cuda":
        return make()

    def there() -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.device(device):
            return make(), torch.cuda.current_stream().record_event()

    with ThreadPoolExecutor(1) as thread:
        made, ready = thread.submit(there).result()
    torch.cuda.current_stream(device).wait_event(ready)
    return made
