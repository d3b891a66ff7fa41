"""Recipes are whole configurations, and the paper's hold the paper's numbers."""

import math
import random
from pathlib import Path

import pytest

from ban_fast import recipes
from ban_fast.config import Config
from ban_fast.errors import UserError
from ban_fast.training import run


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_can_be_run_and_written_down(name: str) -> None:
    config = recipes.get(name)
    config.validate()
    assert config.recipe == name
    assert Config.from_dict(config.to_dict()) == config


def test_a_recipe_is_a_new_configuration_each_time() -> None:
    recipes.get("demo").optimizer.lr = 7.0
    assert recipes.get("demo").optimizer.lr != 7.0


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown recipe 'cifr100'; did you mean 'cifar100'"):
        recipes.get("cifr100")


@pytest.mark.parametrize("name", ["paper", "cifar10", "cifar100"])
def test_the_papers_recipe(name: str) -> None:
    """Section 4.1 of the paper, and the Wide-ResNet authors' code that it points to."""
    config = recipes.get(name)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.nesterov, optimizer.weight_decay) == (0.1, 0.9, True, 5e-4)
    assert (optimizer.schedule, optimizer.milestones, optimizer.lr_decay) == ("step", (0.3, 0.6, 0.8), 0.2)
    assert (config.epochs, config.batch_size, config.amp) == (200, 128, "off")
    assert (config.data.augmentation, config.data.padding) == ("crop+flip", "reflect")
    assert (config.objective.name, config.objective.temperature) == ("ban", 1.0)
    assert config.model.name == "wrn-28-1"


def test_the_cifar_recipes_name_their_data() -> None:
    assert recipes.get("cifar10").data.name == "cifar10"
    assert recipes.get("cifar100").data.name == "cifar100"
    assert recipes.get("demo").data.name == "digits"
    assert recipes.get("demo").generations == 3


def test_the_papers_language_models() -> None:
    """Sections 4.2 and 5.3; rates and norms on the scale of losses summed over time, averaged over streams."""
    lstm, cnn = recipes.get("ptb-lstm"), recipes.get("ptb-cnn-lstm")
    assert (lstm.model.name, lstm.batch_size, cnn.model.name, cnn.batch_size) == ("lstm-1500", 32, "cnn-lstm", 20)
    for config, against, (lr, decay, threshold, norm) in (
        (lstm, "best", (1.0, 0.25, 0.0, 0.2 * 35)),
        (cnn, "previous", (2.0, 0.5, 0.5, 5.0)),
    ):
        optimizer = config.optimizer
        assert optimizer.plateau_against == against, "MXNet's rule, and Kim et al.'s"
        assert (optimizer.lr, optimizer.lr_decay, optimizer.plateau_threshold) == (lr, decay, threshold)
        assert optimizer.clip_norm == pytest.approx(norm)
        assert (optimizer.schedule, optimizer.momentum, optimizer.weight_decay) == ("plateau", 0.0, 0.0)
        assert (config.data.name, config.text.level, config.text.window, config.text.over_time) == (
            "ptb",
            "word",
            35,
            "sum",
        )
        assert (config.objective.name, config.objective.temperature, config.epochs) == ("ban+l", 1.0, 40)
        assert config.objective.weights() == (1.0, 1.0)
        assert config.model.options == {}, "the networks' own defaults are the paper's"
    small = recipes.get("ptb-small")
    assert small.optimizer == lstm.optimizer
    assert small.objective == lstm.objective, "the paper's sum of both terms"
    assert small.epochs < lstm.epochs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ptb-lstm", "ptb-cnn-lstm"])
def test_the_papers_language_models_train(name: str, tmp_path: Path) -> None:
    """Two steps a generation of the recipe as it is, at its full width, on a text of 300 words."""
    draw = random.Random(0)
    for split, lines in (("train", 1000), ("valid", 60), ("test", 60)):
        text = (" ".join(f"word{draw.randrange(300)}" for _ in range(8)) for _ in range(lines))
        (tmp_path / f"{split}.txt").write_text("\n".join(text) + "\n")
    config = recipes.get(name)
    config.data.name, config.max_steps, config.generations, config.device = str(tmp_path), 2, 1, "cpu"
    teacher, student = run(config, out=tmp_path / "run").generations
    assert (teacher["objective"], student["objective"]) == ("label", "ban+l")
    widths = {"ptb-lstm": 4 * 2 * 1500 * (2 * 1500 + 2), "ptb-cnn-lstm": 4 * 650 * (1100 + 3 * 650 + 4)}
    assert teacher["parameters"] == student["parameters"] > widths[name]  # the LSTM, in a model of fewer words
    for record in (teacher, student):
        assert 1 < record["test"]["perplexity"] < 1000
        assert record["test"]["perplexity"] == pytest.approx(math.exp(record["test"]["nll"]))
