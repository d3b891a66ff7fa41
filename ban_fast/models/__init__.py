"""Networks by name (`create`), and the classes behind the names."""

from .densenet import DenseNet
from .registry import create, names, needs_image_size
from .small import MLP, ConvNet
from .wide_resnet import WideResNet

__all__ = ["MLP", "ConvNet", "DenseNet", "WideResNet", "create", "names", "needs_image_size"]
