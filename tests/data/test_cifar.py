"""CIFAR: synthetic directories in the published layout, and the real images where BAN_FAST_DATA has them."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ban_fast import data
from ban_fast.data.cifar import CIFAR
from ban_fast.errors import UserError

MakeCifar = Callable[..., Path]


def write_pickle(path: Path, value: Any, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(value, protocol))


@pytest.mark.parametrize("name", list(CIFAR))
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_images_come_out_as_they_were_put_in(tmp_path: Path, make_cifar: MakeCifar, name: str, protocol: int) -> None:
    published = CIFAR[name]
    directory = make_cifar(published, tmp_path, protocol=protocol)
    for place in (directory, tmp_path, str(tmp_path)):
        d = data.load(name, directory=place)
        assert d.name == name
        assert d.classes == tuple(f"class_{i}" for i in range(published.num_classes))
        assert (d.padding, d.flip) == (4, True)
        assert d.mean == (125.3, 123.0, 113.9)
        assert d.std == (63.0, 62.1, 66.7)
        for part, files in ((d.train, published.train), (d.test, (published.test,))):
            raw = [pickle.loads((directory / file).read_bytes(), encoding="bytes") for file in files]
            planes = np.concatenate([content[b"data"] for content in raw]).reshape(-1, 3, 32, 32)
            assert part.images.is_contiguous()
            assert np.array_equal(part.images.permute(0, 3, 1, 2).numpy(), planes)
            labels = [label for content in raw for label in content[published.labels.encode()]]
            assert part.labels.tolist() == labels
            assert torch.equal(part.sample_ids, torch.arange(len(labels)))


def test_keys_and_names_of_python_3(cifar10: Path) -> None:
    for path in cifar10.iterdir():
        content = pickle.loads(path.read_bytes(), encoding="bytes")
        write_pickle(path, {key.decode(): value for key, value in content.items()}, 4)
    write_pickle(cifar10 / "batches.meta", {"label_names": [f"k{i}" for i in range(10)]}, 4)
    d = data.load("cifar10", directory=cifar10)
    assert len(d.train) == 100
    assert d.classes[3] == "k3"


def test_labels_of_cifar100_are_the_fine_ones(tmp_path: Path, make_cifar: MakeCifar) -> None:
    directory = make_cifar(CIFAR["cifar100"], tmp_path, images=100)
    content = pickle.loads((directory / "train").read_bytes(), encoding="bytes")
    write_pickle(directory / "train", {**content, b"coarse_labels": [0] * 100})
    assert data.load("cifar100", directory=tmp_path).train.labels.tolist() == list(range(100))


def test_the_environment_says_where(tmp_path: Path, make_cifar: MakeCifar, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar(CIFAR["cifar10"], tmp_path)
    monkeypatch.setenv("BAN_FAST_DATA", str(tmp_path))
    assert len(data.load("cifar10").train) == 100
    monkeypatch.delenv("BAN_FAST_DATA")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"home/.cache/ban_fast \(not there\)"):
        data.load("cifar10")


@pytest.mark.parametrize("name", list(CIFAR))
def test_a_dataset_that_is_not_there(tmp_path: Path, name: str) -> None:
    remedy = f"get it with `ban-fast prepare {name} --data-dir {tmp_path}`"
    with pytest.raises(UserError) as caught:
        data.load(name, directory=tmp_path)
    assert str(caught.value) == f"{name} is not in {tmp_path} (no {CIFAR[name].directory} in it); {remedy}"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a directory"):
        data.load(name, directory=tmp_path / "file")


def test_an_image_folder_is_not_taken_for_cifar100(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(UserError, match="no cifar-100-python in it"):
        data.load("cifar100", directory=tmp_path)


def test_cifar_given_as_a_folder(cifar10: Path) -> None:
    with pytest.raises(UserError, match="holds cifar10; give the name 'cifar10' and this as --data-dir"):
        data.load(str(cifar10))


@pytest.mark.parametrize("file", CIFAR["cifar10"].files)
def test_a_file_that_is_missing_is_named(cifar10: Path, file: str) -> None:
    (cifar10 / file).unlink()
    with pytest.raises(UserError, match=f"lacks {file}; .* `ban-fast prepare cifar10 --data-dir {cifar10.parent}`"):
        data.load("cifar10", directory=cifar10)


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_file_cut_short_is_named(cifar10: Path, file: str) -> None:
    path = cifar10 / file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{path} is damaged or cut short"):
        data.load("cifar10", directory=cifar10)


def test_a_hostile_file_is_refused_and_does_not_run(cifar10: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (cifar10 / "data_batch_5").write_bytes(b"cos\nmkdir\n(V" + str(trap).encode() + b"\ntR.")
    with pytest.raises(UserError, match=r"refused .*data_batch_5: it contains a call of 'os.mkdir'"):
        data.load("cifar10", directory=cifar10)
    assert not trap.exists()


IMAGES = np.zeros((4, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a dictionary, got list"),
        ({b"labels": [0] * 4}, "'data' must be uint8 .* got NoneType; this is not a file of cifar10"),
        ({b"data": IMAGES.astype(np.float32), b"labels": [0] * 4}, r"got float32 \[4, 3072\]"),
        ({b"data": IMAGES[:, :784], b"labels": [0] * 4}, r"got uint8 \[4, 784\]"),
        ({b"data": IMAGES[0], b"labels": [0] * 4}, r"got uint8 \[3072\]"),
        ({b"data": [[0] * 3072], b"labels": [0]}, "got list"),
        ({b"data": IMAGES}, "no list of integers 'labels'; this is not a file of cifar10"),
        ({b"data": IMAGES, b"fine_labels": [0] * 4}, "no list of integers 'labels'"),
        ({b"data": IMAGES, b"labels": ["cat"] * 4}, "no list of integers"),
        ({b"data": IMAGES, b"labels": [0.5] * 4}, "no list of integers"),
        ({b"data": IMAGES, b"labels": [[0]] * 4}, "no list of integers"),
        ({b"data": IMAGES, b"labels": [0] * 3}, "4 images and 3 labels"),
        ({b"data": IMAGES[:0], b"labels": []}, "0 images and 0 labels"),
        ({b"data": IMAGES, b"labels": [0, 1, 2, 10]}, r"label 10 is not in 0..9"),
        ({b"data": IMAGES, b"labels": [0, -1, 2, 3]}, r"label -1 is not in 0..9"),
    ],
)
def test_content_that_is_not_the_datasets(cifar10: Path, content: Any, message: str) -> None:
    write_pickle(cifar10 / "data_batch_2", content)
    with pytest.raises(UserError, match=f"{cifar10 / 'data_batch_2'}: .*{message}"):
        data.load("cifar10", directory=cifar10)


def test_labels_as_an_array(cifar10: Path) -> None:
    write_pickle(cifar10 / "test_batch", {b"data": IMAGES, b"labels": np.array([3, 2, 1, 0])})
    assert data.load("cifar10", directory=cifar10).test.labels.tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("content", [{}, {b"label_names": [b"a"] * 9}, {b"label_names": b"abcdefghij"}])
def test_names_that_are_not_the_datasets(cifar10: Path, content: dict[bytes, Any]) -> None:
    write_pickle(cifar10 / "batches.meta", content)
    with pytest.raises(UserError, match=r"batches.meta: no list of 10 names 'label_names'"):
        data.load("cifar10", directory=cifar10)


def test_cifar10_given_for_cifar100(cifar10: Path) -> None:
    shutil.copytree(cifar10, cifar10.parent / "cifar-100-python")
    with pytest.raises(UserError, match="lacks train, test, meta"):
        data.load("cifar100", directory=cifar10.parent)


@pytest.mark.parametrize(
    ("name", "classes", "means", "some"),
    [
        ("cifar10", 10, (0.4914, 0.4822, 0.4465), ("airplane", "truck")),
        ("cifar100", 100, (0.5071, 0.4865, 0.4409), ("apple", "worm")),
    ],
)
def test_the_real_images(
    real_data: Path, name: str, classes: int, means: tuple[float, ...], some: tuple[str, str]
) -> None:
    d = data.load(name, directory=real_data)
    assert (len(d.train), len(d.test)) == (50_000, 10_000)
    assert d.train.images.shape == (50_000, 32, 32, 3)
    assert (d.classes[0], d.classes[-1]) == some
    assert torch.bincount(d.train.labels).tolist() == [50_000 // classes] * classes
    assert torch.bincount(d.test.labels).tolist() == [10_000 // classes] * classes
    sums = d.train.images.view(-1, 3).sum(0, dtype=torch.int64)
    # Published to four places.
    assert (sums / (50_000 * 1024 * 255) - torch.tensor(means)).abs().max() < 5e-5
    own = data.load(name, directory=real_data / CIFAR[name].directory, limit_test=100)
    assert torch.equal(own.train.images, d.train.images)
    assert torch.equal(own.test.images, d.test.images[own.test.sample_ids])
    assert torch.bincount(own.test.labels).tolist() == [100 // classes] * classes
