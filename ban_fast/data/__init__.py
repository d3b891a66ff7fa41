"""Datasets, and loaders that augment on the training device; texts, and their streams."""

from .augment import Augmentation
from .corpus import Corpus
from .dataset import Dataset, Split, StoredSplit
from .loaders import Batch, ImageLoader, KeyedLoader, Loader, MemoryLoader, Shard
from .ptb import load_corpus
from .registry import load, load_stored, names, prepare, prepare_ffcv
from .streamed import FFCVLoader, TorchLoader, open_loader
from .streams import StreamLoader, Window
from .user_data import TensorLoader, WrappedDataLoader

__all__ = [
    "Augmentation",
    "Batch",
    "Corpus",
    "Dataset",
    "FFCVLoader",
    "ImageLoader",
    "KeyedLoader",
    "Loader",
    "MemoryLoader",
    "Shard",
    "Split",
    "StoredSplit",
    "StreamLoader",
    "TensorLoader",
    "TorchLoader",
    "Window",
    "WrappedDataLoader",
    "load",
    "load_corpus",
    "load_stored",
    "names",
    "open_loader",
    "prepare",
    "prepare_ffcv",
]
