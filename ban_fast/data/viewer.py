"""From stored images to what the network takes: cut to a view, normalised, cast. Two ways, one result."""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from .augment import Augmentation, Cropper, Normalizer, sources
from .dataset import Shape

Viewer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""View `views[i]` of `images[rows[i]]`: uint8 [N, H, W, C], int64 [B], int64 [B] -> [B, C, H, W]."""


def viewer(
    augmentation: Augmentation | None,
    shape: Shape,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Viewer:
    """What shows images of `shape` that lie on `device`: in one pass where there is a kernel for it.

    On a CPU that is where `_native` was built, on a GPU where Triton can be used. `augmentation` None: each image has
    the one view, 0, that is itself.
    """
    kind = OnePass if _kernel(device.type) is not None else Composed
    return kind(augmentation, shape, mean, std, device=device, dtype=dtype, channels_last=channels_last)


class Composed:
    """A gather of the pixels, then the normalisation: on any device."""

    def __init__(
        self,
        augmentation: Augmentation | None,
        shape: Shape,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        _, width, _ = shape
        self._crop = None if augmentation is None else Cropper(augmentation, shape, device)
        self._normalise = Normalizer(mean, std, width, device=device, dtype=dtype, channels_last=channels_last)

    def __call__(self, images: Tensor, rows: Tensor, views: Tensor) -> Tensor:
        return self._normalise(images.index_select(0, rows) if self._crop is None else self._crop(images, rows, views))


class OnePass:
    """A kernel that looks up what the normalisation makes of each of a byte's 256 values: the same bits."""

    def __init__(
        self,
        augmentation: Augmentation | None,
        shape: Shape,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        show = _kernel(device.type)
        assert show is not None
        self._show = show
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        ys, xs = sources(augmentation or Augmentation(padding=0, flip=False), shape)
        self._ys, self._xs = (each.to(device, torch.int32).contiguous() for each in (ys, xs))
        channels = shape[-1]
        every = torch.arange(256, dtype=torch.uint8, device=device).view(256, 1, 1, 1).expand(-1, 1, 1, channels)
        shown = Normalizer(mean, std, 1, device=device, dtype=dtype)(every)  # [256, C, 1, 1]
        self._words = shown.view(256, channels).t().contiguous()

    def __call__(self, images: Tensor, rows: Tensor, views: Tensor) -> Tensor:
        return self._show(images.contiguous(), self._ys, self._xs, rows, views, self._words, self._format)


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, torch.memory_format], Tensor]
"""As `backends/native_images.py` and `backends/triton/images.py` have it."""


@functools.cache
def _kernel(device_type: str) -> Kernel | None:
    """What shows images on such devices in one pass, where there is such a thing."""
    try:
        if device_type == "cpu":
            found = importlib.import_module("ban_fast.backends.native_images")
        elif importlib.import_module("ban_fast.backends.triton").problem(device_type) is None:
            found = importlib.import_module("ban_fast.backends.triton.images")
        else:
            return None
    except ImportError:
        return None
    show: Kernel = found.show
    return show
