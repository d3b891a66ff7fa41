"""Words for a run that tables and plots share: names of generations and ensembles, titles, what was scaled down."""

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from . import paper

_DATASETS = {
    "digits": "digits",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "ptb": "Penn Treebank",
    "custom": "own data",
}
_OBJECTIVES = {"label": "labels", "ban": "BAN", "ban+l": "BAN+L", "cwtm": "CWTM", "dkpp": "DKPP"}


def generation(number: int) -> str:
    """ "teacher", "BAN-1", "BAN-2", ..."""
    return f"BAN-{number}" if number else "teacher"


def members(numbers: Sequence[int]) -> str:
    """An ensemble by its members: "BAN-1+2+3", "teacher+BAN-1", "BAN-1..9"."""
    students = [n for n in numbers if n]
    if len(students) > 4 and students == list(range(students[0], students[-1] + 1)):
        joined = [f"BAN-{students[0]}..{students[-1]}"]
    else:
        joined = ["BAN-" + "+".join(map(str, students))] if students else []
    return "+".join([generation(0)] * (0 in numbers) + joined)


def title(config: Mapping[str, Any]) -> str:
    """Data, network and objective: "CIFAR-100, wrn-28-1, BAN"."""
    data = config["data"]["name"]
    objective = config["objective"]["name"]
    students = f", {_OBJECTIVES.get(objective, objective)}" if config["generations"] else ""
    return f"{_DATASETS.get(data, PurePath(data).name)}, {config['model']['name']}{students}"


def scaled_down(config: Mapping[str, Any]) -> str | None:
    """What makes a run smaller than its data or than the paper's, or None; its figures are results of neither."""
    data = config["data"]
    cuts = [
        (data["limit_train"], "{} training images"),
        (data["limit_test"], "{} test images"),
        (config["max_steps"], "{} steps a generation"),
    ]
    parts = [text.format(f"{limit:,}") for limit, text in cuts if limit is not None]
    if data["val_fraction"]:
        parts.append(f"{100 * data['val_fraction']:.3g} % of the training images held out")
    if data["name"] in paper.DATASETS and config["epochs"] < paper.EPOCHS:
        parts.append(f"{config['epochs']} of the paper's {paper.EPOCHS} epochs")
    if data["name"] == paper.TEXT:
        parts += _unlike_the_papers(config)
        if config["epochs"] < paper.TEXT_EPOCHS:
            parts.append(f"{config['epochs']} of the paper's {paper.TEXT_EPOCHS} epochs")
    return f"scaled down: {', '.join(parts)}" if parts else None


def _unlike_the_papers(config: Mapping[str, Any]) -> list[str]:
    """In what a run on Penn Treebank is none of Table 6's."""
    model, parts = config["model"], []
    if config["text"]["level"] != "word":
        parts.append(f"read by {config['text']['level']}s, not by words as the paper's")
    if model["name"] not in paper.TEXT_ROWS:
        parts.append(f"{model['name']} is no network of the paper's")
    elif model["options"]:
        options = ", ".join(f"{key}={value}" for key, value in model["options"].items())
        parts.append(f"{model['name']} with {options} is no network of the paper's")
    return parts


def unfinished(config: Mapping[str, Any], results: Mapping[str, Any]) -> str | None:
    """How far an unfinished run has come, by its results.json, or None."""
    done, planned = len(results["generations"]), config["generations"] + 1
    return f"unfinished: {done} of {planned} generations" if done < planned else None


def test_images(record: Mapping[str, Any]) -> int:
    """Number of test images behind a generation's or an ensemble's figures."""
    return int(sum(record["reliability"]["count"]))


def standard_error(record: Mapping[str, Any]) -> float:
    """Binomial standard error, in points, of a record's test error: what another draw of the test images would move."""
    share = record["test"]["error"] / 100
    return 100 * math.sqrt(share * (1 - share) / test_images(record))


def is_text(record: Mapping[str, Any]) -> bool:
    """Whether a record of results.json is a language model's."""
    return "perplexity" in record.get("test", {})


def headline(test: Mapping[str, Any]) -> str:
    """The figure that counts of a split's: "error 1.67 %" of images, "perplexity 71.87" of a text."""
    if "perplexity" in test:
        return f"perplexity {test['perplexity']:.2f}"
    return f"error {test['error']:.2f} %"


def duration(seconds: float) -> str:
    """ "9.8 s", "3.4 min" or "2.1 h"."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5997 else f"{seconds / 3600:.1f} h"
