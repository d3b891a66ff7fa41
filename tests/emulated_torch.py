"""Has torch, and Triton, take the emulated device for a GPU."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import quick_interpreter
import torch
from emulated_gpu import CPU, DEVICE, GPU, EmulatedGraph, EmulatedTensor, Mode, aten, hosts
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter

_BYTES = 64 << 30
_PROPERTIES = SimpleNamespace(
    name="an emulated GPU",
    total_memory=_BYTES,
    major=9,
    minor=0,
    multi_processor_count=2,  # as in the interpreter: a program has several rows there too
    L2_cache_size=50 << 20,
    shared_memory_per_block_optin=232_448,
)


def install() -> None:
    """For as long as this process lives. TRITON_INTERPRET=1 must be set, and no backend have been asked for."""
    _replace_cuda()
    _replace_moves()
    _replace_tables()
    _interpret_kernels()
    quick_interpreter.install()
    real_run = threading.Thread.run

    def run(self: threading.Thread) -> None:
        with Mode():
            real_run(self)

    threading.Thread.run = run
    Mode().__enter__()


class _Stream:
    """Work on it is done at once, so that there is nothing to wait for."""

    cuda_stream = 0
    device = GPU

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None:
        _synchronize()

    def record_event(self, event: Any = None) -> "_Event":
        event = event or _Event()
        event.record(self)
        return event


class _Event:
    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        self._at = DEVICE.clock

    def synchronize(self) -> None:
        _synchronize()

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None: ...

    def elapsed_time(self, end: "_Event") -> float:
        return end._at - self._at


def _synchronize(*_: Any) -> None:
    """torch's debug mode does not notice it; a recording does."""
    if DEVICE.recording is not None:
        DEVICE.wait("synchronize")


@contextmanager
def _graph(graph: EmulatedGraph, pool: Any = None, stream: Any = None, **_: Any) -> Iterator[None]:
    assert DEVICE.recording is None
    DEVICE.recording = graph
    try:
        yield
    finally:
        DEVICE.recording = None
        graph.end()
        if graph.is_broken:  # as capture_end does, in torch's own __exit__, before the first error goes on
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _set_sync_debug_mode(mode: int | str) -> None:
    DEVICE.says_waits = {"default": 0, "warn": 1, "error": 2}[mode] if isinstance(mode, str) else mode


def _replace_cuda() -> None:
    cuda: Any = torch.cuda
    fakes = {
        "_exchange_device": lambda *_: 0,
        "_lazy_init": lambda: None,
        "_maybe_exchange_device": lambda *_: 0,
        "CUDAGraph": EmulatedGraph,
        "current_device": lambda: 0,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "device": _nothing,
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "Event": _Event,
        "get_device_capability": lambda *_: (_PROPERTIES.major, _PROPERTIES.minor),
        "get_device_name": lambda *_: _PROPERTIES.name,
        "get_device_properties": lambda *_: _PROPERTIES,
        "get_rng_state": lambda *_: DEVICE.generator.get_state(),
        "get_sync_debug_mode": lambda: DEVICE.says_waits,
        "graph": _graph,
        "graph_pool_handle": lambda: (0, 1),
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: DEVICE.recording is not None,
        "is_initialized": lambda: True,
        "manual_seed": DEVICE.generator.manual_seed,
        "manual_seed_all": DEVICE.generator.manual_seed,
        "mem_get_info": lambda *_: (_BYTES, _BYTES),
        "set_device": lambda *_: None,
        "set_rng_state": lambda state, *_: DEVICE.generator.set_state(state) and None,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "Stream": _Stream,
        "stream": _nothing,
        "synchronize": _synchronize,
    }
    for name, fake in fakes.items():
        setattr(cuda, name, fake)
    for name, value in {"current_device_index": 0, "device_count": 1, "set_device_index": 0}.items():
        setattr(torch.accelerator, name, lambda *_, _value=value: _value)
    torch._C._cuda_endAllocateToPool = lambda *_: None
    torch.backends.cudnn.is_acceptable = lambda tensor: False


def _replace_moves() -> None:
    """Of the CPU's tensors to the device, for which torch's C++ would look for a driver."""
    real_to = torch.Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device", args[0] if args else None)
        if not isinstance(device, (str, torch.device)) or torch.device(device).type != "cuda":
            return real_to(self, *args, **kwargs)
        kwargs.pop("copy", None)  # between devices it always is one
        _, dtype, is_async, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        return aten._to_copy.default(
            self, dtype=dtype or self.dtype, device=GPU, non_blocking=is_async, memory_format=memory_format
        )

    def of_values(real: Any) -> Any:
        def make(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            made: Tensor = real(*args, **kwargs)
            return made if device is None else made.to(device)

        return make

    torch.Tensor.to = to
    torch.Tensor.cuda = lambda self, device=None, non_blocking=False: to(self, GPU, non_blocking=non_blocking)
    torch.Tensor.pin_memory = lambda self, device=None: self
    torch.tensor, torch.as_tensor, torch.asarray = map(of_values, (torch.tensor, torch.as_tensor, torch.asarray))
    # Parameters' memory can't be exchanged for the device's: a module that moves gets others.
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def _replace_tables() -> None:
    """What torch looks up by the device's kind is what it has for the CPU."""
    real_autocast = torch.autocast

    class Autocast(real_autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu", *args, **kwargs)

    torch.autocast = torch.amp.autocast = torch.amp.autocast_mode.autocast = Autocast
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        real = getattr(torch, name)
        setattr(torch, name, lambda kind="cpu", _real=real: _real("cpu"))

    real_generator = torch.Generator

    class Generator(real_generator):
        def __new__(cls, device: Any = CPU) -> Any:
            return real_generator()

    torch.Generator = Generator
    groups = torch._C._group_tensors_by_device_and_dtype

    def grouped(lists: Any, with_indices: bool = False) -> Any:
        """Optimizers ask for lists by device."""
        return {
            (GPU if isinstance(value[0][0][0], EmulatedTensor) else device, dtype): value
            for (device, dtype), value in groups(lists, with_indices).items()
        }

    torch._C._group_tensors_by_device_and_dtype = grouped


def _interpret_kernels() -> None:
    """Triton's launches, interpreted, are operations of the device; losses are computed by them, as eager ones."""
    from triton.runtime import interpreter

    from ban_fast.backends import triton
    from ban_fast.ops import autograd

    launch = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        operands = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
        if not all(isinstance(each, EmulatedTensor) for each in operands):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        positional, named = hosts((args, kwargs))

        def once() -> None:
            with _disable_current_modes():
                launch(self, *positional, **named)

        DEVICE.clock += 1
        if DEVICE.recording is not None:
            DEVICE.recording.record_kernel(once, hosts(operands))
        else:
            once()

    interpreter.GridExecutor.__call__ = call
    triton.problem = lambda device_type: None
    autograd._OWN = (*autograd._OWN, EmulatedTensor)
    depth = torch._C._len_torch_dispatch_stack
    torch._C._len_torch_dispatch_stack = lambda: depth() - 1  # the device's own mode wants to see no operator
