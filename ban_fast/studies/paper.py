"""The runs that the paper's tables consist of ("Born-Again Neural Networks", Furlanello et al. 2018), as studies.

Tables 1, 2, 3 and 6, each from the recipe of its dataset. Students of another architecture than their teacher's, the
right half of Table 3 and Tables 4 and 5, are no run of ours: every generation of a run is the same network.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .. import recipes
from ..config import Config, ModelConfig, ObjectiveConfig
from ..errors import UserError
from .study import Study

_WIDE = ("wrn-28-1", "wrn-28-2", "wrn-28-5", "wrn-28-10")
_DENSE = ("densenet-112-33", "densenet-90-60", "densenet-80-80", "densenet-80-120")
_SEQUENCES = {"densenet-80-120": 2}
"""Generations of BAN where they are not 3."""

Listed = Iterator[tuple[Mapping[str, Any], Config]]


def table(
    number: int, seeds: Iterable[int] = (0,), adjusted: Callable[[Config], Config] = lambda config: config
) -> Study:
    """The runs of one table, for each seed; the paper had one. `adjusted` changes each configuration: where data lie,
    the device, or how far the whole is scaled down. UserError for a table that is not made of runs of ours.

    1: CIFAR-10, a teacher and one BAN, for four Wide-ResNets and four DenseNets.
    2: CIFAR-100, the DenseNets: BAN+L, CWTM and DKPP, and BAN as a sequence with its ensembles, whose first stands for
    the column BAN too (the paper trained that one with another seed).
    3: CIFAR-100, the Wide-ResNets and one BAN each.
    6: Penn Treebank, both language models and one BAN+L each.
    """
    tables = {1: _table_1, 2: _table_2, 3: _table_3, 6: _table_6}
    if number not in tables:
        raise UserError(
            f"the paper's table {number} can't be made of runs here, whose students have their teacher's architecture; "
            f"choose one of {', '.join(map(str, tables))}"
        )
    listed: list[tuple[Mapping[str, Any], Config]] = []
    for seed in seeds:
        for varied, recipe in tables[number]():
            config = dataclasses.replace(recipe, seed=seed)
            listed.append(({**varied, "seed": seed}, adjusted(config)))
    return Study.of(listed)


def _run(base: Config, model: str, objective: str, generations: int) -> Config:
    return dataclasses.replace(
        base, model=ModelConfig(name=model), objective=ObjectiveConfig(name=objective), generations=generations
    )


def _table_1() -> Listed:
    for model in (*_WIDE, *_DENSE):
        yield {"model": model}, _run(recipes.cifar10(), model, "ban", 1)


def _table_2() -> Listed:
    for model in _DENSE:
        for objective in ("ban", "ban+l", "cwtm", "dkpp"):
            generations = _SEQUENCES.get(model, 3) if objective == "ban" else 1
            yield {"model": model, "objective": objective}, _run(recipes.cifar100(), model, objective, generations)


def _table_3() -> Listed:
    for model in _WIDE:
        yield {"model": model}, _run(recipes.cifar100(), model, "ban", 1)


def _table_6() -> Listed:
    for config in (recipes.ptb_lstm(), recipes.ptb_cnn_lstm()):
        yield {"model": config.model.name}, config
