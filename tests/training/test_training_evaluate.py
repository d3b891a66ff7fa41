"""`evaluate_run`: the figures of a run, computed anew from its files."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import (
    EPOCHS,
    STEPS,
    StopAt,
    check_figures,
    config,
    digits,
    own,
    without_times,
)
from text_runs import text_config, write_text

from ban_fast.errors import UserError
from ban_fast.training import Interrupted, evaluate_run, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    run(config(generations=3), out=path, **own())
    return path


def test_evaluate_run_gives_results_json_again(finished: Path) -> None:
    assert evaluate_run(finished, **own()) == json.loads((finished / "results.json").read_text())


def test_evaluate_chosen_members(finished: Path) -> None:
    said = evaluate_run(finished, members=[3, 0], **own())
    stored = json.loads((finished / "results.json").read_text())
    assert [r["generation"] for r in said["generations"]] == [3, 0]
    assert said["generations"][1] == stored["generations"][0]
    assert [(e["members"], e["average"]) for e in said["ensembles"]] == [([3, 0], "probabilities"), ([3, 0], "logits")]
    for entry in said["ensembles"]:
        check_figures(entry["test"])
    prefix = evaluate_run(finished, members=[1, 2], **own())
    assert prefix["ensembles"] == stored["ensembles"][:2]
    alone = evaluate_run(finished, members=[2], **own())
    assert alone["ensembles"][0]["test"] == stored["generations"][2]["test"]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([4], r"0\.\.3 here, got 4"),
        ([-1], "got -1"),
        ([1, 1], "different generations, got 1,1"),
        ([], "got none"),
        (["1"], "got '1'"),
        ([True], "got True"),
    ],
)
def test_members_that_are_none(finished: Path, members: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        evaluate_run(finished, members=members, **own())


def test_evaluate_what_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        evaluate_run(tmp_path, **own())
    with pytest.raises(Interrupted):
        run(config(), out=tmp_path / "a", should_stop=StopAt(3), **own())
    with pytest.raises(UserError, match=r"no generation of the run in .* is finished"):
        evaluate_run(tmp_path / "a", **own())
    run(config(), out=tmp_path / "a", resume=True, **own())
    file = tmp_path / "a" / "generation-2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"generation-2/model\.safetensors is cut short"):
        evaluate_run(tmp_path / "a", **own())
    evaluate_run(tmp_path / "a", members=[0, 1], **own())


def test_evaluate_the_finished_part_of_a_stopped_run(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(config(), out=tmp_path, should_stop=StopAt(STEPS + EPOCHS + 6), **own())
    stored = json.loads((tmp_path / "results.json").read_text())
    assert len(stored["generations"]) == 1
    assert evaluate_run(tmp_path, **own()) == stored
    assert without_times(stored)["generations"][0]["steps"] == STEPS


def as_if(path: Path, **changes: Any) -> None:
    """Another machine's run: one that had a GPU, or FFCV."""
    file = path / "config.json"
    stored = json.loads(file.read_text())
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        (stored[part] if part else stored)[name] = value
    file.write_text(json.dumps(stored))


def test_how_it_was_trained_asks_nothing(tmp_path: Path) -> None:
    """A text in fp16, which no CPU trains, and images from files of FFCV's that are gone."""
    run(text_config(write_text(tmp_path / "text", lines=40), generations=0, epochs=1), out=tmp_path / "words")
    as_if(tmp_path / "words", amp="fp16")
    run(digits(generations=0, epochs=1), out=tmp_path / "images")
    as_if(tmp_path / "images", data__loader="ffcv")
    for name in ("words", "images"):
        assert evaluate_run(tmp_path / name) == json.loads((tmp_path / name / "results.json").read_text())
