"""A process that has torch in memory and raises children by fork, to be killed. It trains nothing itself.

`python nursery.py MODE DIRECTORY` prints one JSON line; `test_training_kill.py` reads it. Each child is a process of
its own, with one thread, that runs `ban_fast.training.run` to its end, is killed with SIGKILL by this one at some
moment, or kills itself in the same way just before its nth operation on a file.
"""

import functools
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_runs import Recorder, config, own
from text_runs import text_config, write_text

from ban_fast.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TeacherConfig
from ban_fast.training import run, run_together


def child(work: Callable[..., None], *arguments: Any) -> int:
    """The id of a new process that does `work(*arguments)` and exits."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        work(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def outcome(pid: int) -> int:
    """0 for a child that came to its end, -9 for one that was killed."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a child failed with {code}")
    return code


class Reined(Recorder):
    """Writes a byte for each step, and makes no more than so many of them: then it waits, to be killed."""

    def __init__(self, tell: int, most: int) -> None:
        super().__init__()
        self._tell, self._most = tell, most

    def step(self, generation: int, done_steps: int) -> None:
        super().step(generation, done_steps)
        os.write(self._tell, b".")
        while self.steps.total() == self._most:
            signal.pause()


def session(
    settings: Config, path: Path, arguments: dict[str, Any], log: Path, observer: Recorder | None = None
) -> None:
    """One try at the run: begin it, or go on with it. Its count of steps goes to `log`, if it lives that long."""
    observer = observer or Recorder()
    train = run_together if settings.students else run
    train(settings, out=path, resume=(path / "config.json").exists(), observer=observer, **arguments)
    done = sum(done for _, _, _, done in observer.started)
    skipped = observer.plan.finished * observer.plan.steps if observer.plan else 0
    log.write_text(json.dumps({"steps": observer.steps.total(), "done": done + skipped}))


def killed_at_random(settings: Config, arguments: dict[str, Any], directory: Path, kills: int, seed: int) -> None:
    """Kill a run `kills` times, each a random while after a random number of steps, with a checkpoint after each.

    All of them together may not make the steps of the whole run: so each is killed at work, however late that is.
    """
    log, path = directory / "log.json", directory / "killed"
    begin = time.monotonic()
    assert outcome(child(session, settings, directory / "whole", arguments, log)) == 0
    whole = time.monotonic() - begin
    total = json.loads(log.read_text())["steps"]
    most, draw = (total - 1) // kills, random.Random(seed)
    for _ in range(kills):
        told, tell = os.pipe()
        pid = child(session, settings, path, arguments, log, Reined(tell, most))
        os.close(tell)
        for _ in range(draw.randint(0, most)):
            os.read(told, 1)
        time.sleep(draw.uniform(0, whole / (3 * kills)))
        os.kill(pid, signal.SIGKILL)
        assert outcome(pid) == -signal.SIGKILL
        os.close(told)
    log.unlink()
    assert outcome(child(session, settings, path, arguments, log)) == 0
    print(json.dumps({"total": total, "last": json.loads(log.read_text())}))


def killed_at_each_operation(directory: Path, settings: Config) -> None:
    """Kill a run before its first operation on a file, its second, ... until one comes to its end unharmed."""
    log = directory / "log.json"
    assert outcome(child(session, settings, directory / "whole", own(), log)) == 0
    nth = 0
    while True:
        nth += 1
        path = directory / str(nth)
        if outcome(child(session_killed_before, nth, settings, path, log)) == 0:
            break
        assert outcome(child(session, settings, path, own(), log)) == 0
    print(json.dumps({"operations": nth - 1}))


def session_killed_before(nth: int, settings: Config, path: Path, log: Path) -> None:
    count = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate") and writes:
            if not str(arguments[0]).startswith(str(path.parent)):
                return
            count += 1
            if count == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync, pwrite, ftruncate = os.fsync, os.pwrite, os.ftruncate  # those that raise no audit event

    def watched(operation: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth:
            if operation is pwrite:  # in its midst
                pwrite(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*arguments)

    os.fsync, os.pwrite = functools.partial(watched, fsync), functools.partial(watched, pwrite)
    os.ftruncate = functools.partial(watched, ftruncate)
    sys.addaudithook(audit)
    session(settings, path, own(), log)


def wide_resnet() -> Config:
    """A network with dropout on real images."""
    return Config(
        data=DataConfig(name="digits", limit_train=160, limit_test=64),
        model=ModelConfig(name="wrn-10-1", options={"dropout": 0.3}),
        objective=ObjectiveConfig(name="dkpp"),
        optimizer=OptimizerConfig(lr=0.05),
        generations=2,
        epochs=6,
        batch_size=32,
        device="cpu",
        checkpoint_seconds=0.0,
    )


def main() -> None:
    importlib.import_module("torch._dynamo")  # the first optimizer of a process does, for seconds: children inherit it
    mode, directory = sys.argv[1], Path(sys.argv[2])
    kept = TeacherConfig(mode="cache")
    if mode == "operations":
        killed_at_each_operation(directory, config(epochs=1, max_steps=1, checkpoint_seconds=0.0))
    elif mode == "cache-operations":
        killed_at_each_operation(directory, config(generations=1, epochs=2, checkpoint_seconds=1e9, teacher=kept))
    elif mode == "together-operations":
        settings = config(students=("cwtm", "label"), generations=1, epochs=1, max_steps=1, checkpoint_seconds=0.0)
        killed_at_each_operation(directory, settings)
    elif mode == "cache":
        settings = config(epochs=8, checkpoint_seconds=0.0, teacher=kept)
        killed_at_random(settings, own(), directory, kills=6, seed=3)
    elif mode == "together":
        settings = config(students=("ban", "dkpp", "cwtm"), epochs=4, checkpoint_seconds=0.0)
        killed_at_random(settings, own(), directory, kills=6, seed=4)
    elif mode == "small":
        killed_at_random(config(epochs=8, checkpoint_seconds=0.0), own(), directory, kills=6, seed=1)
    elif mode in ("text", "text-cache", "text-together"):
        corpus = write_text(directory / "corpus", lines=40)
        changes: dict[str, Any] = {"teacher": TeacherConfig(mode="cache" if mode == "text-cache" else "live")}
        if mode == "text-together":
            changes |= {"students": ("ban+l", "dkpp"), "epochs": 2}
        killed_at_random(text_config(corpus, checkpoint_seconds=0.0, **changes), {}, directory, kills=6, seed=5)
    elif mode == "wide-resnet":
        killed_at_random(wide_resnet(), {}, directory, kills=8, seed=2)
    else:
        raise SystemExit(f"unknown mode {mode}")


if __name__ == "__main__":
    main()
