"""What a run learns: the data as loaders, and the network every generation is, on the training device."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from .. import data, models
from ..config import Config, DataConfig, ModelConfig
from ..data import (
    Augmentation,
    Dataset,
    KeyedLoader,
    Loader,
    Split,
    StoredSplit,
    TensorLoader,
    WrappedDataLoader,
    hashing,
    open_loader,
)
from ..errors import OptionError, UserError, first_line
from .distributed import ALONE, Ranks
from .evaluator import Evaluator, ImageEvaluator
from .parallel import check_shares
from .reader import Forward, Reader
from .seeds import derived_seed, isolated, seed_everything

CUSTOM = "custom"
"""The name of a network or of data that the caller brought along."""
EVALUATION_BATCH = 256
"""Images at a time where nothing is trained. Fixed: figures computed anew must meet the same arithmetic."""

_HASHED_AT_ONCE = 1024
"""Images; the hash of images that are stored must be that of the same images in memory."""

Samples = tuple[Tensor, Tensor] | DataLoader[Any]
"""A user's own data: (x [N, ...], y [N]), or a DataLoader of such batches."""
ModelFactory = Callable[[], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Views:
    """The finite family of all that training shows of its samples: what a teacher's outputs can be kept for."""

    samples: int
    """Sample ids are below this."""
    each: int
    """Views of a sample: `Batch.views` is below this."""
    description: str
    """How the views are made."""
    fingerprint: Callable[[], str]
    """A hash of the samples and of how they are normalised; reads all of them."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data and network of a run."""

    device: torch.device
    train: Callable[[int], Loader]
    """The loader of a generation's training batches, from the seed of their order and views."""
    evaluator: Callable[[int, Callable[[], bool]], Evaluator]
    """Of a run with this seed, which asks the function whether to stop."""
    reader: Callable[[nn.Module], Reader]
    """How a network is shown what the loader serves."""
    factory: ModelFactory
    channels_last: bool
    shape: dict[str, Any]
    """Counts of images and classes, the shape of a sample, the network's trainable parameters; in environment.json."""
    structure: str
    """A hash of the names and shapes of the network's tensors."""
    has_batch_norm: bool
    """Whether the network's training depends on which images share a batch."""
    views: Views | None
    """None where what will be shown is not known: a DataLoader's samples are what it makes of them."""
    unit: str = "images"
    """What the rows of a batch are, in speeds."""
    rows_per_step: int
    """Of them in a batch of training."""
    is_fixed: bool = False
    """Whether every epoch serves the same batches in the same order: a text's windows."""
    loss_factor: float = 1.0
    """What a batch's mean loss is multiplied by for its gradient."""
    ranks: Ranks = ALONE
    """The processes that share the batches; the loader serves this one's part of each."""

    @property
    def rows_per_forward(self) -> int:
        """Of them, the most that one rank has."""
        return -(-self.rows_per_step // self.ranks.size)

    def network(self, generation_seed: int) -> nn.Module:
        """A fresh network, from draws of its own generation's seed."""
        seed_everything(derived_seed(generation_seed, "init"), self.device)
        return build(self.factory, self.shape, self.device, self.channels_last)


def training_device(name: str) -> torch.device:
    """The device that a configuration's `device` means here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("device", "there is no CUDA device here; use cpu or auto")
    return torch.device(name)


def with_own(config: Config, model: ModelFactory | None, train: Samples | None, others: list[Samples | None]) -> Config:
    """The configuration on record where the caller brings a network or data of their own."""
    if train is None and any(other is not None for other in others):
        raise UserError("test= and validation= go with train=: pass the training data too")
    if isinstance(model, nn.Module) or (model is not None and not callable(model)):
        raise UserError(
            f"model= must be a function that builds a new network for each generation, got a {type(model).__name__}; "
            "lambda: YourNetwork(...) is one"
        )
    if model is not None:
        config = dataclasses.replace(config, model=ModelConfig(name=CUSTOM))
    elif config.model.name == CUSTOM:
        raise UserError("this configuration's network was the caller's own: pass its factory as model=")
    if train is not None:
        for field in dataclasses.fields(DataConfig):
            value = getattr(config.data, field.name)
            if field.name != "name" and value != field.default and (field.name, value) != ("augmentation", "none"):
                raise OptionError(f"data.{field.name}", "is for ban_fast's own datasets, not for data passed as train=")
        config = dataclasses.replace(config, data=DataConfig(name=CUSTOM))
    elif config.data.name == CUSTOM:
        raise UserError("this configuration's data were the caller's own: pass them as train= and test=")
    return config


def image_task(
    config: Config,
    device: torch.device,
    *,
    model: ModelFactory | None = None,
    train: Samples | None = None,
    test: Samples | None = None,
    validation: Samples | None = None,
    ranks: Ranks = ALONE,
) -> Task:
    """Read the data, build the network once to see that it fits them, and change nothing on disk."""
    if train is None:
        dataset = _load(config.data)
        classes, exact = len(dataset.classes), True
        train_loader = _dataset_loader(config, dataset, device, ranks)
        views: Views | None = _dataset_views(config, dataset)
        evaluation = _dataset_evaluation(config, dataset, device)
    else:
        classes, exact = _own_classes([train, test, validation]), False
        if isinstance(train, DataLoader) and not ranks.is_alone:
            raise UserError(
                "a DataLoader's order is its own affair, and several processes need the same: pass tensors, use one of "
                "ban_fast's datasets, or train in one process"
            )
        train_loader = _own_loader(config, train, device, shuffle=True, classes=None)
        views = _own_views(train)
        evaluation = {}
    sample = train_loader(0)
    shape = sample.sample_shape
    factory = model or image_factory(config.model, classes, shape)
    with isolated(device, seed=0):
        network = placed(factory(), device, config.channels_last)
        width = _output_width(network, shape, device)
    if trainable_parameters(network) == 0:
        raise UserError("the network has no parameter that requires a gradient: nothing to train")
    if (width != classes) if exact else (width < classes):
        raise UserError(f"the network's output has {width} classes, the data have {classes}")
    if train is not None:
        train_loader = _own_loader(config, train, device, shuffle=True, classes=width, ranks=ranks)
        evaluation = {
            name: _own_loader(config, samples, device, shuffle=False, classes=width)(0)
            for name, samples in (("test", test), ("validation", validation))
            if samples is not None
        }
        for name, loader in evaluation.items():
            if loader.sample_shape != shape:
                raise UserError(
                    f"{name} samples have shape {list(loader.sample_shape)}, training samples {list(shape)}"
                )
    if config.optimizer.schedule == "plateau" and ImageEvaluator.validation not in evaluation:
        raise OptionError(
            "optimizer.schedule", "plateau looks at a validation split: set --val-fraction, or validation="
        )
    rows_per_step = _batch_size(config, sample)
    check_shares(config, rows_per_step, ranks)
    return Task(
        device=device,
        train=train_loader,
        evaluator=lambda seed, should_stop: ImageEvaluator(evaluation, device, seed, should_stop, ranks),
        reader=Forward,
        factory=factory,
        channels_last=config.channels_last,
        shape={
            "sample_shape": list(shape),
            "classes": width,
            "steps_per_epoch": sample.steps_per_epoch,
            "train_images": _count(sample),
            **{f"{name}_images": _count(loader) for name, loader in evaluation.items()},
            "parameters": trainable_parameters(network),
        },
        structure=structure(network),
        has_batch_norm=any(isinstance(module, _BatchNorm) for module in network.modules()),
        views=views,
        rows_per_step=rows_per_step,
        ranks=ranks,
    )


def build(factory: ModelFactory, shape: dict[str, Any], device: torch.device, channels_last: bool) -> nn.Module:
    """A network on its device, its lazy layers, if it has some, given the shapes of the data's."""
    network = placed(factory(), device, channels_last)
    if any(nn.parameter.is_lazy(parameter) for parameter in network.parameters()):
        _output_width(network, tuple(shape["sample_shape"]), device)
    return network


def trainable_parameters(network: nn.Module) -> int:
    """How many numbers training changes."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def _load(config: DataConfig) -> Dataset[Any]:
    options: dict[str, Any] = {
        "directory": config.directory,
        "image_size": config.image_size,
        "val_fraction": config.val_fraction,
        "limit_train": config.limit_train,
        "limit_test": config.limit_test,
    }
    if config.loader == "memory":
        return data.load(config.name, **options)
    return data.load_stored(config.name, ffcv=config.loader == "ffcv", **options)


def _dataset_loader(
    config: Config, dataset: Dataset[Any], device: torch.device, ranks: Ranks
) -> Callable[[int], Loader]:
    split = _on_device(dataset.train, device)
    augmentation = _augmentation(config.data, dataset)

    def loader(seed: int) -> Loader:
        return open_loader(
            split,
            batch_size=config.batch_size,
            mean=dataset.mean,
            std=dataset.std,
            seed=seed,
            device=device,
            augmentation=augmentation,
            channels_last=config.channels_last,
            shard=ranks.shard,
        )

    return loader


def _dataset_views(config: Config, dataset: Dataset[Any]) -> Views:
    split: Split | StoredSplit = dataset.train
    augmentation = _augmentation(config.data, dataset)
    return Views(
        samples=int(split.sample_ids.max()) + 1,
        each=1 if augmentation is None else augmentation.views,
        description="the images themselves" if augmentation is None else str(augmentation),
        fingerprint=lambda: hash_of(
            itertools.chain(split.chunks(_HASHED_AT_ONCE), [split.sample_ids]), f"{dataset.mean} {dataset.std}"
        ),
    )


def _own_views(samples: Samples) -> Views | None:
    """Of a user's tensors: each sample is shown as it is."""
    if isinstance(samples, DataLoader):
        return None
    x, y = _tensors(samples)
    return Views(
        samples=len(y), each=1, description="the samples themselves", fingerprint=lambda: hash_of([x], "as they are")
    )


def hash_of(tensors: Iterable[Tensor], text: str) -> str:
    """Of their types, shapes and bytes, and a text."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for tensor in tensors:  # one at a time: they may be read from files
        hashing.add(digest, tensor)
    return digest.hexdigest()


def _dataset_evaluation(config: Config, dataset: Dataset[Any], device: torch.device) -> dict[str, Loader]:
    return {
        name: open_loader(
            _on_device(split, device),
            batch_size=EVALUATION_BATCH,
            mean=dataset.mean,
            std=dataset.std,
            device=device,
            shuffle=False,
            drop_last=False,
            channels_last=config.channels_last,
        )
        for name, split in (("test", dataset.test), ("validation", dataset.validation))
        if split is not None
    }


def _augmentation(config: DataConfig, dataset: Dataset[Any]) -> Augmentation | None:
    if config.augmentation == "none":
        return None
    flip = dataset.flip if config.augmentation == "auto" else config.augmentation == "crop+flip"
    return Augmentation(padding=dataset.padding, flip=flip, fill="reflect" if config.padding == "reflect" else "zero")


def _on_device(split: Split | StoredSplit, device: torch.device) -> Split | StoredSplit:
    """Images in memory are moved once: the loaders of all generations share them."""
    if isinstance(split, StoredSplit):
        return split
    return Split(split.images.to(device), split.labels.to(device), split.sample_ids.to(device))


def _own_loader(
    config: Config,
    samples: Samples,
    device: torch.device,
    *,
    shuffle: bool,
    classes: int | None,
    ranks: Ranks = ALONE,
) -> Callable[[int], Loader]:
    if isinstance(samples, DataLoader):
        wrapped = WrappedDataLoader(samples, device=device, channels_last=config.channels_last, num_classes=classes)
        return lambda seed: wrapped
    x, y = _tensors(samples)
    x = x.to(device)
    return lambda seed: TensorLoader(
        x,
        y,
        batch_size=config.batch_size if shuffle else EVALUATION_BATCH,
        seed=seed,
        device=device,
        shuffle=shuffle,
        drop_last=shuffle,
        channels_last=config.channels_last,
        num_classes=classes,
        shard=ranks.shard,
    )


def _own_classes(sources: list[Samples | None]) -> int:
    """The least number of classes that the labels of the tensors need; 1 where only DataLoaders know them."""
    labels = [
        _tensors(samples)[1] for samples in sources if samples is not None and not isinstance(samples, DataLoader)
    ]
    return max([int(y.max()) + 1 for y in labels if len(y)], default=1)


def _tensors(samples: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(samples, (tuple, list)) and len(samples) == 2 and all(isinstance(t, Tensor) for t in samples)):
        got = (
            [type(part).__name__ for part in samples] if isinstance(samples, (tuple, list)) else type(samples).__name__
        )
        raise UserError(f"data must be two tensors (x, y) or a DataLoader, got {got}; torch.as_tensor makes tensors")
    return samples[0], samples[1]


def image_factory(config: ModelConfig, classes: int, shape: tuple[int, ...]) -> ModelFactory:
    """The factory of a network of images of that shape, [C, H, W]."""
    if len(shape) != 3:
        raise UserError(
            f"{config.name} takes images [C, H, W], got samples of shape {list(shape)}; pass your own model="
        )
    for known in ("name", "num_classes"):
        if known in config.options:
            raise OptionError("model.options", f"{known} is not an option: it is known already; leave it out")
    options = {"in_channels": shape[0], **config.options}
    if models.needs_image_size(config.name):
        options.setdefault("image_size", shape[1])
    return lambda: models.create(config.name, classes, **options)


def placed(network: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """What a factory returned, on its device; UserError if that is no network."""
    if not isinstance(network, nn.Module):
        raise UserError(f"model= must return a torch.nn.Module, got {type(network).__name__}")
    if channels_last:
        return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
    return network.to(device)


@torch.no_grad()
def _output_width(network: nn.Module, shape: tuple[int, ...], device: torch.device) -> int:
    """C of the logits [B, C], by trying the network on two blank samples."""
    blank = torch.zeros(2, *shape, device=device)
    try:
        logits = network.eval()(blank)
    except UserError:
        raise
    except Exception as error:  # as libraries' networks see fit: RuntimeError, AssertionError (timm), ValueError, more
        raise UserError(f"the network does not take samples of shape {list(shape)}: {first_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"the network must return logits [B, classes], got {got} for 2 samples")
    return logits.shape[1]


def _count(loader: Loader) -> int | None:
    return len(loader) if isinstance(loader, KeyedLoader) else None


def _batch_size(config: Config, loader: Loader) -> int:
    """Samples of a batch of training; of a DataLoader as far as it says."""
    if isinstance(loader, WrappedDataLoader):
        return loader.batch_size or config.batch_size
    return min(config.batch_size, _count(loader) or config.batch_size)


def structure(network: nn.Module) -> str:
    """A hash of the names and shapes of a network's tensors."""
    shapes = [
        f"{name} {list(tensor.shape)}" for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)
    ]
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()
