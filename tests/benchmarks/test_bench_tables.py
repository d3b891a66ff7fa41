"""Tables come from results files and from nothing else."""

import json
from pathlib import Path

import pytest
from bench_records import entry, record, results

from benchmarks import cuda, machine, tables, targets
from benchmarks.figures import Figures, best, gb_s, ours, ratio, share
from benchmarks.session import DEFAULT

ROOT = Path(__file__).resolve().parents[2]


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


def test_peak_memory_and_kernels_are_columns_on_a_gpu() -> None:
    r = record(cuda.PLAIN)
    r["providers"]["ban_fast native"]["time"] |= {"peak_bytes": 44.8e6, "kernels": 1.0, "kernel_ms": 0.0123}
    figures = Figures([r])
    text = tables.case_table(figures, figures.cases()[0])
    assert "peak MB" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| ban_fast native")]
    assert [cell.strip() for cell in line.split("|")[-3:-1]] == ["44.8", "1, 0.0123 ms"]
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


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


def test_a_results_file_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results(records=[record(), record(DEFAULT)])))
    assert targets.main([str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(targets.targets("cpu"))
    tuned = "KD [1120, 10000] fp32, random logits, tuned malloc: against the best torch.compile"
    assert f"yes  {tuned}: 2.5x (asked >= 2.5x, goal 3.5x)" in lines
    assert f" no  {tuned.replace('tuned', 'default')}: 2.5x (asked >= 5x, goal 9x)" in lines
    assert f"  -  {tuned.replace('random', 'near')}: not measured yet (asked >= 2.5x, goal 3.5x)" in lines
    assert targets.main([]) == 2


def test_all_targets_met_is_status_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results()))
    found = targets.targets("cpu")
    monkeypatch.setattr(
        targets, "targets", lambda device: [each for each in found if "random logits, tuned" in each.what][:1]
    )
    assert targets.main([str(file)]) == 0


def test_our_fastest_is_judged_and_named_where_auto_follows_no_table() -> None:
    """And what "auto" comes to stands beside it."""
    case = {"objective": "kd", "rows": 128, "classes": 100, "dtype": "fp32", "regime": "random"}
    r = record(cuda.PLAIN, ms=0.01, case=case, automatic="ban_fast triton", auto_measured=False)
    r["providers"]["ban_fast triton"] = entry("ban_fast", 0.02)
    r["providers"]["eager kl_div"] = entry("eager", 0.08)
    r["providers"]["eager soft-CE"] = entry("eager", 0.09)
    assert (ours(r), ratio(r, ("eager",))) == (0.01, 8)
    text = tables.target_table(results("cuda", records=[r]))
    row = next(line for line in text.splitlines() if "against the fastest eager form" in line and "[128" in line)
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [">= 6x", "", "8x (native; auto: 4x)", "yes"]
    assert "takes triton. After `python -m benchmarks.dispatch` it follows the fastest." in text
    assert "0.01 (native)" in tables.summary(Figures([r]), Figures([r]).cases())
    r["providers"]["ban_fast native"]["time"] = None  # refused by the gate, say
    assert "4x (triton)" in tables.target_table(results("cuda", records=[r]))
    measured = tables.target_table(results("cuda", records=[r | {"auto_measured": True}]))
    assert "triton)" not in measured
    assert "benchmarks.dispatch" not in measured


def test_near_logits_are_judged_like_random_ones() -> None:
    asked = [target.what for target in targets.targets("cpu") if "against" in target.what]
    near = [what for what in asked if "near logits" in what]
    assert [what.replace("near", "random") for what in near] == [what for what in asked if "random logits" in what]
    assert {what.split(" [")[0] for what in near} == {"KD", "CWTM", "DKPP"}


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
    assert "cut short" not in quiet
    assert "cut short" in tables.caption(results(complete=False))
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
