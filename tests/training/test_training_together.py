"""Students trained side by side are what separate runs make of them, file by file, however they were interrupted."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_graphs import Emulated
from small_runs import (
    BATCH,
    EPOCHS,
    IMAGES,
    STEPS,
    Recorder,
    StopAt,
    but_for_steps,
    but_for_teachers,
    config,
    footprint,
    network,
    own,
    samples,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ban_fast.config import Config, OptimizerConfig, TeacherConfig
from ban_fast.errors import OptionError, UserError
from ban_fast.training import Interrupted, evaluate_run, learner, run, run_together

FOLDERS = {"ban": "ban", "ban+l": "ban_l", "cwtm": "cwtm", "dkpp": "dkpp", "label": "label"}
THREE = ("ban", "cwtm", "label")


def family(students: tuple[str, ...] = THREE, **changes: Any) -> Config:
    return config(students=students, **changes)


def separate(students: tuple[str, ...], path: Path, **changes: Any) -> dict[str, Any]:
    """What each student's own run leaves."""
    for name in students:
        run(config(name, **changes), out=path / FOLDERS[name], **own())
    return {name: footprint(path / FOLDERS[name]) for name in students}


def footprints(students: tuple[str, ...], path: Path) -> dict[str, Any]:
    return {name: footprint(path / FOLDERS[name]) for name in students}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The three students' own runs."""
    return separate(THREE, tmp_path_factory.mktemp("separate"))


