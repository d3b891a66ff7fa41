"""Texts for language models: a folder's train.txt, valid.txt and test.txt as numbers."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError

Level = Literal["word", "character"]
SPLITS = ("train", "valid", "test")
EOS, UNK = "<eos>", "<unk>"
PADDING, START, END = 0, 1, 2
"""Characters that every table has: after a word's end, before its first letter, after its last."""
WIDEST = 65
"""Characters of a window that nobody asked for, at most: Kim et al.'s limit. All words are convolved at the width of
the longest, so one token of 20,000 letters had two steps of cnn-lstm-16 take 2.5 minutes on two cores."""
_SHOWN = 24
"""Letters of a word in a message."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in three splits, each one stream of tokens."""

    name: str
    """As it was asked for."""
    level: Level
    """What a token is."""
    vocabulary: tuple[str, ...]
    """Every token of the training text, the most frequent first, `<eos>` for a line's end; `<unk>` too, last if the
    text has none: tokens of the other splits that the vocabulary lacks become it."""
    train: Tensor
    """int64 [N]."""
    valid: Tensor
    """int64 [N']."""
    test: Tensor
    """int64 [N'']."""

    def characters(self, window: int | None = None) -> tuple[Tensor, tuple[str, ...]]:
        """The vocabulary's words as characters, for `ban_fast.models.CnnLSTM`: int64 [V, window], and the characters.

        A word is `START`, its letters, `END`, then `PADDING`; `<unk>` and `<eos>` have one character each. `window`
        None is what the longest word needs, `WIDEST` at most: 21 for Penn Treebank, whose characters are 51 with the
        five above. UserError for a word that does not fit.
        """
        if self.level != "word":
            raise UserError(f"{self.name} was read by characters already; read it by words for words' characters")
        longest = max(self.vocabulary, key=_characters_of)
        needed = _characters_of(longest)
        if needed > (WIDEST if window is None else window):
            shown = repr(longest) if len(longest) <= _SHOWN else f"{longest[:_SHOWN]!r}... ({len(longest):,} letters)"
            limit = f"window has {window}" if window is not None else f"window has {WIDEST} unless told otherwise"
            raise UserError(
                f"{self.name}: {shown} needs {needed} characters, start and end included, and the {limit}; give a "
                f"window of {needed} (--model-option window={needed}), or shorten that word in train.txt"
            )
        window = needed if window is None else window
        letters = sorted({letter for word in self.vocabulary if word not in (EOS, UNK) for letter in word})
        named = ("<pad>", "<start>", "<end>", UNK, EOS, *letters)
        index = {name: i for i, name in enumerate(named)}
        rows = [
            [START, *(index[c] for c in ((word,) if word in (EOS, UNK) else word)), END] for word in self.vocabulary
        ]
        table = torch.full((len(rows), window), PADDING)
        for place, row in zip(table, rows, strict=True):
            place[: len(row)] = torch.tensor(row)
        return table, named


def _characters_of(word: str) -> int:
    """How many a word has in a table, start and end included."""
    return 2 + (1 if word in (EOS, UNK) else len(word))


def files(directory: Path) -> dict[str, Path]:
    """The three files of a folder."""
    return {split: directory / f"{split}.txt" for split in SPLITS}


def read(name: str, texts: dict[str, bytes], paths: dict[str, Path], level: Level) -> Corpus:
    """The corpus of three files' contents; UserError that names the file that is empty or no text."""
    tokens = {split: _tokens(texts[split], paths[split], level) for split in SPLITS}
    counts = Counter(tokens["train"])
    vocabulary = sorted(counts, key=lambda token: (-counts[token], token))
    if UNK not in counts:
        vocabulary.append(UNK)
    index = {token: i for i, token in enumerate(vocabulary)}
    unknown = index[UNK]
    streams = {split: torch.tensor([index.get(token, unknown) for token in tokens[split]]) for split in SPLITS}
    return Corpus(name, level, tuple(vocabulary), streams["train"], streams["valid"], streams["test"])


def contents(paths: dict[str, Path], remedy: str) -> dict[str, bytes]:
    """What the files hold; UserError for those that are not there or cannot be read, `remedy` its end."""
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise UserError(f"{next(iter(paths.values())).parent} lacks {', '.join(missing)}; {remedy}")
    found = {}
    for split, path in paths.items():
        try:
            found[split] = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}; {remedy}") from None
    return found


def _tokens(content: bytes, path: Path, level: Level) -> list[str]:
    """Words, or characters with a space between words, of every line, then `<eos>`. Lines end in LF, CRLF or CR."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte {content[error.start]:#04x} at {error.start}; convert it, or replace it"
        ) from None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    found: list[str] = []
    for line in lines:
        words = line.split()
        found += words if level == "word" else _characters(words)
        found.append(EOS)
    if len(found) == len(lines):
        raise UserError(f"{path} has no words; a split needs some text")
    return found


def _characters(words: list[str]) -> list[str]:
    """Letters of words and spaces between them; `<unk>` stays whole."""
    found: list[str] = []
    for i, word in enumerate(words):
        if i:
            found.append(" ")
        found += [word] if word == UNK else word
    return found
