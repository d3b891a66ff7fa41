"""Whole configurations by name: `get("demo")` is a `Config` of its own, to run as it is or to change first."""

from collections.abc import Callable

from ..config import Config
from ..errors import UserError, suggest
from .demo import demo
from .paper import cifar10, cifar100, paper
from .penn_treebank import ptb_cnn_lstm, ptb_lstm, ptb_small

__all__ = ["cifar10", "cifar100", "demo", "get", "names", "paper", "ptb_cnn_lstm", "ptb_lstm", "ptb_small"]

_RECIPES: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "paper": paper,
    "ptb-lstm": ptb_lstm,
    "ptb-cnn-lstm": ptb_cnn_lstm,
    "ptb-small": ptb_small,
}


def names() -> list[str]:
    """Every name that `get` knows."""
    return list(_RECIPES)


def get(name: str) -> Config:
    """A new configuration; changing it changes no later one. UserError for an unknown name, with the nearest."""
    if name not in _RECIPES:
        raise UserError(f"unknown recipe {name!r}{suggest(name, names())}")
    return _RECIPES[name]()
