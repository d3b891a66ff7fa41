"""The loaders of stored images: the same bits as from memory, from any batch on, and nothing left behind."""

import ctypes
import gc
import importlib.util
import itertools
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ban_fast import data
from ban_fast.data import Augmentation, Batch, Dataset, FFCVLoader, ImageLoader, MemoryLoader, TorchLoader, streamed
from ban_fast.data.cifar import CIFAR
from ban_fast.errors import UserError

TRAIN, TEST = 300, 40
HAS_FFCV = importlib.util.find_spec("ffcv") is not None
ffcv_only = pytest.mark.skipif(not HAS_FFCV, reason="FFCV is not installed")
KINDS = ["torch", pytest.param("ffcv", marks=ffcv_only)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_cifar: Callable[..., Path]) -> Path:
    """CIFAR-100 of 300 images in each file, with FFCV's files of it."""
    root = tmp_path_factory.mktemp("streamed")
    make_cifar(CIFAR["cifar100"], root, TRAIN)
    data.prepare_ffcv("cifar100", root)
    return root


@pytest.fixture(scope="module")
def datasets(root: Path) -> dict[str, Dataset[Any]]:
    """The dataset by loader: 240 images to train on, 60 to validate, 300 to test."""
    found: dict[str, Dataset[Any]] = {"memory": data.load("cifar100", directory=root, val_fraction=0.2)}
    for kind in ("torch", "ffcv") if HAS_FFCV else ("torch",):
        found[kind] = data.load_stored("cifar100", ffcv=kind == "ffcv", directory=root, val_fraction=0.2)
    return found


def opened(dataset: Dataset[Any], part: str = "train", **options: Any) -> ImageLoader[Any]:
    options = {"batch_size": 64, "augmentation": Augmentation(), "seed": 3, **options}
    return data.open_loader(getattr(dataset, part), mean=dataset.mean, std=dataset.std, **options)


def same(ours: Iterator[Batch], others: Iterator[Batch]) -> int:
    """How many batches there are, every one of them equal to the last bit."""
    count = 0
    for batch, other in zip(ours, others, strict=True):
        for a, b in zip(batch, other, strict=True):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            assert torch.equal(a, b)
        count += 1
    return count


def test_a_split_opens_its_own_loader(datasets: dict[str, Dataset[Any]]) -> None:
    kinds = {"memory": MemoryLoader, "torch": TorchLoader, "ffcv": FFCVLoader}
    for name, dataset in datasets.items():
        assert type(opened(dataset)) is kinds[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"drop_last": False, "channels_last": True},
        {"dtype": torch.bfloat16, "augmentation": Augmentation(fill="zero", flip=False)},
        {"augmentation": None, "drop_last": False, "batch_size": 7},
        {"batch_size": 1000},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_the_same_bits_as_from_memory(datasets: dict[str, Dataset[Any]], kind: str, options: dict[str, Any]) -> None:
    memory, streamed = opened(datasets["memory"], **options), opened(datasets[kind], **options)
    assert streamed.steps_per_epoch == memory.steps_per_epoch
    for epoch in (0, 5):
        assert same(streamed.epoch(epoch), memory.epoch(epoch)) == memory.steps_per_epoch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["validation", "test"])
def test_the_same_bits_to_evaluate(datasets: dict[str, Dataset[Any]], kind: str, part: str) -> None:
    options: dict[str, Any] = {"augmentation": None, "shuffle": False, "drop_last": False}
    memory, streamed = (opened(datasets[each], part, **options) for each in ("memory", kind))
    assert same(streamed.epoch(0), memory.epoch(0)) == memory.steps_per_epoch


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_from_any_batch_on(datasets: dict[str, Dataset[Any]], kind: str) -> None:
    memory, streamed = (opened(datasets[each], drop_last=False) for each in ("memory", kind))
    for start in range(5):
        assert same(streamed.epoch(2, start), memory.epoch(2, start)) == 4 - start


@pytest.mark.parametrize("kind", KINDS)
def test_two_epochs_at_once(datasets: dict[str, Dataset[Any]], kind: str) -> None:
    memory, streamed = opened(datasets["memory"]), opened(datasets[kind])
    one, other = streamed.epoch(0), streamed.epoch(1)
    expected = memory.epoch(0), memory.epoch(1)
    for _ in range(memory.steps_per_epoch):
        for ours, theirs in zip((one, other), expected, strict=True):
            assert torch.equal(next(ours).images, next(theirs).images)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_is_left_as_it_was(datasets: dict[str, Dataset[Any]], kind: str) -> None:
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)  # another number than any default here
        for _ in opened(datasets[kind]).epoch(0):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.random.get_rng_state(), before)


