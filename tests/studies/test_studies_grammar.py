"""What can be varied and how; names, shared teachers, and study.json."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ban_fast import recipes
from ban_fast.config import Config, DataConfig, ModelConfig, ObjectiveConfig
from ban_fast.errors import OptionError, UserError
from ban_fast.studies import Study, grammar


def names(study: Study) -> list[str]:
    return [run.name for run in study.runs]


def test_every_combination_for_every_seed() -> None:
    study = Study.vary(Config(), {"optimizer.lr": [0.1, 0.05], "batch_size": [32]}, seeds=[0, 7])
    assert names(study) == [
        "lr=0.1,batch_size=32,seed=0",
        "lr=0.05,batch_size=32,seed=0",
        "lr=0.1,batch_size=32,seed=7",
        "lr=0.05,batch_size=32,seed=7",
    ]
    for run in study.runs:
        expected = Config(batch_size=32, seed=run.varied["seed"])
        expected.optimizer.lr = run.varied["lr"]
        assert run.config == expected
        assert run.teacher is None, "each is another teacher"


def test_runs_of_one_teacher_share_it() -> None:
    axes = {"objective.name": ["ban", "ban+l"], "model.name": ["mlp-8", "mlp-16"]}
    study = Study.vary(Config(), axes, seeds=[0, 1])
    for helper in (run for run in study.runs if run.is_helper):
        pupils = [run for run in study.runs if run.teacher == helper.name]
        assert [run.config.objective.name for run in pupils] == ["ban", "ban+l"]
        assert {(run.config.model.name, run.config.seed) for run in pupils} == {
            (helper.config.model.name, helper.config.seed)
        }
        assert (helper.config.generations, helper.teacher) == (0, None)
        assert names(study).index(helper.name) < min(names(study).index(run.name) for run in pupils)
    assert sum(run.is_helper for run in study.runs) == 4
    assert "teacher,model=mlp-8,seed=1" in names(study)


def test_a_run_of_no_students_is_itself_the_teacher() -> None:
    study = Study.vary(Config(), {"generations": [2, 0, 1]})
    assert names(study) == ["generations=0,seed=0", "generations=2,seed=0", "generations=1,seed=0"]
    assert [run.teacher for run in study.runs] == [None, "generations=0,seed=0", "generations=0,seed=0"]
    assert not any(run.is_helper for run in study.runs)


def test_keys_of_one_name_keep_their_whole_names() -> None:
    axes: dict[str, list[Any]] = {"text.window": [20, 35], "model.options.window": [30, 40]}
    base = Config(data=DataConfig(name="ptb"), model=ModelConfig(name="cnn-lstm"))
    varied = [dict(run.varied) for run in Study.vary(base, axes).runs if not run.is_helper]
    assert len({tuple(each.items()) for each in varied}) == 4
    assert varied[0] == {"text.window": 20, "model.options.window": 30, "seed": 0}


def test_what_makes_another_teacher_is_not_shared() -> None:
    """Neither another network nor another learning curve; how students learn is no part of it."""
    axes: dict[str, list[Any]] = {"objective.temperature": [1.0, 4.0], "teacher.cache_dtype": ["fp32", "fp16"]}
    assert sum(run.is_helper for run in Study.vary(Config(), axes).runs) == 1
    assert not any(run.teacher for run in Study.vary(Config(), {"evaluate_every": [1, 2]}).runs)


def test_a_setting_that_an_objective_has_not_is_left_out_of_its_runs() -> None:
    base = Config(objective=ObjectiveConfig(name="ban+l", label_weight=0.5, temperature=4.0))
    study = Study.vary(base, {"objective.name": ["ban", "ban+l", "cwtm"]})
    found = {run.config.objective.name: run.config.objective for run in study.runs if not run.is_helper}
    assert found == {
        "ban": ObjectiveConfig(name="ban", temperature=4.0),
        "ban+l": ObjectiveConfig(name="ban+l", label_weight=0.5, temperature=4.0),
        "cwtm": ObjectiveConfig(name="cwtm"),
    }
    with pytest.raises(OptionError, match="is for none of ban, cwtm"):
        Study.vary(base, {"objective.name": ["ban", "cwtm"]})
    with pytest.raises(OptionError, match="unknown value 'bam'; did you mean 'ban'"):
        Study.vary(base, {"objective.name": ["bam", "cwtm"]})
    with pytest.raises(OptionError, match="objective 'cwtm' has no temperature"):
        Study.vary(Config(), {"objective.name": ["ban", "cwtm"], "objective.temperature": [1.0, 4.0]})


def test_another_network_has_other_options_and_options_can_be_varied() -> None:
    base = Config(model=ModelConfig(name="densenet-bc-40-12", options={"memory": "shared"}))
    study = Study.vary(base, {"model.name": ["wrn-10-1", "densenet-bc-40-12"]})
    assert [run.config.model.options for run in study.runs] == [{}, {"memory": "shared"}]
    study = Study.vary(base, {"model.options.memory": ["plain", "checkpoint"]})
    assert names(study) == ["memory=plain,seed=0", "memory=checkpoint,seed=0"]
    assert [run.config.model.options["memory"] for run in study.runs] == ["plain", "checkpoint"]


def test_options_are_those_of_the_network_beside_them_in_either_order() -> None:
    base = Config(model=ModelConfig(name="wrn-28-1", options={"memory": "shared"}))
    axes = {"model.options.dropout": [0.3], "model.name": ["wrn-28-1", "wrn-16-1"]}
    for keys in (list(axes), list(reversed(axes))):
        study = Study.vary(base, {key: axes[key] for key in keys})
        found = {run.config.model.name: run.config.model.options for run in study.runs}
        assert found == {"wrn-28-1": {"memory": "shared", "dropout": 0.3}, "wrn-16-1": {"dropout": 0.3}}


def test_another_schedule_has_none_of_the_plateaus_settings() -> None:
    study = Study.vary(recipes.get("ptb-cnn-lstm"), {"optimizer.schedule": ["plateau", "cosine"]})
    found = [(run.config.optimizer.plateau_threshold, run.config.optimizer.plateau_against) for run in study.runs]
    assert found == [(0.5, "previous"), (0.0, "best")]
    for keys in (
        ("optimizer.schedule", "optimizer.plateau_threshold"),
        ("optimizer.plateau_threshold", "optimizer.schedule"),
    ):
        values: dict[str, Any] = {"optimizer.schedule": "cosine", "optimizer.plateau_threshold": 0.5}
        with pytest.raises(OptionError, match="is for schedule plateau; leave it out"):
            grammar.configured(Config(), {key: values[key] for key in keys})


def test_what_a_run_would_not_read_is_not_varied() -> None:
    """Its runs would be the same, under other names; what a recipe left behind is no one's mistake."""
    axes: dict[str, list[Any]] = {"optimizer.lr_decay": [0.1, 0.5]}
    assert len(Study.vary(Config(), axes).runs) == 2
    with pytest.raises(OptionError, match="is for schedules step and plateau; leave it out"):
        Study.vary(recipes.get("demo"), axes)
    assert grammar.configured(recipes.get("ptb-lstm"), {"optimizer.schedule": "cosine"}).optimizer.lr_decay == 0.25
    axes = {"objective.name": ["ban", "label"], "teacher.cache_dtype": ["fp32", "bf16"]}
    assert len(Study.vary(Config(), axes).runs) == 1 + 4  # the teacher; some of the others read it
    axes["objective.name"] = ["label"]
    with pytest.raises(OptionError, match="objective 'label' has no teacher; leave it out"):
        Study.vary(Config(), axes)


