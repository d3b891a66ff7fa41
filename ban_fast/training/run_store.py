"""The writing side of a run directory. At any instant the files in it are enough to go on from."""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from ..config import FREE, Config
from ..errors import OptionError, UserError
from ..evaluation.run_directory import CONFIG, ENVIRONMENT, METRICS, MODEL, RESULTS, RESULTS_FORMAT, STATE, RunDirectory
from .checkpoint import (
    TEMPORARY,
    load_model,
    load_state,
    make_directories,
    save_model,
    save_state,
    write_file,
    write_json,
)
from .distributed import ALONE, Ranks
from .locks import DirectoryLock
from .metrics import Journal

_STATE_FORMAT = 3  # of state.pt; another one is another configuration's checkpoint
_GENERATIONS = [RESULTS, *(f"generation-*/{name}" for name in (STATE, METRICS, MODEL))]
_TEMPORARIES = [name + TEMPORARY for name in (CONFIG, ENVIRONMENT, *_GENERATIONS)]


def stored_config(directory: RunDirectory) -> Config:
    """The configuration of a run."""
    return Config.from_dict(directory.config())


def empty_results() -> dict[str, Any]:
    """results.json before there is any."""
    return {"format": RESULTS_FORMAT, "generations": [], "ensembles": []}


class RunStore:
    """A run directory, held by one process at a time for as long as this is open.

    Of the ranks of a run it is rank 0 that holds, reads and writes it, at the others' call too: they all get what it
    read, or its UserError.
    """

    def __init__(self, path: str | os.PathLike[str], ranks: Ranks = ALONE) -> None:
        self.path = Path(path)
        self.ranks = ranks
        self.results = empty_results()
        self.environment: dict[str, Any] | None = None
        self._lock: DirectoryLock | None = None
        self._identity = ""

    def __enter__(self) -> "RunStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def refuse_existing(self) -> None:
        """UserError if a new run can't begin here."""
        self.ranks.first(self._refuse_existing)

    def _refuse_existing(self) -> None:
        if (self.path / CONFIG).exists():
            raise UserError(f"{self.path} holds a run already: continue it with --resume, or choose another --out")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is not a directory: choose another --out")
        lost = next(itertools.chain.from_iterable(self.path.glob(pattern) for pattern in _GENERATIONS), None)
        if lost is not None:
            raise UserError(
                f"{self.path} has {lost.relative_to(self.path)} of a run, but no {CONFIG}: put that back and continue "
                "with --resume, move the run away, or choose another --out"
            )

    def create(self, config: Config, environment: dict[str, Any]) -> None:
        """Make the directory and put down what the run is. config.json comes last: with it, the run exists."""
        self.environment = self.ranks.first(lambda: self._create(config, environment))

    def _create(self, config: Config, environment: dict[str, Any]) -> dict[str, Any]:
        made = make_directories(self.path)
        self._hold()
        self._refuse_existing()
        try:
            self._remove(_TEMPORARIES)
            write_json(self.path / ENVIRONMENT, environment)
            write_json(self.path / CONFIG, config.to_dict())
        except UserError:
            self._unmake(made)
            raise
        return environment

    def _unmake(self, made: list[Path]) -> None:
        """Nothing half-begun stays, as far as the disk still obeys."""
        with contextlib.suppress(OSError):
            for name in (CONFIG, ENVIRONMENT):
                (self.path / name).unlink(missing_ok=True)
            for directory in reversed(made):
                directory.rmdir()

    def reopen(self, config: Config) -> None:
        """Take up the run that is here. UserError if there is none, or if `config` is of another."""
        self.environment, self.results = self.ranks.first(lambda: self._reopen(config))

    def _reopen(self, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
        if not self.path.is_dir() or not (self.path / CONFIG).exists():
            raise UserError(f"nothing to resume in {self.path}: there is no {CONFIG}; start without --resume")
        self._hold()
        directory = RunDirectory(self.path)
        stored = stored_config(directory)
        for field, old, new in config_differences(stored, config):
            raise OptionError(field, f"is {new!r} here, but {old!r} in the run in {self.path}; use another --out")
        environment, results = directory.environment(), directory.results()
        self._remove(_TEMPORARIES)
        return environment, results

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.ranks.first((self.path / CONFIG).exists)

    def has_checkpoint(self, number: int) -> bool:
        """Whether a generation has a state.pt."""
        return self.ranks.first((self.path / f"generation-{number}" / STATE).exists)

    def look(self) -> Config:
        """Read the run that is here without holding it, which leaves it to others too; returns its configuration."""
        directory = RunDirectory(self.path)
        self.environment, self.results, config = self.ranks.first(
            lambda: (directory.environment(), directory.results(), stored_config(directory))
        )
        return config

    def identify(self, config: Config, shape: dict[str, Any], structure: str) -> None:
        """Say what is trained: checkpoints carry a hash of it, and those of anything else are refused.

        UserError if the data or the network don't look as they did when the run began.
        """
        assert self.environment is not None
        then = self.environment.get("shape", {})
        for key in [*shape, *then]:
            if then.get(key) != shape.get(key):
                raise UserError(
                    f"the run in {self.path} began with {key} {then.get(key)}, here it is {shape.get(key)}: "
                    "resume with the same data and network, or use another --out"
                )
        text = json.dumps([_STATE_FORMAT, settings(config), shape, structure], sort_keys=True)
        self._identity = hashlib.sha256(text.encode()).hexdigest()

    def generation(self, number: int) -> "GenerationFiles":
        """The files of one generation; its folder is made."""
        directory = self.path / f"generation-{number}"
        self.ranks.first(lambda: make_directories(directory))
        return GenerationFiles(directory, f"{self._identity} generation {number}", self.ranks)

    def load_network(self, number: int, network: nn.Module) -> None:
        """Fill `network` with the weights of a finished generation."""
        sha256 = self.results["generations"][number].get("model_sha256")
        self.ranks.first(lambda: load_model(self.path / f"generation-{number}" / MODEL, network, sha256))
        self.ranks.copy(network)

    def save_results(self) -> None:
        """results.json; a generation is finished once it is in there."""
        self.ranks.first(lambda: write_json(self.path / RESULTS, self.results))

    def _remove(self, patterns: list[str]) -> None:
        try:
            for path in itertools.chain.from_iterable(self.path.glob(pattern) for pattern in patterns):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def _hold(self) -> None:
        self._lock = DirectoryLock(self.path, "wait for it, or choose another --out")


class GenerationFiles:
    """model.safetensors, metrics.jsonl and state.pt of one generation; rank 0's, as the `RunStore` is."""

    def __init__(self, directory: Path, identity: str, ranks: Ranks = ALONE) -> None:
        self.directory = directory
        self._ranks = ranks
        self.journal = Journal(directory / METRICS)
        self._identity = identity

    def load_state(self) -> dict[str, Any] | None:
        """The last checkpoint, with metrics.jsonl cut back to it; None, and no metrics, where there is none."""
        return self._ranks.first(self._load_state)

    def _load_state(self) -> dict[str, Any] | None:
        path = self.directory / STATE
        if not path.exists():
            self.journal.cut(0)
            return None
        state = load_state(path)
        if state.get("identity") != self._identity:
            raise UserError(f"{path} is a checkpoint of another configuration: resume that one, or use another --out")
        self.journal.cut(state["journal_bytes"])
        return state

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        self._ranks.first(lambda: self._save_state(state))

    def _save_state(self, state: dict[str, Any]) -> None:
        self.journal.sync()
        save_state(self.directory / STATE, {"identity": self._identity, "journal_bytes": self.journal.bytes, **state})

    def copy_from(self, other: "GenerationFiles") -> None:
        """Metrics and checkpoint of a generation that another run has finished."""
        self._ranks.first(lambda: self._copy_from(other))

    def _copy_from(self, other: "GenerationFiles") -> None:
        try:
            metrics = other.journal.path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {other.journal.path}: {error.strerror}") from error
        write_file(self.journal.path, metrics)
        self.journal.bytes = len(metrics)
        if (state := other._load_state()) is not None:
            self._save_state({key: value for key, value in state.items() if key not in ("identity", "journal_bytes")})

    def save_model(self, network: nn.Module) -> str:
        """The final weights; returns the file's SHA-256."""
        return self._ranks.first(lambda: save_model(self.directory / MODEL, network))

    def append(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self._ranks.first(lambda: self.journal.append(record))


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, dict) and name != "model.options":
            yield from _leaves(inner, f"{name}.")
        else:
            yield name, inner


def settings(config: Config) -> dict[str, Any]:
    """Every field that what a run computes may depend on, by its dotted name."""
    return {name: value for name, value in _leaves(config.as_computed().to_dict()) if name not in FREE}


def config_differences(old: Config, new: Config) -> Iterator[tuple[str, Any, Any]]:
    """(field, value in `old`, value in `new`) where a run of one could not go on as a run of the other."""
    before = settings(old)
    for name, value in settings(new).items():
        if before.get(name) != value:
            yield name, before.get(name), value
