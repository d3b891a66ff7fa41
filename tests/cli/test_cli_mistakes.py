"""Whatever a user gets wrong is one line that names it and the remedy, status 2, and no file is touched."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_calls import Call, tree

from ban_fast import recipes
from ban_fast.cli import failures, flags
from ban_fast.config import Config, ModelConfig
from ban_fast.models import create
from ban_fast.training.reader import Forward

# Arguments, and what the line must say.
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "command": (["trian"], ["unknown command 'trian'; did you mean 'train'?"]),
    "option": (
        ["train", "--epoch", "3"],
        ["unknown option --epoch; did you mean '--epochs'?", "ban-fast train --help"],
    ),
    "short option": (["train", "-e"], ["unknown option -e"]),
    "option of the whole": (["--verson"], ["unknown option --verson; did you mean '--version'?"]),
    "value missing": (["train", "--lr"], ["--lr", "requires an argument"]),
    "value of a switch": (["train", "--resume=yes"], ["--resume"]),
    "extra argument": (["train", "digits"], ["unexpected extra argument", "digits"]),
    "argument missing": (["evaluate"], ["RUN is missing", "ban-fast evaluate --help"]),
    "not a whole number": (["train", "--epochs", "2.5"], ["--epochs must be a whole number, got '2.5'"]),
    "not a number": (["train", "--lr", "fast"], ["--lr must be a number, got 'fast'"]),
    "batch size 0": (["train", "--batch-size", "0"], ["--batch-size must be at least 1, got 0"]),
    "micro-batch 0": (["train", "--micro-batch-size", "0"], ["--micro-batch-size must be at least 1, got 0"]),
    "micro-batch too large": (
        ["train", "--batch-size", "8", "--micro-batch-size", "9"],
        ["--micro-batch-size must be at most the batch size, 8, got 9"],
    ),
    "negative epochs": (["train", "--epochs", "-1"], ["--epochs must be at least 1, got -1"]),
    "negative generations": (["train", "--generations", "-1"], ["--generations must be at least 0, got -1"]),
    "max steps 0": (["train", "--max-steps", "0"], ["--max-steps must be at least 1"]),
    "limit 0": (["train", "--limit-train", "0"], ["--limit-train must be at least 1"]),
    "image size": (["train", "--image-size", "0"], ["--image-size must be at least 1"]),
    "seed": (["train", "--seed", "-4"], ["--seed must be at least 0"]),
    "lr 0": (["train", "--lr", "0"], ["--lr must be a finite number above 0"]),
    "lr nan": (["train", "--lr", "nan"], ["--lr must be a finite number"]),
    "lr inf": (["train", "--lr", "inf"], ["--lr must be a finite number"]),
    "weight decay": (["train", "--weight-decay", "-1"], ["--weight-decay must be a finite number of at least 0"]),
    "temperature": (["train", "--temperature", "0"], ["--temperature must be a finite number above 0"]),
    "val fraction": (["train", "--val-fraction", "1"], ["--val-fraction must be in [0, 1), got 1.0"]),
    "recipe": (["train", "--recipe", "cifar"], ["--recipe: unknown recipe 'cifar'; did you mean 'cifar1"]),
    "objective": (["train", "--objective", "bann"], ["--objective: unknown value 'bann'; did you mean 'ban'?"]),
    "schedule": (["train", "--schedule", "cosin"], ["--schedule: unknown value 'cosin'; did you mean 'cosine'?"]),
    "factor of a schedule without": (
        ["train", "--lr-decay", "0.5"],
        ["--lr-decay: is for schedules step and plateau; leave it out"],
    ),
    "cache of no teacher": (
        ["train", "--objective", "label", "--teacher", "cache"],
        ["--teacher: objective 'label' has no teacher; leave it out"],
    ),
    "place of no teacher's cache": (
        ["train", "--students", "label", "--cache-dir", "x"],
        ["--cache-dir: objective 'label' has no teacher; leave it out"],
    ),
    "device": (["train", "--device", "gpu"], ["--device: unknown value 'gpu'"]),
    "amp": (["train", "--amp", "fp8"], ["--amp: unknown value 'fp8'; did you mean 'fp16'?"]),
    "step": (["train", "--step", "grph"], ["--step: unknown value 'grph'; did you mean 'graph'?"]),
    "graph without a GPU": (
        ["train", "--step", "graph", "--device", "cpu"],
        ["--step: a CUDA graph needs a GPU, and this run is on the CPU; use auto, eager or compile"],
    ),
    "compiled or recorded": (
        ["train", "--compile", "--step", "graph"],
        ["--compile: is step compile, and step is graph; leave one of them out"],
    ),
    "teacher": (["train", "--teacher", "lve"], ["--teacher: unknown value 'lve'; did you mean 'live'?"]),
    "cache dtype": (["train", "--cache-dtype", "fp8"], ["--cache-dtype: unknown value 'fp8'; did you mean 'fp"]),
    "cache of a live teacher": (
        ["train", "--teacher", "live", "--cache-dir", "x"],
        ["--cache-dir: a live teacher has no cache; leave it out"],
    ),
    "dtype of no cache": (
        ["train", "--teacher", "live", "--cache-dtype", "bf16"],
        ["--cache-dtype: a live teacher has no cache; leave it out"],
    ),
    "cache fill": (["train", "--cache-fill", "lay"], ["--cache-fill: unknown value 'lay'; did you mean 'lazy'?"]),
    "filling no cache": (
        ["train", "--teacher", "live", "--cache-fill", "ahead"],
        ["--cache-fill: a live teacher has no cache; leave it out"],
    ),
    "folding": (["train", "--fold-teacher", "of"], ["--fold-teacher: unknown value 'of'; did you mean 'off'?"]),
    "folding nothing": (
        ["train", "--fold-teacher", "on", "--model", "mlp-8"],
        ["--fold-teacher: the teacher can't be folded: it has no batch norm; use auto or off"],
    ),
    "cache in a file": (["train", "--cache-dir", "/dev/null"], ["--cache-dir: /dev/null is not a directory"]),
    "empty cache": (["train", "--cache-dir", ""], ["--cache-dir must not be empty"]),
    "students": (["train", "--students", "ban,bann"], ["--students: unknown value 'bann'; did you mean 'ban'?"]),
    "students with spaces": (["train", "--students", "ban, dkpp"], ["--students: unknown value ' dkpp'"]),
    "students twice": (["train", "--students", "ban,ban"], ["--students must be different objectives, got ban,ban"]),
    "one or several": (
        ["train", "--students", "ban", "--objective", "ban"],
        ["--objective and --students each say what students learn from; leave one of them out"],
    ),
    "weight of no student": (
        ["train", "--students", "dkpp,ban", "--kd-weight", "0"],
        ["--kd-weight", "nothing is left"],
    ),
    "data": (["train", "--data", "cifr10"], ["--data: unknown dataset 'cifr10'", "did you mean 'cifar10'?"]),
    "data not there": (["train", "--data", "cifar100", "--data-dir", "."], ["cifar100", "--data-dir"]),
    "data in a file": (
        ["train", "--data", "cifar10", "--data-dir", "/dev/null"],
        ["cifar10 is not in /dev/null (not a directory); name the one that holds cifar-10-batches-py"],
    ),
    "text in a file": (
        ["train", "--data", "ptb", "--data-dir", "/dev/null"],
        ["ptb is not in /dev/null (not a directory); name the one that holds ptb.train.txt, "],
    ),
    "model": (["train", "--model", "wrnn-28-1"], ["--model: ", "wrnn-28-1", "did you mean"]),
    "model depth": (["train", "--model", "wrn-29-1"], ["--model: ", "depth 29", "6n+4"]),
    "model factory": (["train", "--model", "no_such_module:make"], ["--model: ", "no_such_module"]),
    "model option": (["train", "--model-option", "memory"], ["--model-option must be KEY=VALUE", "got 'memory'"]),
    "model option unknown": (["train", "--model-option", "memry=checkpoint"], ["--model-option: ", "memry"]),
    "model option's value": (
        ["train", "--model", "wrn-10-1", "--model-option", "dropout=2"],
        ["--model-option: ", "dropout must be"],
    ),
    "a name like thousands": (["train", "--model", "timm:x"], ["--model: ", "timm has no network 'x'", " more\n"]),
    "weight of no term": (["train", "--objective", "ban", "--label-weight", "1"], ["--label-weight", "no label term"]),
    "weight 0": (["train", "--objective", "dkpp", "--kd-weight", "0"], ["--kd-weight", "nothing is left"]),
    "empty out": (["train", "--out", ""], ["--out must not be empty"]),
    "empty data": (["train", "--data="], ["--data must not be empty"]),
    "empty run": (["evaluate", ""], ["RUN must not be empty"]),
    "empty report": (["report", "x", "--out", ""], ["--out must not be empty"]),
    "empty dataset": (["prepare", ""], ["DATA must not be empty"]),
    "two bases": (["train", "--recipe", "demo", "--config", "x.json"], ["--config and --recipe"]),
    "config missing": (["train", "--config", "x.json"], ["--config: there is no file x.json"]),
    "config a directory": (["train", "--config", "."], ["--config: . is a directory; name its config.json"]),
    "resume of what": (["train", "--resume"], ["--resume needs --out DIR"]),
    "resume of nothing": (["train", "--resume", "--out", "none"], ["--resume: there is no run in none"]),
    "evaluate nothing": (["evaluate", "none"], ["none is not a run directory"]),
    "report nothing": (["report", "none"], ["none is not a run directory"]),
    "evaluate something else": (["evaluate", "."], [". is not a run directory: it has no config.json"]),
    "report something else": (["report", "."], [". is not a run directory"]),
    "members": (["evaluate", ".", "--members", "1;2"], ["--members must be generations with commas", "got '1;2'"]),
    "prepare": (["prepare", "cifr10"], ["unknown dataset 'cifr10'; did you mean 'cifar10'?"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_and_nothing_written(call: Call, tmp_path: Path, name: str) -> None:
    arguments, fragments = MISTAKES[name]
    call(*arguments).mistake(*fragments)
    assert tree(tmp_path) == {}


def test_a_folder_that_is_no_dataset(call: Call, tmp_path: Path) -> None:
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    before = tree(tmp_path)
    call("train", "--data", "photos").mistake("photos", "train")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def net(num_classes): return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def net(:", "SyntaxError"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    ],
)
def test_a_users_own_network_that_fails(call: Call, tmp_path: Path, code: str, said: str) -> None:
    name = f"own_network_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    call("train", "--model", f"{name}:net").mistake(f"--model: {name}:net fails with", said, "BAN_FAST_DEBUG=1")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("moment", "doing", "said"),
    [
        ("self.training", "raise ValueError('my own mistake\\nand more')", "ValueError: my own mistake and more"),
        ("len(x) == 64", "x.view(7, 7)", "RuntimeError: shape '[7, 7]' is invalid for input of size 4096"),
    ],
)
def test_a_users_own_network_that_fails_later(call: Call, tmp_path: Path, moment: str, doing: str, said: str) -> None:
    """When it is trained, and when it is evaluated."""
    name = f"own_network_{abs(hash(doing))}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\n"
        "class net(torch.nn.Linear):\n"
        "    def __init__(self, num_classes): super().__init__(64, num_classes)\n"
        "    def forward(self, x):\n"
        f"        if {moment}: {doing}\n"
        "        return super().forward(x.flatten(1))\n"
    )
    few = ("--limit-train", "128", "--limit-test", "64", "--batch-size", "32", "--epochs", "1", "--device", "cpu")
    failed = call("train", "--model", f"{name}:net", *few)
    assert failed.status == 2
    failed.line(f"--model: {name}:net fails with {said}; mend it")


def test_an_error_of_the_package_below_a_users_network_is_its_own() -> None:
    def failing() -> None:
        raise ZeroDivisionError

    request = flags.Request(Config(model=ModelConfig(name="mods:net")), given={"model.name"})
    with pytest.raises(ZeroDivisionError) as outside:
        failing()
    assert failures.explain(outside.value, request)[1] == 1
    with pytest.raises(ValueError, match="tokens must be") as inside:
        Forward(create("lstm-8", 5))(torch.zeros(2, 2))
    assert failures.explain(inside.value, request)[0].startswith("internal error: ValueError: tokens must be")


def test_an_unknown_dataset_directory(call: Call, tmp_path: Path) -> None:
    call("train", "--data", "cifar10", "--data-dir", tmp_path / "nowhere").mistake("nowhere")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a configuration in JSON, or is cut short"),
        ('{"format": 1, "epochs": 4', "is not a configuration in JSON, or is cut short"),
        ("[]", "a configuration is a JSON object, got list"),
        ('{"format": 99}', "format 99 is not known"),
        ('{"epoch": 4}', "unknown configuration key 'epoch'; did you mean 'epochs'?"),
        ('{"batch_size": 0}', "batch_size: must be at least 1, got 0"),
        ('{"batch_size": "64"}', "batch_size: must be a whole number, got '64'"),
        ("\ud800", "is not a configuration in JSON"),
        ("[" * 100_000, "is not a configuration in JSON"),
    ],
)
@pytest.mark.parametrize("command", [("train", "--config"), ("evaluate",), ("report",), ("train", "--resume", "--out")])
def test_a_damaged_configuration(
    call: Call, tmp_path: Path, content: str, message: str, command: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    before = tree(tmp_path)
    call(*command, run / "config.json" if command[-1] == "--config" else run).mistake("config.json", message)
    assert tree(tmp_path) == before


def test_a_bad_value_is_named_by_where_it_came_from(call: Call, tmp_path: Path) -> None:
    """A file's own value by its path there; a flag's by the flag, over the same file."""
    (tmp_path / "c.json").write_text(json.dumps(recipes.get("demo").to_dict()))
    call("train", "--config", "c.json", "--data", "cifr10").mistake("--data: unknown dataset 'cifr10'")
    stored = recipes.get("demo").to_dict()
    stored["model"]["name"] = "wrnn-28-1"
    (tmp_path / "d.json").write_text(json.dumps(stored))
    call("train", "--config", "d.json").mistake("model.name in d.json: ", "wrnn-28-1")
    call("train", "--config", "c.json", "--lr", "-1").mistake("--lr must be")


def test_an_output_directory_in_use(call: Call, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.json").write_text(json.dumps(recipes.get("demo").to_dict()))
    (tmp_path / "file").write_text("precious")
    before = tree(tmp_path)
    call("train", "--out", "used").mistake("used holds a run already", "--resume", "--out")
    call("train", "--out", "file").mistake("file is not a directory", "--out")
    call("train", "--out", "file/below").mistake("file")
    assert tree(tmp_path) == before


def test_control_characters_are_not_obeyed(call: Call) -> None:
    line = call("train", "--data", "a\x1b[31m\nb").mistake()
    assert "\x1b" not in line


def test_help_and_version(call: Call) -> None:
    for arguments in ([], ["--help"], ["train", "--help"], ["evaluate", "--help"], ["info", "--help"]):
        said = call(*arguments)
        assert (said.status, said.err) == (0, "")
        assert "Usage: ban-fast" in said.out
    assert call("--version").out.startswith("ban-fast 0.")


def test_help_names_what_each_command_takes(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep has no figures of its own to compute anew."""
    monkeypatch.setenv("COLUMNS", "200")
    assert "sweep" not in call("evaluate", "--help").out
    assert "Directory of a run, or of a sweep." in call("report", "--help").out


