"""A GPU without a GPU: tensors that lie on the CPU and say that they are on `cuda:0`, and graphs of what is done there.

It shows nothing of kernels but Triton's, which are interpreted, nor of time. It shows what the Python around them does
there. As on a GPU, operands on two devices are refused; what would wait for the device is told or refused, as
`torch.cuda.set_sync_debug_mode` asks; the device draws from a generator of its own; and what is recorded is not done
until it is replayed, with the memory and with the host's numbers that were there when it was recorded.

`emulated_torch.install` puts it in the place of torch.cuda, for as long as the process lives.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only

aten = torch.ops.aten
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

_MOVES = {aten._to_copy.default, aten.copy_.default}
"""Between devices, by their arguments."""
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Their indices may lie on the host, which waits until they are on the device."""
_WAITS = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.item.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten._unique2.default,
}
"""What needs to know numbers that are on the device."""
_ONLY_THERE: dict[Any, Callable[..., Any]] = {
    aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    aten.mm.dtype_out: lambda a, b, dtype, out: torch.mm(a.to(dtype), b.to(dtype), out=out),
}
"""What torch has for GPUs alone."""


class EmulatedTensor(torch.Tensor):
    """A tensor of the device. Its values are those of `host`, which nobody else may look at."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "EmulatedTensor":
        # Below Python it is one of the CPU's: torch's C++ would ask a driver about a GPU's.
        self: EmulatedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=CPU,
        )
        self.host = host
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return DEVICE.dispatch(func, args, kwargs or {})

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def record_stream(self, stream: Any) -> None: ...

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        copies = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, is_async, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        stays = device is None or device.type == "cuda"
        is_so = memory_format is None or self.is_contiguous(memory_format=memory_format)
        if stays and dtype in (None, self.dtype) and is_so and not copies:
            return self
        with nullcontext() if stays else DEVICE.leaving():
            return aten._to_copy.default(
                self,
                dtype=dtype or self.dtype,
                device=GPU if stays else device,
                non_blocking=is_async,
                memory_format=memory_format,
            )

    def cpu(self, memory_format: Any = None) -> Tensor:
        return self.to(CPU)

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self, **_: Any) -> str:
        return f"{self.host.detach()!r} on {GPU}"


class Mode(TorchDispatchMode):
    """Inside, what is asked to be made on the device is made there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return DEVICE.dispatch(func, args, kwargs or {})


