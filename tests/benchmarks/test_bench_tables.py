"""Tables come from results files and from nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cuda, machine, tables, targets
from benchmarks.figures import Figures, best, gb_s, ours, ratio, share
from benchmarks.session import DEFAULT, TUNED

ROOT = Path(__file__).resolve().parents[2]


def entry(kind: str, ms: float | None, **others: Any) -> dict[str, Any]:
    time = None if ms is None else {"ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.1 * ms, "rounds": 7, "calls": 1}
    base = {"kind": kind, "absent": None, "refused": None, "failed": None, "first_call_s": 0.5, "time": time}
    return base | {"gate": {"random": {"loss": 1e-7, "gradient": 2e-7}, "near": None}} | others


def record(setting: str = TUNED, ms: float = 4.0, objective: str = "kd", **others: Any) -> dict[str, Any]:
    return {
        "case": {"objective": objective, "rows": 1120, "classes": 10000, "dtype": "fp32", "regime": "random"},
        "setting": setting,
        "bytes": 134_400_000,
        "sets": 3,
        "automatic": "ban_fast native",
        "streams_gb_s": {"copy": 60.0, "2R1W": 67.2},
        "providers": {
            "ban_fast reference": entry("ban_fast", 200.0),
            "ban_fast native": entry("ban_fast", ms),
            "eager kl_div": entry("eager", 30.0),
            "eager soft-CE": entry("eager", 14.0),
            "compile kl_div": entry("compile", 10.0),
            "compile soft-CE": entry("compile", None, refused="gradient off by 1e-01 at random logits"),
            "Liger KLDIV": entry("liger", None, absent="liger-kernel is not installed", gate={}),
        },
        **others,
    }


def results(device: str = "cpu", date: str = "2025-01-02", **others: Any) -> dict[str, Any]:
    hardware = {"cpu": "Model X", "cores": 2, "threads": 2, "vector": "AVX512", "l3": "32M", "libc": "glibc 2.36"}
    return {
        "device": device,
        "machine": hardware | ({"gpu": {"name": "Card Y"}} if device == "cuda" else {}),
        "versions": {"torch": "9.9", "triton": None},
        "source": {"commit": "0123456789abcdef", "dirty": False},
        "date": date,
        "load_at_start": 0.1,
        "checks": [],
        "left_out": [],
        "records": [record()],
        **others,
    }


def test_figures() -> None:
    r = record()
    assert ours(r) == 4.0
    assert best(r, ("eager",)) == "eager soft-CE"
    assert best(r, ("eager", "compile", "liger")) == "compile kl_div"
    assert best(r, ("liger",)) is None
    assert ratio(r) == 2.5
    assert ratio(r, ("eager",)) == 3.5
    assert ratio(r, ("liger",)) is None
    assert gb_s(r, "ban_fast native") == pytest.approx(33.6)
    assert share(r, "2R1W") == pytest.approx(0.5)
    assert share(r, "copy", "compile kl_div") == pytest.approx(0.224)


def test_a_case_shows_times_reasons_and_ratios() -> None:
    figures = Figures([record(), record(DEFAULT, ms=8.0)])
    (case,) = figures.cases()
    text = tables.case_table(figures, case)
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if "|" in line
    }
    assert "3 x 1120 x 10000 x 4 B = 134.4 MB" in text
    assert "2R1W 67.2 GB/s" in text
    assert lines["ban_fast native"][:7] == ["1e-07, 2e-07", "", "4 (3.6 to 4.4)", "33.6", "56 %", "50 %", "2.5x"]
    assert lines["ban_fast native"][7:] == ["8 (7.2 to 8.8)", "16.8", "28 %", "25 %", "1.25x"]
    assert lines["eager kl_div"][6] == "0.333x"
    assert lines["compile soft-CE"][2] == "no time: gradient off by 1e-01 at random logits"
    assert lines["Liger KLDIV"][2] == "absent: liger-kernel is not installed"


def test_peak_memory_is_a_column_on_a_gpu() -> None:
    r = record(cuda.PLAIN)
    r["providers"]["ban_fast native"]["time"]["peak_bytes"] = 44.8e6
    figures = Figures([r])
    text = tables.case_table(figures, figures.cases()[0])
    assert "peak MB" in text
    assert "44.8 |" in text


def test_targets_are_judged() -> None:
    r = results(records=[record(), record(DEFAULT), record(objective="dkpp", ms=17.0)])
    text = tables.target_table(r)
    row = next(line for line in text.splitlines() if "KD [1120, 10000] fp32, random logits, tuned malloc" in line)
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [">= 2.5x", "3.5x", "2.5x", "yes"]
    row = next(line for line in text.splitlines() if "KD [1120, 10000] fp32, random logits, default malloc" in line)
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [">= 5x", "9x", "2.5x", "no"]
    row = next(line for line in text.splitlines() if "times our KD" in line)
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["<= 4x", "", "4.25x", "no"]
    assert tables.NOT_MEASURED in text


def test_every_target_has_one_bound() -> None:
    for device in ("cpu", "cuda"):
        for target in targets.targets(device):
            assert (target.at_least is None) != (target.at_most is None), target.what


def test_no_gpu_no_figure() -> None:
    for text in (tables.front_page([results()]), tables.all_pages([results()])):
        assert tables.NOT_MEASURED in text
        assert "Model X" in text
    assert tables.front_page([]).count(tables.NOT_MEASURED) == 2


def test_a_caption_names_machine_versions_commit_and_what_was_amiss() -> None:
    quiet = tables.caption(results())
    for part in ("Model X, 2 cores", "torch 9.9", "commit 0123456789", "2025-01-02"):
        assert part in quiet
    assert "triton" not in quiet
    assert "modif" not in quiet
    assert "Preliminary" not in quiet
    busy = tables.caption(results(load_at_start=3.0, source={"commit": "0123456789abcdef", "dirty": True}))
    assert "with modifications" in busy
    assert "Preliminary" in busy


def test_the_newest_of_every_machine_is_taken(tmp_path: Path) -> None:
    for number, each in enumerate((results(), results(date="2025-02-01"), results("cuda", "2024-01-01"))):
        (tmp_path / f"{number}.json").write_text(json.dumps(each))
    assert [(r["device"], r["date"]) for r in tables.load(tmp_path)] == [("cpu", "2025-02-01"), ("cuda", "2024-01-01")]


def test_only_what_is_between_the_markers_changes(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    assert tables.rewrite(page, "new")
    assert page.read_text() == f"before\n{tables.BEGIN}\n\nnew\n\n{tables.END}\nafter\n"
    assert tables.rewrite(page, "new")
    page.write_text("no markers")
    assert not tables.rewrite(page, "new")
    assert page.read_text() == "no markers"
    assert not tables.rewrite(tmp_path / "missing.md", "new")


def test_one_file_a_machine_and_commit() -> None:
    assert machine.file_name(results()) == "model-x-2-cores-0123456789.json"
    assert machine.file_name(results("cuda")) == "card-y-0123456789.json"
    changed = results(source={"commit": "0123456789abcdef", "dirty": True})
    assert machine.file_name(changed) == "model-x-2-cores-0123456789-modified.json"


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_the_tables_in_the_repository_are_those_of_its_results(name: str, tmp_path: Path) -> None:
    """No figure is typed by hand, and none outlives its results file."""
    page = ROOT / name
    found = tables.load(ROOT / "benchmarks" / "results")
    text = tables.front_page(found) if name == "README.md" else tables.all_pages(found)
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text())
    if not tables.rewrite(copy, text):
        assert name == "README.md", "benchmarks/README.md has lost its markers"
        pytest.skip("README.md has no benchmark tables")
    assert copy.read_text() == page.read_text(), "run: python -m benchmarks.report --tables"
