"""What the Triton backend's answers are held to, and the logits that they are asked about."""

from typing import Any

import torch
from reference_truth import KD
from torch import Tensor

from ban_fast.backends import triton
from ban_fast.backends.interface import LossOutput

DKPP: dict[str, Any] = KD | {"seed": 0}
CWTM: dict[str, Any] = {"ignore_index": -100, "need_grad": True}
LOSS_ERROR = 3e-6
"""Of a KL: twice the 1.2e-6 of row_math.py's docstring, and the rest for a GPU's exponentials (2 ulp)."""
GRADIENT_ERROR = 3e-6
"""Of the largest element of a row's gradient: likewise, from 1.3e-6."""
FAR_ERROR = 6e-6
"""Of both where logits differ by up to 90: the rounding of such a difference, 90 * 2^-24."""


def logits(rows: int, classes: int, regime: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher [rows, classes] in fp32. A born-again student ends "near" its teacher."""
    generator = torch.Generator().manual_seed(seed * 1000 + classes)
    teacher = 2 * torch.randn(rows, classes, generator=generator)
    noise = torch.randn(rows, classes, generator=generator)
    if regime == "random":
        return 2 * noise, teacher
    if regime == "near":
        return teacher + 1e-3 * noise, teacher
    if regime == "shifted":
        return teacher + 1e-3 * noise + 100, teacher
    if regime == "sharper":
        return 1.1 * teacher, teacher
    if regime == "outlier":  # the class that d is measured from is the one that differs
        near = teacher + 1e-3 * noise
        return near.scatter_add(1, teacher.argmax(1, keepdim=True), torch.full((rows, 1), 3.0)), teacher
    assert regime == "far"
    return 12 * noise, 12 * teacher


def found(name: str, tensors: tuple[Any, ...], device: torch.device, **options: Any) -> Any:
    """The Triton backend's answer on `device`, brought to the CPU; a loss's gradient in fp64, grad_scale applied."""
    output = getattr(triton, name)(*(t.to(device) if isinstance(t, Tensor) else t for t in tensors), **options)
    if isinstance(output, Tensor):
        return output.cpu()
    loss, kd, label, grad, scale = (None if t is None else t.cpu() for t in output)
    if grad is not None:
        grad = grad.double() if scale is None else grad.double() * scale.double()
    return LossOutput(loss, kd, label, grad, scale)


def assert_close(
    got: LossOutput, wanted: LossOutput, *, loss: float = LOSS_ERROR, gradient: float = GRADIENT_ERROR
) -> None:
    """Loss and terms within a relative error, gradients within one of the largest element of their row."""
    for name in ("loss", "kd", "label"):
        a, b = getattr(got, name).double(), getattr(wanted, name)
        assert torch.allclose(a, b, rtol=loss, atol=1e-30, equal_nan=True), (name, a, b)
    if wanted.grad is not None:
        assert got.grad is not None
        size = wanted.grad.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
        worst = ((got.grad - wanted.grad) / size).abs().max()
        assert worst <= gradient, worst