class EmulatedDevice:
    """What is done on it, or would have to wait for it."""

    def __init__(self) -> None:
        self.generator = torch.Generator()
        self.says_waits = 0
        """torch.cuda's sync debug mode: 1 warns, 2 is an error."""
        self.recording: EmulatedGraph | None = None
        self.clock = 0.0
        """Milliseconds: one for what the host asks for, an operation or a replay, a tenth for each one in a replay."""
        self._leaving = threading.local()

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Inside, a copy to the CPU is meant as one. Elsewhere torch's C++ asks for it, which knows no other device."""
        self._leaving.here = True
        try:
            yield
        finally:
            self._leaving.here = False

    def wait(self, why: str) -> None:
        """The host waits for the device."""
        if self.recording is not None:
            self.recording.is_broken = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({why})\nand more")
        if self.says_waits == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation ({why})")
        if self.says_waits == 1:
            warnings.warn(f"called a synchronizing CUDA operation ({why})", stacklevel=3)

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation on tensors of which any may be the device's, or that makes one."""
        asked = kwargs.get("device")
        asked = None if asked is None else torch.device(asked).type
        if asked == "cuda":
            if kwargs.get("pin_memory"):
                raise RuntimeError("Only dense CPU tensors can be pinned")
            kwargs = {**kwargs, "device": CPU}
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        operands = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
        here = [each for each in operands if isinstance(each, EmulatedTensor)]
        if func in _MOVES:
            lands = self._move(func, args, kwargs, asked)
        else:
            lands = asked == "cuda" or (bool(here) and asked is None)
            self._check(func, args, operands, here)
        if not lands and not here:
            return func(*args, **kwargs)
        if self.recording is not None:
            if not lands:
                raise NotImplementedError(f"{func} to the host in a graph")
            return self.recording.record(func, args, kwargs)
        self.clock += 1
        result = self.compute(func, *hosts((args, kwargs)))
        return _landed(result, args, kwargs) if lands else result

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation on values. What it draws is drawn from the device's generator."""
        if func in _ONLY_THERE:
            return _ONLY_THERE[func](*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        before = torch.get_rng_state()
        torch.set_rng_state(self.generator.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            self.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(before)

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any], asked: str | None) -> bool:
        """Whether the copy is one to the device, or on it."""
        if func is aten._to_copy.default:
            was_here = isinstance(args[0], EmulatedTensor)
            stays = asked is None or (asked == "cpu" and not getattr(self._leaving, "here", False))
            lands = was_here if stays else asked == "cuda"
            is_async = kwargs.get("non_blocking", False)
        else:
            lands, was_here = (isinstance(each, EmulatedTensor) for each in args[:2])
            is_async = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if lands != was_here and not is_async:
            self.wait(f"{func} from {'the device' if was_here else 'the host'}")
        return lands

    def _check(self, func: Any, args: Any, operands: Sequence[Tensor], here: Sequence[Tensor]) -> None:
        """Operands are all here, but for numbers and indices; and nobody need wait."""
        if not here:
            return
        indices = [each for each in args[1] if each is not None] if func in _INDEXING else []
        free = {id(each) for each in (*here, *indices)}
        if any(id(each) not in free and each.dim() for each in operands):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found two devices, cuda:0 and cpu! ({func})"
            )
        if func in _WAITS:
            self.wait(str(func))
        for index in indices:
            if index.dtype in (torch.bool, torch.uint8) or not isinstance(index, EmulatedTensor):
                self.wait(f"{func} by {index.dtype} on {index.device}")


def hosts(tree: Any) -> Any:
    """The same with values in the place of the device's tensors."""
    return tree_map_only(EmulatedTensor, lambda each: each.host, tree)


def _landed(result: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What came of an operation, on the device: the operand itself where that was changed."""
    known = {id(each.host): each for each in tree_iter((args, kwargs)) if isinstance(each, EmulatedTensor)}

    def landed(host: Tensor) -> Tensor:
        found = known.get(id(host))
        return EmulatedTensor(host) if found is None else found

    return tree_map_only(Tensor, landed, result)


class EmulatedGraph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.is_broken = False
        """By something that can't be recorded."""
        self._operations: list[Callable[[], None]] = []
        self._before: dict[int, tuple[Any, Any]] = {}  # storages that were written to, and what they held

    def record(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation of aten. What it changes is as before at the end of the recording."""
        operands, named = hosts((args, kwargs))
        for number, argument in enumerate(func._schema.arguments):
            value = operands[number] if number < len(operands) else named.get(argument.name)
            if _is_written(argument):
                self._keep(value)
        state = DEVICE.generator.get_state()
        result = DEVICE.compute(func, operands, named)
        DEVICE.generator.set_state(state)

        def again() -> None:
            now = DEVICE.compute(func, operands, named)
            for place, value in zip(tree_iter(result), tree_iter(now), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)

        self._operations.append(again)
        return _landed(result, args, kwargs)

    def record_kernel(self, launch: Callable[[], None], operands: Sequence[Tensor]) -> None:
        """A kernel, which may write to each of its operands."""
        self._keep(operands)
        launch()
        self._operations.append(launch)

    def _keep(self, written: Any) -> None:
        for each in tree_iter(written):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                if storage.data_ptr() not in self._before:
                    self._before[storage.data_ptr()] = storage, storage.clone()

    def end(self) -> None:
        """Of the recording."""
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        """Do what was recorded."""
        with _disable_current_modes():
            for operation in self._operations:
                DEVICE.clock += 0.1
                operation()
        DEVICE.clock += 1


def _is_written(argument: Any) -> bool:
    """Whether an operation changes that argument; of running statistics its schema does not say so."""
    said = argument.alias_info is not None and argument.alias_info.is_write
    return said or argument.name in ("running_mean", "running_var")


DEVICE = EmulatedDevice()
