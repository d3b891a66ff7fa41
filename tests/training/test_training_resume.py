"""A run that was stopped and resumed is the run that was not, to the last bit; and nothing is done twice."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import BATCH, EPOCHS, IMAGES, STEPS, Recorder, StopAt, config, footprint, network, own, samples
from torch.utils.data import DataLoader, TensorDataset

from ban_fast.config import Config
from ban_fast.errors import OptionError, UserError
from ban_fast.evaluation import RunDirectory
from ban_fast.training import Interrupted, run
from ban_fast.training.run_store import RunStore

IN_STUDENT = STEPS + EPOCHS + 2 + 7
"""A question in generation 1: after the teacher's steps and evaluations, two starts, an epoch and two steps more."""


def uninterrupted(settings: Config, path: Path, **arguments: Any) -> dict[str, Any]:
    run(settings, out=path, **arguments)
    return footprint(path)


def questions(settings: Config, path: Path, **arguments: Any) -> int:
    """How often a whole run asks whether to stop."""
    never = StopAt(10**9)
    run(settings, out=path, should_stop=never, **arguments)
    return 10**9 - never.left


def stopped_at_each(settings: Config, path: Path, points: list[int], **arguments: Any) -> Recorder:
    """Stop at each of `points` in its own session, resuming in between; the last session runs to the end."""
    for session, point in enumerate(points):
        with pytest.raises(Interrupted):
            run(settings, out=path, resume=session > 0, should_stop=StopAt(point), **arguments)
    last = Recorder()
    run(settings, out=path, resume=True, observer=last, **arguments)
    return last


