"""What a run does: generations of their own, a frozen teacher, figures from the last epoch, and a complete record."""

import json
import math
import random
from pathlib import Path
from typing import Any

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
    config,
    footprint,
    network,
    own,
    samples,
    without_times,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ban_fast.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from ban_fast.data import TensorLoader
from ban_fast.errors import OptionError, UserError
from ban_fast.evaluation import RunDirectory
from ban_fast.training import Interrupted, evaluate_run, run
from ban_fast.training.checkpoint import load_model
from ban_fast.training.evaluator import full_precision
from ban_fast.training.objectives import make_objective
from ban_fast.training.optim import learning_rate
from ban_fast.training.seeds import derived_seed, generation_seed
from ban_fast.training.teacher import LiveTeacher, fingerprint


def deterministic() -> nn.Module:
    """Without dropout, so that a loop written by hand can draw the same weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


@pytest.mark.parametrize("objective", ["ban", "ban+l", "cwtm", "dkpp", "label"])
def test_generations_are_those_of_a_loop_written_by_hand(objective: str) -> None:
    """Plain torch: two networks, SGD, a batch at a time; the same weights within rounding."""
    settings = config(objective, generations=1, seed=5)
    (x, y), (test_x, _) = samples(IMAGES, 0), samples(TEST_IMAGES, 1)
    trained = run(settings, **own(model=deterministic)).models
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
            for batch in TensorLoader(x, y, batch_size=BATCH, seed=derived_seed(seed, "order")).epoch(epoch):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(settings.optimizer, step, STEPS)
                with torch.no_grad():
                    teacher_logits = None if teacher is None else teacher.eval()(batch.images)
                loss = loss_of(student(batch.images), teacher_logits, batch, torch.tensor(step)).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
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
    assert derived_seed(generation_seed(7, 1), "order") == derived_seed(generation_seed(7, 1), "order")
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
    with pytest.raises(RuntimeError, match="the teacher changed while it taught"):
        run(config(), observer=observer, **own(model=factory))
    assert observer.steps == {0: STEPS, 1: STEPS_PER_EPOCH}


def test_a_live_teacher_is_frozen() -> None:
    teacher = LiveTeacher(network().train())
    images = samples(5, 0)[0]
    first, second = teacher.logits(images), teacher.logits(images)
    assert torch.equal(first, second), "dropout is off"
    assert not first.requires_grad
    assert teacher.forward_images == 10
    assert teacher.record() == {"mode": "live", "dtype": "float32", "forward_images": 10}
    teacher.check()
    teacher.network[1].running_mean[0] += 1e-6
    with pytest.raises(RuntimeError, match="changed"):
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


def check_figures(figures: dict[str, float]) -> None:
    assert set(figures) == {"error", "nll", "ece"}
    assert 0 <= figures["error"] <= 100
    assert figures["nll"] >= 0
    assert 0 <= figures["ece"] <= 1


def test_results_json(tmp_path: Path) -> None:
    settings = config(generations=3)
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


def test_figures_are_of_the_final_weights_and_the_votes_of_theirs(tmp_path: Path) -> None:
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


# Settings


def test_labels_alone_use_no_teacher() -> None:
    results = run(config("label"), **own())
    assert [record["objective"] for record in results.generations] == ["label"] * 3
    assert results.generations[1]["teacher"] == {"mode": "none", "dtype": None, "forward_images": 0}
    assert results.ensembles


def test_the_teacher_alone() -> None:
    results = run(config(generations=0), **own())
    assert len(results.generations) == 1
    assert results.ensembles == []


@pytest.mark.parametrize(
    ("max_steps", "epochs", "steps", "lines"), [(7, 2, 7, 2), (8, 2, 8, 2), (1, 1, 1, 1), (99, EPOCHS, STEPS, EPOCHS)]
)
def test_max_steps(max_steps: int, epochs: int, steps: int, lines: int) -> None:
    """The schedule spans the steps there are: cosine's last rate is the same share of the way down."""
    observer = Recorder()
    settings = config(generations=1, max_steps=max_steps)
    results = run(settings, observer=observer, **own())
    assert observer.plan.steps == steps
    for record in results.generations:
        assert (record["steps"], record["epochs"]) == (steps, epochs)
    assert len(observer.epochs) == 2 * lines
    last = observer.epochs[-1][1]
    assert last["lr"] == learning_rate(settings.optimizer, steps - 1, steps)
    assert "evaluation" in last
    assert last["step"] == steps