@pytest.mark.parametrize(
    ("students", "changes"),
    [
        (("ban", "ban+l", "cwtm", "dkpp", "label"), {"generations": 1, "teacher": TeacherConfig(mode="live")}),
        (("ban", "ban+l", "cwtm", "dkpp"), {"teacher": TeacherConfig(mode="cache")}),
        (("dkpp", "ban+l"), {"amp": "fp16", "max_steps": 7, "evaluate_every": 2}),
        (("cwtm",), {"teacher": TeacherConfig(mode="cache")}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_every_file_is_that_of_a_run_by_itself(
    students: tuple[str, ...], changes: dict[str, Any], tmp_path: Path
) -> None:
    """Weights, metrics, figures, ensembles, counts of forward passes, configuration."""
    together = run_together(family(students, **changes), out=tmp_path / "all", **own())
    assert footprints(students, tmp_path / "all") == separate(students, tmp_path, **changes)
    assert list(together) == list(students)
    for name in students:
        mine, theirs = tmp_path / "all" / FOLDERS[name], tmp_path / FOLDERS[name]
        assert together[name].to_dict() == json.loads((mine / "results.json").read_text())
        assert (mine / "config.json").read_bytes() == (theirs / "config.json").read_bytes()
        assert {p.relative_to(mine) for p in mine.rglob("*")} == {p.relative_to(theirs) for p in theirs.rglob("*")}
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"config.json", "environment.json"} | {
        FOLDERS[name] for name in students
    }


def test_without_a_directory() -> None:
    together = run_together(family(generations=1), **own())
    x = samples(8, 2)[0]
    for name, results in together.items():
        alone = run(config(name, generations=1), **own())
        assert [r["test"] for r in results.generations] == [r["test"] for r in alone.generations]
        assert all(torch.equal(a(x), b(x)) for a, b in zip(results.models, alone.models, strict=True))


def test_the_teacher_is_trained_and_asked_once() -> None:
    """Four students: generation 0 makes its steps once, and each batch of generation 1 is shown to it once."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.trained, self.asked = network(), 0, 0

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.trained += 1
            elif len(x) == BATCH:
                self.asked += 1
            return self.body(x)

    networks: list[Counting] = []

    def factory() -> nn.Module:
        networks.append(Counting())
        return networks[-1]

    observer = Recorder()
    settings = family(("ban", "ban+l", "cwtm", "dkpp"), generations=1, teacher=TeacherConfig(mode="live"))
    run_together(settings, observer=observer, **own(model=factory))
    made = networks[1:]  # the first was only tried on the data
    assert [one.trained for one in made] == [STEPS] * 5
    assert [one.asked for one in made] == [STEPS, 0, 0, 0, 0]
    assert observer.plan.students == ("ban", "ban+l", "cwtm", "dkpp")
    assert observer.started == [(0, "label", STEPS, 0), (1, "ban, ban+l, cwtm, dkpp", STEPS, 0)]
    assert observer.steps == {0: STEPS, 1: STEPS}
    assert [(number, record["objective"]) for number, record in observer.finished] == [
        (0, "label"),
        *((1, name) for name in ("ban", "ban+l", "cwtm", "dkpp")),
    ]
    assert len(observer.epochs) == EPOCHS * 5


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_many_sessions(seed: int, expected: dict[str, Any], tmp_path: Path) -> None:
    """Stopped after a few steps each time, between generations and evaluations too."""
    draw = random.Random(seed)
    sessions = 0
    while True:
        try:
            stop = StopAt(draw.randint(2, 9) if sessions < 8 else 10**9)
            run_together(family(), out=tmp_path, resume=sessions > 0, should_stop=stop, **own())
            break
        except Interrupted:
            sessions += 1
    assert sessions == 8
    assert footprints(THREE, tmp_path) == expected


def stopped(path: Path, question: int = STEPS + EPOCHS + 2 + 7) -> None:
    with pytest.raises(Interrupted):
        run_together(family(checkpoint_seconds=0.0), out=path, should_stop=StopAt(question), **own())


def test_checkpoints_of_different_moments_meet_again(expected: dict[str, Any], tmp_path: Path) -> None:
    """A kill between them: one student stands where it was two steps ago, one where it began, one ahead."""
    path = tmp_path / "run"
    stopped(path)
    early = (path / "ban" / "generation-1" / "state.pt").read_bytes()
    with pytest.raises(Interrupted):
        run_together(family(), out=path, resume=True, should_stop=StopAt(4), **own())
    (path / "ban" / "generation-1" / "state.pt").write_bytes(early)
    (path / "label" / "generation-1" / "state.pt").unlink()
    observer = Recorder()
    run_together(family(), out=path, resume=True, observer=observer, **own())
    assert observer.started[0][3] == 0
    assert observer.steps[1] == STEPS
    assert footprints(THREE, path) == expected


@pytest.mark.slow
def test_a_student_that_is_a_generation_ahead(expected: dict[str, Any], tmp_path: Path) -> None:
    """Each is a whole run: one is resumed and finished by itself, its teacher asked anew; then the others are."""
    path = tmp_path / "run"
    stopped(path)
    run(config("cwtm", checkpoint_seconds=0.0), out=path / "cwtm", resume=True, **own())
    done = footprint(path / "cwtm")
    assert but_for_teachers(done) == but_for_teachers(expected["cwtm"])
    run_together(family(), out=path, resume=True, **own())
    assert footprints(THREE, path) == expected | {"cwtm": done}


@pytest.mark.parametrize("lost", ["ban", pytest.param("label", marks=pytest.mark.slow)])
def test_a_student_that_was_not_begun(lost: str, expected: dict[str, Any], tmp_path: Path) -> None:
    """A kill before its config.json was there, or between the teacher's files: it gets the teacher of the others."""
    path = tmp_path / "run"
    stopped(path)
    shutil.rmtree(path / lost)
    observer = Recorder()
    run_together(family(), out=path, resume=True, observer=observer, **own())
    assert observer.steps[0] == 0
    assert footprints(THREE, path) == expected


def test_all_finished_is_returned_at_once(tmp_path: Path) -> None:
    first = run_together(family(generations=1), out=tmp_path, **own())
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    again = run_together(family(generations=1), out=tmp_path, resume=True, should_stop=lambda: True, **own())
    assert {name: r.to_dict() for name, r in again.items()} == {name: r.to_dict() for name, r in first.items()}
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    x = samples(8, 2)[0]
    assert torch.equal(first["ban"].models[1](x), again["ban"].models[1](x))
    assert evaluate_run(tmp_path / "ban", **own()) == first["ban"].to_dict()


# What is refused


def test_refusals_touch_nothing(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(*samples(IMAGES, 0)), batch_size=BATCH)
    for settings, arguments, said in (
        (config(), {}, "names no objective"),
        (family(), {"train": loader}, "need data that ban_fast draws batches of"),
        (family(("ban", "ban")), {}, "must be different objectives, got ban,ban"),
        (family(("bann",)), {}, "unknown value 'bann'; did you mean 'ban'"),
    ):
        with pytest.raises(OptionError, match=said) as caught:
            run_together(settings, out=tmp_path / "run", **own(**arguments))
        assert caught.value.field == "students"
    with pytest.raises(OptionError, match="are trained by run_together"):
        run(family(), out=tmp_path / "run", **own())
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="needs out="):
        run_together(family(), resume=True, **own())
    with pytest.raises(UserError, match="nothing to resume in"):
        run_together(family(), resume=True, out=tmp_path / "run", **own())


def test_a_directory_that_holds_a_run(tmp_path: Path) -> None:
    run(config(generations=0), out=tmp_path / "run" / "cwtm", **own())
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="cwtm holds a run already"):
        run_together(family(), out=tmp_path / "run", **own())
    with pytest.raises(UserError, match="cwtm holds a run already"):
        run_together(family(), out=tmp_path / "run" / "cwtm", **own())
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_other_students_are_another_run(tmp_path: Path) -> None:
    stopped(tmp_path)
    with pytest.raises(OptionError, match=r"is .* here, but .* in the run in") as caught:
        run_together(family(("ban", "dkpp")), out=tmp_path, resume=True, **own())
    assert caught.value.field == "students"


def test_settings_go_to_those_who_have_them() -> None:
    settings = family(("ban", "ban+l", "cwtm", "label", "dkpp"))
    settings.objective.temperature, settings.objective.label_weight, settings.objective.kd_weight = 4.0, 0.1, 0.9
    settings.validate()
    of = {name: settings.of_student(name).objective for name in settings.students}
    assert {name: o.temperature for name, o in of.items()} == {
        "ban": 4.0,
        "ban+l": 4.0,
        "cwtm": 1.0,
        "label": 1.0,
        "dkpp": 4.0,
    }
    assert {name for name, o in of.items() if o.label_weight == 0.1} == {"ban+l", "dkpp"}
    assert {name for name, o in of.items() if o.kd_weight == 0.9} == {"ban", "ban+l", "dkpp"}


