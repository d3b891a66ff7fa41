"""What cannot be trained is one line, and leaves nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    BATCH,
    IMAGES,
    STEPS_PER_EPOCH,
    StopAt,
    config,
    footprint,
    network,
    own,
    samples,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ban_fast.config import Config, DataConfig, ModelConfig, OptimizerConfig
from ban_fast.errors import OptionError, UserError
from ban_fast.evaluation import RunDirectory
from ban_fast.training import Interrupted, evaluate_run, run
from ban_fast.training.evaluator import full_precision
from ban_fast.training.learner import Learner


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


class Moody(nn.Sequential):
    """Does something else in training than in evaluation."""

    def __init__(self, mood: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(nn.Flatten(), nn.Linear(36, 4))
        self.mood = mood

    def forward(self, x: torch.Tensor) -> Any:
        return self.mood(super().forward(x)) if self.training else super().forward(x)


@pytest.mark.parametrize(
    ("mood", "said"),
    [
        (lambda logits: (logits, logits), r"must return logits \[16, 4\] in training too, got tuple"),
        (lambda logits: logits[:, :3], r"must return logits \[16, 4\] in training too, got \[16, 3\]"),
        (lambda logits: logits[:8], r"must return logits \[16, 4\] in training too, got \[8, 4\]"),
        (torch.Tensor.detach, "no gradient in training: let it use neither no_grad nor detach"),
    ],
)
def test_what_a_network_does_in_training_alone(mood: Callable[[torch.Tensor], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(config(), **own(model=lambda: Moody(mood)))


def test_outputs_in_training_are_looked_at_once_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    check = Learner._check_logits
    monkeypatch.setattr(Learner, "_check_logits", lambda self, *given: (seen.append(self.number), check(self, *given)))
    run(config(generations=1, micro_batch_size=6), **own())
    assert seen == [0, 1]


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


PRECISIONS: Any = torch.backends
HANDLES = [
    PRECISIONS.cuda.matmul,
    PRECISIONS.mkldnn.matmul,
    PRECISIONS.mkldnn.conv,
    PRECISIONS.mkldnn.rnn,
    PRECISIONS.cudnn.conv,
    PRECISIONS.cudnn.rnn,
]
"""Where torch's newer settings of fp32's products are."""


@pytest.fixture
def precisions() -> Iterator[Callable[[], list[str]]]:
    """What is allowed now; afterwards it is as it was."""
    all_of_torch = PRECISIONS.fp32_precision
    before = [handle.fp32_precision for handle in HANDLES]
    yield lambda: [handle.fp32_precision for handle in HANDLES]
    PRECISIONS.fp32_precision = all_of_torch
    torch.set_float32_matmul_precision("highest")
    for handle, precision in zip(HANDLES, before, strict=True):
        handle.fp32_precision = precision


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("setting", ["nothing", "all", "products", "both", "older high", "older medium", "older tf32"])
def test_figures_are_computed_in_full_precision(setting: str, device: str, precisions: Callable[[], list[str]]) -> None:
    """Whatever a caller allowed, by torch's newer settings or by its older ones, and with it allowed again after."""
    if setting == "all":
        PRECISIONS.fp32_precision = "tf32"
    elif setting == "products":
        PRECISIONS.cuda.matmul.fp32_precision = "tf32"
        PRECISIONS.mkldnn.fp32_precision = "bf16"
    elif setting == "both":
        torch.set_float32_matmul_precision("high")
        PRECISIONS.mkldnn.matmul.fp32_precision = "bf16"
    elif setting == "older tf32":
        PRECISIONS.cuda.matmul.allow_tf32 = True
    elif setting.startswith("older"):
        torch.set_float32_matmul_precision(setting.split()[1])
    before = precisions()
    with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device(device)):
        inside = precisions()
        assert not PRECISIONS.cuda.matmul.allow_tf32  # raises, as a GPU's products would, where settings disagree
        assert (nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.float32) is (device == "cpu")
    assert {"ieee", "none"} >= set(inside if device == "cuda" else inside[:4])
    assert precisions() == before
    if setting.startswith("older"):
        assert torch.get_float32_matmul_precision() == ("medium" if setting == "older medium" else "high")


def test_a_run_where_a_caller_allowed_less(precisions: Callable[[], list[str]]) -> None:
    """By the newer settings: torch then refuses to say what the older one is."""
    PRECISIONS.fp32_precision = "tf32"
    settings = config()
    assert len(run(settings, **own()).generations) == settings.generations + 1


def test_without_momentum(tmp_path: Path) -> None:
    settings = config(optimizer=OptimizerConfig(lr=0.05, momentum=0.0, nesterov=False))
    run(settings, out=tmp_path / "a", **own())
    with pytest.raises(Interrupted):
        run(settings, out=tmp_path / "b", should_stop=StopAt(22), **own())
    run(settings, out=tmp_path / "b", resume=True, **own())
    assert footprint(tmp_path / "a") == footprint(tmp_path / "b")
