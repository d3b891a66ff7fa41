"""`--loader`, and the files that `prepare --format ffcv` writes for it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from cli_calls import SMALL, Call, tree

ffcv_only = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")


@pytest.fixture
def without_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ffcv" else find(name, *rest))


def error(run: Path) -> Any:
    """What training came to."""
    return [record["test"] for record in json.loads((run / "results.json").read_text())["generations"]]


def test_prepare(call: Call, tmp_path: Path) -> None:
    said = call("prepare", "digits", "--format", "ffcv", "--data-dir", str(tmp_path))
    assert (said.status, said.err) == (0, "")
    train, test = tmp_path / "digits-train-8.beton", tmp_path / "digits-test-8.beton"
    assert said.out == f"digits is ready: {train} and {test}\n"
    assert train.is_file()
    assert test.is_file()


@ffcv_only
def test_train_from_ffcvs_files_and_go_on_without(call: Call, tmp_path: Path) -> None:
    where = ("--data-dir", str(tmp_path))
    runs = {loader: tmp_path / loader for loader in ("memory", "torch", "ffcv")}
    call("train", *SMALL, "--loader", "ffcv", *where, "--out", str(tmp_path / "early")).mistake(
        "write it with `ban-fast prepare digits --format ffcv --data-dir "
    )
    assert not (tmp_path / "early").exists()
    assert call("prepare", "digits", "--format", "ffcv", *where).status == 0
    for loader, run in runs.items():
        assert call("train", *SMALL, "--loader", loader, *where, "--out", str(run)).status == 0
    assert error(runs["memory"]) == error(runs["torch"]) == error(runs["ffcv"])
    assert call("train", "--out", str(runs["ffcv"]), "--resume", "--loader", "memory").status == 0
    file = tmp_path / "digits-train-8.beton"
    content = file.read_bytes()
    file.write_bytes(content[: 2**23 + 7] + bytes([content[2**23 + 7] ^ 1]) + content[2**23 + 8 :])
    before = tree(tmp_path)
    call("train", *SMALL, "--loader", "ffcv", *where, "--out", str(tmp_path / "early")).mistake(
        "digits-train-8.beton is damaged", "write it again with `ban-fast prepare digits --format ffcv --data-dir "
    )
    assert tree(tmp_path) == before
    assert call("prepare", "digits", "--format", "ffcv", *where).status == 0
    assert file.read_bytes() == content
    file.write_bytes(b"")
    call("train", *SMALL, "--loader", "ffcv", *where, "--out", str(tmp_path / "early")).mistake(
        "digits-train-8.beton is cut short; write it again with `ban-fast prepare digits --format ffcv --data-dir "
    )
    assert not (tmp_path / "early").exists()


def test_mistakes(call: Call, tmp_path: Path) -> None:
    call("train", "--loader", "dali").mistake("--loader", "'dali'", "memory, torch, ffcv")
    call("prepare", "digits", "--format", "zip").mistake("--format must be ffcv, got 'zip'")
    call("prepare", "digits", "--image-size", "8").mistake("--image-size is for FFCV's files: add --format ffcv")
    where = ("--format", "ffcv", "--data-dir", str(tmp_path))
    call("prepare", "digits", *where, "--image-size", "9").mistake("--image-size", "digits has images of 8 pixels")
    call("prepare", "cifra10", *where).mistake("unknown dataset 'cifra10'; did you mean 'cifar10'?")
    call("prepare", "ptb", *where).mistake("ptb is a text, and FFCV's files are of images: leave out --format ffcv")


@pytest.mark.usefixtures("without_ffcv")
def test_without_ffcv(call: Call) -> None:
    needed = "FFCV is not installed; `apt-get install libopencv-dev libturbojpeg0-dev pkg-config`"
    call("train", *SMALL, "--loader", "ffcv").mistake(f"--loader: {needed}")
    (line,) = [line for line in call("info").out.splitlines() if line.split()[:1] == ["ffcv"]]
    assert "not installed; `apt-get install libopencv-dev" in line
