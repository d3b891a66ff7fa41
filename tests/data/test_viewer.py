"""The two ways to show images, against each other and against one image at a time."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from ban_fast.data import viewer
from ban_fast.data.augment import Augmentation
from ban_fast.data.viewer import Composed, OnePass

CPU = torch.device("cpu")
MEAN, STD = (125.3, 123.0, 113.9, 100.0), (63.0, 62.1, 66.7, 50.0)
native = pytest.mark.skipif(viewer._kernel("cpu") is None, reason="ban_fast._native is not built")
WAYS = [Composed, pytest.param(OnePass, marks=native)]
AUGMENTATIONS = [
    None,
    Augmentation(),
    Augmentation(fill="zero"),
    Augmentation(padding=0),
    Augmentation(padding=2, flip=False),
]
SHAPES = [(32, 32, 3), (8, 8, 1), (5, 9, 4), (20, 13, 2)]


def images_of(shape: tuple[int, int, int], count: int = 50) -> Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draw(augmentation: Augmentation | None, count: int, of: int = 50) -> tuple[Tensor, Tensor]:
    """Rows and views of a batch."""
    generator = torch.Generator().manual_seed(1)
    views = 1 if augmentation is None else augmentation.views
    return torch.randint(0, of, (count,), generator=generator), torch.randint(0, views, (count,), generator=generator)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fill", ["reflect", "zero"])
def test_every_view_is_a_padded_image_cut_and_mirrored(way: type, fill: str) -> None:
    shape, augmentation = (7, 6, 3), Augmentation(padding=3, fill=fill)  # type: ignore[arg-type]
    image = images_of(shape, 1)
    show = way(augmentation, shape, MEAN[:3], STD[:3], device=CPU, dtype=torch.float64)
    shown = show(image, torch.zeros(augmentation.views, dtype=torch.int64), torch.arange(augmentation.views))
    mode = {"mode": "reflect"} if fill == "reflect" else {"mode": "constant"}
    padded = np.pad(image[0].numpy(), ((3, 3), (3, 3), (0, 0)), **mode)  # type: ignore[call-overload]
    for view, (dy, dx, flipped) in enumerate(itertools.product(range(7), range(7), (False, True))):
        cut = padded[dy : dy + 7, dx : dx + 6]
        wanted = (cut[:, ::-1] if flipped else cut).astype(np.float32)
        normalised = (wanted - np.array(MEAN[:3], np.float32)) / np.array(STD[:3], np.float32)
        assert np.array_equal(shown[view].numpy(), normalised.transpose(2, 0, 1))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_pass_has_the_bits_of_the_composed(
    shape: tuple[int, int, int], channels_last: bool, dtype: torch.dtype
) -> None:
    images, channels = images_of(shape), shape[-1]
    for augmentation in AUGMENTATIONS:
        composed, one_pass = (
            way(
                augmentation,
                shape,
                MEAN[:channels],
                STD[:channels],
                device=CPU,
                dtype=dtype,
                channels_last=channels_last,
            )
            for way in (Composed, OnePass)
        )
        for count in (0, 1, 37):
            rows, views = draw(augmentation, count)
            ours, theirs = one_pass(images, rows, views), composed(images, rows, views)
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
            if channels > 1 and count > 1:  # elsewhere strides of 1 x 1 dimensions mean nothing
                assert ours.stride() == theirs.stride()


@native
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_one_pass_has_the_same_bits_on_any_number_of_threads(threads: int) -> None:
    images, augmentation = images_of((32, 32, 3), 300), Augmentation()
    rows, views = draw(augmentation, 300, of=300)
    show = OnePass(augmentation, (32, 32, 3), MEAN[:3], STD[:3], device=CPU)
    before = torch.get_num_threads()
    wanted = Composed(augmentation, (32, 32, 3), MEAN[:3], STD[:3], device=CPU)(images, rows, views)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(show(images, rows, views), wanted)
    finally:
        torch.set_num_threads(before)


@native
def test_one_pass_takes_what_is_not_contiguous() -> None:
    images, augmentation = images_of((32, 32, 3)), Augmentation()
    rows, views = draw(augmentation, 40)
    strided = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    show = OnePass(augmentation, (32, 32, 3), MEAN[:3], STD[:3], device=CPU)
    assert torch.equal(show(strided, rows[::2], views[::2]), show(images, rows[::2].clone(), views[::2].clone()))


def test_what_was_not_built_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "_kernel", lambda _: None)
    assert isinstance(viewer.viewer(None, (8, 8, 1), (0.0,), (1.0,), device=CPU), Composed)


def test_a_device_has_its_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("ban_fast.backends.triton", reason="Triton is not installed")
    from ban_fast.backends.triton import images

    monkeypatch.setattr(triton, "problem", lambda device_type: None if device_type == "cuda" else "no such device")
    find = viewer._kernel.__wrapped__
    assert find("cuda") is images.show
    assert find("xpu") is None
    assert find("cpu").__module__ == "ban_fast.backends.native_images"