def test_the_base_is_left_as_it_was() -> None:
    base = Config(model=ModelConfig(options={"a": 1}))
    before = dataclasses.asdict(base)
    Study.vary(base, {"model.options.a": [2], "optimizer.lr": [0.5], "objective.name": ["cwtm"]})
    assert dataclasses.asdict(base) == before


def test_names_are_folders_and_no_two_alike() -> None:
    wild = ["torchvision:resnet18", "a b:c", "../../x", "TORCHVISION_resnet18", "m" * 400, "\u00e9"]
    study = Study.vary(Config(), {"model.name": wild})
    assert names(study) == [
        "model=torchvision_resnet18,seed=0",
        "model=a_b_c,seed=0",
        "model=x,seed=0",
        "model=TORCHVISION_resnet18,seed=0-2",
        "model=" + "m" * 114,
        "model=_,seed=0",
    ]


def test_the_same_run_twice() -> None:
    with pytest.raises(UserError, match=r"seed=0 and seed=0-2 are the same run: leave one of them out"):
        Study.vary(Config(), {}, seeds=[0, 1, 0])
    listed = [({"a": 1}, Config()), ({"a": 2}, Config(checkpoint_seconds=1.0))]
    with pytest.raises(UserError, match="a=1 and a=2 are the same run"):
        Study.of(listed)


