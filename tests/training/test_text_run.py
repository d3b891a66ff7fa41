"""Language models through the one training loop: its steps against a loop written by hand, figures, votes, choices."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Recorder, footprint
from text_runs import STREAMS, WINDOW, text_config, write_text
from torch import Tensor, nn
from torch.nn import functional as F

from ban_fast.config import ModelConfig, OptimizerConfig, TextConfig
from ban_fast.data import StreamLoader, load_corpus
from ban_fast.evaluation import RunDirectory
from ban_fast.models import WordLSTM
from ban_fast.training import evaluate_run, run, run_together, text_task
from ban_fast.training.seeds import derived_seed, generation_seed


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    run(text_config(text, generations=3), out=path)
    return path


def whole_text(network: nn.Module, tokens: Tensor) -> Tensor:
    """Log-probabilities of every token after the first [N - 1], the text read in one piece."""
    with torch.no_grad():
        logits, _ = network.double()(tokens[:-1, None])
    return logits[:, 0].log_softmax(1).gather(1, tokens[1:, None])[:, 0]


# One loop


@pytest.mark.parametrize(("over_time", "clip"), [("sum", 0.5), ("mean", None)])
def test_the_loop_is_the_one_written_by_hand(tmp_path: Path, over_time: str, clip: float | None) -> None:
    """In float64: state carried over the windows of an epoch, for student and teacher each its own, none over epochs.

    The gradient is that of the sum over time, the mean over streams; plateau and clipping by their definitions.
    """
    text = write_text(tmp_path / "corpus", lines=40)
    corpus = load_corpus(text)
    words = len(corpus.vocabulary)

    def factory() -> nn.Module:
        return WordLSTM(6, num_classes=words, dropout=0.0).double()

    rate = 0.7 if over_time == "sum" else 0.7 * WINDOW
    optimizer = OptimizerConfig(
        lr=rate, momentum=0.0, nesterov=False, weight_decay=0.0, schedule="plateau", lr_decay=0.5, clip_norm=clip
    )
    settings = text_config(
        text, text=TextConfig(window=WINDOW, over_time=over_time), optimizer=optimizer, generations=1, epochs=4
    )
    results = run(settings, model=factory)
    loader = StreamLoader(corpus.train, batch_size=STREAMS, length=WINDOW)
    teacher: nn.Module | None = None
    for number in range(2):
        torch.manual_seed(derived_seed(generation_seed(0, number), "init"))
        network = factory()
        now, best = rate, math.inf
        for _ in range(4):
            state = taught_state = None
            for window in loader.epoch():
                logits, state = network(window.tokens, state)
                state = tuple(tensor.detach() for tensor in state)
                rows, labels = logits.flatten(0, 1), window.targets.flatten()
                losses = F.cross_entropy(rows, labels, reduction="none")
                if teacher is not None:
                    with torch.no_grad():
                        taught, taught_state = teacher(window.tokens, taught_state)
                    losses = losses + F.kl_div(
                        rows.log_softmax(1), taught.flatten(0, 1).softmax(1), reduction="none"
                    ).sum(1)
                losses = losses.view(WINDOW, STREAMS)
                loss = losses.sum(0).mean() if over_time == "sum" else losses.mean()
                gradients = torch.autograd.grad(loss, list(network.parameters()))
                norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
                shrink = 1.0 if clip is None else min(1.0, clip / (norm.item() + 1e-6))
                with torch.no_grad():
                    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                        parameter -= now * shrink * gradient
            perplexity = (-whole_text(network, corpus.valid).mean()).exp().item()
            now, best = (now, perplexity) if perplexity < best else (now * 0.5, best)
        for mine, theirs in zip(results.models[number].parameters(), network.parameters(), strict=True):
            # float64, some 150 steps whose sums run in another order
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
        teacher = network


def test_an_objective_of_each_kind_side_by_side(text: Path, tmp_path: Path) -> None:
    """Each row of a window is one sample, as far as the losses know: none is refused, and each falls."""
    names = ("label", "ban", "ban+l", "cwtm", "dkpp")
    settings = text_config(text, students=names, generations=1)
    run_together(settings, out=tmp_path / "all")
    for name in names:
        found = tmp_path / "all" / name.replace("+", "_")
        losses = [epoch["train"]["loss"] for epoch in RunDirectory(found).metrics(1)]
        assert losses[-1] < losses[0], name
        if name in ("ban+l", "dkpp"):
            run(settings.of_student(name), out=tmp_path / name)
            assert footprint(found) == footprint(tmp_path / name)


@pytest.mark.parametrize(
    ("model", "level"), [("lstm-8", "character"), ("cnn-lstm-16", "word")], ids=["characters", "words by their letters"]
)
def test_other_readings_of_a_text(text: Path, tmp_path: Path, model: str, level: str) -> None:
    settings = text_config(
        text, text=TextConfig(level=level, window=WINDOW), model=ModelConfig(name=model), generations=1, epochs=1
    )
    results = run(settings, out=tmp_path / "run")
    assert evaluate_run(tmp_path / "run", device="cpu") == results.to_dict()
    stored = run(settings, out=tmp_path / "run", resume=True)  # networks from their files, without the text
    tokens = load_corpus(text, level=level).test[:9, None]  # type: ignore[arg-type]
    for mine, theirs in zip(results.models, stored.models, strict=True):
        assert torch.equal(mine(tokens)[0], theirs(tokens)[0])


def test_in_bf16(text: Path) -> None:
    """Networks run in bf16 while they train, and are measured in full precision: nearly the same comes of it."""
    exact, rounded = (
        run(text_config(text, generations=1, amp=amp, model=ModelConfig(name="lstm-8"))).generations
        for amp in ("off", "bf16")
    )
    for one, other in zip(exact, rounded, strict=True):
        assert one["test"] != other["test"]
        # 2^-8 of each logit, in some 120 steps of lr 1
        assert other["test"]["nll"] == pytest.approx(one["test"]["nll"], rel=0.05)


# Figures


def test_figures_are_those_of_the_whole_text_in_one_piece(finished: Path, text: Path) -> None:
    corpus = load_corpus(text)
    stored = json.loads((finished / "results.json").read_text())
    models = run(text_config(text, generations=3), out=finished, resume=True).models
    for record, network in zip(stored["generations"], models, strict=True):
        for split, tokens in (("test", corpus.test), ("valid", corpus.valid)):
            nll = -whole_text(network, tokens).mean().item()
            # the network is fp32: 1e-6 of its logits
            assert record[split]["nll"] == pytest.approx(nll, rel=1e-5)
            assert record[split]["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
            assert set(record[split]) == {"nll", "perplexity"}


@pytest.mark.parametrize("window", [1, 7, 64])
def test_windows_of_evaluation_do_not_show(window: int, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State is carried from one to the next, to the split's last token."""
    monkeypatch.setattr("ban_fast.training.text_task.EVALUATION_WINDOW", window)
    stored = json.loads((finished / "results.json").read_text())
    for anew, record in zip(evaluate_run(finished, device="cpu")["generations"], stored["generations"], strict=True):
        for split in ("test", "valid"):
            # fp32 sums in another order
            assert anew[split]["nll"] == pytest.approx(record[split]["nll"], rel=1e-6)


