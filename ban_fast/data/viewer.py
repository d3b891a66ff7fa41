"""From stored images to what the network takes: cut to a view, normalised, cast. Two ways, one result."""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

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
    """What shows images of `shape` that lie on `device`: in one pass on a CPU, where `_native` was built.

    `augmentation` None: each image has the one view, 0, that is itself.
    """
    kind = OnePass if device.type == "cpu" and _native() is not None else Composed
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
    """A native kernel that looks up what the normalisation makes of each of a byte's 256 values: the same bits."""

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
        native = _native()
        assert native is not None
        self._show = native.show
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        ys, xs = sources(augmentation or Augmentation(padding=0, flip=False), shape)
        self._ys, self._xs = ys.to(torch.int32), xs.to(torch.int32)
        channels = shape[-1]
        every = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(-1, 1, 1, channels)
        shown = Normalizer(mean, std, 1, device=device, dtype=dtype)(every)  # [256, C, 1, 1]
        self._words = shown.view(256, channels).t().contiguous()

    def __call__(self, images: Tensor, rows: Tensor, views: Tensor) -> Tensor:
        shown: Tensor = self._show(images.contiguous(), self._ys, self._xs, rows, views, self._words, self._format)
        return shown


@functools.cache
def _native() -> ModuleType | None:
    try:
        return importlib.import_module("ban_fast.backends.native_images")
    except ImportError:
        return None