def test_students_side_by_side_are_no_run_of_a_study() -> None:
    with pytest.raises(UserError, match="have one objective each: vary it"):
        Study.of([({}, Config(students=("ban", "cwtm")))])


@pytest.mark.parametrize(
    ("path", "texts", "values"),
    [
        ("optimizer.lr", ["0.1", " 1e-3", "1"], [0.1, 1e-3, 1.0]),
        ("epochs", ["3", "10"], [3, 10]),
        ("compile", ["true", "False"], [True, False]),
        ("max_steps", ["none", "5"], [None, 5]),
        ("model.name", ["10", "wrn-28-1"], ["10", "wrn-28-1"]),
        ("data.directory", ["None"], [None]),
        ("model.options.dropout", ["0", "0.3", "x"], [0, 0.3, "x"]),
    ],
)
def test_values_have_their_keys_types(path: str, texts: list[str], values: list[Any]) -> None:
    found = grammar.parsed(path, texts, "--vary")
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("path", "texts", "words"),
    [
        ("optimizer.lr", ["fast"], "must be a number, got 'fast'"),
        ("optimizer.lr", ["true"], "must be a number, got 'true'"),
        ("epochs", ["1.5"], "must be a whole number, got '1.5'"),
        ("compile", ["1"], "must be true or false, got '1'"),
        ("epochs", ["3", ""], "a value is missing"),
        ("epochs", ["3", "4", " 3"], "3 is given twice"),
        ("optimizer.lr", ["0.1", "1e-1"], "1e-1 is given twice"),
        ("optimiser.lr", ["1"], "unknown configuration key 'optimiser.lr'; did you mean 'optimizer.lr'"),
        ("students", ["ban"], "unknown configuration key 'students'"),
    ],
)
def test_what_is_no_value(path: str, texts: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        grammar.parsed(path, texts, "--vary x")
    assert words in str(caught.value)


def test_every_key_can_be_set() -> None:
    """One by one, to the value that it has: an equal configuration of its own."""
    for path in grammar.known_keys():
        value: Any = Config()
        for part in path.split("."):
            value = getattr(value, part)
        assert grammar.configured(Config(), {path: value}) == Config()


def test_a_study_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    study = Study.vary(Config(), {"objective.name": ["ban", "dkpp"], "max_steps": [None, 4]}, seeds=[0, 3])
    study.save(tmp_path)
    assert Study.load(tmp_path) == study


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "study format 2 is not known; this version reads 1"),
        ({"runs": {}}, "is a JSON object with a list of runs"),
        ({"name": "../elsewhere"}, "'../elsewhere' is no name of a run"),
        ({"name": "objective=ban,seed=0"}, "'objective=ban,seed=0' is no name of a run"),
        ({"teacher": "seed=9"}, "its teacher is no run before it"),
        ({"config": {"format": 1, "optimiser": {}}}, "unknown configuration key 'optimiser'"),
        ({"config": {"format": 1, "epochs": 0}}, "epochs: must be at least 1, got 0"),
    ],
)
def test_a_study_file_of_another_grammar(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    values = Study.vary(Config(), {"objective.name": ["ban", "dkpp"]}).to_dict()
    (values if set(change) & set(values) else values["runs"][-1]).update(change)
    (tmp_path / "study.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        Study.load(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path / "study.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", '{"format": 1, "ru', "[1]", "\udcff", "[" * 100_000])
def test_a_study_file_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"study\.json"):
        Study.load(tmp_path)


def test_another_study_is_refused_by_its_first_difference(tmp_path: Path) -> None:
    axes = {"objective.name": ["ban", "dkpp"]}
    study = Study.vary(Config(), axes, seeds=[0, 1])
    study.refuse_other(Study.vary(Config(checkpoint_seconds=1.0), axes, seeds=[0, 1]), tmp_path)
    for other, words in (
        (Study.vary(Config(), axes, seeds=[0, 1, 2]), "seed=2 is not among the runs of the study"),
        (Study.vary(Config(), axes, seeds=[0]), "also has teacher,seed=1"),
        (Study.vary(Config(epochs=7), axes, seeds=[0, 1]), "epochs is 7 here, but 200 in teacher,seed=0"),
    ):
        with pytest.raises(UserError, match=words):
            study.refuse_other(other, tmp_path)
