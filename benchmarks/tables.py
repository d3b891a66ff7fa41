"""Results as Markdown. Every figure in README.md and benchmarks/README.md comes through here, none by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import densenet_figures, loaders, machine, step_figures
from benchmarks.cases import TITLE, Case, targets
from benchmarks.figures import PEERS, Figures, Record, best, gb_s, milliseconds, our_name, ratio, share
from benchmarks.targets import NOT_MEASURED, judge

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
Results = dict[str, Any]
STREAMS = ("copy", "2R1W")


def load(folder: Path) -> list[Results]:
    """The newest results of every machine, one a machine, CPUs first."""
    newest: dict[str, Results] = {}
    for path in sorted(folder.glob("*.json")):
        results: Results = json.loads(path.read_text())
        known = newest.get(machine.name(results))
        if known is None or known["date"] < results["date"]:
            newest[machine.name(results)] = results
    return sorted(newest.values(), key=lambda each: (each["device"] != "cpu", machine.name(each)))


def rewrite(path: Path, text: str) -> bool:
    """Put `text` between the markers of a file; False where it has none."""
    before = path.read_text() if path.exists() else ""
    head, found, rest = before.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        return False
    after = f"{head}{BEGIN}\n\n{text.strip()}\n\n{END}{tail}"
    if after != before:
        path.write_text(after)
    return True


def front_page(found: Sequence[Results]) -> str:
    """README's part: the cases that targets are set for, on the newest CPU and GPU results."""
    return "\n\n".join(
        f"**{'CPU' if device == 'cpu' else 'GPU'}**: " + _on_front_page([r for r in found if r["device"] == device])
        for device in ("cpu", "cuda")
    )


def all_pages(found: Sequence[Results]) -> str:
    """benchmarks/README.md's part: targets, the summary and every case of every machine."""
    parts = []
    for device, title in (("cpu", "CPU"), ("cuda", "GPU")):
        measured = [results for results in found if results["device"] == device]
        if not measured:
            parts.append(f"### {title}\n\n{NOT_MEASURED}")
        parts += [_page(results, title) for results in measured]
    return "\n\n".join(parts)


def caption(results: Results) -> str:
    """Machine, versions, commit, date; and what makes the figures preliminary."""
    source, versions, hardware = results["source"], results["versions"], results["machine"]
    commit = f"commit {source['commit'][:10]}" if source["commit"] else "commit unknown"
    modified = ", with modifications" if source["dirty"] else ""
    packages = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    threads = f"{hardware['threads']} threads, {hardware['vector']}, L3 {hardware['l3']}, {hardware['libc']}"
    lines = [f"{machine.name(results)} ({threads}); {packages}; {commit}{modified}; {results['date']}."]
    if not results["complete"]:
        lines.append("The run was cut short.")
    if results["load_at_start"] > machine.BUSY:
        lines.append(f"Preliminary: the machine was busy (load {results['load_at_start']:.1f} at the start).")
    return " ".join(lines)


def summary(figures: Figures, cases: Sequence[Case]) -> str:
    """A line a case and setting: ours, the best eager form, the best torch.compile, the ratio to the best other."""
    rows = []
    for case in cases:
        for setting in figures.settings():
            record = figures.find(case, setting)
            if record is None:
                continue
            eager, compiled = best(record, ("eager",)), best(record, ("compile",))
            rows.append(
                [
                    f"{TITLE[case.objective]} [{case.rows}, {case.classes}] {case.dtype}"
                    + (", near" if case.regime == "near" else ""),
                    setting,
                    _ours(record),
                    _percent(share(record, "2R1W")),
                    _named(record, eager),
                    _named(record, compiled),
                    _times(ratio(record)),
                ]
            )
    head = ["", "", "ban_fast ms", "of 2R1W", "best eager ms", "best torch.compile ms", "best other / ban_fast"]
    return _table(head, rows) + of_auto(figures)


def target_table(results: Results) -> str:
    """Every target of the device: asked, goal, measured."""
    rows = [verdict.cells for verdict in judge(results)]
    return _table(["", "asked", "goal", "measured", "met"], rows) + of_auto(Figures(results["records"]))


def of_auto(figures: Figures) -> str:
    """A paragraph where what is shown of ours is not what backend="auto" gives yet."""
    taken = {r["automatic"].removeprefix("ban_fast ") for r in figures.records if not r.get("auto_measured", True)}
    if not taken:
        return ""
    return (
        '\n\nOf ban_fast\'s backends the fastest is shown, and named: backend="auto" had no measured table for this '
        f"device, and takes {' or '.join(sorted(taken))}. After `python -m benchmarks.dispatch` it follows the fastest."
    )


