"""Views of stored images, normalised and cast, in one kernel: each byte is read once, each number written once.

The same function as `backends/native_images.py` has for the CPU. Nothing is computed: a table holds what the
normalisation makes of each of a byte's 256 values, so that the bits are those of the operations that made the table.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ban_fast.backends.triton.launch import OPTIONS, on

_PIXELS = 256
"""Of an image that a program shows, all channels of each. 32 x 32 pixels are 4 programs: a batch of 128 fills a GPU."""
_WARPS = 4
_JIT: dict[str, Any] = {
    # A batch's order and views begin anywhere in an epoch's: a captured call can't wait for a compiler.
    "do_not_specialize_on_alignment": ["images", "ys", "xs", "rows", "views"],
}


@triton.jit(**_JIT)
def show_kernel(
    images,  # uint8 [N, H, W, C]
    ys,  # int32 [Y, H]
    xs,  # int32 [X, W]
    rows,  # int64 [B]
    views,  # int64 [B]
    words,  # [C, 256]
    shown,  # [B, C, H, W]: pixels `PIXEL` apart, channels `CHANNEL`
    X: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    PIXEL: tl.constexpr,
    CHANNEL: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Some pixels of an image of the batch."""
    image = tl.program_id(0)
    row = tl.load(rows + image)
    view = tl.load(views + image)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = pixel < H * W
    y = tl.load(ys + (view // X) * H + pixel // W, mask=inside, other=-1)
    x = tl.load(xs + (view % X) * W + pixel % W, mask=inside, other=-1)
    wanted = inside & (channel < C)
    source = images + row * (H * W * C) + (y * W + x) * C + channel
    byte = tl.load(source, mask=wanted & (y >= 0) & (x >= 0), other=0).to(tl.int32)
    word = tl.load(words + channel * 256 + byte, mask=wanted)
    target = shown + image.to(tl.int64) * (H * W * C) + pixel * PIXEL + channel * CHANNEL
    tl.store(target, word, mask=wanted)


def show(
    images: Tensor,  # uint8 [N, H, W, C]
    ys: Tensor,  # int32 [Y, H]
    xs: Tensor,  # int32 [X, W]
    rows: Tensor,  # int64 [B]
    views: Tensor,  # int64 [B]
    words: Tensor,  # [C, 256]
    memory_format: torch.memory_format,
) -> Tensor:  # [B, C, H, W]
    """View `views[i]` of `images[rows[i]]`, its bytes looked up in `words`; of the type of `words`.

    Row y of view v is row `ys[v // X, y]` of the image, and likewise its columns; -1 is black. All tensors lie on one
    device, all but `rows` and `views` contiguous; what they hold is not checked. No host sync, in one launch.
    """
    _, height, width, channels = images.shape
    shape = (len(rows), channels, height, width)
    shown = torch.empty(shape, dtype=words.dtype, device=images.device, memory_format=memory_format)
    if not shown.numel():
        return shown
    is_last = memory_format == torch.channels_last
    with on(images.device):
        show_kernel[(len(rows), triton.cdiv(height * width, _PIXELS))](
            images, ys, xs, rows.contiguous(), views.contiguous(), words, shown,
            X=len(xs), H=height, W=width, C=channels,
            PIXEL=channels if is_last else 1, CHANNEL=1 if is_last else height * width,
            PIXELS=_PIXELS, CHANNELS=triton.next_power_of_2(channels), num_warps=_WARPS, **OPTIONS,
        )  # fmt: skip
    return shown
