"""Tiles of the dense block's kernels by shape: small tables, no tuning at run time.

`tests/backends/triton` compiles what they yield for sm_80 and sm_90 and fails on a spilled register.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

JIT: dict[str, Any] = {
    "do_not_specialize": [
        *("num_rows", "num_in", "num_out", "num_channels", "num_tiles", "tile_rows", "first", "measured", "eps"),
        *("x_pitch", "grad_pitch", "out_pitch", "into_pitch", "weight_pitch", "terms_pitch"),
        *("split_rows", "num_splits", "share", "size"),
    ],
    "do_not_specialize_on_alignment": [
        *("gamma", "beta", "mean", "var", "scale", "shift", "batch_mean", "batch_var"),
        *("partials", "terms", "total", "norm_grad"),
    ],
}
"""Of every kernel: arguments that it is not compiled anew for when they happen to be 1 or divisible by 16, or a block
would compile a kernel for each of its widths. What matters of those kernels are told as *_ALIGN."""

PASS_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
"""Of every launch but the products'. Multiplications may fuse with additions, as in torch's batch norm."""
IEEE, TF32 = "ieee", "tf32"


class Tile(NamedTuple):
    """A product's share of a program: [rows, channels], `depth` of the summed dimension at a time."""

    rows: int
    channels: int
    depth: int
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        """Of its launch."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def precision(x: Tensor) -> str:
    """How fp32 is multiplied: as torch's convolutions do (`torch.backends.cudnn.conv.fp32_precision`)."""
    setting: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return TF32 if x.dtype == torch.float32 and setting == "tf32" else IEEE


_FEW_ROWS = 16_384
"""64 images of 16x16 pixels: up to these, tiles of 128 rows would leave multiprocessors idle."""
_FLOAT = {IEEE: Tile(64, 32, 16, 4, 2), TF32: Tile(64, 64, 32, 4, 3)}
"""Products of fp32: in IEEE arithmetic without tensor cores, whose sums and operands fill a thread's registers sooner."""


def project_tile(rows: int, channels: int, dtype: torch.dtype, how: str) -> Tile:
    """Of [rows, channels] summed over what is read: a unit's 1x1 convolution, or the exit's."""
    if dtype == torch.float32:
        return _float_tile(rows, how)
    if rows <= _FEW_ROWS:
        return Tile(64, 64, 32, 4, 3)
    # 4 warps would do for 64 channels, but 168 registers a thread: Triton 3.6 spills 16 bytes of them on sm_80.
    return Tile(128, 64 if channels <= 64 else 128, 32, 8, 3)


def unproject_tile(rows: int, dtype: torch.dtype, how: str) -> Tile:
    """Of [rows, channels] summed over what was made of them; x and the gradient buffer need registers at its end."""
    if dtype == torch.float32:
        return _float_tile(rows, how)
    return Tile(64, 64, 32, 4, 3) if rows <= _FEW_ROWS else Tile(128, 64, 32, 8, 3)


def _float_tile(rows: int, how: str) -> Tile:
    return Tile(128, 64, 16, 8, 2) if how == IEEE and rows > _FEW_ROWS else _FLOAT[how]


def weight_tile(dtype: torch.dtype, how: str) -> Tile:
    """Of a weight's gradient [rows of it, channels], summed over pixels."""
    return _FLOAT[how] if dtype == torch.float32 else Tile(64, 64, 32, 4, 3)


def splits(tiles: int, pixels: int, tile: Tile, multiprocessors: int) -> tuple[int, int]:
    """(parts that pixels are cut into for a weight's gradient of so many tiles, pixels of each): two programs a
    multiprocessor, each with 8 steps of the sum at least."""
    steps = -(-pixels // tile.depth)
    parts = max(1, min(2 * multiprocessors // tiles, steps // 8))
    each = -(-steps // parts) * tile.depth
    return -(-pixels // each), each


def pass_tile(rows: int, channels: int) -> tuple[int, int]:
    """[rows, channels] that a pass over memory takes at a time with 4 warps: 16 to 32 elements a thread."""
    across = min(32, max(8, triton.next_power_of_2(channels)))
    return (64 if rows <= _FEW_ROWS else 128), across
