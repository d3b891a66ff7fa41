"""What a run makes of its settings: objectives, step limits, splits, precision, users' own data, networks by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    BATCH,
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
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ban_fast.config import Config, DataConfig, ModelConfig, OptimizerConfig, TeacherConfig
from ban_fast.errors import OptionError, UserError
from ban_fast.evaluation import RunDirectory
from ban_fast.training import Interrupted, evaluate_run, run
from ban_fast.training.optim import learning_rate
from ban_fast.training.teacher import fingerprint


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
    results = run(config(batch_size=1000, teacher=TeacherConfig(mode="live")), **own())
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
    mixed = run(config(epochs=8, amp=amp, teacher=TeacherConfig(mode="live")), **own())
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
    assert caught.value.field == "step"
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
