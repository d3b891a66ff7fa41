"""Networks by name (`create`), and the classes behind the names."""

from .cnn_lstm import LEAST_WINDOW, CnnLSTM
from .densenet import DenseNet
from .lstm import LanguageModel, State, WordLSTM
from .registry import create, names, needs_characters, needs_image_size, reads
from .small import MLP, ConvNet
from .wide_resnet import WideResNet

__all__ = [
    "LEAST_WINDOW",
    "MLP",
    "CnnLSTM",
    "ConvNet",
    "DenseNet",
    "LanguageModel",
    "State",
    "WideResNet",
    "WordLSTM",
    "create",
    "names",
    "needs_characters",
    "needs_image_size",
    "reads",
]
