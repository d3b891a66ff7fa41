"""Reading the records of DenseNets' training steps: a ratio of times or of bytes, and a case as a table."""

from dataclasses import dataclass
from typing import Any

from benchmarks.harness import quantiles

Record = dict[str, Any]
GRAPHED = ", graphed"
PLAIN, CHANNELS_LAST, CHECKPOINT, SHARED = "plain", "plain channels_last", "checkpoint", "shared"
AUTOTUNED = "compile max-autotune"
COMPILED = ("compile", AUTOTUNED)
SIZES = ("saved_bytes", "held_bytes", "peak_bytes")
"""Of autograd's storages; what a process, on a GPU its allocator, kept from forward to backward; and the most of it."""


@dataclass(frozen=True)
class Case:
    """A network, a batch and an arithmetic."""

    network: str
    batch: int
    amp: bool = False

    @property
    def title(self) -> str:
        return f"{self.network}, batch {self.batch}, {'bf16 autocast' if self.amp else 'fp32'}"


def over(record: Record | None, name: str, other: str) -> float | None:
    """The median over the rounds that both had of one's time over another's in the same round."""
    ones, others = _rounds(record, name), _rounds(record, other)
    both = [ones[number] / others[number] for number in ones.keys() & others.keys()]
    return quantiles(both)[1] if both else None


def best_compiled_over(record: Record | None, name: str) -> float | None:
    """`over`, of the compiled form that takes least."""
    ratios = [ratio for each in COMPILED if (ratio := over(record, each, name)) is not None]
    return min(ratios, default=None)


def bytes_over(record: Record | None, size: str, name: str, other: str) -> float | None:
    """One's bytes over another's; `size` is of `SIZES`."""
    one, two = (None if record is None else record["providers"].get(each, {}).get(size) for each in (name, other))
    return one / two if one is not None and two else None


def table(record: Record) -> str:
    """Markdown: a provider a line."""
    case = Case(**record["case"])
    head = ["", "ms (p20 to p80)", "images/s", "of plain's time", "saved MB", "held MB", "peak MB", "gradient off"]
    lines = [f"{case.title}\n", " | ".join(["", *head, ""]).strip(), "|---|" + "---:|" * (len(head) - 1)]
    for name, entry in record["providers"].items():
        clock = [entry["failed"] or "no time", "", ""]
        if entry["laps_s"]:
            low, median, high = quantiles(entry["laps_s"])
            clock = [f"{1e3 * median:.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})", f"{case.batch / median:.0f}"]
            ratio = over(record, name, PLAIN)
            clock.append("" if ratio is None else f"{ratio:.2f}")
        sizes = [f"{entry[size] / 1e6:.0f}" if size in entry else "" for size in SIZES]
        off = "" if entry["off"] is None else f"{entry['off']:.0e}"
        lines.append("| " + " | ".join([name, *clock, *sizes, off]) + " |")
    for why in dict.fromkeys(e["memory_failed"] for e in record["providers"].values() if "memory_failed" in e):
        names = [name for name, e in record["providers"].items() if e.get("memory_failed") == why]
        lines.append(f"\nNo memory of {', '.join(names)}: {why}")
    return "\n".join(lines)


def _rounds(record: Record | None, name: str) -> dict[int, float]:
    """Seconds by round: who is compiled joins later."""
    entry = None if record is None else record["providers"].get(name)
    return {} if entry is None else dict(enumerate(entry["laps_s"], entry.get("first_round", 0)))
