"""Datasets, and loaders that augment on the training device; texts, and their streams."""

from .augment import Augmentation
from .corpus import Corpus, Level
from .dataset import Dataset, Split, StoredSplit
from .loaders import Batch, ImageLoader, KeyedLoader, Loader, MemoryLoader, Shard
from .ptb import is_text, load_corpus
from .registry import load, load_stored, names, prepare, prepare_ffcv
from .streamed import FFCVLoader, TorchLoader, open_loader
from .streams import IGNORED, StreamLoader, TextLoader, Window
from .user_data import TensorLoader, WrappedDataLoader

__all__ = [
    "IGNORED",
    "Augmentation",
    "Batch",
    "Corpus",
    "Dataset",
    "FFCVLoader",
    "ImageLoader",
    "KeyedLoader",
    "Level",
    "Loader",
    "MemoryLoader",
    "Shard",
    "Split",
    "StoredSplit",
    "StreamLoader",
    "TensorLoader",
    "TextLoader",
    "TorchLoader",
    "Window",
    "WrappedDataLoader",
    "is_text",
    "load",
    "load_corpus",
    "load_stored",
    "names",
    "open_loader",
    "prepare",
    "prepare_ffcv",
]
