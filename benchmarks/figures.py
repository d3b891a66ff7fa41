"""Reading a run's results: a time, the best of a kind, a ratio, a share."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.cases import Case

Record = dict[str, Any]
PEERS = ("eager", "compile", "liger", "triton")


@dataclass(frozen=True)
class Figures:
    """The records of one run, by case and setting."""

    records: list[Record]
    steps: list[Record] = field(default_factory=list)
    """Of whole training steps: `step_figures` reads them."""
    loaders: Record | None = None
    """Of the loaders alone, where they were measured: `loaders` reads it."""
    densenets: list[Record] = field(default_factory=list)
    """Of DenseNets in every memory: `densenet_figures` reads them."""

    def find(self, case: Case, setting: str) -> Record | None:
        for record in self.records:
            if record["setting"] == setting and case_of(record) == case:
                return record
        return None

    def as_auto(self) -> "Figures":
        """The same, ours being what backend="auto" comes to, measured or not."""
        return replace(self, records=[record | {"auto_measured": True} for record in self.records])

    def settings(self) -> list[str]:
        """In the order they were measured in."""
        return list(dict.fromkeys(record["setting"] for record in self.records))

    def cases(self) -> list[Case]:
        return list(dict.fromkeys(case_of(record) for record in self.records))


def find(records: list[Record], case: Any) -> Record | None:
    """The record of a whole step's or a DenseNet's case: `case` is of the class that the records' cases are of."""
    return next((record for record in records if type(case)(**record["case"]) == case), None)


def case_of(record: Record) -> Case:
    return Case(**record["case"])


def milliseconds(record: Record, provider: str) -> float | None:
    """The median of a provider's calls, or None where it has no time."""
    time = record["providers"].get(provider, {}).get("time")
    return None if time is None else float(time["ms"])


def best(record: Record, kinds: Iterable[str]) -> str | None:
    """The fastest provider of these kinds."""
    timed = {
        name: time
        for name, entry in record["providers"].items()
        if entry["kind"] in kinds and (time := milliseconds(record, name)) is not None
    }
    return min(timed, key=timed.__getitem__) if timed else None


def our_name(record: Record) -> str:
    """Who stands for us: what backend="auto" comes to. Where it had no measured table to follow, our fastest."""
    measured = record.get("auto_measured", True)  # files that don't say are of a CPU, which has a table
    automatic = str(record["automatic"])
    return automatic if measured else best(record, ("ban_fast",)) or automatic


def ours(record: Record) -> float | None:
    """The time of `our_name`."""
    return milliseconds(record, our_name(record))


def ratio(record: Record | None, kinds: Iterable[str] = PEERS) -> float | None:
    """How many times as long the fastest of these kinds takes as we do."""
    if record is None:
        return None
    mine, name = ours(record), best(record, kinds)
    theirs = None if name is None else milliseconds(record, name)
    return None if mine is None or theirs is None else theirs / mine


def gb_s(record: Record, provider: str) -> float | None:
    """GB/s on the record's byte count, which is every provider's."""
    ms = milliseconds(record, provider)
    return None if ms is None else float(record["bytes"]) / ms / 1e6


def share(record: Record | None, stream: str, provider: str | None = None) -> float | None:
    """Our (or a provider's) GB/s over those of a stream of the same run."""
    if record is None:
        return None
    speed = gb_s(record, provider or our_name(record))
    return None if speed is None else speed / float(record["streams_gb_s"][stream])
