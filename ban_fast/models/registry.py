"""From a name to a network. One dict; a new family is one entry."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UserError, suggest
from . import checks, external
from .cnn_lstm import CnnLSTM
from .densenet import DenseNet, densenet_bc
from .lstm import WordLSTM
from .small import MLP, ConvNet
from .wide_resnet import WideResNet

DEFAULT_CLASSES = 100  # CIFAR-100, the paper's main dataset
DEFAULT_WORDS = 10_000  # Penn Treebank, its other one
EXTERNAL = ("torchvision:{name}", "timm:{name}", "{package.module}:{factory}")


def _densenet_of_depth(depth: int, growth: int, **arguments: Any) -> DenseNet:
    return densenet_bc(checks.units_of_depth("densenet-bc", depth), growth, **arguments)


@dataclass(frozen=True)
class Family:
    """Networks under one pattern, built by `build(*numbers in the name, num_classes=, in_channels=, **options)`; those
    that read tokens have no in_channels."""

    build: Callable[..., nn.Module]
    options: tuple[str, ...] = ()
    needs_image_size: bool = False
    reads: Literal["images", "tokens"] = "images"
    needs_characters: bool = False


_CNN_LSTM_OPTIONS = ("characters", "window", "table", "layers", "dropout")

FAMILIES: dict[str, Family] = {
    "wrn-{depth}-{width}": Family(WideResNet, ("dropout",)),
    "densenet-bc-{depth}-{growth}": Family(_densenet_of_depth, ("memory", "sync_statistics")),
    # The paper's rows by what their parameter counts say: 17, 14, 12 and 12 units a block, and a third transition in
    # all but the first, which is DenseNet-BC-106-33.
    "densenet-112-33": Family(partial(densenet_bc, 17, 33), ("memory", "sync_statistics")),
    "densenet-90-60": Family(partial(densenet_bc, 14, 60, True), ("memory", "sync_statistics")),
    "densenet-80-80": Family(partial(densenet_bc, 12, 80, True), ("memory", "sync_statistics")),
    "densenet-80-120": Family(partial(densenet_bc, 12, 120, True), ("memory", "sync_statistics")),
    "convnet-{width}": Family(ConvNet),
    "mlp-{hidden}": Family(MLP, ("image_size",), needs_image_size=True),
    "lstm-{hidden}": Family(WordLSTM, ("layers", "dropout", "tied"), reads="tokens"),
    "cnn-lstm": Family(CnnLSTM, _CNN_LSTM_OPTIONS, reads="tokens", needs_characters=True),
    "cnn-lstm-{hidden}": Family(CnnLSTM, _CNN_LSTM_OPTIONS, reads="tokens", needs_characters=True),
}


def names() -> list[str]:
    """What `create` knows: names as they are, and patterns like "wrn-{depth}-{width}"."""
    return [*FAMILIES, *EXTERNAL]


def create(name: str, num_classes: int | None = None, *, in_channels: int | None = None, **options: Any) -> nn.Module:
    """The network called `name`, freshly initialised from torch's generator; on the meta device too.

    It takes [B, in_channels, H, W] and returns logits [B, num_classes]; None is 3 and 100. `options` are those
    of its family: dropout (wrn), memory and sync_statistics (densenet), image_size (mlp); torchvision's and timm's go
    to their builders.
    `package.module:factory` is called with num_classes and the options, and with in_channels if it has a parameter of
    that name.

    Language models (`LanguageModel`: lstm, cnn-lstm) take tokens [T, B] and a state, and have no channels; num_classes
    is their words, 10,000 for None.
    UserError for a name, an option or a value that cannot be.
    """
    classes = checks.whole("num_classes", DEFAULT_CLASSES if num_classes is None else num_classes)
    channels = checks.whole("in_channels", 3 if in_channels is None else in_channels)
    source, colon, rest = name.partition(":")
    if source == "torchvision" and colon:
        return external.torchvision(rest, classes, channels, options)
    if source == "timm" and colon:
        return external.timm(rest, classes, channels, options)
    if _is_factory(name):
        return external.custom(name, classes, channels, options)
    family, numbers = _find(name)
    for key in options:
        if key not in family.options:
            valid = suggest(key, family.options) if family.options else "; it has none"
            raise UserError(f"{name} has no option {key!r}{valid}")
    if not isinstance(sync := options.get("sync_statistics", False), bool):
        raise UserError(f"sync_statistics must be true or false, got {sync!r}")
    if family.reads == "tokens":
        if in_channels is not None:
            raise UserError(
                f"{name} is a language model: it reads words, and images of {in_channels} channels were given"
            )
        return family.build(*numbers, num_classes=DEFAULT_WORDS if num_classes is None else classes, **options)
    return family.build(*numbers, num_classes=classes, in_channels=channels, **options)


def needs_image_size(name: str) -> bool:
    """Whether `create` wants option image_size, the side of the images in pixels, for this network."""
    if name.startswith(("torchvision:", "timm:")):
        return False
    if _is_factory(name):
        return "image_size" in external.parameters(name, external.find_factory(name))
    return _find(name)[0].needs_image_size


def reads(name: str) -> Literal["images", "tokens"] | None:
    """What a network takes; None of a `package.module:factory`, which only it knows."""
    if name.startswith(("torchvision:", "timm:")):
        return "images"
    return None if _is_factory(name) else _find(name)[0].reads


def needs_characters(name: str) -> bool:
    """Whether `create` wants the words' characters for this network: options table, characters and window."""
    return reads(name) == "tokens" and _find(name)[0].needs_characters


def _is_factory(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None


def _find(name: str) -> tuple[Family, list[int]]:
    for pattern, family in FAMILIES.items():
        match = re.fullmatch(re.sub(r"\\{\w+\\}", r"([0-9]+)", re.escape(pattern)), name)
        if match:
            return family, [int(number) for number in match.groups()]
    raise UserError(f"unknown network {name!r}{_nearest(name)}")


def _nearest(name: str) -> str:
    from torchvision.models import list_models

    if name in list_models():
        return f"; did you mean 'torchvision:{name}'?"
    numbers = re.findall("[0-9]+", name)
    candidates = []
    for pattern in FAMILIES:
        for number in numbers:
            pattern = re.sub(r"\{\w+\}", number, pattern, count=1)
        if _can_be(pattern):
            candidates.append(pattern)
    near = suggest(name, candidates)
    return near if "did you mean" in near else f"; choose one of: {', '.join(names())}"


def _can_be(name: str) -> bool:
    if "{" in name:
        return True
    try:
        with torch.device("meta"):
            create(name)
    except UserError:
        return False
    return True
