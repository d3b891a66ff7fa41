"""Views of stored images, normalised and cast, on the CPU in one pass (csrc/images.h).

Importing it is an ImportError where `ban_fast._native` was not built.
"""

import torch
from torch import Tensor

from .._native import show_views


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

    Row y of view v is row `ys[v // X, y]` of the image, and likewise its columns; -1 is black. All tensors lie on the
    CPU, all but `rows` and `views` contiguous; what they hold is not checked.
    """
    _, height, width, channels = images.shape
    shown = torch.empty((len(rows), channels, height, width), dtype=words.dtype, memory_format=memory_format)
    rows, views = rows.contiguous(), views.contiguous()
    image, channel, row, column = shown.stride()
    show_views(
        (images.data_ptr(), height, width, channels, ys.data_ptr(), xs.data_ptr(), len(xs)),
        rows.data_ptr(),
        views.data_ptr(),
        words.data_ptr(),
        (shown.data_ptr(), words.element_size(), len(rows), image, channel, row, column),
        torch.get_num_threads(),
    )
    return shown