@pytest.mark.parametrize("apart", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_at_every_question(tmp_path: Path, apart: int) -> None:
    """Each step, each evaluation batch, each pause between generations; or one in some of them."""
    settings = config(generations=1)
    whole = tmp_path / "whole"
    count = questions(settings, whole, **own())
    assert count > 2 * (STEPS + EPOCHS)
    expected = footprint(whole)
    for point in range(1, count + 1, apart):
        path = tmp_path / str(point)
        stopped_at_each(settings, path, [point], **own())
        assert footprint(path) == expected, f"stopped at question {point}"


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("cwtm", {"amp": "fp16"}),
        ("ban", {"max_steps": 7, "evaluate_every": 2}),
        pytest.param("ban", {}, marks=pytest.mark.slow),
        pytest.param("ban+l", {"amp": "bf16"}, marks=pytest.mark.slow),
        pytest.param("dkpp", {}, marks=pytest.mark.slow),
        pytest.param("label", {"channels_last": True}, marks=pytest.mark.slow),
    ],
)
def test_many_sessions(objective: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Sessions of a few steps each; a second and third resume go on from where the last one stopped."""
    settings = config(objective, **changes)
    expected = uninterrupted(settings, tmp_path / "whole", **own())
    draw = random.Random(f"{objective}{changes}")
    points = [draw.randint(2, 7) for _ in range(4)]
    stopped_at_each(settings, tmp_path / "parts", points, **own())
    assert footprint(tmp_path / "parts") == expected


def test_the_last_session_does_only_what_is_left(tmp_path: Path) -> None:
    settings = config()
    first = Recorder()
    with pytest.raises(Interrupted):
        run(settings, out=tmp_path, observer=first, should_stop=StopAt(IN_STUDENT), **own())
    assert first.steps[0] == STEPS
    done = first.steps[1]
    assert 0 < done < STEPS
    last = Recorder()
    run(settings, out=tmp_path, resume=True, observer=last, **own())
    assert last.plan.finished == 1
    assert last.started == [(1, "ban", STEPS, done), (2, "ban", STEPS, 0)]
    assert last.steps == {1: STEPS - done, 2: STEPS}
    assert [number for number, _ in last.finished] == [1, 2]


def test_stopped_between_generations(tmp_path: Path) -> None:
    class StopAfterTeacher(Recorder):
        def __call__(self) -> bool:
            return bool(self.finished)

    stop = StopAfterTeacher()
    with pytest.raises(Interrupted):
        run(config(), out=tmp_path / "parts", observer=stop, should_stop=stop, **own())
    assert len(json.loads((tmp_path / "parts" / "results.json").read_text())["generations"]) == 1
    last = Recorder()
    run(config(), out=tmp_path / "parts", resume=True, observer=last, **own())
    assert [number for number, *_ in last.started] == [1, 2]
    assert footprint(tmp_path / "parts") == uninterrupted(config(), tmp_path / "whole", **own())


def test_a_finished_run_is_returned_at_once(tmp_path: Path) -> None:
    results = run(config(), out=tmp_path, **own())
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    observer = Recorder()
    again = run(config(), out=tmp_path, resume=True, observer=observer, should_stop=lambda: True, **own())
    assert again.to_dict() == results.to_dict()
    assert observer.plan is None
    assert not observer.steps
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    x = samples(8, 2)[0]
    for mine, stored in zip(results.models, again.models, strict=True):
        assert not stored.training
        assert torch.equal(mine(x), stored(x))


def test_with_a_dataloader_by_whole_epochs(tmp_path: Path) -> None:
    """Its order comes from the global generator, which the checkpoint holds: so even its bits come again."""

    def loaders() -> dict[str, Any]:
        train = DataLoader(TensorDataset(*samples(IMAGES, 0)), batch_size=BATCH, shuffle=True, drop_last=True)
        return own(train=train, test=DataLoader(TensorDataset(*samples(40, 1)), batch_size=32))

    settings = config(checkpoint_seconds=0.0)
    expected = uninterrupted(settings, tmp_path / "whole", **loaders())
    for point in (3, 8, 13, 25):
        path = tmp_path / str(point)
        last = stopped_at_each(settings, path, [point], **loaders())
        assert footprint(path) == expected
        done = last.started[0][3]
        assert done % (IMAGES // BATCH) == 0
        assert last.steps[last.started[0][0]] == STEPS - done


def test_draws_of_python_and_numpy_are_resumed_too(tmp_path: Path) -> None:
    class Noisy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            noise = random.random() + np.random.rand() if self.training else 1.0
            return self.body(x * noise)

    settings = config(generations=1)
    expected = uninterrupted(settings, tmp_path / "whole", **own(model=Noisy))
    stopped_at_each(settings, tmp_path / "parts", [4, 5, 9], **own(model=Noisy))
    assert footprint(tmp_path / "parts") == expected


# What can't be resumed


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run stopped inside generation 1, with a checkpoint."""
    path = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(config(), out=path, should_stop=StopAt(IN_STUDENT), **own())
    assert (path / "generation-1" / "state.pt").exists()
    return path


def resume(path: Path, settings: Config | None = None, **changes: Any) -> None:
    run(settings or config(), out=path, resume=True, **own(**changes))


def test_resume_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(UserError, match=r"nothing to resume in .*: there is no config\.json"):
            resume(place)
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="needs out="):
        run(config(), resume=True, **own())


def test_a_new_run_does_not_touch_one_that_is_there(begun: Path) -> None:
    before = {file: file.read_bytes() for file in begun.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="continue it with --resume, or choose another --out"):
        run(config(), out=begun, **own())
    assert {file: file.read_bytes() for file in begun.rglob("*") if file.is_file()} == before


def test_another_configuration_names_the_first_field(begun: Path) -> None:
    other = config(epochs=4, seed=3)
    with pytest.raises(OptionError, match=r"is 4 here, but 3 in the run in") as caught:
        resume(begun, other)
    assert caught.value.field == "epochs"
    other = config()
    other.optimizer.lr = 0.5
    with pytest.raises(OptionError, match=r"is 0\.5 here, but 0\.05") as caught:
        resume(begun, other)
    assert caught.value.field == "optimizer.lr"


def test_checkpoint_interval_is_free(begun: Path, tmp_path: Path) -> None:
    resume(begun, config(checkpoint_seconds=0.0))
    assert footprint(begun) == uninterrupted(config(), tmp_path / "whole", **own())


def nested() -> torch.nn.Module:
    """As many parameters as `network`, under other names."""
    *body, head = network().children()
    return torch.nn.Sequential(*body, torch.nn.Sequential(head))


