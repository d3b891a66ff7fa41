"""`ban-fast sweep`: its mistakes, what it leaves, signals, and going on."""

import json
import os
import signal
from pathlib import Path

import pytest
from cli_calls import SMALL, Call, Start, await_there, finish, tree

from ban_fast.config import Config
from ban_fast.studies import Study

HELD = """
import os, threading, time
from pathlib import Path
from torch import nn

class Held(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

    def forward(self, x):
        if "HOLD" in os.environ and self.training and any(Path().glob("*/*/generation-1/state.pt")):
            Path("held").touch()
            while threading.active_count() > 1:
                time.sleep(0.01)
        return self.layers(x)
"""
"""With HOLD set, students say so and wait, when one has a checkpoint, as long as the thread is there that hears of the
end: it may be over already."""


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (["--vary", "objectiv=ban"], ["--vary: unknown key 'objectiv'; did you mean 'objective'?"]),
        (["--vary", "momentum=0.5"], ["--vary: unknown key 'momentum'; did you mean 'optimizer.momentum'?"]),
        (["--vary", "students=ban"], ["--vary: unknown key 'students'"]),
        (["--vary", "lr"], ["--vary must be KEY=VALUE,VALUE,... (lr=0.1,0.05 for example), got 'lr'"]),
        (["--vary", "lr="], ["--vary lr: a value is missing"]),
        (["--vary", "lr=0.1,fast"], ["--vary lr: must be a number, got 'fast'"]),
        (["--vary", "lr=0.1,0.1"], ["--vary lr: 0.1 is given twice; leave one of them out"]),
        (["--vary", "lr=-1"], ["--lr must be a finite number above 0, got -1.0"]),
        (["--vary", "lr=1", "--vary", "lr=2"], ["--vary lr is given twice; write all its values in one"]),
        (["--vary", "lr=1", "--vary", "optimizer.lr=2"], ["--vary optimizer.lr is given twice"]),
        (["--vary", "lr=1", "--lr", "2"], ["--lr and --vary lr each set optimizer.lr; leave one of them out"]),
        (["--vary", "batch-size=8", "--batch-size", "9"], ["--batch-size and --vary batch-size each set batch_size"]),
        (["--vary", "data.augmentation=auto,mixup"], ["data.augmentation: mixup changes an image in endless ways"]),
        (["--vary", "objective=ban,bam"], ["--objective: unknown value 'bam'; did you mean 'ban'?"]),
        (["--vary", "objective=ban,cwtm", "--label-weight", "1"], ["--label-weight: is for none of ban, cwtm"]),
        (["--vary", "lr_decay=0.1,0.5"], ["--lr-decay: is for schedules step and plateau; leave it out"]),
        (
            ["--vary", "schedule=cosine,onecycle", "--lr-decay", "0.5"],
            ["--lr-decay: is for schedules step and plateau; leave it out"],
        ),
        (
            ["--paper", "3", "--schedule", "cosine", "--lr-decay", "0.5"],
            ["--lr-decay: is for schedules step and plateau; leave it out"],
        ),
        (["--vary", "recipe=demo,nope"], ["--recipe: unknown recipe 'nope'"]),
        (["--vary", "recipe=demo", "--recipe", "demo"], ["--recipe and --vary recipe each set recipe"]),
        (["--seeds", "0,x"], ["--seeds: must be a whole number, got 'x'"]),
        (["--seeds", "0-3,2"], ["--seeds: 2 is given twice"]),
        (["--seeds", "5-3"], ["--seeds: 5-3 must be FIRST-LAST, from 1 to 10,000 seeds"]),
        (["--seeds", "0-999999999"], ["--seeds: 0-999999999 must be FIRST-LAST"]),
        (["--seeds", "1", "--vary", "seed=2"], ["--seeds and --vary seed each list seeds"]),
        (["--seed", "1"], ["unknown option --seed; did you mean '--seeds'?"]),
        (["--workers", "0"], ["--workers must be at least 1, got 0"]),
        (["--cpus-per-run", "0"], ["--cpus-per-run must be a number above 0, got 0.0"]),
        (["--retries", "-1"], ["--retries must be at least 0, got -1"]),
        (["--engine", "slurm"], ["--engine must be one of auto, local, ray, got 'slurm'"]),
        (["--paper", "4"], ["the paper's table 4 can't be made of runs here"]),
        (
            ["--paper", "2", "--objective", "ban"],
            ["--objective: --paper says that for each run; leave one of them out"],
        ),
        (["--paper", "2", "--vary", "lr=1,2"], ["--vary: --paper says that for each run"]),
        (["--paper", "3", "--epochs", "0"], ["--epochs must be at least 1, got 0"]),
        (["--resume"], ["--resume needs --out DIR"]),
        (
            ["--resume", "--out", "nothing"],
            ["there is no study in", "nothing (no study.json); start one without --resume"],
        ),
    ],
)
def test_mistakes_are_one_line_and_touch_no_file(
    call: Call, tmp_path: Path, args: list[str], fragments: list[str]
) -> None:
    call("sweep", *args).mistake(*fragments)
    assert tree(tmp_path) == {}


