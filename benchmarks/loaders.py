"""`python -m benchmarks.loaders`: images a second of the loaders alone, on CIFAR's shapes, in memory or page cache.

Random crop, flip and normalisation to fp32, batches of 128, on as many threads as torch has:

- ours: `memory` (the default), `torch` and `ffcv`, which serve the same bits;
- torchvision: its transforms on PIL images, as its CIFAR datasets do, in a DataLoader whose workers stay alive;
- FFCV: its own transforms, compiled, on its own file of raw images.

A lap is an epoch, and nothing is done with its batches. Pixels are random: no loader minds. A minute on two cores.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ban_fast import data
from ban_fast.data import Augmentation, Split, StoredSplit, beton
from ban_fast.data.cifar import MEAN, STD
from ban_fast.data.dataset import Part
from ban_fast.data.folder import cores
from benchmarks import machine
from benchmarks.harness import Lap, interleave, quantiles

IMAGES, BATCH, ROUNDS = 25_600, 128, 5
PADDING = 4
OURS = ("memory", "torch", "ffcv")
TORCHVISION, FFCV = "torchvision + DataLoader", "FFCV's own pipeline"
TARGETS = {TORCHVISION: 5.0, FFCV: 1.5}
"""How many times as fast the loader in memory must be."""

Epochs = Callable[[int], Iterable[Tensor]]
"""The batches of images of an epoch, by its number."""
Record = dict[str, Any]


def measure(images: int = IMAGES, rounds: int = ROUNDS) -> Record:
    """Seconds an image of every loader that is there, round by round, in turn; and who is absent, and why."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loaders, absent = _loaders(images, folder, stack)
        for name, epochs in loaders.items():
            _check(name, epochs, images)
        laps, failures = interleave({name: _lap(epochs) for name, epochs in loaders.items()}, rounds)
    record: Record = {
        "images": images,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "workers": cores(),
        "seconds_per_image": laps,
        "images_per_s": {name: round(1 / quantiles(each)[1]) for name, each in laps.items()},
        "absent": absent | {name: f"{type(error).__name__}: {error}" for name, error in failures.items()},
    }
    record["targets"] = targets(record)
    return record


def targets(record: Record) -> list[Record]:
    """What the loader in memory is held to, and what it reached; None where that was not measured."""
    return [
        {"memory over": name, "times": speed_up(record, name), "at_least": least} for name, least in TARGETS.items()
    ]


def speed_up(record: Record, name: str) -> float | None:
    """How many times as many images a second the loader in memory serves; None where `name` is absent."""
    rates = record["images_per_s"]
    return round(rates["memory"] / rates[name], 2) if name in rates and "memory" in rates else None


def table(record: Record) -> str:
    """As Markdown."""
    lines = ["| loader | images/s | memory is faster by |", "|---|---:|---:|"]
    for name, rate in sorted(record["images_per_s"].items(), key=lambda each: -each[1]):
        lines.append(f"| {_title(name)} | {rate:,} | {speed_up(record, name)} x |")
    lines += [f"| {_title(name)} | absent: {reason} | |" for name, reason in record["absent"].items()]
    for target in record["targets"]:
        times, least = target["times"], target["at_least"]
        verdict = "not measured" if times is None else f"{times} x, {'met' if times >= least else 'missed'}"
        lines.append(f"\nmemory at least {least:g} x {target['memory over']}: {verdict}")
    return "\n".join(lines)


def _title(name: str) -> str:
    return f"ours, `--loader {name}`" if name in OURS else name


def _lap(epochs: Epochs) -> Lap:
    number = itertools.count()

    def lap() -> float:
        start = time.perf_counter()
        served = sum(len(images) for images in epochs(next(number)))
        return (time.perf_counter() - start) / served

    return lap


def _check(name: str, epochs: Epochs, images: int) -> None:
    """A warm epoch, whole and of the right shape."""
    served = 0
    for batch in epochs(0):
        assert batch.shape == (BATCH, 3, 32, 32), (name, batch.shape)
        assert batch.dtype == torch.float32, (name, batch.dtype)
        served += len(batch)
    assert served == images, (name, served)


