"""The main job: `ban-fast train` alone, and generations on real CIFAR-100 images, killed, resumed and reported."""

import json
import os
import signal
from pathlib import Path

import pytest
from cli_calls import Start, await_there, finish
from matplotlib.image import imread

CIFAR = (
    *("train", "--data", "cifar100", "--model", "wrn-10-1", "--generations", "2", "--epochs", "3", "--max-steps", "6"),
    *("--limit-train", "256", "--limit-test", "128", "--batch-size", "64", "--lr", "0.05"),
)


@pytest.mark.slow
def test_the_demo(start: Start, tmp_path: Path) -> None:
    """Two commands after a clone: what they show is honest, a teacher that has learned and students beside it."""
    said = finish(start("train", env={"OMP_NUM_THREADS": "2"}))
    assert (said.status, said.err) == (0, "")
    (run,) = (tmp_path / "runs").iterdir()
    results = json.loads((run / "results.json").read_text())
    errors = [record["test"]["error"] for record in results["generations"]]
    assert len(errors) == 4
    assert max(errors) < 5, "percent of the digits' test images; k-nearest neighbours miss about 3"
    assert [record["members"] for record in results["ensembles"]] == [[1, 2], [1, 2], [1, 2, 3], [1, 2, 3]]
    for name in ("teacher", "BAN-1", "BAN-2", "BAN-3", "BAN-1+2+3"):
        assert name in said.out


@pytest.fixture
def cifar() -> str:
    directory = os.environ.get("BAN_FAST_DATA")
    if not directory or not (Path(directory) / "cifar-100-python").is_dir():
        pytest.skip("BAN_FAST_DATA names no directory with cifar-100-python/ in it")
    return directory


@pytest.mark.slow
def test_cifar_100_killed_resumed_and_reported(start: Start, tmp_path: Path, cifar: str) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = start(*CIFAR, "--data-dir", cifar, "--out", run)
    await_there(run / "generation-0" / "model.safetensors", process)  # killed as it begins with the first student
    process.send_signal(signal.SIGKILL)
    process.communicate()

    resumed = finish(start("train", "--out", run, "--resume"))
    assert (resumed.status, resumed.err) == (0, ""), resumed
    assert "scaled down: 256 training images, 128 test images, 6 steps a generation" in resumed.out
    assert finish(start(*CIFAR, "--data-dir", cifar, "--out", whole)).status == 0
    for generation in range(3):
        name = f"generation-{generation}/model.safetensors"
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    figures = [json.loads((path / "results.json").read_text()) for path in (run, whole)]
    for mine, uninterrupted in zip(figures[0]["generations"], figures[1]["generations"], strict=True):
        assert mine["test"] == uninterrupted["test"]
    assert [record["test"] for record in figures[0]["ensembles"]] == [r["test"] for r in figures[1]["ensembles"]]

    reported = finish(start("report", run))
    assert (reported.status, reported.err) == (0, "")
    for path in map(Path, reported.out.splitlines()[-3:]):
        picture = imread(path)[..., :3]
        assert min(picture.shape[:2]) > 600
        assert 0.0005 < (picture.max(axis=2) - picture.min(axis=2) > 0.3).mean() < 0.5, path.name
    evaluated = finish(start("evaluate", run, "--members", "0,2", "--data-dir", cifar))
    assert evaluated.status == 0
    assert "teacher+BAN-2" in evaluated.out


def test_cifar_that_is_damaged(start: Start, tmp_path: Path, cifar: str) -> None:
    damaged = tmp_path / "cifar-100-python"
    damaged.mkdir()
    for file in (Path(cifar) / "cifar-100-python").iterdir():
        content = file.read_bytes()
        (damaged / file.name).write_bytes(content[: len(content) // 2] if file.name == "train" else content)
    said = finish(start(*CIFAR, "--data-dir", tmp_path, "--out", "run"))
    said.mistake("train")
    assert not (tmp_path / "run").exists()
