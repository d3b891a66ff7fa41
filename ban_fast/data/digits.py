"""Handwritten digits, bundled with the package: 1,797 grey images of 8 x 8 pixels, 10 classes.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
https://archive.ics.uci.edu/dataset/80, licence CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/).
These are the 1,797 images of its file optdigits.tes, in its order.

Transformation: the published pixels count set dots, 0..16; `digits.npz` holds round(v * 255 / 16) as uint8, `images`
[1797, 8, 8, 1], and `labels`, uint8 [1797]. Nothing else was changed.
"""

from pathlib import Path

import numpy as np
import torch

from . import splits
from .dataset import Part, Source

FILE = Path(__file__).with_name("digits.npz")
"""The bundled images."""

MEAN, STD = (77.9,), (95.8,)
"""Of the training images, in units of 0..255."""

_TEST_IMAGES = 360


def read() -> Source:
    """The bundled digits: 1,437 for training, 360 for testing, the same division always, each class in both alike.

    The publishers' own training part is not among these images, hence a division of our own.
    """
    with np.load(FILE) as stored:
        images = torch.from_numpy(stored["images"])
        labels = torch.from_numpy(stored["labels"]).long()
    test = splits.proportional(labels, _TEST_IMAGES)
    is_train = torch.ones(len(labels), dtype=torch.bool)
    is_train[test] = False
    return Source(
        classes=tuple(str(digit) for digit in range(10)),
        mean=MEAN,
        std=STD,
        padding=1,
        flip=False,
        train=Part.of(images[is_train], labels[is_train]),
        test=Part.of(images[test], labels[test]),
    )
