"""Networks by name (`create`), and the classes behind the names."""

from .cnn_lstm import CnnLSTM
from .densenet import DenseNet
from .lstm import LanguageModel, State, WordLSTM
from .registry import create, names, needs_image_size
from .small import MLP, ConvNet
from .wide_resnet import WideResNet

__all__ = [
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
    "needs_image_size",
]
