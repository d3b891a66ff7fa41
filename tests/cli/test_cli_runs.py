"""Runs through the command, in this process: what they print, what repeats them, and what damage is told as."""

import json
import shutil
from pathlib import Path

import pytest
from cli_calls import SMALL, Call, tree

from ban_fast import recipes
from ban_fast.cli import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a teacher and a student; the tests copy it before they damage it."""
    run = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *SMALL, "--out", str(run)]) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def stopped(run: Path) -> Path:
    """The same run as if it had been killed while the student was in training."""
    results = json.loads((run / "results.json").read_text())
    results["generations"], results["ensembles"] = results["generations"][:1], []
    (run / "results.json").write_text(json.dumps(results))
    return run


def test_a_run_ends_in_a_table(call: Call, tmp_path: Path) -> None:
    said = call("train", *SMALL, "--out", "run")
    assert (said.status, said.err) == (0, "")
    for words in ("teacher", "BAN-1", "scaled down: 128 training images, 64 test images", "64 test images: one is 1.6"):
        assert words in said.out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "environment.json",
        "results.json",
        "generation-0",
        "generation-1",
    }
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"] == "demo"


def test_a_run_without_a_name_goes_to_runs(call: Call, tmp_path: Path) -> None:
    assert call("train", *SMALL, "--generations", "0").status == 0
    (directory,) = (tmp_path / "runs").iterdir()
    assert directory.name.startswith("demo-2")
    assert call("train", *SMALL, "--generations", "0").status == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_recipe_of_a_file_is_no_path(call: Call, tmp_path: Path) -> None:
    stored = recipes.get("demo").to_dict() | {"recipe": "../../up\n"}
    (tmp_path / "c.json").write_text(json.dumps(stored))
    assert call("train", "--config", "c.json", *SMALL).status == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("_.._up_-")


def test_resuming_a_finished_run_prints_its_table_and_changes_nothing(call: Call, run: Path) -> None:
    before = tree(run)
    said = call("train", "--resume", "--out", run)
    assert (said.status, said.err) == (0, "")
    assert "BAN-1" in said.out
    assert tree(run) == before
    call("train", *SMALL, "--resume", "--out", run)
    assert tree(run) == before


def test_a_run_directory_is_not_used_twice(call: Call, run: Path) -> None:
    before = tree(run)
    call("train", *SMALL, "--out", run).mistake("holds a run already", "--resume")
    assert tree(run) == before


def test_a_configuration_repeats_its_run(call: Call, run: Path, tmp_path: Path) -> None:
    assert call("train", "--config", run / "config.json", "--out", "again").status == 0
    for name in ("config.json", "generation-0/model.safetensors", "generation-1/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes(), name


def test_flags_must_agree_with_the_run_resumed(call: Call, stopped: Path) -> None:
    before = tree(stopped)
    line = call("train", "--resume", "--out", stopped, "--batch-size", "32").mistake("--batch-size is 32, but 64 in")
    assert "--out" in line
    assert tree(stopped) == before


def test_evaluate_prints_the_same_figures(call: Call, run: Path) -> None:
    before = tree(run)
    evaluated = call("evaluate", run)
    assert (evaluated.status, evaluated.err) == (0, "")
    assert tree(run) == before
    assert evaluated.out == "".join(call("report", run).out.splitlines(keepends=True)[:-3])


def test_evaluate_adds_any_ensemble(call: Call, run: Path) -> None:
    shown = call("evaluate", run, "--members", "0,1").out
    assert shown.count("teacher+BAN-1") == 2
    assert "unfinished" not in shown
    assert "teacher+BAN-1" not in call("evaluate", run, "--members", "1").out
    call("evaluate", run, "--members", "0,7").mistake("members must be finished generations, 0..1 here, got 7")


def test_report_writes_plots_and_names_them(call: Call, run: Path, tmp_path: Path) -> None:
    said = call("report", run)
    assert (said.status, said.err) == (0, "")
    paths = [Path(line) for line in said.out.splitlines()[-3:]]
    assert [path.parent for path in paths] == [run / "report"] * 3
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert call("report", run, "--out", "elsewhere").status == 0
    assert len(list((tmp_path / "elsewhere").iterdir())) == 3


def test_report_of_an_unfinished_run(call: Call, stopped: Path) -> None:
    said = call("report", stopped)
    assert (said.status, said.err) == (0, "")
    assert "unfinished: 1 of 2 generations" in said.out


def test_a_loss_that_is_not_finite(call: Call) -> None:
    said = call("train", *SMALL, "--lr", "1e30", "--epochs", "20", "--out", "run")
    assert said.status == 2
    said.line("not finite in generation 0", "--lr")


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("results.json", "report"),
        ("results.json", "evaluate"),
        ("results.json", "resume"),
        ("environment.json", "resume"),
        ("generation-1/state.pt", "resume"),
        ("generation-0/model.safetensors", "resume"),
        ("generation-1/model.safetensors", "evaluate"),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_file_cut_short(call: Call, stopped: Path, run: Path, file: str, command: str, share: float) -> None:
    if command == "evaluate" and file.startswith("generation-1"):
        results = json.loads((stopped / "results.json").read_text())
        results["generations"].append({**results["generations"][0], "generation": 1})
        results["generations"][1].pop("model_sha256", None)
        (stopped / "results.json").write_text(json.dumps(results))
    whole = (stopped / file).read_bytes()
    (stopped / file).write_bytes(whole[: int(len(whole) * share)])
    before = tree(stopped)
    arguments = {"resume": ["train", "--resume", "--out"]}.get(command, [command])
    said = call(*arguments, stopped)
    assert said.status == 2, said
    said.line(file.rpartition("/")[2])
    assert tree(stopped) == before


def test_a_metrics_file_that_is_damaged(call: Call, run: Path) -> None:
    (run / "generation-0" / "metrics.jsonl").write_text('{"epoch": 1,\n{"epoch": 2}\n')
    assert call("report", run).status == 2


def test_a_checkpoint_of_another_configuration(call: Call, stopped: Path, tmp_path: Path) -> None:
    assert call("train", *SMALL, "--seed", "7", "--out", "other").status == 0
    shutil.copy(tmp_path / "other" / "generation-1" / "state.pt", stopped / "generation-1" / "state.pt")
    before = tree(stopped)
    said = call("train", "--resume", "--out", stopped)
    assert said.status == 2
    said.line("state.pt is a checkpoint of another configuration")
    assert tree(stopped) == before


def test_a_failure_of_ours_has_status_1(call: Call, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **more: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("ban_fast.training.evaluate_run", broken)
    said = call("evaluate", run)
    assert said.status == 1
    said.only_line("internal error: ZeroDivisionError: division by zero", "BAN_FAST_DEBUG=1 shows the traceback")
    monkeypatch.setenv("BAN_FAST_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        call("evaluate", run)


def test_our_warnings_are_a_line_and_those_of_libraries_none(
    call: Call, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import warnings

    from ban_fast import training

    evaluate_run = training.evaluate_run

    def warning(*arguments: object, **more: object) -> object:
        warnings.warn_explicit("a library's", UserWarning, "/usr/lib/library.py", 1)
        warnings.warn_explicit("ours\nin two lines", UserWarning, training.__file__, 1)
        return evaluate_run(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("ban_fast.training.evaluate_run", warning)
    said = call("evaluate", run)
    assert said.status == 0
    assert said.err == "ban-fast: warning: ours in two lines\n"


def test_students_side_by_side(call: Call, tmp_path: Path) -> None:
    """A table for each, below one directory; each is a run of its own, and all are resumed, evaluated and reported."""
    said = call("train", *SMALL, "--students", "ban,ban+l", "--out", "run")
    assert (said.status, said.err) == (0, "")
    assert "2 generations of 4 steps, ban and ban+l side by side" in said.out
    for words in ("BAN-1 (ban+l) test error", ", BAN, seed 0: run/ban\n", ", BAN+L, seed 0: run/ban_l\n"):
        assert words in said.out
    before = tree(tmp_path)
    again = call("train", "--out", "run", "--resume")
    assert (again.status, again.err) == (0, "")
    assert tree(tmp_path) == before
    assert call("train", *SMALL, "--objective", "ban+l", "--out", "alone").status == 0
    for name in ("config.json", "generation-0/model.safetensors", "generation-1/model.safetensors"):
        assert (tmp_path / "run" / "ban_l" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    evaluated = call("evaluate", "run")
    assert (evaluated.status, evaluated.err) == (0, "")
    assert evaluated.out == call("evaluate", "run/ban").out + call("evaluate", "run/ban_l").out
    plots = [Path(line) for line in call("report", "run").out.splitlines() if line.endswith(".png")]
    assert [path.parent for path in plots] == [Path("run/ban/report")] * 3 + [Path("run/ban_l/report")] * 3
    assert call("report", "run", "--out", "elsewhere").status == 0
    assert len(list((tmp_path / "elsewhere").glob("*/*.png"))) == 6


def test_a_teacher_that_is_kept_is_said_and_shared(call: Call, tmp_path: Path) -> None:
    kept = ("--epochs", "20", "--teacher", "cache", "--cache-dir", "caches")
    said = call("train", *SMALL, *kept, "--out", "a")
    assert (said.status, said.err) == (0, "")
    assert "BAN-1    teacher cache: 20 epochs show" in said.out
    assert f"in {tmp_path / 'caches'}" in said.out
    assert call("train", *SMALL, *kept, "--objective", "dkpp", "--out", "b").status == 0
    records = [json.loads((tmp_path / run / "results.json").read_text())["generations"][1] for run in ("a", "b")]
    assert records[0]["teacher"]["forward_images"] > records[1]["teacher"]["forward_images"] == 0
    (folder,) = (tmp_path / "caches").iterdir()
    (folder / "cache.json").write_text("{}")
    said = call("train", *SMALL, *kept, "--objective", "ban+l", "--out", "c")
    assert said.status == 2
    said.line("is the cache of another format", "delete the directory", "--cache-dir")
