"""Views against padding, cropping and mirroring each image by itself in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ban_fast.data import Augmentation
from ban_fast.data.augment import Fill, Normalizer
from ban_fast.errors import UserError


def images_of(n: int, height: int, width: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, height, width, channels), dtype=torch.uint8, generator=generator)


def one_view(image: np.ndarray, augmentation: Augmentation, view: int) -> np.ndarray:
    p, (height, width, _) = augmentation.padding, image.shape
    view, flipped = divmod(view, 2) if augmentation.flip else (view, 0)
    dy, dx = divmod(view, 2 * p + 1)
    mode = "reflect" if augmentation.fill == "reflect" else "constant"
    crop = np.pad(image, ((p, p), (p, p), (0, 0)), mode=mode)[dy : dy + height, dx : dx + width]
    return crop[:, ::-1] if flipped else crop


@pytest.mark.parametrize("fill", ["reflect", "zero"])
@pytest.mark.parametrize(
    ("padding", "flip", "shape"),
    [
        (4, True, (32, 32, 3)),  # CIFAR: 162 views
        (1, False, (8, 8, 1)),  # the digits: 9 views
        (4, False, (5, 9, 3)),  # not square, and as narrow as reflection allows
        (0, True, (6, 7, 2)),  # a flip alone
        (0, False, (6, 7, 2)),  # one view
        (2, True, (3, 3, 4)),
    ],
)
def test_every_view_is_the_padded_cropped_mirrored_image(
    padding: int, flip: bool, shape: tuple[int, int, int], fill: Fill
) -> None:
    augmentation = Augmentation(padding=padding, flip=flip, fill=fill)
    images = images_of(3, *shape)
    for image in images:
        views = torch.arange(augmentation.views)
        got = augmentation.apply(image.expand(len(views), *shape), views)
        wanted = np.stack([one_view(image.numpy(), augmentation, view) for view in range(augmentation.views)])
        assert got.dtype == torch.uint8
        assert np.array_equal(got.numpy(), wanted)


def test_each_image_gets_the_view_asked_for() -> None:
    augmentation = Augmentation()
    images = images_of(50, 32, 32, 3)
    views = torch.arange(50) * 37 % augmentation.views
    got = augmentation.apply(images, views)
    for image, view, out in zip(images, views.tolist(), got, strict=True):
        assert np.array_equal(out.numpy(), one_view(image.numpy(), augmentation, view))


def test_count_of_views() -> None:
    assert Augmentation(padding=4, flip=True).views == 162
    assert Augmentation(padding=1, flip=False).views == 9
    assert Augmentation(padding=0, flip=False).views == 1


@pytest.mark.parametrize("fill", ["reflect", "zero"])
def test_views_differ(fill: Fill) -> None:
    augmentation = Augmentation(fill=fill)
    image = images_of(1, 32, 32, 3)
    views = augmentation.apply(image.expand(162, 32, 32, 3), torch.arange(162))
    assert len({view.numpy().tobytes() for view in views}) == 162


def test_the_images_are_not_written_to() -> None:
    images = images_of(2, 8, 8, 1)
    before = images.clone()
    Augmentation(fill="zero").apply(images, torch.tensor([0, 161]))
    assert torch.equal(images, before)


def test_images_that_do_not_lie_in_one_piece() -> None:
    augmentation = Augmentation()
    images = images_of(4, 32, 32, 3)
    planar = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    views = torch.tensor([0, 50, 100, 161])
    assert torch.equal(augmentation.apply(planar, views), augmentation.apply(images, views))


def test_reflection_needs_larger_images() -> None:
    with pytest.raises(UserError, match=r"4 x 32 pixels .* reflecting 4"):
        Augmentation(padding=4).apply(images_of(1, 4, 32, 3), torch.tensor([0]))
    Augmentation(padding=4, fill="zero").apply(images_of(1, 4, 32, 3), torch.tensor([0]))


def test_wrong_settings() -> None:
    with pytest.raises(UserError, match="got -1"):
        Augmentation(padding=-1)
    with pytest.raises(UserError, match="did you mean 'reflect'"):
        Augmentation(fill="reflekt")  # type: ignore[arg-type]


MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        # Two fp32 roundings, of the difference and of the quotient, after one of the mean and one of std: each at most
        # 2**-24 of values up to 255 / 62.
        (torch.float32, 1e-6),
        (torch.float64, 1e-6),
        (torch.bfloat16, 2**-7 + 1e-6),  # half a last place of values in [2, 4)
        (torch.float16, 2**-10 + 1e-6),
    ],
)
def test_normalised_values(dtype: torch.dtype, bound: float, channels_last: bool) -> None:
    images = images_of(5, 6, 7, 3)
    device = torch.device("cpu")
    got = Normalizer(MEAN, STD, 7, device=device, dtype=dtype, channels_last=channels_last)(images)
    wanted = (images.double() - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    assert got.dtype == dtype
    assert got.shape == (5, 3, 6, 7)
    assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert (got.double() - wanted.permute(0, 3, 1, 2)).abs().max() <= bound
