"""Images shown by one kernel have the bits of the gather and the normalisation that it stands for."""

import itertools

import pytest
import torch
from torch import Tensor

from ban_fast.backends.triton import images
from ban_fast.data.augment import Augmentation, Normalizer, sources
from ban_fast.data.viewer import Composed

MEAN, STD = (125.3, 123.0, 113.9, 100.0), (63.0, 62.1, 66.7, 50.0)
AUGMENTATIONS = [
    None,
    Augmentation(padding=3),
    Augmentation(fill="zero"),
    Augmentation(padding=0),
    Augmentation(padding=2, flip=False),
]
SHAPES = [(32, 32, 3), (8, 8, 1), (5, 9, 4), (20, 13, 2)]
"""Several programs an image, a single channel, sides that no power of two divides, and channels that do."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Shower:
    """`viewer.OnePass` with Triton's kernel, on the CPU too."""

    def __init__(
        self, augmentation: Augmentation | None, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        every = torch.arange(256, dtype=torch.uint8, device=device).view(256, 1, 1, 1).expand(-1, 1, 1, shape[-1])
        norm = Normalizer(MEAN[: shape[-1]], STD[: shape[-1]], 1, device=device, dtype=dtype)
        self._words = norm(every).view(256, shape[-1]).t().contiguous()
        tables = sources(augmentation or Augmentation(padding=0, flip=False), shape)
        self._tables = [table.to(device, torch.int32).contiguous() for table in tables]

    def __call__(self, stored: Tensor, rows: Tensor, views: Tensor, memory_format: torch.memory_format) -> Tensor:
        return images.show(stored, *self._tables, rows, views, self._words, memory_format)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_of_gather_and_normalisation(device: torch.device, shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    channels = shape[-1]
    stored = torch.randint(0, 256, (20, *shape), dtype=torch.uint8, generator=generator).to(device)
    # Every augmentation with every dtype and both formats, but for the interpreter's sake not all of all.
    ways = zip(AUGMENTATIONS * 2, itertools.cycle(DTYPES), itertools.cycle([False] * 5 + [True] * 5), strict=False)
    for augmentation, dtype, channels_last in ways:
        count = 5
        views = torch.randint(0, 1 if augmentation is None else augmentation.views, (count,), generator=generator)
        rows = torch.randint(0, 20, (2 * count,), generator=generator).to(device)[::2]
        composed = Composed(
            augmentation,
            shape,
            MEAN[:channels],
            STD[:channels],
            device=device,
            dtype=dtype,
            channels_last=channels_last,
        )
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        ours = Shower(augmentation, shape, device, dtype)(stored, rows, views.to(device), memory_format)
        theirs = composed(stored, rows, views.to(device))
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
        if channels > 1:  # elsewhere strides of 1 x 1 dimensions mean nothing
            assert ours.stride() == theirs.stride()


def test_every_view(device: torch.device) -> None:
    """All 162 of an image, black borders included, whose bytes take every value."""
    shape, augmentation = (16, 16, 1), Augmentation(fill="zero")
    stored = torch.arange(256, dtype=torch.uint8, device=device).view(1, *shape)
    rows, views = torch.zeros(162, dtype=torch.int64, device=device), torch.arange(162, device=device)
    shown = Shower(augmentation, shape, device, torch.float32)(stored, rows, views, torch.contiguous_format)
    composed = Composed(augmentation, shape, MEAN[:1], STD[:1], device=device)
    assert torch.equal(shown, composed(stored, rows, views))


def test_no_images(device: torch.device) -> None:
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    stored = torch.zeros(3, 4, 4, 3, dtype=torch.uint8, device=device)
    shown = Shower(None, (4, 4, 3), device, torch.float32)(stored, nothing, nothing, torch.channels_last)
    assert shown.shape == (0, 3, 4, 4)