def test_windows_of_evaluation_are_as_long_as_their_logits_allow() -> None:
    """Not longer than pays, 128 MiB of fp32 logits at most, and not single places whatever the vocabulary."""
    lengths = [text_task._evaluation_window(words) for words in (2, 10_000, 16_384, 100_000, 10_000_000)]
    assert lengths == [2048, 2048, 2048, 335, 64]


def test_a_vote_is_the_mean_of_distributions(finished: Path, text: Path) -> None:
    """Computed from distributions over all words; no member's are kept by the run."""
    tokens = load_corpus(text).test
    stored = json.loads((finished / "results.json").read_text())
    models = run(text_config(text, generations=3), out=finished, resume=True).models
    assert [(e["members"], e["average"]) for e in stored["ensembles"]] == [
        ([1, 2], "probabilities"),
        ([1, 2, 3], "probabilities"),
    ]
    for entry in stored["ensembles"]:
        joint = torch.zeros(len(tokens) - 1, dtype=torch.float64)
        for member in entry["members"]:
            joint += whole_text(models[member], tokens).exp() / len(entry["members"])
        assert entry["test"]["nll"] == pytest.approx(-joint.log().mean().item(), rel=1e-5)
    some = evaluate_run(finished, members=[0, 2], device="cpu")["ensembles"]
    assert [entry["members"] for entry in some] == [[0, 2]]


