"""Device memory that is kept for good, whichever pool the thread that first needs it allocates from."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def lasting(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """What `make` returns, on `device`, to be used on the current stream. Not while a CUDA graph is captured."""
    if device.type != "cuda":
        return make()
    made, ready = made_apart(make, device)
    torch.cuda.current_stream(device).wait_event(ready)
    return made


def made_apart(make: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, torch.cuda.Event]:
    """What `make` returns, on a CUDA device, and the event that a stream has to wait for before it uses that.

    It is made in a thread of its own. While torch.compile's CUDA graphs warm up, and under `torch.cuda.use_mem_pool`,
    all that this thread allocates comes from a pool that is taken back afterwards, and would be another's.
    """

    def there() -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.device(device):
            return make(), torch.cuda.current_stream().record_event()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(there).result()