def test_a_directory_that_is_taken(call: Call, tmp_path: Path) -> None:
    axes = {"optimizer.lr": [0.1, 0.2]}
    (tmp_path / "study").mkdir()
    base = Config(epochs=3)
    Study.vary(base, axes).save(tmp_path / "study")
    (tmp_path / "family.json").write_text(json.dumps(Config(students=("ban", "cwtm")).to_dict()))
    before = tree(tmp_path)
    call("sweep", "--out", "study").mistake("study holds a study already: continue it with --resume, or choose another")
    call("sweep", "--out", "study", "--resume", "--vary", "lr=0.1,0.2", "--epochs", "4").mistake(
        "is ", "in lr=0.1,seed=0 of the study in", "leave those flags out, or start another study"
    )
    call("sweep", "--out", "study", "--resume", "--vary", "lr=0.3").mistake("lr=0.3,seed=0 is not among the runs")
    call("sweep", "--config", "family.json").mistake("a study's runs have one objective each")
    call("report", "study", "--out", "plots").mistake("--out: study is a study, which has a table and no plots")
    assert tree(tmp_path) == before


def test_a_sweep_leaves_runs_and_one_table(call: Call, tmp_path: Path) -> None:
    """One line a run, the table, status 0; report prints that table again; nothing is left to do."""
    said = call("sweep", *SMALL, "--generations", "0", "--seeds", "0,3", "--workers", "2", "--out", "study")
    assert (said.status, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0] == "2 runs, in study"
    assert sorted(line.partition(" ")[2].partition(":")[0] for line in lines[1:3]) == ["seed=0", "seed=3"]
    assert [line.partition(" ")[0] for line in lines[1:3]] == ["[1/2]", "[2/2]"]
    table = said.out.partition("\n" + lines[2] + "\n")[2]
    assert table.startswith("digits, mlp-8, 2 runs, 2 seeds: study")
    again = call("report", "study")
    assert (again.status, again.err, again.out) == (0, "", table)
    before = tree(tmp_path)
    for flags in ((), (*SMALL, "--generations", "0", "--seeds", "0,3")):
        said = call("sweep", "--resume", "--out", "study", *flags)
        assert (said.status, said.err) == (0, "")
        assert said.out == f"2 runs, in study; 2 done before\n{table}"
        assert tree(tmp_path) == before


@pytest.mark.slow
def test_a_terminals_interrupt_saves_all(start: Start, tmp_path: Path) -> None:
    """SIGINT for the whole process group, as a terminal sends it: every run saves itself, and goes on later."""
    (tmp_path / "held.py").write_text(HELD)
    flags = ("--model", "held:Held", "--generations", "1", "--max-steps", "20")
    vary = ("--vary", "objective=ban,cwtm", "--vary", "checkpoint_seconds=0.0", "--workers", "2")
    process = start("sweep", *flags, *vary, "--out", "a study", start_new_session=True, env={"HOLD": "1"})
    run = tmp_path / "a study" / "objective=ban,checkpoint_seconds=0.0,seed=0"
    await_there(tmp_path / "held", process)  # by whichever student was the first
    os.killpg(process.pid, signal.SIGINT)
    said = finish(process)
    assert said.status == 130, said
    said.line("stopped by SIGINT with 1 of 3 runs done: all is saved; ", "`ban-fast sweep --out 'a study' --resume`")
    assert not (run / "generation-1" / "model.safetensors").exists()
    resumed = finish(start("sweep", "--out", "a study", "--resume"))
    assert (resumed.status, resumed.err) == (0, ""), resumed
    assert "3 runs, 1 of them for a teacher that several share, in a study; 1 done before" in resumed.out
    whole = finish(start("train", *flags, "--objective", "ban", "--out", "whole"))
    assert whole.status == 0
    for generation in ("generation-0", "generation-1"):
        weights = (tmp_path / "whole" / generation / "model.safetensors").read_bytes()
        assert (run / generation / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_run_that_fails_is_one_line_and_status_1(start: Start, tmp_path: Path) -> None:
    said = finish(start("sweep", *SMALL[2:], "--vary", "model=mlp-8,mlp-0", "--generations", "0", "--out", "study"))
    assert said.status == 1
    said.line("1 of 2 runs failed; continue with `ban-fast sweep --out study --resume`")
    assert "model=mlp-0,seed=0: failed: " in said.out
    assert "unfinished: 1 of 2 runs" in said.out
    assert (tmp_path / "study" / "model=mlp-8,seed=0" / "results.json").exists()


@pytest.mark.slow
def test_texts_have_perplexities(call: Call, tmp_path: Path) -> None:
    """A sweep of language models: the same flags as train's, and the table's figures are results.json's."""
    (tmp_path / "words").mkdir()
    for split, lines in (("train", 40), ("valid", 12), ("test", 15)):
        (tmp_path / "words" / f"{split}.txt").write_text("the cat sat on a mat\nand a dog\n" * lines)
    small = ("--model", "lstm-8", "--batch-size", "4", "--window", "5", "--epochs", "1", "--generations", "1")
    said = call("sweep", "--data", "words", *small, "--seeds", "0,1", "--workers", "2", "--out", "study")
    assert (said.status, said.err) == (0, "")
    results = [json.loads((tmp_path / "study" / f"seed={seed}" / "results.json").read_text()) for seed in (0, 1)]
    tests = [run["generations"][1]["test"] for run in results]
    lines = said.out.splitlines()
    heading, student = (next(line for line in lines if word in line) for word in ("vs teacher", "BAN-1 "))
    assert heading.split() == ["n", "perplexity", "vs", "teacher", "NLL"]
    mean = sum(test["perplexity"] for test in tests) / 2
    assert student.split()[:3] == ["BAN-1", "2", f"{mean:.2f}"]