def case_table(figures: Figures, case: Case) -> str:
    """Every provider of a case, in every setting."""
    records = {s: record for s in figures.settings() if (record := figures.find(case, s)) is not None}
    names = list(dict.fromkeys(name for record in records.values() for name in record["providers"]))
    head = ["", "loss, gradient off at random", "off near the teacher"]
    for setting in records:
        head += [f"{setting}: ms (p20 to p80)", "GB/s", *(f"of {stream}" for stream in STREAMS), "best other / this"]
        head += ["peak MB", "kernels"] if _has_peaks(records) else []
    gpu = _has_peaks(records)
    rows = []
    for name in names:
        first = next(record["providers"][name] for record in records.values())
        verdict = first["absent"] and f"absent: {first['absent']}"
        row = [name, _errors(first, "random"), _errors(first, "near")]
        for record in records.values():
            row += _cells(record, name, verdict, gpu)
        rows.append(row)
    speeds = "; ".join(
        f"{setting}: " + ", ".join(f"{stream} {record['streams_gb_s'][stream]:.1f} GB/s" for stream in STREAMS)
        for setting, record in records.items()
    )
    return f"{case.title}: {case.byte_count}. In-run streams: {speeds}.\n\n{_table(head, rows)}"


def _has_peaks(records: dict[str, Record]) -> bool:
    """Whether these are a GPU's, which come with peak memory."""
    times = (entry["time"] for record in records.values() for entry in record["providers"].values())
    return any(time is not None and "peak_bytes" in time for time in times)


def _cells(record: Record, name: str, verdict: str | None, gpu: bool) -> list[str]:
    entry = record["providers"][name]
    if entry["time"] is None:
        why = verdict or (entry["refused"] and f"no time: {entry['refused']}") or f"failed: {entry['failed']}"
        return [why, *[""] * (len(STREAMS) + 2 + 2 * gpu)]
    time, speed = entry["time"], gb_s(record, name)
    other = best(record, PEERS)
    fastest = None if other is None else milliseconds(record, other)
    assert speed is not None
    cells = [f"{_ms(time['ms'])} ({_ms(time['p20_ms'])} to {_ms(time['p80_ms'])})", f"{speed:.3g}"]
    cells += [_percent(share(record, stream, name)) for stream in STREAMS]
    cells.append(_times(None if fastest is None else fastest / time["ms"]))
    if gpu:
        cells.append(f"{time['peak_bytes'] / 1e6:.4g}" if "peak_bytes" in time else "")
        cells.append(f"{time['kernels']:.0f}, {_ms(time['kernel_ms'])} ms" if "kernels" in time else "")
    return cells


def _on_front_page(measured: Sequence[Results]) -> str:
    if not measured:
        return NOT_MEASURED
    results = max(measured, key=lambda each: str(each["date"]))
    return f"{caption(results)}\n\n{summary(Figures(results['records']), targets(results['device']))}"


def _page(results: Results, title: str) -> str:
    figures = Figures(results["records"])
    parts = [f"### {title}: {machine.name(results)}", caption(results)]
    parts += ["#### Targets", target_table(results), "#### All cases", summary(figures, figures.cases())]
    for case in figures.cases():
        parts.append(f"<details><summary>{case.title}</summary>\n\n{case_table(figures, case)}\n\n</details>")
    if results.get("steps"):
        parts += ["#### Whole training steps", *(step_figures.table(record) for record in results["steps"])]
    if results.get("densenets"):
        parts += ["#### DenseNets in every memory", *map(densenet_figures.table, results["densenets"])]
    if results.get("loaders"):
        parts += ["#### Loaders alone", loaders.table(results["loaders"])]
    if results["checks"]:
        parts += ["#### Checks", *(f"- {check['name']}: {check['outcome']}" for check in results["checks"])]
    if results["failures"]:
        parts += ["#### Failed", "\n".join(f"- {line}" for line in results["failures"])]
    if results["left_out"]:
        parts += ["#### Left out", "\n".join(f"- {line}" for line in results["left_out"])]
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned to be read as text too: the first to the left, figures to the right."""
    widths = [max(3, *(len(row[i]) for row in (head, *rows))) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *others])} |"

    rule = [("-" * width) if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(line(cells) for cells in (head, rule, *rows))


def _errors(entry: dict[str, Any], regime: str) -> str:
    errors = entry["gate"].get(regime)
    return "" if errors is None else f"{errors['loss']:.0e}, {errors['gradient']:.0e}"


def _ours(record: Record) -> str:
    """Our time, and whose it is where "auto" has nothing measured to follow."""
    name = our_name(record)
    return _ms(milliseconds(record, name)) if record.get("auto_measured", True) else _named(record, name)


def _named(record: Record, name: str | None) -> str:
    return "" if name is None else f"{_ms(milliseconds(record, name))} ({name.split(' ', 1)[1]})"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.1f} %"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}x"