def test_another_network_of_the_same_size(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(config(), out=tmp_path, should_stop=StopAt(5), **own())
    with pytest.raises(UserError, match=r"state\.pt is a checkpoint of another configuration"):
        resume(tmp_path, model=nested)


def test_other_data_or_another_network_are_refused(begun: Path) -> None:
    x, y = samples(IMAGES + BATCH, 0)
    with pytest.raises(UserError, match="began with steps_per_epoch 4, here it is 5"):
        resume(begun, train=(x, y))
    with pytest.raises(UserError, match="began with test_images 40, here it is 39"):
        resume(begun, test=samples(39, 1))
    with pytest.raises(UserError, match="began with parameters"):
        resume(begun, model=lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4)))
    with pytest.raises(UserError, match=r"is of another network: 6\.0\.bias is not there, here \[4\]"):
        resume(begun, model=nested)


def test_a_checkpoint_of_another_run(begun: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with pytest.raises(Interrupted):
        run(config(seed=1), out=other, should_stop=StopAt(IN_STUDENT), **own())
    (begun / "generation-1" / "state.pt").write_bytes((other / "generation-1" / "state.pt").read_bytes())
    with pytest.raises(UserError, match=r"state\.pt is a checkpoint of another configuration"):
        resume(begun)


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "half":
        del data[len(data) // 2 :]
    elif how == "empty":
        data.clear()
    elif how == "flipped bit":
        data[len(data) // 2] ^= 1
    else:
        data[:] = b"garbage\n" * 100
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["half", "empty", "flipped bit", "garbage"])
@pytest.mark.parametrize("name", ["generation-1/state.pt", "generation-0/model.safetensors"])
def test_a_damaged_file_is_one_line(begun: Path, name: str, how: str) -> None:
    damage(begun / name, how)
    with pytest.raises(UserError, match=r"cut short or corrupted|not the file that the run wrote") as caught:
        resume(begun)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "environment.json", "results.json"])
def test_damaged_json_is_one_line(begun: Path, name: str) -> None:
    damage(begun / name, "half")
    with pytest.raises(UserError, match=f"{name} is cut short or corrupted"):
        resume(begun)


def test_a_missing_checkpoint_begins_its_generation_again(begun: Path, tmp_path: Path) -> None:
    """What the message about a damaged one advises."""
    (begun / "generation-1" / "state.pt").unlink()
    resume(begun)
    assert footprint(begun) == uninterrupted(config(), tmp_path / "whole", **own())


