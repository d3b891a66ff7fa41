"""KD with its defaults, as backends are called, and truth for kernels: the reference on float64 copies, on the CPU.

(The reference itself is held to independent float64 and 60-digit formulas in tests/losses.)
"""

from typing import Any

from torch import Tensor

from ban_fast.backends import reference

KD: dict[str, Any] = {
    "temperature": 1.0,
    "kd_weight": 1.0,
    "label_weight": 0.0,
    "divergence": "kl",
    "scale_t2": True,
    "ignore_index": -100,
    "reduction": "mean",
    "need_grad": True,
}


def truth(name: str, *tensors: Any, **options: Any) -> Any:
    """The reference's answer for the same bits in float64; a confidence or a normaliser is widened too."""
    return getattr(reference, name)(*(_wide(tensor) for tensor in tensors), **options)


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
