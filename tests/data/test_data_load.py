"""`load`: names, divisions and limits, on the bundled digits and on small folders."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ban_fast import data
from ban_fast.data import digits, splits
from ban_fast.errors import OptionError, UserError


def counts(labels: Tensor) -> list[int]:
    return torch.bincount(labels, minlength=10).tolist()


def test_names() -> None:
    assert data.names() == ["digits", "cifar10", "cifar100"]


class TestDigits:
    def test_shapes_and_constants(self) -> None:
        d = data.load("digits")
        assert (len(d.train), len(d.test), d.validation) == (1437, 360, None)
        assert d.train.images.shape == (1437, 8, 8, 1)
        assert d.train.images.dtype == torch.uint8
        assert d.train.labels.dtype == d.train.sample_ids.dtype == torch.int64
        assert torch.equal(d.train.sample_ids, torch.arange(1437))
        assert torch.equal(d.test.sample_ids, torch.arange(360))
        assert d.classes == tuple("0123456789")
        assert (d.padding, d.flip) == (1, False)
        pixels = d.train.images.double()
        # The constants are given to a tenth of a unit.
        assert abs(d.mean[0] - pixels.mean()) < 0.1
        assert abs(d.std[0] - pixels.std()) < 0.1

    def test_each_class_is_in_both_parts_alike(self) -> None:
        d = data.load("digits")
        for train, test in zip(counts(d.train.labels), counts(d.test.labels), strict=True):
            assert abs(test - (train + test) * 360 / 1797) < 1

    def test_the_parts_are_all_images_once(self) -> None:
        d = data.load("digits")
        with np.load(digits.FILE) as stored:
            whole = sorted(image.tobytes() for image in stored["images"])
        parts = sorted(image.numpy().tobytes() for part in (d.train, d.test) for image in part.images)
        assert parts == whole

    def test_pixels_are_sixteenths(self) -> None:
        levels = {round(v * 255 / 16) for v in range(17)}
        assert set(data.load("digits").train.images.unique().tolist()) == levels

    def test_they_are_the_bundled_ones(self) -> None:
        with np.load(digits.FILE) as stored:
            content = stored["images"].tobytes() + stored["labels"].tobytes()
        # Taken when the next test passed.
        assert hashlib.sha256(content).hexdigest() == "a19cb3d96bba7deace8ee5a513a6eb7bad0403d528f00bf4d351b6a7a55baa91"

    def test_they_are_the_published_ones(self) -> None:
        sklearn = pytest.importorskip("sklearn.datasets", reason="scikit-learn, which has a copy to compare with")
        published = sklearn.load_digits()
        with np.load(digits.FILE) as stored:
            assert np.array_equal(stored["images"][..., 0], np.rint(published.images * 255 / 16))
            assert np.array_equal(stored["labels"], published.target)

    def test_a_directory_is_not_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("BAN_FAST_DATA", raising=False)
        assert len(data.load("digits", directory="/nowhere").train) == 1437


class TestDivisions:
    def test_the_division_is_the_same_always(self) -> None:
        # A pin: another division would make figures of earlier runs incomparable.
        assert data.load("digits", limit_test=5).test.sample_ids.tolist() == [112, 151, 174, 250, 260]
        d = data.load("digits", val_fraction=0.005)
        assert d.validation is not None
        assert d.validation.sample_ids.tolist() == [151, 296, 508, 636, 1148, 1204, 1262]

    @pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
    def test_validation_is_a_share_of_each_class(self, fraction: float) -> None:
        whole, d = data.load("digits"), data.load("digits", val_fraction=fraction)
        assert d.validation is not None
        assert len(d.validation) == round(1437 * fraction)
        assert len(d.train) + len(d.validation) == 1437
        for held, all_of_class in zip(counts(d.validation.labels), counts(whole.train.labels), strict=True):
            assert abs(held - all_of_class * fraction) <= 1

    def test_validation_comes_out_of_the_training_images_alone(self) -> None:
        whole, d = data.load("digits"), data.load("digits", val_fraction=0.2)
        assert d.validation is not None
        both = torch.cat([d.train.sample_ids, d.validation.sample_ids])
        assert torch.equal(both.sort().values, whole.train.sample_ids)
        assert torch.equal(d.test.images, whole.test.images)
        for part in (d.train, d.validation):
            assert torch.equal(part.images, whole.train.images[part.sample_ids])
            assert torch.equal(part.labels, whole.train.labels[part.sample_ids])

    @pytest.mark.parametrize(("limit", "least", "most"), [(1, 0, 1), (10, 1, 1), (25, 2, 3), (1000, 100, 100)])
    def test_a_limit_keeps_as_many_of_each_class(self, limit: int, least: int, most: int) -> None:
        d = data.load("digits", limit_train=limit)
        assert len(d.train) == limit
        assert least <= min(counts(d.train.labels)) <= max(counts(d.train.labels)) <= most
        assert torch.equal(d.train.sample_ids, d.train.sample_ids.unique())

    def test_a_limit_applies_to_what_validation_leaves(self) -> None:
        held = data.load("digits", val_fraction=0.2).validation
        d = data.load("digits", val_fraction=0.2, limit_train=500, limit_test=50)
        assert held is not None
        assert d.validation is not None
        assert torch.equal(d.validation.sample_ids, held.sample_ids)
        assert (len(d.train), len(d.test)) == (500, 50)
        assert not set(d.train.sample_ids.tolist()) & set(held.sample_ids.tolist())

    def test_a_limit_beyond_the_set_is_the_set(self) -> None:
        d = data.load("digits", limit_train=10**6, limit_test=360)
        assert (len(d.train), len(d.test)) == (1437, 360)

    def test_larger_limits_contain_smaller_ones(self) -> None:
        small, large = (set(data.load("digits", limit_train=n).train.sample_ids.tolist()) for n in (100, 101))
        assert small < large

    def test_classes_with_too_few_images_give_all_they_have(self) -> None:
        labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 50)
        chosen = labels[splits.even(labels, 43)]
        assert torch.bincount(chosen).tolist() == [20, 3, 20]

    @pytest.mark.parametrize("count", [0, 1, 7, 50, 103])
    def test_shares_of_uneven_classes(self, count: int) -> None:
        labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 50)
        got = torch.bincount(labels[splits.proportional(labels, count)], minlength=3)
        assert got.sum() == count
        assert ((got - torch.tensor([50, 3, 50]) * count / 103).abs() <= 1).all()

    @pytest.mark.parametrize("fraction", [1.0, -0.1, 1.5, float("nan")])
    def test_impossible_fractions(self, fraction: float) -> None:
        with pytest.raises(OptionError, match=r"data.val_fraction: must be in \[0, 1\), got"):
            data.load("digits", val_fraction=fraction)

    def test_fractions_that_leave_a_part_empty(self) -> None:
        with pytest.raises(OptionError, match="no image to validate on"):
            data.load("digits", val_fraction=1e-4)
        with pytest.raises(OptionError, match="no image to train on"):
            data.load("digits", val_fraction=0.9999)

    @pytest.mark.parametrize("option", ["limit_train", "limit_test"])
    def test_limits_are_positive(self, option: str) -> None:
        with pytest.raises(OptionError, match=f"data.{option}: must be at least 1, got 0"):
            data.load("digits", **{option: 0})


class TestNames:
    @pytest.mark.parametrize(
        ("given", "meant"), [("cifar-10", "cifar10"), ("digit", "digits"), ("cifar1000", "cifar100")]
    )
    def test_the_nearest_name_is_suggested(self, given: str, meant: str) -> None:
        for function in (data.load, data.prepare):
            with pytest.raises(UserError, match=f"unknown dataset '{given}'; did you mean '{meant}'"):
                function(given)

    def test_far_names_get_the_list(self) -> None:
        with pytest.raises(UserError, match="choose one of: digits, cifar10, cifar100"):
            data.load("imagenet")

    def test_a_path_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no directory .*pets; name a folder laid out as train/CLASS/\*"):
            data.load(str(tmp_path / "pets"))

    def test_a_directory_that_is_no_dataset(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no directory .*train; a folder of images is laid out as train/CLASS"):
            data.load(str(tmp_path))

    @pytest.mark.parametrize(("name", "size"), [("digits", 8)])
    def test_a_size_is_for_folders(self, name: str, size: int) -> None:
        with pytest.raises(OptionError, match=f"data.image_size: {name} has images of {size} pixels, got 16"):
            data.load(name, image_size=16)
        assert data.load(name, image_size=size).name == name

    def test_prepare_of_the_digits_finds_them_there(self) -> None:
        assert data.prepare("digits", "/nowhere") == digits.FILE
        assert digits.FILE.is_file()
        assert not Path("/nowhere").exists()
