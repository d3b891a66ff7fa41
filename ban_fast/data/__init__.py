"""Datasets, and loaders that augment on the training device."""

from .augment import Augmentation
from .dataset import Dataset, Split
from .loaders import Batch, Loader, MemoryLoader
from .registry import load, names, prepare
from .user_data import TensorLoader, WrappedDataLoader

__all__ = [
    "Augmentation",
    "Batch",
    "Dataset",
    "Loader",
    "MemoryLoader",
    "Split",
    "TensorLoader",
    "WrappedDataLoader",
    "load",
    "names",
    "prepare",
]