def test_missing_weights_and_short_metrics(begun: Path) -> None:
    metrics = begun / "generation-1" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"metrics\.jsonl is cut short"):
        resume(begun)
    (begun / "generation-0" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors: No such file.*delete results\.json"):
        resume(begun)


def test_what_the_messages_advise_is_true(begun: Path, tmp_path: Path) -> None:
    """Weights lost: without results.json they are made again. Metrics lost: so they are without the checkpoint."""
    (begun / "generation-0" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"delete results\.json"):
        resume(begun)
    (begun / "results.json").unlink()
    (begun / "generation-1" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="delete the checkpoint"):
        resume(begun)
    (begun / "generation-1" / "state.pt").unlink()
    resume(begun)
    assert footprint(begun) == uninterrupted(config(), tmp_path / "whole", **own())


def test_results_can_be_made_again_from_the_checkpoints(begun: Path, tmp_path: Path) -> None:
    """state.pt of a finished generation is its end: without results.json nothing is trained twice."""
    (begun / "results.json").unlink()
    observer = Recorder()
    run(config(), out=begun, resume=True, observer=observer, **own())
    assert observer.started[0] == (0, "label", STEPS, STEPS)
    assert observer.steps[0] == 0
    assert footprint(begun) == uninterrupted(config(), tmp_path / "whole", **own())


def test_a_replaced_teacher_is_noticed(begun: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run(config(seed=1), out=other, **own())
    (begun / "generation-0" / "model.safetensors").write_bytes(
        (other / "generation-0" / "model.safetensors").read_bytes()
    )
    with pytest.raises(UserError, match="SHA-256 differs"):
        resume(begun)
    results = json.loads((begun / "results.json").read_text())
    del results["generations"][0]["model_sha256"]
    (begun / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="had another teacher"):
        resume(begun)


def test_another_number_of_threads_is_said(begun: Path) -> None:
    torch.set_num_threads(2)
    observer = Recorder()
    run(config(), out=begun, resume=True, observer=observer, **own())
    assert len(observer.messages) == 1
    assert "CPU threads 1 then, 2 now" in observer.messages[0]


def test_a_directory_in_use(tmp_path: Path) -> None:
    class Intruder(Recorder):
        said = ""

        def step(self, generation: int, done_steps: int) -> None:
            if not self.said:
                with pytest.raises(UserError, match="in use by another process") as caught:
                    run(config(), out=tmp_path, resume=True, **own())
                self.said = str(caught.value)

    intruder = Intruder()
    run(config(generations=0), out=tmp_path, observer=intruder, **own())
    assert intruder.said
    assert not list(tmp_path.rglob("*lock*"))
    run(config(generations=0), out=tmp_path, resume=True, **own())


def test_a_forked_child_does_not_keep_the_directory(tmp_path: Path) -> None:
    """As a DataLoader's worker would, for the seconds that it outlives a killed run."""
    run(config(generations=0), out=tmp_path, **own())
    reading, writing = os.pipe()
    told, tell = os.pipe()
    with RunStore(tmp_path) as store:
        store.reopen(Config.from_dict(RunDirectory(tmp_path).config()))
        child = os.fork()
        if child == 0:
            os.write(tell, b"!")
            os.close(writing)
            os.read(reading, 1)  # until the parent closes its end
            os._exit(0)
    try:
        assert os.read(told, 1)
        run(config(generations=0), out=tmp_path, resume=True, **own())
    finally:
        for end in (reading, writing, told, tell):
            os.close(end)
        os.waitpid(child, 0)


def test_a_config_of_another_time_is_named(begun: Path) -> None:
    (begun / "config.json").write_text('{"format": 1, "epoks": 3}')
    with pytest.raises(UserError, match=r"config\.json: unknown configuration key 'epoks'; did you mean 'epochs'"):
        resume(begun)


def test_a_directory_without_config_counts_as_empty(tmp_path: Path) -> None:
    """Whatever a killed run left before its config.json was there is not taken up; what is no run's is left alone."""
    path = tmp_path / "run"
    (path / "generation-0").mkdir(parents=True)
    (path / "environment.json").write_text('{"format"')
    (path / "generation-0" / "state.pt.tmp").touch()
    (path / "notes.txt").write_text("mine")
    observer = Recorder()
    run(config(), out=path, observer=observer, **own())
    assert observer.started[0] == (0, "label", STEPS, 0)
    assert footprint(path) == uninterrupted(config(), tmp_path / "whole", **own())
    assert (path / "notes.txt").read_text() == "mine"


def test_networks_that_lost_their_config_are_not_replaced(begun: Path, tmp_path: Path) -> None:
    """One file of them after the other is taken away; with the configuration back, the run goes on."""
    (begun / "config.json").rename(tmp_path / "config.json")
    kept = tmp_path / "kept"
    shutil.copytree(begun, kept)
    found = ["results.json", *(f"generation-{n}/{file}" for file in ("state.pt", "metrics.jsonl") for n in (0, 1))]
    for name in [*found, "generation-0/model.safetensors"]:
        before = {file: file.read_bytes() for file in begun.rglob("*") if file.is_file()}
        with pytest.raises(UserError, match=r"of a run, but no config\.json: put that back and continue with --resume"):
            run(config(), out=begun, **own())
        assert {file: file.read_bytes() for file in begun.rglob("*") if file.is_file()} == before
        (begun / name).unlink()
    shutil.rmtree(begun)
    kept.rename(begun)
    (tmp_path / "config.json").rename(begun / "config.json")
    resume(begun)
    assert footprint(begun) == uninterrupted(config(), tmp_path / "whole", **own())
