"""What a run does: generations of their own, a frozen teacher, figures from the last epoch, and a complete record."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import (
    BATCH,
    CLASSES,
    EPOCHS,
    IMAGES,
    STEPS,
    STEPS_PER_EPOCH,
    TEST_IMAGES,
    Recorder,
    StopAt,
    check_figures,
    config,
    deterministic,
    footprint,
    network,
    own,
    samples,
)
from torch import Tensor, nn

from ban_fast.config import Config, ObjectiveConfig, TeacherConfig
from ban_fast.data import Batch, TensorLoader
from ban_fast.errors import UserError
from ban_fast.evaluation import RunDirectory
from ban_fast.training import Interrupted, evaluate_run, run
from ban_fast.training.checkpoint import load_model
from ban_fast.training.objectives import make_objective
from ban_fast.training.optim import learning_rate
from ban_fast.training.seeds import derived_seed, generation_seed
from ban_fast.training.teacher import LiveTeacher, Taught, fingerprint


@pytest.mark.parametrize("objective", ["ban", "ban+l", "cwtm", "dkpp", "label"])
def test_generations_are_those_of_a_loop_written_by_hand(objective: str) -> None:
    """Plain torch: two networks, SGD, a batch at a time; the same weights and metrics within rounding."""
    settings, observer = config(objective, generations=1, seed=5), Recorder()
    (x, y), (test_x, _) = samples(IMAGES, 0), samples(TEST_IMAGES, 1)
    trained = run(settings, observer=observer, **own(model=deterministic)).models
    metrics = [record["train"] for _, record in observer.epochs]
    teacher = None
    for number in (0, 1):
        seed = generation_seed(5, number)
        torch.manual_seed(derived_seed(seed, "init"))
        student = deterministic()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        loss_of = make_objective(
            settings.objective if number else ObjectiveConfig(name="label"), derived_seed(seed, "dkpp")
        )
        step = 0
        for epoch in range(EPOCHS):
            seen = []
            for batch in TensorLoader(x, y, batch_size=BATCH, seed=derived_seed(seed, "order")).epoch(epoch):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(settings.optimizer, step, STEPS)
                with torch.no_grad():
                    taught = None if teacher is None else Taught(teacher.eval()(batch.images))
                logits = student(batch.images)
                terms = loss_of(logits, taught, batch, torch.tensor(step))
                optimizer.zero_grad()
                terms.loss.backward()
                optimizer.step()
                step += 1
                wrong = (logits.argmax(1) != batch.labels).sum()
                seen.append([terms.loss.item(), terms.kd.item(), terms.label.item(), 100 * wrong.item() / BATCH])
            means = dict(zip(("loss", "kd", "label", "error"), np.mean(seen, axis=0), strict=True))
            assert metrics[number * EPOCHS + epoch] == pytest.approx(means, rel=1e-4)
        # 12 steps of fp32 in which SGD's rounding differs (fused against not): some 1e-6 of the logits
        torch.testing.assert_close(trained[number](test_x), student.eval()(test_x), rtol=1e-4, atol=1e-4)
        teacher = student


def test_each_generation_begins_from_a_fresh_seed_of_its_own() -> None:
    initial: list[Tensor] = []

    def factory() -> nn.Module:
        made = network()
        initial.append(made[0].weight.detach().clone())
        return made

    results = run(config(), **own(model=factory))
    seeds = [record["seed"] for record in results.generations]
    assert seeds == [generation_seed(0, number) for number in range(3)]
    assert len(set(seeds)) == 3
    weights = initial[1:]  # the first was only tried on the data
    assert len(weights) == 3
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    other = run(config(seed=1), **own())
    assert not set(seeds) & {record["seed"] for record in other.generations}


def test_seeds_are_pinned() -> None:
    """They decide every result: changing how they are derived is a change of every published run."""
    assert generation_seed(0, 0) == 2552367984494884
    assert derived_seed(generation_seed(7, 1), "order") == 3966447843533182
    values = {
        derived_seed(generation_seed(r, g), p) for r in range(5) for g in range(5) for p in ("init", "order", "x")
    }
    assert len(values) == 75
    assert all(0 <= value < 2**53 for value in values)


def test_same_seed_same_bits_whatever_the_caller_drew(tmp_path: Path) -> None:
    torch.manual_seed(1)
    run(config(), out=tmp_path / "a", **own())
    torch.manual_seed(2)
    torch.randn(7), random.random(), np.random.rand()
    run(config(), out=tmp_path / "b", **own())
    run(config(seed=1), out=tmp_path / "c", **own())
    assert footprint(tmp_path / "a") == footprint(tmp_path / "b")
    assert (
        footprint(tmp_path / "a")["generation-0/model.safetensors"]
        != footprint(tmp_path / "c")["generation-0/model.safetensors"]
    )


def test_the_callers_generators_are_left_as_found() -> None:
    def draws() -> tuple[float, float, float]:
        return torch.rand(1).item(), random.random(), np.random.rand()

    def seed() -> None:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)

    seed()
    expected = draws()
    seed()
    results = run(config(generations=1), **own())
    assert draws() == expected
    seed()
    assert len(results.models) == 2
    assert draws() == expected
    seed()
    with pytest.raises(Interrupted):
        run(config(), should_stop=StopAt(5), **own())
    assert draws() == expected


# The teacher


def test_the_teacher_is_the_generation_before_and_is_not_changed(tmp_path: Path) -> None:
    results = run(config(), out=tmp_path, **own())
    models = results.models
    assert len({id(model) for model in models}) == 3
    for number, model in enumerate(models):
        fresh = network()
        load_model(tmp_path / f"generation-{number}" / "model.safetensors", fresh)
        assert fingerprint(fresh) == fingerprint(model)  # stored before it taught, the same after
        assert not model.training
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())


class Drifting(nn.BatchNorm2d):
    """A batch norm that never stops learning its statistics."""

    def train(self, mode: bool = True) -> "Drifting":
        return super().train(True)


def test_a_teacher_that_drifts_is_caught_after_the_first_epoch() -> None:
    def factory() -> nn.Module:
        made = network()
        made[1] = Drifting(8)
        return made

    observer = Recorder()
    with pytest.raises(UserError, match="the teacher changed while it taught"):
        run(config(), observer=observer, **own(model=factory))
    assert observer.steps == {0: STEPS, 1: STEPS_PER_EPOCH}


def test_a_live_teacher_is_frozen() -> None:
    teacher = LiveTeacher(network().train())
    images = samples(5, 0)[0]
    batch = Batch(images, torch.zeros(5).long(), torch.arange(5), torch.zeros(5).long())
    first, second = teacher(batch).logits, teacher(batch).logits
    assert first is not None
    assert second is not None
    assert torch.equal(first, second), "dropout is off"
    assert not first.requires_grad
    assert teacher.record(10) == {"mode": "live", "dtype": "float32", "forward_images": 10}
    teacher.check()
    teacher.network[1].running_mean[0] += 1e-6
    with pytest.raises(UserError, match="changed"):
        teacher.check()


def test_a_factory_that_hands_out_one_network_twice_is_refused(tmp_path: Path) -> None:
    """One module as teacher and student: the teacher would be overwritten, and the KL be 0."""
    only = network()
    with pytest.raises(UserError, match="must build a new network each time"):
        run(config(), **own(model=lambda: only))
    head = nn.Linear(32, CLASSES)

    def sharing() -> nn.Module:
        made = network()
        made[6] = head
        return made

    with pytest.raises(UserError, match="must build a new network each time"):
        run(config(), **own(model=sharing))
    with pytest.raises(Interrupted):
        run(config(), out=tmp_path, should_stop=StopAt(STEPS + EPOCHS + 4), **own())
    with pytest.raises(UserError, match="must build a new network each time"):
        run(config(), out=tmp_path, resume=True, **own(model=lambda: only.requires_grad_()))


def test_lazy_layers_get_their_shapes_before_training(tmp_path: Path) -> None:
    def lazy() -> nn.Module:
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(CLASSES))

    results = run(config(), out=tmp_path, **own(model=lazy))
    assert results.generations[0]["parameters"] == 4 * 9 + 4 + 8 + 4 * 16 * CLASSES + CLASSES
    assert evaluate_run(tmp_path, **own(model=lazy)) == results.to_dict()
    assert len(run(config(), out=tmp_path, resume=True, **own(model=lazy)).models) == 3


def test_a_shared_frozen_layer_is_allowed() -> None:
    head = nn.Linear(32, CLASSES).requires_grad_(False)

    def sharing() -> nn.Module:
        made = network()
        made[6] = head
        return made

    results = run(config(), **own(model=sharing))
    assert results.generations[0]["parameters"] == 8 * 9 + 16


# The record


def test_results_json(tmp_path: Path) -> None:
    settings = config(generations=3, teacher=TeacherConfig(mode="live"))
    results = run(settings, out=tmp_path, **own())
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored == results.to_dict()
    assert set(stored) == {"format", "generations", "ensembles"}
    assert stored["format"] == 1
    parameters = sum(p.numel() for p in network().parameters())
    for number, record in enumerate(stored["generations"]):
        assert record["generation"] == number
        assert record["objective"] == ("ban" if number else "label")
        assert (record["epochs"], record["steps"], record["parameters"]) == (EPOCHS, STEPS, parameters)
        check_figures(record["test"])
        assert {len(values) for values in record["reliability"].values()} == {15}
        assert sum(record["reliability"]["count"]) == TEST_IMAGES
        assert record["train_seconds"] > 0
        assert record["images_per_second"] == pytest.approx(STEPS * BATCH / record["train_seconds"])
        assert len(record["model_sha256"]) == 64
        if number:
            assert record["teacher"] == {"mode": "live", "dtype": "float32", "forward_images": STEPS * BATCH}
        else:
            assert "teacher" not in record
    votes = [(e["members"], e["average"]) for e in stored["ensembles"]]
    assert votes == [(m, a) for m in ([1, 2], [1, 2, 3]) for a in ("probabilities", "logits")]
    for entry in stored["ensembles"]:
        check_figures(entry["test"])
        assert sum(entry["reliability"]["count"]) == TEST_IMAGES


def test_figures_are_of_the_final_weights_and_the_votes_of_theirs() -> None:
    """Computed by hand from the networks that `run` returns."""
    results = run(config(), **own())
    x, y = samples(TEST_IMAGES, 1)
    with torch.no_grad():
        logits = [model(x).double() for model in results.models]
    for record, z in zip(results.generations, logits, strict=True):
        assert record["test"]["error"] == 100 * (z.argmax(1) != y).sum().item() / TEST_IMAGES
        assert record["test"]["nll"] == pytest.approx(nn.functional.cross_entropy(z, y).item(), rel=1e-6)
    p = (logits[1].softmax(1) + logits[2].softmax(1)) / 2
    q = ((logits[1] + logits[2]) / 2).softmax(1)
    for entry, joint in zip(results.ensembles, (p, q), strict=True):
        assert entry["test"]["error"] == 100 * (joint.argmax(1) != y).sum().item() / TEST_IMAGES
        assert entry["test"]["nll"] == pytest.approx(-joint[range(TEST_IMAGES), y].log().mean().item(), rel=1e-6)


def test_the_headline_is_the_last_epoch(tmp_path: Path) -> None:
    results = run(config(epochs=6), out=tmp_path, **own())
    for record in results.generations:
        curve = RunDirectory(tmp_path).metrics(record["generation"])
        assert len(curve) == 6
        last = curve[-1]["evaluation"]
        assert last.pop("split") == "test"
        assert last == record["test"]


def test_metrics_jsonl(tmp_path: Path) -> None:
    observer = Recorder()
    settings = config("ban+l", evaluate_every=2)
    run(settings, out=tmp_path, observer=observer, **own())
    for generation in range(3):
        lines = RunDirectory(tmp_path).metrics(generation)
        assert lines == [record for number, record in observer.epochs if number == generation]
        assert [line["epoch"] for line in lines] == [1, 2, 3]
        assert [line["step"] for line in lines] == [4, 8, 12]
        assert ["evaluation" in line for line in lines] == [False, True, True]
        for line in lines:
            assert line["lr"] == learning_rate(settings.optimizer, line["step"] - 1, STEPS)
            train = line["train"]
            assert set(train) == {"loss", "kd", "label", "error"}
            assert train["loss"] == pytest.approx(train["kd"] + train["label"], rel=1e-6)
            assert 0 <= train["error"] <= 100
        assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_config_and_environment(tmp_path: Path) -> None:
    settings = config()
    run(settings, out=tmp_path, **own())
    stored = Config.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert (stored.model.name, stored.data.name) == ("custom", "custom")
    stored.model, stored.data = settings.model, settings.data
    assert stored == settings
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert environment["shape"] == {
        "sample_shape": [1, 6, 6],
        "classes": CLASSES,
        "steps_per_epoch": STEPS_PER_EPOCH,
        "train_images": IMAGES,
        "test_images": TEST_IMAGES,
        "parameters": sum(p.numel() for p in network().parameters()),
    }
    text = json.dumps(environment)
    assert str(Path.home()) not in text
    assert str(tmp_path) not in text


def test_no_files_without_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = run(config(), **own())
    assert len(results.models) == 3
    assert "model_sha256" not in results.generations[0]
    assert not list(tmp_path.iterdir())


def test_observer_is_told_everything() -> None:
    observer = Recorder()
    results = run(config(), observer=observer, **own())
    plan = observer.plan
    assert (plan.generations, plan.finished, plan.steps, plan.epochs) == (3, 0, STEPS, EPOCHS)
    assert plan.steps_per_epoch == STEPS_PER_EPOCH
    assert observer.started == [(0, "label", STEPS, 0), (1, "ban", STEPS, 0), (2, "ban", STEPS, 0)]
    assert observer.steps == {0: STEPS, 1: STEPS, 2: STEPS}
    assert [record for _, record in observer.finished] == results.generations
    assert not observer.messages
