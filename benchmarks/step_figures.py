"""Reading the records of whole training steps: a time, a ratio, a share, and a case as a table."""

from dataclasses import dataclass
from typing import Any

from benchmarks.harness import quantiles

Record = dict[str, Any]
NAIVE, COMPOSED = "naive loop", "best composed"
LIVE, CACHED, SUPERVISED = "ours, teacher live", "ours, teacher cached", "ours, supervised"
COMPILED, EAGER = "ours, cached, step compile", "ours, cached, step eager"
PARTS = ("loader", "loss", "teacher", "student")


@dataclass(frozen=True)
class Case:
    """A network and a batch."""

    network: str
    batch: int

    @property
    def title(self) -> str:
        return f"{self.network}, batch {self.batch}"


def seconds(record: Record | None, name: str) -> float | None:
    """The median step of a trainer, None where it has no time."""
    laps = _laps(record, name)
    return quantiles(laps)[1] if laps else None


def over(record: Record | None, name: str, other: str) -> float | None:
    """The median over the rounds of one's time over another's in the same round."""
    ones, others = _laps(record, name), _laps(record, other)
    if not (ones and others):
        return None
    return quantiles([one / two for one, two in zip(ones, others, strict=True)])[1]


def loader_and_loss(record: Record | None) -> float | None:
    """Their share of a step of ours whose teacher is cached."""
    shares = None if record is None else record["trainers"].get(CACHED, {}).get("shares")
    return None if shares is None else float(shares["loader"] + shares["loss"])


def table(record: Record) -> str:
    """Markdown: a trainer a line."""
    case = Case(**record["case"])
    head = ["", "ms a step (p20 to p80)", "images/s", "of supervised's time", *PARTS, "gradient off"]
    lines = [f"{case.title}, {record['images']}\n", f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for name, entry in record["trainers"].items():
        cells = [entry["failed"] or "no time", *[""] * (2 + len(PARTS))]
        if entry["laps_s"]:
            low, median, high = quantiles(entry["laps_s"])
            ratio = over(record, name, SUPERVISED)
            cells = [f"{1e3 * median:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})", f"{case.batch / median:,.0f}"]
            cells.append("" if ratio is None else f"{ratio:.3f}")
            shares = entry["shares"]
            cells += [""] * len(PARTS) if shares is None else [f"{100 * shares[part]:.1f} %" for part in PARTS]
        off = "" if entry["off"] is None else f"{entry['off']:.0e}"
        lines.append("| " + " | ".join([name, *cells, off]) + " |")
    return "\n".join(lines)


def _laps(record: Record | None, name: str) -> list[float]:
    entry = None if record is None else record["trainers"].get(name)
    return [] if entry is None else list(entry["laps_s"])
