"""Flags become a configuration: which base, what overrides it, and what a message calls a field."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ban_fast import recipes
from ban_fast.cli import failures, flags
from ban_fast.config import Config, ModelConfig
from ban_fast.errors import UserError
from ban_fast.models import registry

NOT_GIVEN: dict[str, Any] = dict.fromkeys(["recipe", "config", "out", *flags.FIELDS]) | {"model_option": []}


def requested(**given: Any) -> Config:
    return flags.requested({**NOT_GIVEN, **given}).config


@pytest.mark.parametrize(
    ("data", "recipe"), [(None, "demo"), ("digits", "demo"), ("cifar10", "cifar10"), ("cifar100", "cifar100")]
)
def test_the_data_choose_the_base(data: str | None, recipe: str) -> None:
    assert requested(data=data) == recipes.get(recipe)


def test_a_folder_starts_from_the_papers_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    config = requested(data="photos")
    assert config.recipe == "paper"
    assert config.data.name == str(tmp_path / "photos"), "whole, so that it is found from elsewhere"


def test_a_folder_never_hides_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert requested(data="digits") == recipes.get("demo")
    assert requested(data="./digits").data.name == str(tmp_path / "digits")


def test_only_what_is_given_overrides() -> None:
    config = requested(data="cifar100", epochs=3, lr=0.05, compile=True, data_dir="/data")
    expected = recipes.get("cifar100")
    expected.epochs, expected.optimizer.lr, expected.compile, expected.data.directory = 3, 0.05, True, "/data"
    assert config == expected


def test_students_are_a_list_and_one_objective_is_none_of_it(tmp_path: Path) -> None:
    config = requested(students="ban,ban+l", cache_dir="caches")
    assert config.students == ("ban", "ban+l")
    assert config.teacher.cache_directory == str(Path("caches").absolute())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    assert requested(config=str(file)).students == ("ban", "ban+l")
    assert requested(config=str(file), students="cwtm").students == ("cwtm",)
    single = requested(config=str(file), objective="dkpp")
    assert (single.students, single.objective.name) == ((), "dkpp")


def test_one_of_a_files_students_has_the_settings_of_its_objective(tmp_path: Path) -> None:
    several = requested(students="ban,ban+l,label", label_weight=0.5, temperature=4.0)
    (tmp_path / "config.json").write_text(json.dumps(several.to_dict()))
    for name in several.students:
        single = requested(config=str(tmp_path / "config.json"), objective=name)
        single.validate()
        assert single == several.of_student(name)


def test_every_field_of_a_flag_is_one_of_the_configuration() -> None:
    for path in flags.FIELDS.values():
        value: Any = Config()
        for name in path.split("."):
            assert hasattr(value, name), path
            value = getattr(value, name)


def test_a_configuration_file_is_a_base(tmp_path: Path) -> None:
    stored = recipes.get("cifar10")
    stored.epochs = 7
    (tmp_path / "config.json").write_text(json.dumps(stored.to_dict()))
    config = requested(config=str(tmp_path / "config.json"), seed=5)
    stored.seed = 5
    assert config == stored


def test_another_network_or_objective_drops_what_belonged_to_the_one_before(tmp_path: Path) -> None:
    stored = recipes.get("cifar10")
    stored.model.options = {"dropout": 0.3}
    stored.objective.name, stored.objective.label_weight = "ban+l", 0.5
    file = tmp_path / "config.json"
    file.write_text(json.dumps(stored.to_dict()))
    config = requested(config=str(file), model="densenet-90-60", objective="cwtm", model_option=["memory=checkpoint"])
    assert config.model.options == {"memory": "checkpoint"}
    assert config.objective.label_weight is None
    config.validate()
    assert requested(config=str(file), model_option=["norm=x"]).model.options == {"dropout": 0.3, "norm": "x"}


def test_another_schedule_drops_the_plateaus_settings() -> None:
    for schedule, kept in (("cosine", (0.0, "best")), ("plateau", (0.5, "previous"))):
        config = requested(recipe="ptb-cnn-lstm", schedule=schedule)
        assert (config.optimizer.plateau_threshold, config.optimizer.plateau_against) == kept
        config.validate()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=-3", -3),
        ("a=0.3", 0.3),
        ("a=1e-3", 1e-3),
        ("a=true", True),
        ("a=False", False),
        ("a=checkpoint", "checkpoint"),
        ("a=", ""),
        ("a=b=c", "b=c"),
        ("a=nan", "nan"),  # config.json is JSON, which has no NaN
    ],
)
def test_model_options_have_types(text: str, value: Any) -> None:
    options = requested(model="m", model_option=[text]).model.options
    assert options == {"a": value}
    assert type(options["a"]) is type(value)


@pytest.mark.parametrize("text", ["memory", "=3", "2x=3", ""])
def test_what_is_no_model_option(text: str) -> None:
    with pytest.raises(UserError, match="--model-option must be KEY=VALUE"):
        requested(model_option=[text])


def test_fields_are_called_by_their_flags_or_by_their_file() -> None:
    assert flags.flag_of("optimizer.weight_decay") == "--weight-decay"
    assert flags.flag_of("model.options") == "--model-option"
    assert flags.flag_of("optimizer.milestones") is None
    request = flags.Request(Config(), Path("run/config.json"), {"batch_size"})
    assert request.name_of("batch_size") == "--batch-size"
    assert request.name_of("epochs") == "epochs in run/config.json"
    assert flags.Request(Config()).name_of("epochs") == "--epochs"


@pytest.mark.parametrize(
    ("model", "options", "more"),
    [
        ("densenet-90-60", {}, ", so does --model-option memory=shared"),
        ("densenet-90-60", {"memory": "checkpoint"}, ", so does --model-option memory=shared"),
        ("densenet-90-60", {"memory": "shared"}, ""),
        ("timm:densenet121", {}, ""),
        ("cnn-lstm-16", {}, ""),
    ],
)
def test_too_little_memory_names_what_this_network_can_do(model: str, options: dict[str, Any], more: str) -> None:
    config = Config(model=ModelConfig(name=model, options=options))
    said = f"out of memory; a smaller --batch-size needs less{more}", 2
    assert failures.explain(MemoryError(), flags.Request(config)) == said
    of_torch = RuntimeError("Storage size calculation overflowed with sizes=[16777216, 16777216, 3, 3]")
    for error in (MemoryError(), of_torch):
        assert failures.explain(error, None) == ("out of memory; a smaller --batch-size needs less", 2)


def test_too_little_memory_for_the_weights_names_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*numbers: int, **options: Any) -> nn.Module:
        raise MemoryError

    monkeypatch.setitem(registry.FAMILIES, "mlp-{hidden}", registry.Family(build))
    with pytest.raises(MemoryError) as caught:
        registry.create("mlp-8")
    request = flags.Request(Config(model=ModelConfig(name="mlp-8")))
    said = "--model: mlp-8 is too large for the memory that there is; choose a smaller one", 2
    assert failures.explain(caught.value, request) == said


class TestResume:
    """The configuration comes from the run; what is given beside it must say the same."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        config = recipes.get("demo")
        config.epochs, config.model.options, config.data.directory = 2, {"image_size": 8}, "/data"
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        return tmp_path

    def resumed(self, run: Path, **given: Any) -> Config:
        return flags.resumed({**NOT_GIVEN, **given}, run).config

    def test_nothing_beside_it(self, run: Path) -> None:
        assert self.resumed(run) == Config.from_dict(json.loads((run / "config.json").read_text()))

    def test_the_same_again(self, run: Path) -> None:
        same = self.resumed(run, recipe="demo", data="digits", epochs=2, model_option=["image_size=8"], generations=3)
        assert same == self.resumed(run)
        assert self.resumed(run, config=str(run / "config.json")) == same

    def test_data_and_caches_may_have_moved(self, run: Path) -> None:
        assert self.resumed(run, data_dir="/elsewhere").data.directory == "/elsewhere"
        assert self.resumed(run, cache_dir="/elsewhere").teacher.cache_directory == "/elsewhere"

    def test_a_file_may_differ_in_what_nothing_computed_depends_on(self, run: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.json"
        other.write_text(json.dumps({**json.loads((run / "config.json").read_text()), "checkpoint_seconds": 60.0}))
        assert self.resumed(run, config=str(other)).checkpoint_seconds == 60

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"epochs": 3}, "--epochs is 3, but 2 in the run to resume"),
            ({"recipe": "cifar10"}, "--recipe is cifar10, but demo in"),
            ({"model": "wrn-10-1"}, "--model is wrn-10-1, but convnet-24 in"),
            ({"model_option": ["image_size=9"]}, "--model-option is image_size=9, but image_size=8 in"),
            ({"limit_train": 5}, "--limit-train is 5, but not set in"),
            ({"lr": 0.5}, "--lr is 0.5, but "),
            ({"teacher": "live"}, "--teacher is live, but auto in"),
            ({"students": "ban,cwtm"}, "--students is ban,cwtm, but not set in"),
        ],
    )
    def test_anything_else_is_refused_by_name(self, run: Path, given: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as raised:
            self.resumed(run, **given)
        assert str(raised.value).startswith(message)
        assert str(run) in str(raised.value)

    def test_what_an_older_run_did_not_read_may_be_repeated(self, run: Path) -> None:
        assert self.resumed(run, lr_decay=0.2, schedule="cosine") == self.resumed(run)

    def test_another_file(self, run: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.json"
        other.write_text(json.dumps({**json.loads((run / "config.json").read_text()), "seed": 9}))
        with pytest.raises(UserError, match=r"^seed in .*other\.json is 9, but 0 in the run"):
            self.resumed(run, config=str(other))
