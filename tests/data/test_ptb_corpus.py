"""Texts as numbers: small folders, all that can be wrong with them, and Penn Treebank where BAN_FAST_DATA has it."""

import hashlib
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from ban_fast.data import Corpus, is_text, load_corpus, ptb
from ban_fast.errors import UserError
from ban_fast.models import CnnLSTM

TEXTS = {"train": " the cat <unk> \n the dog \n", "valid": "the bird\n", "test": "a cat\nthe dog\n"}


def write(directory: Path, texts: dict[str, str] = TEXTS, pattern: str = "{}.txt") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for split, text in texts.items():
        (directory / pattern.format(split)).write_bytes(text.encode())
    return directory


def spelled(corpus: Corpus, split: str) -> list[str]:
    return [corpus.vocabulary[i] for i in getattr(corpus, split).tolist()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "text")


@pytest.fixture(scope="module")
def real_ptb() -> Path:
    root = Path(os.environ.get("BAN_FAST_DATA", ""))
    if not os.environ.get("BAN_FAST_DATA") or not (root / "ptb").is_dir():
        pytest.skip("BAN_FAST_DATA names no directory with Penn Treebank in ptb/")
    return root


def test_words_as_numbers(folder: Path) -> None:
    """The most frequent first, then by the alphabet; a line ends in <eos>; what train does not know is <unk>."""
    corpus = load_corpus(folder)
    assert corpus.vocabulary == ("<eos>", "the", "<unk>", "cat", "dog")
    assert corpus.train.dtype == torch.int64
    assert spelled(corpus, "train") == ["the", "cat", "<unk>", "<eos>", "the", "dog", "<eos>"]
    assert spelled(corpus, "valid") == ["the", "<unk>", "<eos>"]
    assert spelled(corpus, "test") == ["<unk>", "cat", "<eos>", "the", "dog", "<eos>"]
    assert (corpus.name, corpus.level) == (str(folder), "word")


def test_letters_as_numbers(folder: Path) -> None:
    corpus = load_corpus(folder, level="character")
    assert spelled(corpus, "train") == [*"the cat ", "<unk>", "<eos>", *"the dog", "<eos>"]
    assert spelled(corpus, "valid") == [*"the ", *("<unk>",) * 3, "d", "<eos>"]  # b, i and r are not in train
    with pytest.raises(UserError, match="read by characters already"):
        corpus.characters()


def test_a_text_that_knows_every_word_has_unk_all_the_same(tmp_path: Path) -> None:
    corpus = load_corpus(write(tmp_path, {**TEXTS, "train": "b a\n"}))
    assert corpus.vocabulary == ("<eos>", "a", "b", "<unk>")
    assert (corpus.train != 3).all()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_endings_and_byte_order_marks_change_nothing(tmp_path: Path, end: str, last: bool, mark: str) -> None:
    expected = load_corpus(write(tmp_path / "lf"))
    texts = {k: mark + (text if last else text.removesuffix("\n")).replace("\n", end) for k, text in TEXTS.items()}
    corpus = load_corpus(write(tmp_path / "other", texts))
    assert corpus.vocabulary == expected.vocabulary
    for split in TEXTS:
        assert torch.equal(getattr(corpus, split), getattr(expected, split))


def test_an_empty_line_is_a_line(tmp_path: Path) -> None:
    corpus = load_corpus(write(tmp_path, {**TEXTS, "valid": "the\n\ncat\n"}))
    assert spelled(corpus, "valid") == ["the", "<eos>", "<eos>", "cat", "<eos>"]


def test_other_scripts(tmp_path: Path) -> None:
    corpus = load_corpus(write(tmp_path, {**TEXTS, "train": "żółw 日本\u2028x\n"}))
    assert spelled(corpus, "train") == ["żółw", "日本", "x", "<eos>"]  # one line: U+2028 ends none, and parts words
    assert spelled(load_corpus(tmp_path, level="character"), "train")[:5] == ["ż", "ó", "ł", "w", " "]


def test_folders_are_found_by_path_and_below_the_data_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_corpus("text", directory=folder.parent).name == "text"
    monkeypatch.setenv("BAN_FAST_DATA", str(folder.parent))
    assert len(load_corpus("text").vocabulary) == 5


def test_words_as_characters(folder: Path) -> None:
    corpus = load_corpus(folder)
    table, named = corpus.characters()
    assert named == ("<pad>", "<start>", "<end>", "<unk>", "<eos>", *"acdeghot")
    rows = [[named[c] for c in row] for row in table.tolist()]
    assert rows[0] == ["<start>", "<eos>", "<end>", "<pad>", "<pad>"]
    assert rows[1] == ["<start>", *"the", "<end>"]
    assert rows[2] == ["<start>", "<unk>", "<end>", "<pad>", "<pad>"]
    wide, _ = corpus.characters(8)
    assert torch.equal(wide[:, :5], table)
    assert not wide[:, 5:].any()
    model = CnnLSTM(8, num_classes=5, characters=len(named), window=8, table=wide)
    assert model(corpus.train[:6].view(3, 2))[0].shape == (3, 2, 5)


def test_a_word_longer_than_the_window_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match="'the' needs 5 characters, start and end included, and the window has 4"):
        load_corpus(folder).characters(4)