def belongings() -> dict[str, int]:
    """What a leak would add to, counted: threads of Python's and of the system's, children, open files."""
    gc.collect()
    return {
        "python threads": threading.active_count(),
        "threads": len(os.listdir("/proc/self/task")),
        "children": len(multiprocessing.active_children()),
        "files": len(os.listdir("/proc/self/fd")),
    }


def left_over(before: dict[str, int]) -> dict[str, int]:
    """What is there beyond `before`: threads of closed queues end by themselves, a moment later. What is still there
    after a minute stays."""
    deadline = time.monotonic() + 60
    while True:
        found = {name: count for name, count in belongings().items() if count > before[name]}
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc to count threads and files in")
@pytest.mark.parametrize("kind", KINDS)
def test_epochs_left_early_leave_nothing_behind(datasets: dict[str, Dataset[Any]], kind: str) -> None:
    loader = opened(datasets[kind])

    def leave(times: int) -> None:
        for epoch in range(times):
            for step, _ in enumerate(loader.epoch(epoch)):
                if step == epoch % 3:
                    break

    leave(3)  # imports, compiled code, allocators' pools
    before = belongings()
    leave(5)
    assert left_over(before) == {}
    for epoch in range(2):
        assert len(list(loader.epoch(epoch))) == loader.steps_per_epoch
    assert left_over(before) == {}


class Mallinfo(ctypes.Structure):
    """What glibc says of its memory, in bytes."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc 2.33 that counts the memory in use")
@pytest.mark.parametrize("kind", KINDS)
def test_epochs_left_early_hold_no_memory(datasets: dict[str, Dataset[Any]], kind: str) -> None:
    """Of what was allocated: pages of the process stay with it for a while when what was in them is freed."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Mallinfo

    def in_use() -> int:
        gc.collect()
        info = ask()
        return int(info.uordblks + info.hblkhd)

    loader = opened(datasets[kind], batch_size=200)
    for epoch in range(3):
        next(loader.epoch(epoch))
    before = in_use()
    for epoch in range(8):
        next(loader.epoch(epoch))
    # A batch is 2.5 MB, and FFCV reads 3 MB ahead: kept, they would be 20 MB and more.
    assert in_use() - before < 8e6


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_in_hand_can_be_dropped_unstarted(datasets: dict[str, Dataset[Any]], kind: str) -> None:
    before = set(threading.enumerate()), set(multiprocessing.active_children())
    epoch = opened(datasets[kind]).epoch(0)
    del epoch
    assert set(threading.enumerate()) <= before[0]
    assert set(multiprocessing.active_children()) <= before[1]


def check_no_child_stays() -> None:
    for child in multiprocessing.active_children():
        child.join()  # torch gives it 5 s to end


