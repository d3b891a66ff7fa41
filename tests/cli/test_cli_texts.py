"""`ban-fast train` on a text: from the flags to table, plots and figures computed anew; what it refuses in one line."""

import json
import random
from pathlib import Path

import pytest
from cli_calls import Call, tree
from matplotlib.image import imread

from ban_fast import recipes
from ban_fast.cli import flags

SMALL = ("--model", "lstm-8", "--batch-size", "4", "--window", "5", "--epochs", "2", "--device", "cpu")
"""Flags of a run that takes a second."""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder, draw = tmp_path / "mytext", random.Random(0)
    folder.mkdir()
    for split, lines in (("train", 50), ("valid", 12), ("test", 15)):
        words = [" ".join(draw.choice("abcdefgh") * draw.randint(1, 4) for _ in range(6)) for _ in range(lines)]
        (folder / f"{split}.txt").write_text("\n".join(words) + "\n")
    return folder


def test_train_report_and_evaluate(call: Call, text: Path, tmp_path: Path) -> None:
    said = call("train", "--data", "mytext", *SMALL, "--generations", "2", "--out", "run")
    assert said.status == 0, said
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipe"] == "ptb-lstm", "a folder with train.txt is a text"
    assert (config["objective"]["name"], config["text"]["window"], config["batch_size"]) == ("ban+l", 5, 4)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    teacher, student, _ = results["generations"]
    assert f"teacher  test perplexity {teacher['test']['perplexity']:.2f}, trained in" in said.out
    rows = {words[0]: words[1:] for line in said.out.splitlines() if (words := line.split())}
    assert rows["teacher"][0] == f"{teacher['test']['perplexity']:.2f}"
    assert rows["BAN-1"][:4] == [
        f"{student['test']['perplexity']:.2f}",
        f"{student['test']['perplexity'] - teacher['test']['perplexity']:+.2f}",
        f"{student['test']['nll']:.4f}",
        f"{student['valid']['perplexity']:.2f}",
    ]
    assert rows["BAN-1+2"][0] == f"{results['ensembles'][0]['test']['perplexity']:.2f}"
    anew = call("evaluate", "run")
    assert anew.status == 0, anew
    assert anew.out in said.out
    plots = call("report", "run")
    assert plots.status == 0, plots
    names = ["perplexity-by-generation.png", "learning-curves.png"]
    assert [Path(line).name for line in plots.out.splitlines()[-2:]] == names
    assert all(imread(tmp_path / "run" / "report" / name).ndim == 3 for name in names)


@pytest.mark.parametrize("name", ["ptb-lstm", "ptb-cnn-lstm", "ptb-small"])
def test_recipes_of_texts_by_name(call: Call, text: Path, tmp_path: Path, name: str) -> None:
    """Through the recipe's own options, on a text and a network of a moment."""
    model = "cnn-lstm-16" if name == "ptb-cnn-lstm" else "lstm-8"
    small = ("--model", model, "--batch-size", "4", "--epochs", "1", "--device", "cpu")
    said = call("train", "--recipe", name, "--data", str(text), *small, "--out", "run")
    assert said.status == 0, said
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["optimizer"] == recipes.get(name).to_dict()["optimizer"]
    assert call("train", "--out", "run", "--resume").status == 0


def test_a_language_model_of_ones_own(call: Call, text: Path, tmp_path: Path) -> None:
    (tmp_path / "own_words.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, num_classes, hidden=4):\n"
        "        super().__init__()\n"
        "        self.embedding = torch.nn.Embedding(num_classes, hidden)\n"
        "        self.gru = torch.nn.GRU(hidden, hidden)\n"
        "        self.output = torch.nn.Linear(hidden, num_classes)\n"
        "    def forward(self, tokens, state):\n"
        "        outputs, state = self.gru(self.embedding(tokens), state)\n"
        "        return self.output(outputs), state\n"
    )
    flags = (*SMALL, "--model", "own_words:Net", "--model-option", "hidden=6", "--generations", "1")
    said = call("train", "--data", "mytext", *flags, "--out", "run")
    assert said.status == 0, said
    anew = call("evaluate", "run")
    assert anew.status == 0, anew
    assert anew.out in said.out


def test_flags_of_texts(call: Call, text: Path, tmp_path: Path) -> None:
    more = (
        "--level",
        "character",
        "--over-time",
        "mean",
        "--clip-norm",
        "0.5",
        "--lr-decay",
        "0.7",
        "--max-steps",
        "9",
    )
    said = call("train", "--data", str(text), *SMALL, *more, "--generations", "0", "--out", "run")
    assert said.status == 0, said
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["text"] == {"level": "character", "window": 5, "over_time": "mean"}
    assert (config["optimizer"]["clip_norm"], config["optimizer"]["lr_decay"]) == (0.5, 0.7)
    assert "9 steps a generation" in said.out, "scaled down, and says so"


