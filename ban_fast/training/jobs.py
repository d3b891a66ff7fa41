"""Which kind of task a configuration is: networks of images, or language models of a text."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from .. import data, models
from ..config import Config, ModelConfig, TextConfig
from ..errors import OptionError
from .distributed import ALONE, Ranks
from .task import CUSTOM, ModelFactory, Samples, Task, image_factory, image_task
from .text_task import language_model, text_task


def make_task(
    config: Config,
    device: torch.device,
    *,
    model: ModelFactory | None = None,
    train: Samples | None = None,
    test: Samples | None = None,
    validation: Samples | None = None,
    ranks: Ranks = ALONE,
) -> Task:
    """Read the data, build the network once to see that it fits them, and change nothing on disk.

    UserError where they don't fit each other, or where an option is for data of the other kind.
    """
    if train is None and _is_text(config):
        return text_task(config, device, model, ranks)
    for field in dataclasses.fields(TextConfig):
        if getattr(config.text, field.name) != field.default:
            raise OptionError(f"text.{field.name}", f"is for texts, and {config.data.name} is images; leave it out")
    return image_task(config, device, model=model, train=train, test=test, validation=validation, ranks=ranks)


def _is_text(config: Config) -> bool:
    """By what the folder holds; where that is nothing, by what the network reads, so that it is missed as such."""
    name, directory = config.data.name, config.data.directory
    if data.is_text(name, directory):
        return True
    folders = ((place / name).expanduser() for place in (Path(), Path(directory or "")))
    has_images = name in data.names() or any(any(each.is_dir() for each in folder.glob("*")) for folder in folders)
    return not has_images and config.model.name != CUSTOM and models.reads(config.model.name) == "tokens"


def network_factory(config: ModelConfig, shape: dict[str, Any]) -> ModelFactory:
    """The factory of a configuration's network, from a run's record of what its data looked like."""
    if "vocabulary" not in shape:
        return image_factory(config, shape["classes"], tuple(shape["sample_shape"]))
    letters = shape["characters"]
    table = None if letters is None else torch.zeros(shape["classes"], letters["window"], dtype=torch.int32)
    return language_model(config, shape["classes"], None if table is None else (table, letters["count"]))
