"""Which loader brings the batches is no part of what a run is."""

import importlib.util
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
from small_runs import StopAt, footprint

from ban_fast import data
from ban_fast.config import Config, DataConfig, ModelConfig
from ban_fast.errors import OptionError, UserError
from ban_fast.training import Interrupted, run

KINDS = [
    "torch",
    pytest.param(
        "ffcv", marks=pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
    ),
]


def settings(loader: str, directory: Path, **changes: Any) -> Config:
    """A teacher and a student, two epochs each, on 120 of the digits."""
    images = DataConfig(
        directory=str(directory),
        limit_train=120,
        limit_test=40,
        val_fraction=0.2,
        augmentation="crop",
        loader=loader,
    )
    values: dict[str, Any] = {
        "data": images,
        "model": ModelConfig(name="mlp-8"),
        "generations": 1,
        "epochs": 2,
        "batch_size": 50,
        "device": "cpu",
    }
    return Config(**{**values, **changes})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("digits")
    data.prepare_ffcv("digits", directory)
    return directory


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("memory") / "run"
    run(settings("memory", prepared), out=path)
    return footprint(path)


def check_all_ended(before: set[threading.Thread]) -> None:
    """No process and no thread of a run outlives it for long: a queue's thread is told to end, and not waited for."""
    for each in [*multiprocessing.active_children(), *set(threading.enumerate()) - before]:
        each.join(600)
        assert not each.is_alive(), each.name


@pytest.mark.parametrize("kind", KINDS)
def test_runs_are_the_same_to_the_last_bit(tmp_path: Path, prepared: Path, expected: Any, kind: str) -> None:
    threads = set(threading.enumerate())
    run(settings(kind, prepared), out=tmp_path / "run")
    assert footprint(tmp_path / "run") == expected
    check_all_ended(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_another_loader(tmp_path: Path, prepared: Path, expected: Any, kind: str) -> None:
    threads = set(threading.enumerate())
    loaders = ["memory", kind]
    for session, point in enumerate((2, 4, 6)):
        with pytest.raises(Interrupted):
            run(
                settings(loaders[session % 2], prepared),
                out=tmp_path / "run",
                resume=session > 0,
                should_stop=StopAt(point),
            )
    run(settings(kind, prepared), out=tmp_path / "run", resume=True)
    assert footprint(tmp_path / "run") == expected
    check_all_ended(threads)


def test_an_unknown_loader(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^data\.loader: unknown value 'fcv'; did you mean 'ffcv'\?$"):
        run(settings("fcv", tmp_path), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
def test_ffcv_before_its_files_are_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"write it with `ban-fast prepare digits --format ffcv --data-dir "):
        run(settings("ffcv", tmp_path), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