def test_every_flag_of_train_is_in_its_help(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = call("train", "--help").out
    names = [name.replace("_", "-") for name in (*flags.FIELDS, "recipe", "config", "model_option", "out", "resume")]
    for flag in names:
        assert f"--{flag} " in shown


def test_help_waits_for_no_torch() -> None:
    """Nor for any other library that takes its time: counted, for a clock would tell of the machine."""
    command = [sys.executable, "-X", "importtime", "-m", "ban_fast", "train", "--help"]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    modules = {line.split("|")[-1].strip() for line in imported.splitlines()}
    assert "typer" in modules
    slow = {"torch", "torchvision", "triton", "numpy", "matplotlib", "PIL", "safetensors", "timm", "ray", "ffcv"}
    assert not modules & slow


def test_info_of_another_place_says_how_to_fill_it(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAN_FAST_DATA", "usual")
    assert "not there; `ban-fast prepare cifar100` downloads it\n" in call("info").out
    said = call("info", "--data-dir", "my data").out
    assert "not there; `ban-fast prepare cifar100 --data-dir 'my data'` downloads it\n" in said


def test_info(call: Call) -> None:
    said = call("info")
    assert (said.status, said.err) == (0, "")
    for word in (
        "torch",
        "numpy",
        "CUDA in _native",
        "cpu",
        "gloo for CPUs",
        "reference on cpu",
        "native on cuda",
        "triton on cpu",
        "auto on cpu ",
        "auto on cuda ",
        "digits",
        "cifar100",
        "timm",
        "ray",
        "ffcv",
    ):
        assert word in said.out


def test_info_says_how_to_get_what_is_missing(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("ray", "timm") else find(name, *rest)
    )
    lines = {line.strip() for line in call("info").out.splitlines()}
    assert {"ray   not installed; `pip install 'ban_fast[ray]'`", "timm  not installed; `pip install timm`"} <= lines
