"""What a text, its options and its network can't be together is one line that names it, and nothing is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import config, own
from text_runs import text_config, write_text
from torch import nn

from ban_fast.config import Config, DataConfig, ModelConfig, OptimizerConfig, TextConfig
from ban_fast.errors import OptionError, UserError
from ban_fast.training import evaluate_run, run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "corpus", lines=40)


def changed(section: str, field: str, value: Any) -> Callable[[Config], None]:
    return lambda settings: setattr(getattr(settings, section) if section else settings, field, value)


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        (changed("data", "image_size", 8), "data.image_size", "is for images, and .*corpus is a text; leave it out"),
        (changed("data", "val_fraction", 0.1), "data.val_fraction", "is for images"),
        (changed("data", "limit_train", 9), "data.limit_train", "is for images"),
        (changed("data", "loader", "torch"), "data.loader", "is for images"),
        (changed("data", "augmentation", "crop"), "data.augmentation", "is for images"),
        (changed("", "channels_last", True), "channels_last", "is for images"),
        (changed("", "micro_batch_size", 2), "micro_batch_size", "a smaller --batch-size has fewer streams"),
        (
            changed("", "sync_statistics", True),
            "sync_statistics",
            "is for images, and .*corpus is a text; leave it out",
        ),
        (changed("", "compile", True), "step", "does not take recurrent networks"),
        (changed("", "amp", "fp16"), "amp", "on the CPU there are no recurrent networks in fp16; use bf16 or off"),
        (changed("", "batch_size", 99), "batch_size", r"99 streams of 5 .* wider than the text, .*; use \d+ at most"),
        (changed("text", "window", 9999), "batch_size", "windows shorter than 9999"),
        (changed("text", "level", "letter"), "text.level", "unknown value 'letter'"),
        (changed("text", "over_time", "max"), "text.over_time", "unknown value 'max'"),
        (changed("text", "window", 0), "text.window", "must be at least 1, got 0"),
        (changed("model", "name", "wrn-10-1"), "model.name", "reads images, and the data are a text"),
        (changed("model", "options", {"num_classes": 3}), "model.options", "num_classes is not an option"),
        (changed("optimizer", "clip_norm", 0.0), "optimizer.clip_norm", "must be a finite number above 0, got 0"),
        (changed("optimizer", "plateau_against", "last"), "optimizer.plateau_against", "unknown value 'last'"),
        (changed("", "evaluate_every", 2), "evaluate_every", "must be 1 for schedule plateau, got 2"),
    ],
)
def test_options_that_do_not_go_with_a_text(
    text: Path, tmp_path: Path, change: Callable[[Config], None], field: str, said: str
) -> None:
    settings = text_config(text)
    change(settings)
    with pytest.raises(OptionError, match=said) as caught:
        run(settings, out=tmp_path / "run")
    assert caught.value.field == field
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "options", "level", "said"),
    [
        ("cnn-lstm-8", {"window": 3}, "word", "'hhhh' needs 6 characters, start and end included, .* a window of 6"),
        ("cnn-lstm-8", {"window": "wide"}, "word", "window must be a whole number of at least 1, got 'wide'"),
        ("cnn-lstm-8", {"window": 10**30}, "word", "window must be at most 16,777,216, got 1000"),
        ("cnn-lstm-8", {}, "character", "was read by characters already"),
        ("cnn-lstm-8", {"characters": 40}, "word", "characters is not an option: it is known already"),
    ],
)
def test_networks_that_read_letters(text: Path, name: str, options: dict[str, Any], level: str, said: str) -> None:
    settings = text_config(text, model=ModelConfig(name=name, options=options), text=TextConfig(level=level))
    with pytest.raises(OptionError, match=said) as caught:
        run(settings)
    assert caught.value.field in ("model.name", "model.options")


class Other(nn.Module):
    """A network whose logits are of another shape, or that takes no state, or returns none in training."""

    def __init__(self, width: int | None, *, forgets: bool = False) -> None:
        super().__init__()
        self.width, self.forgets = width, forgets
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor, *state: Any) -> Any:
        if self.width is None:
            raise TypeError("no state here")
        logits = self.weight * torch.zeros(*tokens.shape, self.width)
        return logits if self.forgets and self.training else (logits, None)


def test_networks_of_ones_own(text: Path) -> None:
    with pytest.raises(UserError, match=r"must return logits \[T, B, 14\] and its state, got \[2, 1, 3\]"):
        run(text_config(text), model=lambda: Other(3))
    with pytest.raises(UserError, match=r"does not take \(tokens \[T, B\], state\): no state here"):
        run(text_config(text), model=lambda: Other(None))
    with pytest.raises(UserError, match=r"must return \(logits \[T, B, V\], state\) in training too, got Tensor"):
        run(text_config(text), model=lambda: Other(14, forgets=True))
    settings = text_config(text, generations=1, epochs=1, model=ModelConfig())
    assert run(settings, model=lambda: Other(14)).generations[1]["test"]["perplexity"] == pytest.approx(14)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"test.txt": None}, r"lacks test\.txt; a corpus is a folder with train\.txt, valid\.txt and test\.txt"),
        ({"valid.txt": b"\n\n"}, r"valid\.txt has no words; a split needs some text"),
        ({"train.txt": b"caf\xe9\n"}, r"train\.txt is not UTF-8 text: byte 0xe9 at 3"),
    ],
)
def test_splits_that_are_none(tmp_path: Path, files: dict[str, bytes | None], said: str) -> None:
    folder = write_text(tmp_path / "corpus", lines=40)
    for name, content in files.items():
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        run(text_config(folder), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_gone_is_missed_as_a_text(text: Path, tmp_path: Path) -> None:
    """Not as one of images, where another folder may be named."""
    folder = write_text(tmp_path / "corpus", lines=40)
    run(text_config(folder, generations=0, epochs=1), out=tmp_path / "run")
    folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"no directory .*corpus; name 'ptb', or a folder with train\.txt, valid\.txt"):
        evaluate_run(tmp_path / "run", device="cpu")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved").rename(tmp_path / "elsewhere" / "corpus")
    for place in ("elsewhere", "elsewhere/corpus"):
        anew = evaluate_run(tmp_path / "run", data_dir=str(tmp_path / place), device="cpu")
        assert anew["generations"][0]["test"]["perplexity"] > 1
    with pytest.raises(UserError, match=r"no directory .*none; name 'ptb', or a folder with train\.txt, valid\.txt"):
        run(text_config(tmp_path / "none"))


def test_line_endings_change_nothing(text: Path, tmp_path: Path) -> None:
    folder = write_text(tmp_path / "corpus", lines=40)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    tests = [run(text_config(place, generations=0, epochs=1)).generations[0]["test"] for place in (text, folder)]
    assert tests[0] == tests[1]


def test_options_of_texts_are_not_for_images() -> None:
    for text in (TextConfig(window=3), TextConfig(level="character"), TextConfig(over_time="mean")):
        with pytest.raises(OptionError, match="is for texts, and custom is images; leave it out"):
            run(config(text=text), **own())
    with pytest.raises(OptionError, match="plateau looks at a validation split: set --val-fraction"):
        run(config(optimizer=OptimizerConfig(schedule="plateau")), **own())
    for optimizer in (OptimizerConfig(plateau_threshold=0.5), OptimizerConfig(plateau_against="previous")):
        with pytest.raises(OptionError, match="is for schedule plateau"):
            run(config(optimizer=optimizer), **own())
    digits = Config(data=DataConfig(name="digits"), model=ModelConfig(name="lstm-8"), device="cpu")
    with pytest.raises(UserError, match="lstm-8 is a language model: it reads words, and images of 1 channels"):
        run(digits)


def test_a_diverging_run_says_so(text: Path) -> None:
    optimizer = OptimizerConfig(lr=1e6, momentum=0.0, nesterov=False, weight_decay=0.0, schedule="constant")
    with pytest.raises(UserError, match=r"lower --lr"):
        run(text_config(text, optimizer=optimizer))


def test_images_by_a_plateau_and_clipped() -> None:
    """They are not of texts alone: by the validation error, through the same lines."""
    optimizer = OptimizerConfig(lr=2.0, schedule="plateau", lr_decay=0.1, clip_norm=1.0)
    x, y = own()["train"]
    results = run(
        config(optimizer=optimizer, generations=0, epochs=6), **own(train=(x[:48], y[:48]), validation=(x[48:], y[48:]))
    )
    assert results.generations[0]["validation"]["error"] < 75
    assert "best" not in results.generations[0]