class TestTorchLoader:
    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_any_number_of_workers(self, datasets: dict[str, Dataset[Any]], workers: int) -> None:
        loader = opened(datasets["torch"])
        assert isinstance(loader, TorchLoader)
        loader.workers = workers
        assert same(loader.epoch(1), opened(datasets["memory"]).epoch(1)) == 3

    def test_a_temporary_directory_with_too_long_a_path_is_one_line(
        self, datasets: dict[str, Dataset[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Its workers could make no socket there, and would be waited for forever."""
        place = tmp_path / ("x" * 100)
        monkeypatch.setattr(streamed, "get_temp_dir", lambda: str(place / "pymp-12345678"))
        loader = opened(datasets["torch"])
        assert isinstance(loader, TorchLoader)
        with pytest.raises(UserError, match=f"^the path of {re.escape(str(place))} is too long .*TMPDIR"):
            list(loader.epoch(0))
        loader.workers = 0
        assert len(list(loader.epoch(0))) == 3

    def test_workers_heed_no_stop_signal(self, datasets: dict[str, Dataset[Any]]) -> None:
        # Ctrl-C reaches them too, and the training loop wants to end its step and save.
        epoch = opened(datasets["torch"], batch_size=16).epoch(0)
        next(epoch)
        for child in multiprocessing.active_children():
            for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(child.pid or 0, stop)
        assert len(list(epoch)) == 240 // 16 - 1

    def test_nor_do_workers_that_have_only_begun(
        self, datasets: dict[str, Dataset[Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(streamed, "_leave_signals_to_the_parent", lambda worker: time.sleep(0.5 * worker))
        epoch = opened(datasets["torch"], batch_size=16).epoch(0)
        next(epoch)
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGINT)
        assert len(list(epoch)) == 240 // 16 - 1

    def test_a_killed_worker_is_one_line(
        self, datasets: dict[str, Dataset[Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Killed while it reads its second batch, where it holds none of the locks that processes share."""
        reading, told = os.pipe()
        read, calls = streamed._Reading.__getitem__, itertools.count()

        def read_once(self: Any, ids: Any) -> Any:
            if next(calls) > 0:
                os.write(told, b"!")
                time.sleep(600)
            return read(self, ids)

        monkeypatch.setattr(streamed._Reading, "__getitem__", read_once)
        loader = opened(datasets["torch"], batch_size=4)
        assert isinstance(loader, TorchLoader)
        loader.workers = 1
        before = set(multiprocessing.active_children())
        epoch = loader.epoch(0)
        next(epoch)
        (worker,) = set(multiprocessing.active_children()) - before
        assert os.read(reading, 1) == b"!"

        def go_on_without_it() -> None:
            worker.kill()
            list(epoch)

        # torch's handler of SIGCHLD raises wherever this process is by then: RuntimeError, where not in the loader.
        with pytest.raises((UserError, RuntimeError), match=r"a process that reads images failed|killed"):
            go_on_without_it()
        epoch.close()
        check_no_child_stays()
        os.close(reading)
        os.close(told)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder of 2 x 20 images to train on and 2 x 4 to test, of many sizes."""
    for part, count in (("train", 20), ("test", 4)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.radial_gradient("L").resize((20 + i, 30 - i)).convert("RGB")
                image.putpixel((i, label), (200, i, 10 * label))
                image.save(tmp_path / "pets" / part / name / f"{i:02}.png")
    return tmp_path / "pets"


@pytest.mark.parametrize("kind", KINDS)
def test_folders(pets: Path, kind: str) -> None:
    options: dict[str, Any] = {"image_size": 12, "val_fraction": 0.25, "limit_train": 21}
    memory = data.load(pets, **options)
    if kind == "ffcv":
        data.prepare_ffcv(str(pets), image_size=12)
    stored = data.load_stored(pets, ffcv=kind == "ffcv", **options)
    assert (stored.mean, stored.std, stored.classes) == (memory.mean, memory.std, memory.classes)
    for part in ("train", "validation", "test"):
        ours, theirs = (opened(each, part, batch_size=5, drop_last=False) for each in (stored, memory))
        assert same(ours.epoch(1), theirs.epoch(1)) == ours.steps_per_epoch


def test_a_damaged_image_is_one_line_from_a_worker_too(pets: Path) -> None:
    stored = data.load_stored(pets)
    (pets / "train" / "dog" / "07.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"^cannot read .*07\.png as an image \(.*\); replace or remove it$"):
        list(opened(stored).epoch(0))
    check_no_child_stays()


@ffcv_only
def test_what_fails_in_ffcvs_thread_is_raised(
    datasets: dict[str, Dataset[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ban_fast.data import ffcv_reader

    loader = opened(datasets["ffcv"], batch_size=16)
    list(loader.epoch(0))
    pipeline = ffcv_reader._Epoch.run_pipeline

    def fail(self: Any, number: int, *rest: Any) -> Any:
        if number == 2:
            raise MemoryError("no room")
        return pipeline(self, number, *rest)

    monkeypatch.setattr(ffcv_reader._Epoch, "run_pipeline", fail)
    epoch = loader.epoch(0)
    next(epoch), next(epoch)
    with pytest.raises(MemoryError, match="no room"):
        next(epoch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_real_images(real_data: Path, tmp_path: Path, kind: str) -> None:
    # Links, so that the files of FFCV's are not written among the real ones.
    (tmp_path / "cifar-100-python").mkdir()
    for file in ("train", "test", "meta"):
        (tmp_path / "cifar-100-python" / file).symlink_to(real_data / "cifar-100-python" / file)
    memory = data.load("cifar100", directory=tmp_path)
    if kind == "ffcv":
        data.prepare_ffcv("cifar100", tmp_path)
    stored = data.load_stored("cifar100", ffcv=kind == "ffcv", directory=tmp_path)
    ours, theirs = (opened(each, batch_size=128) for each in (stored, memory))
    assert same(ours.epoch(0), theirs.epoch(0)) == 390


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_on_the_gpu(datasets: dict[str, Dataset[Any]], kind: str) -> None:
    memory, streamed = opened(datasets["memory"]), opened(datasets[kind], device="cuda")
    for epoch in range(3):
        for ours, theirs in zip(streamed.epoch(epoch), memory.epoch(epoch), strict=True):
            # Work that keeps the device busy while the next batches are copied over.
            torch.randn(2000, 2000, device="cuda") @ torch.randn(2000, 2000, device="cuda")
            assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))