MISTAKES = {
    "images": (["--model", "wrn-10-1"], ["--model: wrn-10-1 reads images, and the data are a text"]),
    "limit": (["--limit-train", "9"], ["--limit-train: is for images, and ", "mytext is a text; leave it out"]),
    "micro": (["--micro-batch-size", "2"], ["--micro-batch-size: divides batches of images"]),
    "graph": (
        ["--step", "graph"],
        ["--step: a CUDA graph needs a GPU, and this run is on the CPU; use auto or eager\n"],
    ),
    "recipe": (
        ["--recipe", "cifar10"],
        [
            "--recipe cifar10: data.augmentation is for images, and ",
            "mytext is a text; leave --recipe out, or name another\n",
        ],
    ),
    "compile": (["--compile"], ["--step: torch.compile does not take recurrent networks"]),
    "wide": (["--batch-size", "99"], ["--batch-size: 99 streams of 5 and one more token are wider than the text"]),
    "window": (["--window", "0"], ["--window must be at least 1, got 0"]),
    "level": (["--level", "letter"], ["--level: unknown value 'letter'"]),
    "letters": (
        ["--model", "cnn-lstm-8", "--model-option", "window=3"],
        ["--model-option: ", "needs 6 characters, start and end included, and the window has 3; give a window of 6"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(call: Call, text: Path, tmp_path: Path, name: str) -> None:
    arguments, fragments = MISTAKES[name]
    before = tree(tmp_path)
    call("train", "--data", "mytext", *SMALL, *arguments, "--out", "run").mistake(*fragments)
    assert tree(tmp_path) == before


def test_a_token_too_long_for_any_window_is_one_line(call: Call, text: Path, tmp_path: Path) -> None:
    """Nothing is written first, and the option that the line names is the remedy."""
    (text / "train.txt").write_text((text / "train.txt").read_text() + "z" * 70 + "\n")
    before, flags = tree(tmp_path), (*SMALL, "--model", "cnn-lstm-8", "--max-steps", "1", "--generations", "0")
    said = call("train", "--data", "mytext", *flags, "--out", "run")
    said.mistake("--model: ", f"'{'z' * 24}'... (70 letters) needs 72 characters", "--model-option window=72")
    assert tree(tmp_path) == before
    assert call("train", "--data", "mytext", *flags, "--model-option", "window=72", "--out", "run").status == 0


@pytest.mark.parametrize(
    ("file", "content", "fragment"),
    [
        ("test.txt", None, "mytext lacks test.txt; a corpus is a folder with train.txt, valid.txt and test.txt"),
        ("valid.txt", b"", "valid.txt has no words"),
        ("train.txt", b"\xff\n", "train.txt is not UTF-8 text"),
    ],
)
def test_splits_that_are_none(
    call: Call, text: Path, tmp_path: Path, file: str, content: bytes | None, fragment: str
) -> None:
    (text / file).unlink() if content is None else (text / file).write_bytes(content)
    before = tree(tmp_path)
    call("train", "--data", "mytext", *SMALL, "--out", "run").mistake("--data: ", fragment)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["none", "file", "empty"])
def test_a_text_that_is_not_there_is_missed_as_one(call: Call, tmp_path: Path, kind: str) -> None:
    """Not as images, with the options of a recipe that nobody named."""
    if kind == "file":
        (tmp_path / "mytext").write_text("a b c\n")
    elif kind == "empty":
        (tmp_path / "mytext").mkdir()
    lacks = "mytext lacks train.txt, valid.txt, test.txt" if kind == "empty" else "no directory mytext; name 'ptb'"
    said = call("train", "--data", "mytext", *SMALL, "--out", "run")
    said.mistake(lacks, "a folder with train.txt, valid.txt and test.txt")
    assert not (tmp_path / "run").exists()


def test_another_vocabulary_is_one_line(call: Call, text: Path) -> None:
    assert call("train", "--data", "mytext", *SMALL, "--generations", "0", "--out", "run").status == 0
    (text / "train.txt").write_text((text / "train.txt").read_text() + "new\n")
    call("evaluate", "run").mistake("know a text of classes ", "name the directory of theirs")


def test_penn_treebank_that_is_not_there(call: Call, tmp_path: Path) -> None:
    said = call("train", "--data", "ptb", "--data-dir", str(tmp_path))
    said.mistake("ptb is not in", f"`ban-fast prepare ptb --data-dir {tmp_path}`")
    lines = call("info", "--data-dir", str(tmp_path)).out.splitlines()
    assert any(line.split()[:3] == ["ptb", "not", "there;"] for line in lines)


def test_which_recipe_data_begin_with(text: Path) -> None:
    given = dict.fromkeys([*flags.FIELDS, "config", "recipe", "model_option"])
    assert flags.requested({**given, "data": "ptb"}).config.recipe == "ptb-lstm"
    assert flags.requested({**given, "data": str(text)}).config.recipe == "ptb-lstm"
    assert flags.requested({**given, "data": str(text.parent)}).config.recipe == "paper"