def test_fewer_images_than_a_batch_are_one_batch() -> None:
    results = run(config(batch_size=1000), **own())
    assert results.generations[0]["steps"] == EPOCHS
    assert results.generations[1]["teacher"]["forward_images"] == EPOCHS * IMAGES


def test_a_validation_split_is_evaluated_too_and_draws_the_curves(tmp_path: Path) -> None:
    observer = Recorder()
    results = run(config(), out=tmp_path, observer=observer, **own(validation=samples(24, 2)))
    for record in results.generations:
        check_figures(record["validation"])
        check_figures(record["test"])
        assert sum(record["reliability"]["count"]) == TEST_IMAGES
    assert {record["evaluation"]["split"] for _, record in observer.epochs} == {"validation"}
    without = run(config(), **own())
    assert [r["test"] for r in without.generations] == [r["test"] for r in results.generations]
    anew = evaluate_run(tmp_path, **own(validation=samples(24, 2)))
    assert anew == results.to_dict()


def test_without_test_images_there_are_no_figures_but_networks(tmp_path: Path) -> None:
    results = run(config(), out=tmp_path, model=network, train=samples(IMAGES, 0))
    assert len(results.models) == 3
    assert all("test" not in record and "reliability" not in record for record in results.generations)
    assert results.ensembles == []
    assert all("evaluation" not in line for line in RunDirectory(tmp_path).metrics(1))


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_mixed_precision_trains_like_full_precision(amp: str, dtype: str) -> None:
    """The teacher speaks in the reduced type; the weights stay fp32, and the figures near those without."""
    full = run(config(epochs=8), **own())
    mixed = run(config(epochs=8, amp=amp), **own())
    assert mixed.generations[1]["teacher"]["dtype"] == dtype
    assert all(p.dtype == torch.float32 for p in mixed.models[1].parameters())
    for a, b in zip(full.generations, mixed.generations, strict=True):
        # 8 bits of mantissa over 32 steps: the runs part by some percent of a nat, not by another fate
        assert abs(a["test"]["nll"] - b["test"]["nll"]) < 0.15


