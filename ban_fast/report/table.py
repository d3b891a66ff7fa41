"""The table of a run: every generation and ensemble, next to the teacher and, where they compare, the paper."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..evaluation import RunDirectory
from . import describe, paper, text_table

_AVERAGES = {"probabilities": "ensembles (probabilities)", "logits": "ensembles (logits)"}

Record = Mapping[str, Any]


def table(run: RunDirectory, results: Record | None = None) -> Group:
    """What a run came to, for a rich console: error (percent), NLL (nats), ECE, change against the teacher, time.

    Of language models: perplexities, of the last and of the best epoch.

    `results` are the figures of results.json computed anew; None reads the file. A scaled-down or unfinished run says
    so above the table. UserError where the directory's files can't be read.
    """
    config, stored = run.config(), run.results()
    results = stored if results is None else results
    parts: list[Any] = [
        Text(
            f"{describe.title(config)}, seed {config['seed']}: {run.path}",
            style="bold",
            no_wrap=True,
            overflow="ignore",
        )
    ]
    for note in (describe.scaled_down(config), describe.unfinished(config, stored)):
        if note is not None:
            parts.append(Text(note, style="yellow"))
    if results["generations"]:
        teacher = stored["generations"][0]
        if describe.is_text(teacher):
            parts += [text_table.rows(config, results, teacher), Text(text_table.REMARK, style="dim")]
            return Group(*parts)
        parts.append(_rows(config, results, teacher))
        if "test" in teacher:
            parts.append(Text(_remark(teacher), style="dim"))
    return Group(*parts)


def _rows(config: Record, results: Record, teacher: Record) -> Table:
    published = paper.row(config)
    objective = config["objective"]["name"]
    validated = any("validation" in record for record in results["generations"])
    made = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    made.add_column("", no_wrap=True)
    for heading in ["test\nerror %", "vs\nteacher", "NLL", "ECE", *["val.\nerror %"] * validated, "time"]:
        made.add_column(heading, justify="right", no_wrap=True)
    if published is not None:
        made.add_column("paper\nerror %", justify="right", no_wrap=True)

    def add(name: str, record: Record, seconds: float | None, printed: float | None) -> None:
        cells = [name, *_figures(record, teacher)]
        if validated:
            cells.append(f"{record['validation']['error']:.2f}" if "validation" in record else "")
        cells.append("" if seconds is None else describe.duration(seconds))
        if published is not None:
            cells.append("" if printed is None else f"{printed:.2f}")
        made.add_row(*cells)

    for record in results["generations"]:
        number = record["generation"]
        printed = published.generation(number, objective) if published is not None else None
        add(describe.generation(number), record, record.get("train_seconds"), printed)
    for average, heading in _AVERAGES.items():
        chosen = [record for record in results["ensembles"] if record["average"] == average]
        if chosen:
            made.add_section()
            made.add_row(Text(heading, style="italic"))
        for record in chosen:
            numbers = tuple(record["members"])
            printed = published.ensemble(numbers, average, objective) if published is not None else None
            add(f"  {describe.members(numbers)}", record, None, printed)
    return made


def _figures(record: Record, teacher: Record) -> list[str]:
    """Error, change against the teacher, NLL and ECE on the test images; a library's run may have none."""
    if "test" not in record or "test" not in teacher:
        return ["", "", "", ""]
    test = record["test"]
    change = "" if record.get("generation") == 0 else f"{test['error'] - teacher['test']['error']:+.2f}"
    return [f"{test['error']:.2f}", change, f"{test['nll']:.4f}", f"{test['ece']:.4f}"]


def _remark(teacher: Record) -> str:
    """How far the test images can tell generations apart."""
    count = describe.test_images(teacher)
    return (
        f"{count:,} test images: one is {100 / count:.2g} points of error, "
        f"the teacher's standard error {describe.standard_error(teacher):.2g}"
    )
