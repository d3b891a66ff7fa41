"""Every loss of every backend for GPUs on a few small shapes, Triton's dense block forward and backward, and what reads
out of bounds if anything does.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.sanitize

Without the caching allocator every tensor has an allocation of its own, whose ends compute-sanitizer knows.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ban_fast.backends import dispatch
from ban_fast.backends.dense_interface import Need
from ban_fast.backends.dense_shape import Norm
from ban_fast.losses import cwtm_loss, dkpp_loss, kd_loss
from benchmarks.cases import TITLE, Case, Dtype, Shape
from benchmarks.gate import gradient
from benchmarks.inputs import make_inputs
from benchmarks.providers import public_step

# A warp and less a row, tails for every vector width, a row on chip and one that is read twice or shared by a cluster.
SHAPES: tuple[Shape, ...] = ((5, 3), (128, 10), (33, 101), (4, 4099), (2, 70001))


def main(device: torch.device, shapes: Sequence[Shape]) -> None:
    names = [name for name, problem in dispatch.available(device.type).items() if problem is None]
    for backend in names:
        if backend == "reference" or (backend == "native" and device.type == "cpu"):
            continue
        for shape in shapes:
            losses(backend, device, shape)
            edges(backend, device, shape)
        print(f"{backend}: {len(shapes)} shapes", flush=True)
        if backend == "triton":
            for dtype in (torch.float32, torch.bfloat16):
                for out in (7, 0):
                    dense(device, dtype, out)
            print("dense blocks", flush=True)


def losses(backend: str, device: torch.device, shape: Shape) -> None:
    """All of them, forward and backward; AssertionError where anything is not finite."""
    dtypes: tuple[Dtype, ...] = ("fp32", "bf16")
    for objective in TITLE:
        for dtype in dtypes:
            case = Case(objective=objective, rows=shape[0], classes=shape[1], dtype=dtype)
            loss, grad, _ = gradient(public_step(objective, backend), make_inputs(case, "random", device, seed=0))
            assert torch.cat([loss.reshape(1), grad.reshape(-1)]).isfinite().all(), (backend, case)


def edges(backend: str, device: torch.device, shape: Shape) -> None:
    """Rows that name a label or a teacher row that is not there, in columns apart: NaN there, and no gradient."""
    rows, classes = shape
    student = torch.randn(classes, rows, device=device).t().requires_grad_()
    teacher = torch.randn(rows + 1, 2 * classes, device=device, dtype=torch.float16)[:, ::2]
    indices = torch.arange(rows, device=device)
    labels, teacher_rows = indices % classes, indices.clone()
    labels[0], teacher_rows[-1] = classes, -1
    arguments: dict[str, Any] = {"teacher_rows": teacher_rows, "backend": backend}
    each: dict[str, Any] = {"label_weight": 0.5, "reduction": "none", **arguments}
    for loss in (kd_loss(student, teacher, labels, **each), dkpp_loss(student, teacher, labels, **each)):
        assert loss.isnan().nonzero().flatten().tolist() == [0, rows - 1], loss
        _assert_no_gradient(loss.sum(), student)
    loss = cwtm_loss(student, teacher, labels, **arguments)
    assert loss.isnan(), "CWTM hides a label that is not there"
    _assert_no_gradient(loss, student)


def dense(device: torch.device, dtype: torch.dtype, out: int) -> None:
    """A dense block of two units and its exit to `out` channels, or to the mean over an image: forward, and every
    gradient. Widths and pixels that no tile and no 16 bytes divide."""
    from ban_fast.backends.triton import dense as kernels

    generator = torch.Generator(device).manual_seed(0)
    norms: list[Norm] = []
    convs: list[Tensor] = []

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def norm(channels: int) -> Norm:
        return Norm(normal(channels), normal(channels), None, None, 1e-5)

    entry, growth, batch, side = 11, 5, 2, 5
    for channels in (entry, entry + growth):
        norms += [norm(channels), norm(4 * growth)]
        convs += [normal(4 * growth, channels, 1, 1) / 4, normal(growth, 4 * growth, 3, 3) / 13]
    norms.append(norm(entry + 2 * growth))
    if out:
        convs.append(normal(out, entry + 2 * growth, 1, 1) / 4)
    convs = [weight.to(dtype) for weight in convs]
    x = normal(batch, entry, side, side).to(dtype, memory_format=torch.channels_last)
    y, saved = kernels.forward(x, convs, norms, group="", keep=True)
    need = Need(True, [True] * len(convs), [True] * len(norms))
    found = kernels.backward(normal(*y.shape).to(dtype), saved, convs, norms, need, group="")
    everything = [y, found.x, *found.convs, *found.norms]
    assert all(each is not None and each.isfinite().all() for each in everything), (dtype, out)


def _assert_no_gradient(loss: Tensor, student: Tensor) -> None:
    """In the first row and the last."""
    (grad,) = torch.autograd.grad(loss, student)
    assert not grad[[0, -1]].any(), "a row that is out of range has a gradient"


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("benchmarks.sanitize needs a GPU")
    main(torch.device("cuda"), SHAPES)