def test_fp16_skips_steps_and_keeps_to_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss scale that overflows at first: steps are skipped, and counted, rates are those of the steps."""
    real = torch.amp.GradScaler
    scalers: list[Any] = []

    def high(*args: Any, **kwargs: Any) -> Any:
        scalers.append(real(*args, init_scale=2.0**26, **kwargs))
        return scalers[-1]

    monkeypatch.setattr(torch.amp, "GradScaler", high)
    observer = Recorder()
    settings = config(amp="fp16", epochs=8)
    results = run(settings, observer=observer, **own())
    assert all(scaler.get_scale() < 2.0**26 for scaler in scalers), "no step was skipped"
    for _, record in observer.epochs:
        assert record["lr"] == learning_rate(settings.optimizer, record["step"] - 1, 8 * STEPS_PER_EPOCH)
    assert all(math.isfinite(p.sum().item()) for model in results.models for p in model.parameters())
    assert results.generations[0]["test"]["error"] < 60  # chance is 75


def test_channels_last_computes_the_same(tmp_path: Path) -> None:
    plain = run(config(generations=1), **own(model=deterministic))
    last = run(config(generations=1, channels_last=True), out=tmp_path, **own(model=deterministic))
    assert last.models[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    x = samples(8, 3)[0]
    torch.testing.assert_close(last.models[1](x), plain.models[1](x), rtol=1e-3, atol=1e-3)
    assert evaluate_run(tmp_path, **own(model=deterministic)) == last.to_dict()


def test_a_users_dataloader(tmp_path: Path) -> None:
    loaders = {
        "train": DataLoader(TensorDataset(*samples(IMAGES, 0)), batch_size=BATCH, shuffle=True),
        "test": DataLoader(TensorDataset(*samples(TEST_IMAGES, 1)), batch_size=7),
    }
    results = run(config(), out=tmp_path, model=network, **loaders)
    per_epoch = -(-IMAGES // BATCH)  # this one keeps its last, short batch
    assert results.generations[0]["steps"] == EPOCHS * per_epoch
    assert results.generations[1]["teacher"]["forward_images"] == EPOCHS * IMAGES
    assert json.loads((tmp_path / "environment.json").read_text())["shape"]["train_images"] is None
    assert evaluate_run(tmp_path, model=network, **loaders) == results.to_dict()


def test_a_shuffled_test_dataloader_serves_every_generation_alike() -> None:
    """Else the members of an ensemble would vote on different images."""
    test = DataLoader(TensorDataset(*samples(TEST_IMAGES, 1)), batch_size=8, shuffle=True)
    shuffled, fixed = run(config(), **own(test=test)), run(config(), **own())
    assert [e["test"]["error"] for e in shuffled.ensembles] == [e["test"]["error"] for e in fixed.ensembles]
    generator = torch.Generator()
    test = DataLoader(TensorDataset(*samples(TEST_IMAGES, 1)), batch_size=8, shuffle=True, generator=generator)
    with pytest.raises(UserError, match="serves another order each time: use shuffle=False"):
        run(config(), **own(test=test))


def test_a_dataloader_that_ends_early() -> None:
    class Short(torch.utils.data.IterableDataset):
        def __len__(self) -> int:
            return IMAGES

        def __iter__(self) -> Any:
            return iter(zip(*samples(BATCH + 1, 0), strict=True))

    with pytest.raises(UserError, match="ended after 2 batches; its length says 5"):
        run(config(), **own(train=DataLoader(Short(), batch_size=BATCH)))


def test_the_ten_lines_of_a_library_user() -> None:
    x, y = torch.randn(600, 20), torch.randint(0, 4, (600,))
    factory = lambda: nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))  # noqa: E731
    settings = Config(generations=3, epochs=5, optimizer=OptimizerConfig(lr=0.01))
    results = run(settings, model=factory, train=(x[:500], y[:500]), test=(x[500:], y[500:]))
    assert len(results.models) == 4
    assert results.ensembles[-1]["members"] == [1, 2, 3]


def test_labels_are_checked() -> None:
    x, y = samples(IMAGES, 0)
    with pytest.raises(UserError, match="labels must be"):
        run(config(), **own(train=(x, torch.where(y == 0, -1, y))))
    with pytest.raises(UserError, match="has 4 classes, the data have 5"):
        run(config(), **own(train=(x, y + 1)))
    loader = DataLoader(TensorDataset(x, y + 1), batch_size=BATCH)
    with pytest.raises(UserError, match=r"labels must be in 0\.\.3, got 4"):
        run(config(), **own(train=loader))
    with pytest.raises(UserError, match="has 4 classes, the data have 5"):
        run(config(), **own(test=(x, y + 1)))


# What can't be


class Picky(nn.Linear):
    """Refuses images as libraries' networks do, by an assertion."""

    def __init__(self) -> None:
        super().__init__(36, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("too small\nand more")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": None}, "pass the training data too"),
        ({"train": samples(IMAGES, 0)[0]}, "two tensors"),
        ({"test": (torch.randn(4, 1, 5, 5), torch.zeros(4).long())}, r"test samples have shape \[1, 5, 5\]"),
        ({"model": lambda: nn.Linear(7, 4)}, r"does not take samples of shape \[1, 6, 6\]"),
        ({"model": lambda: nn.Conv2d(1, 4, 3)}, r"must return logits \[B, classes\], got \[2, 4, 4, 4\]"),
        ({"model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3))}, "has 3 classes, the data have 4"),
        ({"model": lambda: nn.Flatten()}, "nothing to train"),
        ({"model": lambda: 7}, "must return a torch.nn.Module, got int"),
        ({"model": nn.Flatten()}, "a function that builds a new network for each generation, got a Flatten"),
        ({"model": "wrn-28-1"}, "a function that builds a new network for each generation, got a str"),
        ({"model": Picky}, r"does not take samples of shape \[1, 6, 6\]: too small"),
        ({"train": (samples(IMAGES, 0)[0].numpy(), samples(IMAGES, 0)[1])}, r"got \['ndarray', 'Tensor'\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        run(config(), out=tmp_path / "run", **own(**changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_batch_normalisation_of_one_sample() -> None:
    """The last batch of a DataLoader without drop_last."""
    x, y = samples(BATCH + 1, 0)

    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 4))

    with pytest.raises(UserError, match=r"a batch of one sample.*drop_last=True"):
        run(config(), model=network, train=DataLoader(TensorDataset(x, y), batch_size=BATCH))
    run(config(), model=network, train=DataLoader(TensorDataset(x, y), batch_size=BATCH, drop_last=True))


@pytest.mark.parametrize("option", ["name", "num_classes"])
def test_options_that_are_known_already(option: str) -> None:
    settings = config(model=ModelConfig(name="mlp-8", options={option: 3}), data=DataConfig(limit_train=20))
    with pytest.raises(OptionError, match=f"model.options: {option} is not an option"):
        run(settings)


def test_options_of_the_built_in_data_are_not_silently_ignored() -> None:
    for field, value in (("val_fraction", 0.1), ("limit_train", 5), ("augmentation", "crop"), ("directory", "x")):
        with pytest.raises(OptionError) as caught:
            run(config(data=DataConfig(**{field: value})), **own())
        assert caught.value.field == f"data.{field}"
    run(config(generations=0, data=DataConfig(augmentation="none")), **own())


def test_a_custom_run_asks_for_what_it_was_made_with(tmp_path: Path) -> None:
    run(config(generations=0), out=tmp_path, **own())
    stored = Config.from_dict(RunDirectory(tmp_path).config())
    with pytest.raises(UserError, match="pass its factory as model="):
        run(stored, out=tmp_path, resume=True)
    with pytest.raises(UserError, match="pass them as train= and test="):
        run(stored, out=tmp_path, resume=True, model=network)
    with pytest.raises(UserError, match="pass its factory as model="):
        evaluate_run(tmp_path)


def test_no_cuda_device() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(OptionError, match="no CUDA device") as caught:
        run(config(device="cuda"), **own())
    assert caught.value.field == "device"


@pytest.mark.parametrize("lr", [1e20, 1e38])
def test_a_loss_that_is_not_finite(lr: float, tmp_path: Path) -> None:
    settings = config(optimizer=OptimizerConfig(lr=lr, schedule="constant"), checkpoint_seconds=0.0)
    with pytest.raises(UserError, match=r"not finite.*lower --lr.*with another --out") as caught:
        run(settings, out=tmp_path, **own())
    assert "generation 0, epoch 1, at step" in str(caught.value)
    state = tmp_path / "generation-0" / "state.pt"
    if state.exists():
        stored = torch.load(state, weights_only=True)
        assert all(t.isfinite().all() for t in stored["network"].values())


@pytest.mark.parametrize("saved", [True, False])
def test_weights_that_overflow_at_the_last_step_are_noticed(saved: bool, tmp_path: Path) -> None:
    """The loss was finite to the end; only the last update was not."""
    settings = config(max_steps=1, optimizer=OptimizerConfig(lr=3e38, schedule="constant", weight_decay=1e10))
    with pytest.raises(UserError, match="a weight is not finite in generation 0, epoch 1, at step 1: lower --lr"):
        run(settings, out=tmp_path if saved else None, model=network, train=samples(IMAGES, 0))
    assert not list(tmp_path.rglob("state.pt"))


def test_bad_images_make_the_loss_not_finite_at_their_step() -> None:
    x, y = samples(IMAGES, 0)
    x[: IMAGES - STEPS_PER_EPOCH * BATCH + 1] = float("nan")  # one more than an epoch leaves out
    with pytest.raises(UserError, match=r"the loss is not finite in generation 0, epoch 1, at step [1-4]: "):
        run(config(), **own(train=(x, y)))


def test_figures_are_computed_in_full_precision() -> None:
    backends = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.float32
    with full_precision(torch.device("cuda")):
        assert [backend.fp32_precision for backend in backends] == ["ieee"] * 3
    assert [backend.fp32_precision for backend in backends] == before


def test_without_momentum(tmp_path: Path) -> None:
    settings = config(optimizer=OptimizerConfig(lr=0.05, momentum=0.0, nesterov=False))
    run(settings, out=tmp_path / "a", **own())
    with pytest.raises(Interrupted):
        run(settings, out=tmp_path / "b", should_stop=StopAt(22), **own())
    run(settings, out=tmp_path / "b", resume=True, **own())
    assert footprint(tmp_path / "a") == footprint(tmp_path / "b")


# Networks and data by name


def test_digits_by_name(tmp_path: Path) -> None:
    settings = Config(
        data=DataConfig(limit_train=200, limit_test=50, val_fraction=0.1),
        model=ModelConfig(name="convnet-4"),
        optimizer=OptimizerConfig(lr=0.05),
        generations=2,
        epochs=1,
        batch_size=32,
        device="cpu",
    )
    results = run(settings, out=tmp_path)
    assert all(set(r) >= {"test", "validation"} for r in results.generations)
    assert evaluate_run(tmp_path) == results.to_dict()
    stored = run(settings, out=tmp_path, resume=True)
    assert [fingerprint(m) for m in stored.models] == [fingerprint(m) for m in results.models]


def test_networks_that_need_the_image_size() -> None:
    settings = Config(
        data=DataConfig(limit_train=64, limit_test=20), model=ModelConfig(name="mlp-8"), generations=0, epochs=1
    )
    assert len(run(settings).models) == 1


def test_a_compiler_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no working C++ compiler\nand much more")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=broken))
    with pytest.raises(OptionError, match=r"torch\.compile failed .*no working C\+\+ compiler") as caught:
        run(config(compile=True), out=tmp_path / "run", **own())
    assert caught.value.field == "compile"
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_compiled_networks(tmp_path: Path) -> None:
    """Forward of student and teacher through torch.compile; files and figures are the plain module's."""
    settings = config(generations=2, compile=True)
    compiled = run(settings, out=tmp_path / "a", **own(model=deterministic))
    plain = run(config(generations=2), **own(model=deterministic))
    for a, b in zip(compiled.generations, plain.generations, strict=True):
        assert abs(a["test"]["nll"] - b["test"]["nll"]) < 1e-3  # fused kernels round otherwise, over 12 steps
    assert evaluate_run(tmp_path / "a", **own(model=deterministic)) == compiled.to_dict()
    with pytest.raises(Interrupted):
        run(config(compile=True), out=tmp_path / "b", should_stop=StopAt(20), **own())
    run(config(compile=True), out=tmp_path / "b", resume=True, **own())
    run(config(compile=True), out=tmp_path / "c", **own())
    assert footprint(tmp_path / "b") == footprint(tmp_path / "c")


# Evaluating anew


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    run(config(generations=3), out=path, **own())
    return path


def test_evaluate_run_gives_results_json_again(finished: Path) -> None:
    assert evaluate_run(finished, **own()) == json.loads((finished / "results.json").read_text())


def test_evaluate_chosen_members(finished: Path) -> None:
    said = evaluate_run(finished, members=[3, 0], **own())
    stored = json.loads((finished / "results.json").read_text())
    assert [r["generation"] for r in said["generations"]] == [3, 0]
    assert said["generations"][1] == stored["generations"][0]
    assert [(e["members"], e["average"]) for e in said["ensembles"]] == [([3, 0], "probabilities"), ([3, 0], "logits")]
    for entry in said["ensembles"]:
        check_figures(entry["test"])
    prefix = evaluate_run(finished, members=[1, 2], **own())
    assert prefix["ensembles"] == stored["ensembles"][:2]
    alone = evaluate_run(finished, members=[2], **own())
    assert alone["ensembles"][0]["test"] == stored["generations"][2]["test"]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([4], r"0\.\.3 here, got 4"),
        ([-1], "got -1"),
        ([1, 1], "different generations, got 1,1"),
        ([], "got none"),
        (["1"], "got '1'"),
        ([True], "got True"),
    ],
)
def test_members_that_are_none(finished: Path, members: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        evaluate_run(finished, members=members, **own())


def test_evaluate_what_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        evaluate_run(tmp_path, **own())
    with pytest.raises(Interrupted):
        run(config(), out=tmp_path / "a", should_stop=StopAt(3), **own())
    with pytest.raises(UserError, match=r"no generation of the run in .* is finished"):
        evaluate_run(tmp_path / "a", **own())
    run(config(), out=tmp_path / "a", resume=True, **own())
    file = tmp_path / "a" / "generation-2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"generation-2/model\.safetensors is cut short"):
        evaluate_run(tmp_path / "a", **own())
    evaluate_run(tmp_path / "a", members=[0, 1], **own())


def test_evaluate_the_finished_part_of_a_stopped_run(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(config(), out=tmp_path, should_stop=StopAt(STEPS + EPOCHS + 6), **own())
    stored = json.loads((tmp_path / "results.json").read_text())
    assert len(stored["generations"]) == 1
    assert evaluate_run(tmp_path, **own()) == stored
    assert without_times(stored)["generations"][0]["steps"] == STEPS
