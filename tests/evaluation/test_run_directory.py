"""Reading a run directory: what is there, and one line about what is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from ban_fast.config import Config
from ban_fast.errors import UserError
from ban_fast.evaluation import RunDirectory

RESULTS = {"format": 1, "generations": [{"generation": 0}, {"generation": 1}], "ensembles": []}


def results(average: str = "logits", members: Any = (0,), **changes: Any) -> bytes:
    """results.json of a teacher and an ensemble of it alone, with some figure replaced."""
    test = {"error": 1.0, "nll": 0.1, "ece": 0.0}
    bins = {"count": [4], "confidence": [0.9], "accuracy": [1.0]}
    for name, value in changes.items():
        (test if name in test else bins)[name] = value
    figures = {"test": test, "reliability": bins}
    vote = {"members": list(members), "average": average}
    return json.dumps(
        {"format": 1, "generations": [{"generation": 0} | figures], "ensembles": [vote | figures]}
    ).encode()


def test_figures_of_a_run(path: Path) -> None:
    """The file that `test_damaged_results` damages is a good one."""
    (path / "results.json").write_bytes(results())
    assert len(RunDirectory(path).results()["ensembles"]) == 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"format": 1, "epochs": 2}')
    (tmp_path / "environment.json").write_text('{"threads": 2}')
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    for number in (0, 1):
        folder = tmp_path / f"generation-{number}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    return tmp_path


def test_reads_everything(path: Path) -> None:
    run = RunDirectory(str(path))
    assert run.config() == Config(epochs=2).to_dict()  # what an older version did not write has its default
    assert run.environment() == {"threads": 2}
    assert run.results() == RESULTS
    assert run.generations() == [0, 1]
    assert run.metrics(1) == [{"epoch": 1}, {"epoch": 2}]


def test_a_run_in_the_making(path: Path) -> None:
    """No generation finished; one line of the metrics cut short by a kill."""
    (path / "results.json").unlink()
    (path / "generation-1" / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    run = RunDirectory(path)
    assert run.results() == {"format": 1, "generations": [], "ensembles": []}
    assert run.metrics(1) == [{"epoch": 1}]
    (path / "generation-1" / "metrics.jsonl").write_text("")
    assert run.metrics(1) == []


def test_what_is_no_run_directory(tmp_path: Path) -> None:
    for place, said in ((tmp_path / "no", "no such directory"), (tmp_path, "no config.json")):
        with pytest.raises(UserError, match=said):
            RunDirectory(place)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a directory"):
        RunDirectory(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cut short or corrupted"),
        (b'{"format": 1, "gener', "cut short or corrupted"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b"{}", "format None"),
        (b'{"format": 2, "generations": [], "ensembles": []}', "format 2"),
        (b'{"format": 1}', "does not list generations"),
        (b'{"format": 1, "generations": [{"generation": 1}], "ensembles": []}', "does not list generations"),
        (b'{"format": 1, "generations": [7], "ensembles": []}', "does not list generations"),
        (b'{"format": 1, "generations": [], "ensembles": [7]}', "does not list generations"),
        (results(error="low"), "has not the figures"),
        (results(ece=None), "has not the figures"),
        (results(count=[1, 2]), "has not the figures"),
        (results(accuracy="x"), "has not the figures"),
        (results(count=[0]), "has not the figures"),
        (results(members=[0, 1]), "has not the figures"),
        (results(average="median"), "has not the figures"),
        (results().replace(b'"test"', b'"tests"', 1), "has not the figures"),
        (results().replace(b'"generation"', b'"train_seconds": "3", "generation"', 1), "has not the figures"),
    ],
)
def test_damaged_results(path: Path, content: bytes, said: str) -> None:
    (path / "results.json").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        RunDirectory(path).results()
    assert "results.json" in str(caught.value)
    assert "delete it" in str(caught.value) or "this version reads 1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_metrics_and_missing_files(path: Path) -> None:
    (path / "generation-0" / "metrics.jsonl").write_text('{"epoch": 1}\nnonsense\n{"epoch": 3}\n')
    with pytest.raises(UserError, match="line 2 is not a JSON object"):
        RunDirectory(path).metrics(0)
    with pytest.raises(UserError, match=r"cannot read .*generation-7"):
        RunDirectory(path).metrics(7)
    (path / "environment.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*environment\.json: No such file"):
        RunDirectory(path).environment()


def test_a_configuration_that_is_none_names_its_file(path: Path) -> None:
    (path / "config.json").write_text('{"format": 1, "epochs": "two"}')
    with pytest.raises(UserError, match=r"config\.json: epochs: must be a whole number, got 'two'"):
        RunDirectory(path).config()
