"""Config: a faithful record, and a strict reader of one."""

import dataclasses
import json

import pytest

from ban_fast.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TeacherConfig
from ban_fast.errors import OptionError, UserError, suggest
from ban_fast.ops import checks

EVERYTHING = Config(
    recipe="demo",
    data=DataConfig(name="cifar100", directory="/data", val_fraction=0.1, limit_train=5),
    model=ModelConfig(name="wrn-10-1", options={"dropout": 0.3, "memory": "plain"}),
    objective=ObjectiveConfig(name="ban+l", temperature=4, kd_weight=0.9, label_weight=0.1),
    optimizer=OptimizerConfig(lr=1, milestones=(0.25, 0.5)),
    teacher=TeacherConfig(mode="cache", cache_dtype="fp16", cache_directory="/caches"),
    students=("ban", "dkpp"),
    max_steps=7,
)


def test_json_round_trip() -> None:
    assert Config.from_dict(json.loads(json.dumps(EVERYTHING.to_dict()))) == EVERYTHING
    assert Config.from_dict({}) == Config()


def test_every_field_has_a_docstring() -> None:
    import ast
    import inspect

    import ban_fast.config as module

    for cls in (c for c in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(c, ast.ClassDef)):
        assert ast.get_docstring(cls), cls.name
        for field, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{cls.name}.{ast.unparse(field.target)}"


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"epochs": 0}, "epochs", "at least 1, got 0"),
        ({"epochs": "3"}, "epochs", "must be a whole number, got '3'"),
        ({"seed": True}, "seed", "must be a whole number, got True"),
        ({"seed": 2**63}, "seed", "below 2**63"),
        ({"batch_size": 0}, "batch_size", "at least 1, got 0"),
        ({"generations": -1}, "generations", "at least 0, got -1"),
        ({"max_steps": 1.5}, "max_steps", "a whole number or null"),
        ({"data": {"augmentation": "crop-flip"}}, "data.augmentation", "did you mean 'crop+flip'"),
        ({"amp": "bf15"}, "amp", "did you mean 'bf16'"),
        ({"objective": {"name": "bam"}}, "objective.name", "did you mean 'ban'"),
        ({"objective": {"name": "cwtm", "kd_weight": 1}}, "objective.kd_weight", "no KD term"),
        ({"objective": {"name": "ban", "label_weight": 1}}, "objective.label_weight", "use 'ban+l'"),
        ({"objective": {"name": "cwtm", "temperature": 2}}, "objective.temperature", "has no temperature"),
        ({"objective": {"temperature": 0}}, "objective.temperature", "above 0, got 0"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr", "finite number above 0, got nan"),
        ({"optimizer": {"lr": 10**400}}, "optimizer.lr", "finite number above 0, got 1000"),
        ({"objective": {"temperature": 10**400}}, "objective.temperature", "finite number above 0, got 1000"),
        ({"optimizer": {"weight_decay": -1}}, "optimizer.weight_decay", "of at least 0, got -1"),
        ({"optimizer": {"milestones": [0.6, 0.3]}}, "optimizer.milestones", "rising"),
        ({"optimizer": {"milestones": ["a"]}}, "optimizer.milestones", "rising"),
        ({"objective": {"kd_weight": 0}}, "objective.kd_weight", "nothing is left to learn"),
        ({"optimizer": {"momentum": 0}}, "optimizer.nesterov", "momentum above 0"),
        ({"teacher": {"mode": "cached"}}, "teacher.mode", "did you mean 'cache'"),
        ({"teacher": {"mode": "live", "cache_directory": "x"}}, "teacher.cache_directory", "has no cache"),
        ({"teacher": {"mode": "live", "cache_dtype": "bf16"}}, "teacher.cache_dtype", "has no cache"),
        ({"students": "ban"}, "students", "must be a list of strings, got 'ban'"),
        ({"optimizer": {"milestones": 0.3}}, "optimizer.milestones", "must be a list of numbers, got 0.3"),
        ({"model": {"options": ["memory"]}}, "model.options", "must be an object, got ['memory']"),
        ({"compile": "yes"}, "compile", "must be true or false, got 'yes'"),
        ({"students": ["ban", 3]}, "students", "must be names of objectives, got 3"),
        ({"students": ["ban", "ban"]}, "students", "must be different objectives"),
        (
            {"students": ["ban", "cwtm"], "objective": {"label_weight": 0.5}},
            "objective.label_weight",
            "none of ban, cwtm",
        ),
        (
            {"students": ["label", "cwtm"], "objective": {"temperature": 4}},
            "objective.temperature",
            "none of label, cwtm",
        ),
        ({"students": ["cwtm"], "objective": {"kd_weight": 0.5}}, "objective.kd_weight", "none of cwtm; leave it out"),
        ({"students": ["cwtm", "bam"]}, "students", "did you mean 'ban'"),
        ({"data": {"val_fraction": 1}}, "data.val_fraction", "[0, 1), got 1"),
        ({"data": {"limit_train": 0}}, "data.limit_train", "at least 1, got 0"),
        ({"data": "cifar10"}, "data", "must be an object"),
    ],
)
def test_a_wrong_value_names_its_field(change: dict, field: str, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        Config.from_dict(change)
    assert caught.value.field == field
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["mixup", "CutMix", "cutout", "rand-augment", "AutoAugment", "trivialaugment-wide"])
def test_what_changes_images_in_endless_ways_is_refused(name: str) -> None:
    """With the reason, and the way to bring it along."""
    with pytest.raises(
        OptionError, match=rf"{name} changes an image in endless ways; .* the finite crop x flip"
    ) as caught:
        Config.from_dict({"data": {"augmentation": name}})
    assert caught.value.field == "data.augmentation"
    assert str(caught.value).endswith("a DataLoader from Python, run(config, train=loader), with --teacher live")
    assert "\n" not in str(caught.value)


