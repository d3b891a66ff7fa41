"""Checks of the arguments that networks take, one line for the user each."""

from collections.abc import Iterable
from typing import Any

import torch

from ..errors import UserError, suggest

MOST = 2**24
"""Of anything that networks have a number of: a tensor of one such side is a tensor yet."""


def whole(name: str, value: Any, least: int = 1) -> int:
    """`value` if it is an int of at least `least` and at most `MOST`, else a UserError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if value > MOST:
        raise UserError(f"{name} must be at most {MOST:,}, got {value}")
    return value


def share(name: str, value: Any) -> float:
    """`value` if it is a number in [0, 1), else a UserError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"{name} must be a number in [0, 1), got {value!r}")
    return float(value)


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """`value` if it is one of `choices`, else a UserError that suggests one."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f"unknown {name} {value!r}{suggest(str(value), choices)}")
    return str(value)


def units_of_depth(name: str, depth: int) -> int:
    """n of a depth 6n+4 (three stages of n units of two convolutions); UserError with the nearest depths otherwise."""
    units, rest = divmod(depth - 4, 6)
    if units >= 1 and not rest:
        return units
    below, above = depth - rest, depth - rest + 6
    nearest = f"{below} and {above}" if below >= 10 else "10"
    raise UserError(f"{name} has no depth {depth}: it must be 6n+4; nearest: {nearest}")


def image(x: torch.Tensor, weight: torch.Tensor, least: int) -> None:  # [B, C, H, W], [out, C, s, s]
    """ValueError unless `x` is a batch of images that a convolution by `weight` takes, each side at least `least`.

    Under autocast, which casts all floating-point tensors but fp64, they may be of another dtype than the weights.
    """
    channels = weight.shape[1]
    if x.ndim != 4 or x.shape[1] != channels or min(x.shape[2:]) < least:
        raise ValueError(f"images must be [B, {channels}, H, W] with H and W at least {least}, got {list(x.shape)}")
    if x.dtype != weight.dtype:
        cast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
        if not (cast and all(t.is_floating_point() and t.dtype != torch.float64 for t in (x, weight))):
            raise ValueError(f"images must be {weight.dtype}, as the network's weights are, got {x.dtype}")


def tokens(x: torch.Tensor) -> None:  # [T, B]
    """ValueError unless `x` is a window of a language model's streams: int64, of one place and one stream at least."""
    if x.ndim != 2 or x.dtype != torch.int64 or 0 in x.shape:
        raise ValueError(f"tokens must be int64 [T, B], T and B at least 1, got {x.dtype} {list(x.shape)}")


def characters(x: torch.Tensor, window: int) -> None:  # [T, B, window]
    """ValueError unless `x` is a window of streams of words, each as its characters."""
    if x.ndim != 3 or x.dtype != torch.int64 or x.shape[2] != window or 0 in x.shape:
        raise ValueError(
            f"without a table, words must be int64 [T, B, {window}], their characters, got {x.dtype} {list(x.shape)}"
        )