def test_a_student_that_diverges_is_named() -> None:
    settings = family(generations=1)
    x, y = samples(IMAGES, 0)

    class Fragile(Recorder):
        def generation_started(self, generation: int, objective: str, total_steps: int, done_steps: int) -> None:
            if generation:
                x.fill_(float("nan"))

    with pytest.raises(
        UserError, match="the loss is not finite in generation 1 of ban, epoch 1, at step 1: lower --lr"
    ):
        run_together(settings, observer=Fragile(), **own(train=(x, y)))


# Recorded steps


def plain() -> nn.Module:
    """The small network without dropout: it draws nothing in training."""
    layers = list(network().children())
    return nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Dropout)))


RECORDED = {
    "live": (("ban", "ban+l", "cwtm", "dkpp", "label"), {"teacher": TeacherConfig(mode="live"), "generations": 1}),
    "kept, two generations": (("ban", "cwtm", "dkpp"), {"teacher": TeacherConfig(mode="cache")}),
    "fp16, whose scalers skip steps": (("ban", "ban+l"), {"amp": "fp16", "generations": 1}),
    "a plateau for each": (
        ("ban", "label"),
        {"optimizer": OptimizerConfig(lr=0.05, schedule="plateau", lr_decay=0.5), "generations": 1},
    ),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_together(tmp_path: Path, graphs: Callable[[int], Emulated], name: str) -> None:
    """One graph has a step of all students: what batches served make of them, and one teacher's answer for all."""
    students, changes = RECORDED[name]
    settings = family(students, epochs=8, **changes)
    data = own(model=plain, validation=samples(20, 2))
    run_together(settings, out=tmp_path / "served", **data)
    device, observer = graphs(4), Recorder()
    results = run_together(settings, out=tmp_path / "replayed", observer=observer, **data)
    for folder in (FOLDERS[student] for student in students):
        assert but_for_steps(tmp_path / "replayed" / folder) == but_for_steps(tmp_path / "served" / folder)
    assert device.replays.count(4) * 4 >= 12 * (settings.generations + 1)
    for each in results.values():
        steps = [record["step"] for record in each.generations]
        assert steps == [{"mode": "graph", "reason": "for this test", "a_replay": 4}] * (settings.generations + 1)
    assert len([text for text in observer.messages if text.startswith("steps: 4 a replay")]) == settings.generations + 1


def test_students_who_draw_are_not_recorded_together(tmp_path: Path, graphs: Callable[[int], Emulated]) -> None:
    """Dropout has its own generator for each; the teacher, alone in its generation, is recorded."""
    settings = family(("ban", "dkpp"), generations=1)
    run_together(settings, out=tmp_path / "served", **own())
    device, observer = graphs(1), Recorder()
    results = run_together(settings, out=tmp_path / "tried", observer=observer, **own())
    for folder in ("ban", "dkpp"):
        assert but_for_steps(tmp_path / "tried" / folder) == but_for_steps(tmp_path / "served" / folder)
    reason = (
        "a step can't be recorded as a CUDA graph: students side by side draw from generators of their own, "
        "and a CUDA graph has one"
    )
    for each in results.values():
        assert [record["step"]["mode"] for record in each.generations] == ["graph", "eager"]
        assert each.generations[1]["step"]["reason"] == reason
    assert [text for text in observer.messages if reason in text]
    assert device.replays


@pytest.mark.parametrize("question", [29, 44, *(pytest.param(q, marks=pytest.mark.slow) for q in range(24, 60, 5))])
def test_recorded_together_and_interrupted(
    tmp_path: Path, graphs: Callable[[int], Emulated], monkeypatch: pytest.MonkeyPatch, question: int
) -> None:
    """Also where a kill came between two of their checkpoints: who is behind catches up, batch by batch."""
    students, changes = RECORDED["kept, two generations"]
    settings = family(students, epochs=5, **changes)
    data = own(model=plain)
    run_together(settings, out=tmp_path / "a", **data)
    graphs(2)
    real, saved = learner.Learner.save, []

    def save(self: learner.Learner) -> None:
        saved.append(self)
        if len(saved) % 3 or self.batch == 0 or self.step < 5:  # the third's is lost, in the midst of an epoch
            real(self)

    monkeypatch.setattr(learner.Learner, "save", save)
    with pytest.raises(Interrupted):
        run_together(settings, out=tmp_path / "b", should_stop=StopAt(question), **data)
    monkeypatch.setattr(learner.Learner, "save", real)
    run_together(settings, out=tmp_path / "b", resume=True, **data)
    for folder in (FOLDERS[student] for student in students):
        assert but_for_steps(tmp_path / "b" / folder) == but_for_steps(tmp_path / "a" / folder)
