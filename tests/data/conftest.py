"""Small synthetic CIFAR directories in the published layout, and the real ones where the machine has them."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ban_fast.data.cifar import CIFAR, Published


def write_cifar(published: Published, parent: Path, images: int = 20, protocol: int = 2) -> Path:
    """`images` random images a file, labels 0, 1, 2, ... in turn."""
    directory = parent / published.directory
    directory.mkdir(parents=True)
    random = np.random.default_rng(0)
    for file in (*published.train, published.test):
        content = {
            b"data": random.integers(0, 256, (images, 3072), dtype=np.uint8),
            published.labels.encode(): [i % published.num_classes for i in range(images)],
            b"filenames": [b"image_%d.png" % i for i in range(images)],
        }
        (directory / file).write_bytes(pickle.dumps(content, protocol))
    names = [b"class_%d" % i for i in range(published.num_classes)]
    (directory / published.meta).write_bytes(pickle.dumps({published.label_names.encode(): names}, protocol))
    return directory


@pytest.fixture(scope="session")
def make_cifar() -> Callable[..., Path]:
    """`write_cifar`, for tests that choose its arguments."""
    return write_cifar


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    """A directory of 5 x 20 training and 20 test images."""
    return write_cifar(CIFAR["cifar10"], tmp_path)


@pytest.fixture(scope="session")
def real_data() -> Path:
    directory = os.environ.get("BAN_FAST_DATA")
    if not directory:
        pytest.skip("BAN_FAST_DATA names no directory with the real CIFAR images")
    return Path(directory)
