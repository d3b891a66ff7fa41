"""The record of a run of language models: its figures, what was cut, and what word frequencies alone are worth."""

import json
import math
from pathlib import Path

import pytest

from ban_fast.config import Config, DataConfig, ModelConfig, OptimizerConfig
from ban_fast.data import load_corpus
from ban_fast.evaluation import RunDirectory
from ban_fast.training import run
from benchmarks import language_models

TEXT = "a b a c\n" * 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(TEXT)
    return tmp_path


def test_word_frequencies_alone(folder: Path) -> None:
    """Of 100 training tokens 40 are a, and 20 each b, c and <eos>; <unk> has none. One more for each of the five."""
    shares = {"a": 41 / 105, "b": 21 / 105}
    words = {**shares, "c": shares["b"], "<eos>": shares["b"]}
    expected = [words[word] for _ in range(20) for word in ("a", "b", "a", "c", "<eos>")][1:]
    nll = -sum(map(math.log, expected)) / 99
    assert language_models.unigram_perplexity(load_corpus(folder), "test") == pytest.approx(math.exp(nll), rel=1e-12)


def test_a_runs_record(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Config(
        data=DataConfig(name=str(folder)),
        model=ModelConfig(name="lstm-4"),
        optimizer=OptimizerConfig(lr=0.5, schedule="constant"),
        generations=1,
        epochs=2,
        batch_size=1,
        max_steps=3,
        device="cpu",
    )
    run(settings, out=folder / "run")
    arguments = ["language_models", str(folder / "run"), "--out", str(folder / "records")]
    arguments += ["--cut", "half of a larger text"]
    monkeypatch.setattr("sys.argv", arguments)
    assert language_models.main() == 0
    (path,) = (folder / "records").iterdir()
    made = json.loads(path.read_text())
    results = RunDirectory(folder / "run").results()
    assert made["generations"] == results["generations"]
    assert made["scaled_down"] == "scaled down: 3 steps a generation, half of a larger text"
    assert made["trained_on"]["shape"]["train_tokens"] == 100
    assert made["curves"]["1"][-1]["step"] == 3
    assert str(folder) not in path.read_text()
    assert made["recorded_on"]["versions"]["torch"]
    assert f"teacher: perplexity {results['generations'][0]['test']['perplexity']:.2f}" in capsys.readouterr().out
