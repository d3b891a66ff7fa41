"""The table of a run of language models: perplexities of the last epoch, of the best one, and the paper's."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from . import describe, paper

Record = Mapping[str, Any]
_HEADINGS = ("test\nppl", "vs\nteacher", "test\nNLL", "valid\nppl", "best\nepoch", "its\ntest", "its\nvalid", "time")

REMARK = (
    "perplexity per token, line ends included, state carried over the whole split; of the last epoch, and of the one "
    "with the best validation perplexity"
)


def rows(config: Record, results: Record, teacher: Record) -> Table:
    """Generations and ensembles, each next to the teacher and, where they compare, Table 6 of the paper."""
    published = paper.text_row(config)
    made = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    made.add_column("", no_wrap=True)
    for heading in (*_HEADINGS, *["paper\ntest", "paper\nvalid"] * (published is not None)):
        made.add_column(heading, justify="right", no_wrap=True)
    for record in results["generations"]:
        cells = [describe.generation(record["generation"]), *_figures(record, teacher), *_best(record)]
        cells.append(describe.duration(record["train_seconds"]) if "train_seconds" in record else "")
        if published is not None:
            printed = published.generation(record["generation"], config["objective"]["name"])
            cells += ["", ""] if printed is None else [f"{printed.test:.2f}", f"{printed.valid:.2f}"]
        made.add_row(*cells)
    if results["ensembles"]:
        made.add_section()
        made.add_row(Text("ensembles (probabilities)", style="italic"))
    for record in results["ensembles"]:
        made.add_row(f"  {describe.members(record['members'])}", *_figures(record, teacher))
    return made


def _figures(record: Record, teacher: Record) -> list[str]:
    """Test perplexity, its change against the teacher, NLL, and the validation perplexity."""
    test, before = record["test"], teacher["test"]["perplexity"]
    change = "" if record.get("generation") == 0 else f"{test['perplexity'] - before:+.2f}"
    valid = f"{record['valid']['perplexity']:.2f}" if "valid" in record else ""
    return [f"{test['perplexity']:.2f}", change, f"{test['nll']:.4f}", valid]


def _best(record: Record) -> list[str]:
    """The epoch of the best validation perplexity, and what the network was worth there."""
    best = record.get("best")
    if best is None:
        return ["", "", ""]
    return [str(best["epoch"]), f"{best['test']['perplexity']:.2f}", f"{best['valid']['perplexity']:.2f}"]
