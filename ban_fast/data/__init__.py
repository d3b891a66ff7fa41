"""Datasets, and loaders that augment on the training device."""

from .augment import Augmentation
from .dataset import Dataset, Split, StoredSplit
from .loaders import Batch, ImageLoader, KeyedLoader, Loader, MemoryLoader
from .registry import load, load_stored, names, prepare, prepare_ffcv
from .streamed import FFCVLoader, TorchLoader, open_loader
from .user_data import TensorLoader, WrappedDataLoader

__all__ = [
    "Augmentation",
    "Batch",
    "Dataset",
    "FFCVLoader",
    "ImageLoader",
    "KeyedLoader",
    "Loader",
    "MemoryLoader",
    "Split",
    "StoredSplit",
    "TensorLoader",
    "TorchLoader",
    "WrappedDataLoader",
    "load",
    "load_stored",
    "names",
    "open_loader",
    "prepare",
    "prepare_ffcv",
]