def test_evaluate_run_gives_results_json_again(finished: Path) -> None:
    assert evaluate_run(finished, device="cpu") == json.loads((finished / "results.json").read_text())


# Choices


def test_nothing_is_chosen_on_the_test_split(text: Path, tmp_path: Path) -> None:
    """The learning rate falls after epochs without a better validation perplexity, and the best of them is on record.

    The test split, of another text, is never asked.
    """
    other = write_text(tmp_path / "other")
    (other / "test.txt").write_text((text / "train.txt").read_text())
    optimizer = OptimizerConfig(
        lr=6.0, momentum=0.0, nesterov=False, weight_decay=0.0, schedule="plateau", lr_decay=0.25, clip_norm=20.0
    )
    runs = []
    for folder in (text, other):
        observer = Recorder()
        settings = text_config(folder, generations=0, epochs=12, optimizer=optimizer)
        record = run(settings, out=tmp_path / f"of-{folder.name}", observer=observer).generations[0]
        epochs = [epoch for _, epoch in observer.epochs]
        assert all(epoch["evaluation"]["split"] == "valid" for epoch in epochs)
        curve = [epoch["evaluation"]["perplexity"] for epoch in epochs]
        rate, best = 6.0, math.inf
        for epoch, perplexity in zip(epochs, curve, strict=True):
            assert epoch["lr"] == rate
            rate, best = (rate, perplexity) if perplexity < best else (rate * 0.25, best)
        assert rate < 6.0, "this learning rate was to be too high"
        assert record["best"]["epoch"] == 1 + curve.index(min(curve))
        assert record["best"]["valid"]["perplexity"] == min(curve)
        assert record["valid"]["perplexity"] == curve[-1]
        runs.append((curve, record))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1]["test"] != runs[1][1]["test"]
    assert runs[0][1]["best"]["valid"] == runs[1][1]["best"]["valid"]


def test_the_best_epochs_figures_are_its_own(text: Path) -> None:
    """A run that ends with the best epoch of a longer one ends in what the longer one says of it."""
    optimizer = OptimizerConfig(
        lr=8.0, momentum=0.0, nesterov=False, weight_decay=0.0, schedule="constant", clip_norm=30.0
    )
    long = run(text_config(text, generations=0, epochs=8, optimizer=optimizer)).generations[0]
    best = long["best"]
    assert best["epoch"] < 8, "this learning rate was to be too high"
    short = run(text_config(text, generations=0, epochs=best["epoch"], optimizer=optimizer)).generations[0]
    assert {split: short[split] for split in ("valid", "test")} == {split: best[split] for split in ("valid", "test")}


def test_what_a_run_leaves(finished: Path) -> None:
    directory = RunDirectory(finished)
    shape = directory.environment()["shape"]
    assert shape["train_tokens"] > shape["test_tokens"] > 0
    assert len(shape["vocabulary"]) == 16
    for record in directory.results()["generations"]:
        assert record["tokens_per_second"] > 0
        assert "images_per_second" not in record
        assert "reliability" not in record
    teacher: dict[str, Any] = directory.results()["generations"][1]["teacher"]
    assert teacher["forward_tokens"] == directory.results()["generations"][1]["steps"] * STREAMS * WINDOW