def _loaders(images: int, folder: Path, stack: ExitStack) -> tuple[dict[str, Epochs], dict[str, str]]:
    assert images % BATCH == 0
    pixels = torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, ids = torch.arange(images) % 100, torch.arange(images)
    part = Part.of(pixels, labels)
    found: dict[str, Epochs] = {
        # First, while no other has started threads: its workers are forked.
        TORCHVISION: _torchvision(pixels),
        "memory": _ours(Split(pixels, labels, ids)),
        "torch": _ours(StoredSplit(part.read, part.shape, labels, ids)),
    }
    if (reason := beton.missing()) is not None:
        return found, dict.fromkeys(("ffcv", FFCV), reason)
    beton.write(folder / "ours.beton", part, "cifar")
    file = beton.Beton(folder / "ours.beton", part, "cifar", "")
    found["ffcv"] = _ours(StoredSplit(file.read, part.shape, labels, ids, file))
    found[FFCV] = _ffcv(pixels, folder / "theirs.beton", stack)
    return found, {}


def _ours(split: Split | StoredSplit) -> Epochs:
    loader = data.open_loader(
        split, batch_size=BATCH, mean=MEAN, std=STD, augmentation=Augmentation(padding=PADDING, fill="zero")
    )
    return lambda number: (batch.images for batch in loader.epoch(number))


def _torchvision(pixels: Tensor) -> Epochs:
    loader = torchvision_loader(pixels, torch.arange(len(pixels)) % 100, BATCH)
    return lambda number: (images for images, _ in loader)


def torchvision_loader(pixels: Tensor, labels: Tensor, batch_size: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """CIFAR's usual: torchvision's transforms on PIL images, in a worker a core; uint8 [N, 32, 32, 3], int64 [N]."""
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=PADDING),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]),
        ]
    )
    return DataLoader(
        _Pictures(pixels.numpy(), labels.tolist(), transform),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=cores(),
        persistent_workers=True,
    )


class _Pictures(Dataset[tuple[Tensor, int]]):
    """What torchvision's CIFAR datasets do for an index."""

    def __init__(
        self, pixels: "np.ndarray[Any, np.dtype[np.uint8]]", labels: list[int], transform: Callable[[Any], Tensor]
    ) -> None:
        self._pixels, self._labels, self._transform = pixels, labels, transform

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self._transform(Image.fromarray(self._pixels[index])), self._labels[index]


def _ffcv(pixels: Tensor, path: Path, stack: ExitStack) -> Epochs:
    threads = torch.get_num_threads()
    stack.callback(torch.set_num_threads, threads)  # FFCV sets it, on import too
    import numba
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, RandomTranslate, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    pictures = _Pictures(pixels.numpy(), (torch.arange(len(pixels)) % 100).tolist(), np.asarray)  # type: ignore[arg-type]
    DatasetWriter(str(path), {"image": RGBImageField(), "label": IntField()}).from_indexed_dataset(pictures)
    loader = Loader(
        str(path),
        batch_size=BATCH,
        num_workers=min(threads, numba.config.NUMBA_NUM_THREADS),
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={
            "image": [
                SimpleRGBImageDecoder(),
                RandomHorizontalFlip(),
                RandomTranslate(padding=PADDING),
                NormalizeImage(np.array(MEAN), np.array(STD), np.float32),
                ToTensor(),
                ToTorchImage(),
            ]
        },
    )
    torch.set_num_threads(threads)
    return lambda number: _images(loader)


def _images(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    for images, _ in loader:
        yield images


def main() -> None:
    """Measure, print the table, and write the record where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loaders", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write what was measured")
    path = parser.parse_args().json
    described = machine.describe("cpu")
    record = measure()
    print(table(record))
    if path is not None:
        machine.write(Path(path), json.dumps(described | {"loaders": record}, indent=1))


if __name__ == "__main__":
    main()