def test_temperatures_are_those_that_the_losses_take() -> None:
    for temperature in (checks.COLDEST, checks.HOTTEST):
        Config.from_dict({"objective": {"temperature": temperature}})
    for temperature in (checks.COLDEST / 2, checks.HOTTEST * 2):
        with pytest.raises(OptionError, match="must be from 1e-18 to"):
            Config.from_dict({"objective": {"temperature": temperature}})


def test_unknown_keys_and_formats_are_refused() -> None:
    with pytest.raises(UserError, match="'epoks'; did you mean 'epochs'"):
        Config.from_dict({"epoks": 3})
    with pytest.raises(UserError, match=r"'optimizer\.lrr'; did you mean 'lr'"):
        Config.from_dict({"optimizer": {"lrr": 3}})
    with pytest.raises(UserError, match="format 2"):
        Config.from_dict({"format": 2})
    with pytest.raises(UserError, match="JSON object, got list"):
        Config.from_dict([])  # type: ignore[arg-type]


def test_weights_of_the_objectives() -> None:
    """ban+l is the paper's plain sum; the others have no label term unless one is asked for."""
    assert ObjectiveConfig(name="ban").weights() == (1.0, 0.0)
    assert ObjectiveConfig(name="ban+l").weights() == (1.0, 1.0)
    assert ObjectiveConfig(name="dkpp", label_weight=0.5).weights() == (1.0, 0.5)
    assert ObjectiveConfig(name="ban+l", kd_weight=0, label_weight=0.25).weights() == (0.0, 0.25)


def test_defaults_are_the_papers() -> None:
    """The paper: SGD, Nesterov 0.9, weight decay 5e-4, lr 0.1 times 0.2 at 30/60/80 %, batch 128, 200 epochs."""
    c = Config()
    assert dataclasses.astuple(c.optimizer) == (0.1, 0.9, True, 5e-4, "step", (0.3, 0.6, 0.8), 0.2, 0.0, "best", None)
    assert (c.batch_size, c.epochs, c.generations) == (128, 200, 3)


def test_suggest() -> None:
    assert suggest("wnr-28-1", ["wrn-28-1", "mlp"]) == "; did you mean 'wrn-28-1'?"
    assert suggest("zzz", ["a", "b"]) == "; choose one of: a, b"
    assert suggest("zzz", [f"n{i}" for i in range(23)]).endswith("n18, n19 and 3 more")
