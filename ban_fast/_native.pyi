"""Native kernels over plain addresses (csrc/bindings.cpp). Nothing is checked here: `backends/native.py` calls them."""

from typing import TypedDict

from torch import Tensor
from typing_extensions import NotRequired

INTERFACE: int

Matrix = tuple[int, int, int, int, int]
"""Address, dtype code, rows, strides in elements."""
Selection = tuple[int, int, int, int, int]
"""Rows, classes, addresses of labels and teacher_rows (0: none), ignore_index."""
Key = tuple[int, int, int]
"""Seed and step as unsigned 64-bit words, address of sample_ids (0: none)."""
Options = tuple[float, float, float, bool, bool, int]
"""Temperature, kd_weight, label_weight, whether cross-entropy, scale_t2, reduction code."""
Result = tuple[int, int, int, int, int]
"""Addresses of loss, kd, label, gradient and grad_scale (0: not wanted)."""
Stored = tuple[int, int, int, int, int, int, int]
"""Addresses of pixels, height, width, channels, addresses of ys and xs, columns: as csrc/images.h."""
Shown = tuple[int, int, int, int, int, int, int]
"""Address, bytes of a word, images, strides in words of image, channel, row and column."""
Pixels = tuple[int, int]
"""Address, and the pitch from row to row in elements; channels have unit stride."""
PixelsSize = tuple[int, int, int]
"""Dtype code of the features, rows, channels."""
Offence = tuple[int, int]
"""(0, 0), or which index is out of range (1: labels, 2: teacher_rows) and in which row."""

CudaKey = tuple[int, int, int, int]
"""Seed and step as unsigned 64-bit words, addresses of the step (0: the word it is) and of sample_ids (0: none)."""
CudaLaunch = tuple[int, int, int, int]
"""Device, and the addresses of its stream, of cuda_scratch() doubles, and of a 32-bit counter that is 0."""

class CudaInfo(TypedDict):
    built: bool
    runtime_version: NotRequired[int]
    architectures: NotRequired[str]
    devices: NotRequired[int]

def usual_kd(
    student: object,
    teacher: object,
    labels: object,
    teacher_rows: object,
    temperature: object,
    kd_weight: object,
    label_weight: object,
    divergence: object,
    scale_t2: object,
    ignore_index: object,
    reduction: object,
    need_grad: object,
    threads: int,
    /,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Loss, gradient and its scale for tensors on the CPU whose gradient is below 1 MiB; None for other arguments,
    wrong ones among them, and where torch has no DLPack C exchange API."""

def kd(student: Matrix, teacher: Matrix, rows: Selection, options: Options, to: Result, threads: int) -> Offence: ...
def dkpp(
    student: Matrix, teacher: Matrix, rows: Selection, permutation: Key, options: Options, to: Result, threads: int
) -> Offence: ...
def cwtm(
    student: Matrix,
    teacher: Matrix,
    confidence: Matrix,
    rows: Selection,
    has_normalizer: bool,
    normalizer: float,
    by_label: bool,
    to: Result,
    threads: int,
) -> Offence: ...
def dkpp_targets(
    teacher: Matrix, rows: Selection, permutation: Key, temperature: float, targets: int, threads: int
) -> Offence: ...
def dkpp_permutation(argmax: int, rows: int, classes: int, permutation: Key, sources: int, threads: int) -> None: ...
def scale_gradient(
    gradient: int, dtype: int, rows: int, classes: int, factors: int, factor_stride: int, scale: float, threads: int
) -> None: ...
def dense_activate(size: PixelsSize, x: Pixels, scale: int, shift: int, out: Pixels, threads: int) -> None: ...
def dense_moments(size: PixelsSize, x: Pixels, mean: int, distances: int, threads: int) -> None: ...
def dense_deposit(
    size: PixelsSize,
    grad: Pixels,
    activation: Pixels,
    x: Pixels,
    scale: int,
    mean: int,
    into: Pixels,
    dz_sum: int,
    distance_sum: int,
    add: bool,
    threads: int,
) -> None: ...
def dense_correct(
    size: PixelsSize, grad: Pixels, x: Pixels, mean: int, p: int, q: int, out: Pixels, threads: int
) -> None: ...
def dense_pointwise(
    size: PixelsSize, x: Pixels, scale: int, shift: int, weight: int, outputs: int, out: Pixels, threads: int
) -> None: ...
def dense_pointwise_backward(
    size: PixelsSize,
    grad: Pixels,
    x: Pixels,
    scale: int,
    shift: int,
    mean: int,
    weight: int,
    outputs: int,
    into: Pixels,
    dz_sum: int,
    distance_sum: int,
    weight_grad: int,
    add: bool,
    threads: int,
) -> None: ...
def show_views(stored: Stored, rows: int, views: int, words: int, shown: Shown, threads: int) -> None: ...

class PooledMemory:
    """At least so many bytes of the pool's memory, which go back to it when this object ends. ValueError where
    BAN_FAST_POOL_MIB is no number."""

    def __init__(self, size: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def pool_use() -> tuple[int, int, int]:
    """Bytes of blocks now owned, the most that were owned at once, and of blocks kept for later."""

def empty_pool() -> None: ...
def instruction_set() -> str: ...
def cuda_info() -> CudaInfo: ...

# Only where cuda_info()["built"]. A CUDA error is a RuntimeError.
def cuda_kd(
    student: Matrix, teacher: Matrix, rows: Selection, options: Options, to: Result, launch: CudaLaunch
) -> None: ...
def cuda_dkpp(
    student: Matrix,
    teacher: Matrix,
    rows: Selection,
    permutation: CudaKey,
    options: Options,
    to: Result,
    launch: CudaLaunch,
) -> None: ...
def cuda_cwtm(
    student: Matrix,
    teacher: Matrix,
    confidence: Matrix,
    rows: Selection,
    normalizer: int,
    by_label: bool,
    to: Result,
    launch: CudaLaunch,
) -> None: ...
def cuda_dkpp_targets(
    teacher: Matrix, rows: Selection, permutation: CudaKey, temperature: float, targets: int, launch: CudaLaunch
) -> None: ...
def cuda_dkpp_permutation(
    argmax: int, rows: int, classes: int, permutation: CudaKey, sources: int, launch: CudaLaunch
) -> None: ...
def cuda_scale_gradient(
    gradient: int,
    dtype: int,
    rows: int,
    classes: int,
    factors: int,
    factor_stride: int,
    scale: int,
    launch: CudaLaunch,
) -> None: ...
def cuda_scratch() -> int: ...