def test_a_window_that_nobody_asked_for_has_a_limit(folder: Path) -> None:
    """Kim et al.'s 65, start and end included; a wider one on request. The message shows a part of such a word."""
    (folder / "train.txt").write_text("a " + "b" * 63 + "\n")
    assert load_corpus(folder).characters()[0].shape[1] == 65
    (folder / "train.txt").write_text("a " + "b" * 64 + "\n")
    with pytest.raises(UserError, match="needs 66 characters, start and end included, and the window has 65 unless"):
        load_corpus(folder).characters()
    assert load_corpus(folder).characters(66)[0].shape[1] == 66
    with pytest.raises(UserError, match=rf"'{'b' * 24}'\.\.\. \(64 letters\) needs 66 .*; give a window of 66 \("):
        load_corpus(folder).characters(10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid": None}, "lacks valid.txt; a corpus is a folder with train.txt, valid.txt and test.txt"),
        ({"train": None, "test": None}, "lacks train.txt, test.txt;"),
        ({"test": b""}, "test.txt has no words; a split needs some text"),
        ({"train": b" \r\n\r\n"}, "train.txt has no words"),
        ({"valid": b"caf\xe9\n"}, "valid.txt is not UTF-8 text: byte 0xe9 at 3; convert it"),
        ({"valid": "the".encode("utf-16")}, "valid.txt is not UTF-8 text: byte 0xff at 0"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(folder: Path, change: dict[str, bytes | None], message: str) -> None:
    for split, content in change.items():
        path = folder / f"{split}.txt"
        path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_corpus(folder)
    assert "\n" not in str(caught.value)


def test_what_a_text_is_known_by(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files, one of them at least; a folder that has images in `train` is none, whatever lies beside them."""
    monkeypatch.setenv("BAN_FAST_DATA", str(folder.parent))
    assert is_text("ptb")
    assert is_text(folder)
    assert is_text(folder.name)
    assert is_text(folder.name, folder.parent)
    assert not is_text("digits")
    assert not is_text(folder.name, tmp_path / "none")
    (folder / "train").mkdir()
    assert not is_text(folder)
    for file in folder.glob("*.txt"):
        file.unlink()
    (folder / "train").rmdir()
    assert not is_text(folder)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no directory nowhere; name 'ptb', or a folder with train.txt"):
        load_corpus("nowhere", directory=tmp_path)
    with pytest.raises(UserError, match=r"ptb is not in .*; put ptb.train.txt, ptb.valid.txt and ptb.test.txt"):
        load_corpus("ptb", directory=tmp_path / "none")
    with pytest.raises(UserError, match="level must be 'word' or 'character', got 'char'"):
        load_corpus("ptb", directory=tmp_path, level="char")  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [".", "ptb", "simple-examples/data"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_penn_treebank_is_known_by_its_sums(
    tmp_path: Path, place: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its line endings have become."""
    sums = {split: hashlib.md5(text.encode()).hexdigest() for split, text in TEXTS.items()}
    monkeypatch.setattr(ptb, "SUMS", sums)
    texts = {split: text.replace("\n", end) for split, text in TEXTS.items()}
    directory = write(tmp_path / place, texts, "ptb.{}.txt")
    assert spelled(load_corpus("ptb", directory=tmp_path), "valid") == ["the", "<unk>", "<eos>"]
    (directory / "ptb.valid.txt").write_text("the bird \n")
    with pytest.raises(UserError, match=r"ptb.valid.txt has md5 \w{32}, not the published \w{32}; replace it, or name"):
        load_corpus("ptb", directory=tmp_path)
    (directory / "ptb.valid.txt").unlink()
    with pytest.raises(UserError, match=r"lacks ptb.valid.txt; complete it with Mikolov's simple-examples"):
        load_corpus("ptb", directory=tmp_path)


def test_the_real_penn_treebank(real_ptb: Path) -> None:
    corpus = load_corpus("ptb", directory=real_ptb)
    assert [len(split) for split in (corpus.train, corpus.valid, corpus.test)] == [929_589, 73_760, 82_430]
    assert len(corpus.vocabulary) == 10_000
    assert corpus.vocabulary[:3] == ("the", "<unk>", "<eos>")
    counts = corpus.train.bincount()
    assert (counts.diff() <= 0).all()
    assert counts.min() > 0
    table, named = corpus.characters()
    assert table.shape == (10_000, 21)
    assert len(named) == 51
    first = (real_ptb / "ptb" / "ptb.valid.txt").read_text().split("\n")[0].split()
    assert spelled(corpus, "valid")[: len(first) + 1] == [*first, "<eos>"]
    with pytest.raises(UserError, match="needs 21 characters"):
        corpus.characters(20)


def test_the_real_penn_treebank_by_characters(real_ptb: Path, tmp_path: Path) -> None:
    shutil.copytree(real_ptb / "ptb", tmp_path / "elsewhere")
    corpus = load_corpus("ptb", directory=tmp_path / "elsewhere", level="character")
    text = (real_ptb / "ptb" / "ptb.test.txt").read_text()
    letters = Counter(text.replace("<unk>", "~"))
    assert (corpus.test == corpus.vocabulary.index("<unk>")).sum() == letters["~"]
    assert (corpus.test == corpus.vocabulary.index("e")).sum() == letters["e"]
    assert (corpus.test == corpus.vocabulary.index("<eos>")).sum() == letters["\n"] == 3761
    assert len(corpus.vocabulary) == 46 + 3
