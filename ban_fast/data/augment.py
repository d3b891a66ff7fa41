"""Random crop and flip as a finite family of views, and normalisation: vectorised, on the device of the images."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError, suggest
from .dataset import Shape

Fill = Literal["reflect", "zero"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Crops of an image padded by `padding` pixels on each side, times a flip from left to right.

    Every view has an index: `(dy * (2 * padding + 1) + dx) * (2 if flip else 1) + flipped`, where the crop begins dy
    rows and dx columns into the padded image (0..2*padding) and is then mirrored if `flipped`. 4 pixels with a flip
    are 162 views.
    """

    padding: int = 4
    """Pixels on each side; 0 never moves an image."""
    flip: bool = True
    """Whether half of the views are mirrored from left to right."""
    fill: Fill = "reflect"
    """What the padding holds: "reflect", the image mirrored about its border pixels, or "zero", black ones."""

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise UserError(f"padding must be at least 0 pixels, got {self.padding}")
        if self.fill not in ("reflect", "zero"):
            raise UserError(f"unknown padding {self.fill!r}{suggest(self.fill, ('reflect', 'zero'))}")

    @property
    def views(self) -> int:
        """How many views an image has."""
        return (2 * self.padding + 1) ** 2 * (2 if self.flip else 1)

    def apply(self, images: Tensor, views: Tensor) -> Tensor:
        """View `views[i]` of image i: uint8 [B, H, W, C], int64 [B] -> uint8 [B, H, W, C]."""
        _, height, width, channels = images.shape
        rows = torch.arange(len(images), device=images.device)
        return Cropper(self, (height, width, channels), images.device)(images, rows, views)


class Cropper:
    """Cuts views out of images that stay where they are: no padded copy, one gather of the pixels that are needed."""

    def __init__(self, augmentation: Augmentation, shape: Shape, device: torch.device) -> None:
        """For images of `shape` that lie on `device`."""
        height, width, _ = shape
        self._shape = shape
        self._row_step = height * width
        ys, xs = (each.to(device) for each in sources(augmentation, shape))
        self._columns = len(xs)
        self._inside: tuple[Tensor, Tensor] | None = None
        if augmentation.fill == "zero" and augmentation.padding:
            self._inside = ys.ge(0).to(torch.uint8), xs.ge(0).to(torch.uint8)
        self._ys = ys.clamp(min=0) * width
        self._xs = xs.clamp(min=0)

    def __call__(self, images: Tensor, rows: Tensor, views: Tensor) -> Tensor:
        """View `views[i]` of `images[rows[i]]`: uint8 [N, H, W, C], int64 [B], int64 [B] -> uint8 [B, H, W, C]."""
        dy, dx = views // self._columns, views % self._columns
        y = self._ys[dy] + (rows * self._row_step)[:, None]  # [B, H]
        index = y[:, :, None] + self._xs[dx][:, None, :]  # [B, H, W]
        pixels = images.reshape(-1, self._shape[-1])
        cut = pixels.index_select(0, index.view(-1)).view(-1, *self._shape)
        if self._inside is not None:
            inside_y, inside_x = self._inside
            cut *= inside_y[dy][:, :, None, None] * inside_x[dx][:, None, :, None]
        return cut


class Normalizer:
    """uint8 [B, H, W, C] -> (pixels - mean) / std, [B, C, H, W] of `dtype`; computed in fp32, rounded once at the end.

    Subtraction and division are separate operations and both correctly rounded, so the result has the same bits at
    every batch size and on every device.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        width: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        # A row of W * C constants: broadcasting along the innermost C elements would defeat vector instructions.
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device).repeat(width)
        self._std = torch.tensor(std, dtype=torch.float32, device=device).repeat(width)
        self._dtype = dtype
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> `dtype` [B, C, H, W]."""
        b, h, w, c = images.shape
        pixels = images.reshape(b, h, w * c).to(torch.float32).sub_(self._mean).div_(self._std).to(self._dtype)
        return pixels.view(b, h, w, c).permute(0, 3, 1, 2).contiguous(memory_format=self._format)


def sources(augmentation: Augmentation, shape: Shape) -> tuple[Tensor, Tensor]:
    """Which row and column of an image each of a view's comes from, -1 for black: int64 [Y, H] and [X, W].

    View v has rows `v // X` of the one and `v % X` of the other.
    """
    height, width, _ = shape
    p = augmentation.padding
    if augmentation.fill == "reflect" and p >= min(height, width):
        raise UserError(
            f"images of {height} x {width} pixels cannot be padded by reflecting {p} of them; "
            "use padding 'zero' or no cropping"
        )
    ys, xs = (_filled(_offsets(size, p), size, augmentation.fill) for size in (height, width))  # [2p+1, H], [2p+1, W]
    if augmentation.flip:
        xs = torch.stack([xs, xs.flip(1)], 1).reshape(-1, width)  # [2(2p+1), W]: dx, then flipped
    return ys, xs


def _offsets(size: int, padding: int) -> Tensor:
    """Where each pixel of each crop comes from, before the borders are seen to: [2p+1, size], -p..size-1+p."""
    return torch.arange(-padding, padding + 1)[:, None] + torch.arange(size)


def _filled(index: Tensor, size: int, fill: Fill) -> Tensor:
    """Indices beyond either border mirrored about it, or -1."""
    if fill == "zero":
        return torch.where((index < 0) | (index >= size), -1, index)
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
