"""The in-memory loader: one run of numbers, however it is cut into batches."""

import gc
import itertools
import weakref

import pytest
import torch
from torch import Tensor

from ban_fast.data import Augmentation, Batch, MemoryLoader, Split
from ban_fast.data.augment import Normalizer
from ban_fast.errors import UserError

MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)


def split_of(n: int, size: int = 32, first: int = 0) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n) % 10, torch.arange(n) + first)


def loader_of(split: Split, **options: object) -> MemoryLoader:
    options = {"batch_size": 128, "augmentation": Augmentation(), "seed": 3, "mean": MEAN, "std": STD, **options}
    return MemoryLoader(split, **options)  # type: ignore[arg-type]


def joined(batches: list[Batch]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("fill", ["reflect", "zero"])
def test_same_bits_at_every_batch_size(fill: str, channels_last: bool, dtype: torch.dtype) -> None:
    # 301 leaves a last batch of 0, 0, 45 and 301 samples; 1 and 7 end inside every vector and thread's share.
    split = split_of(301)
    epochs = [
        joined(
            list(
                loader_of(
                    split,
                    batch_size=size,
                    drop_last=False,
                    channels_last=channels_last,
                    dtype=dtype,
                    augmentation=Augmentation(fill=fill),  # type: ignore[arg-type]
                ).epoch(5)
            )
        )
        for size in (1, 7, 128, 1000)
    ]
    for other in epochs[1:]:
        for a, b in zip(epochs[0], other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_at_every_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    wanted = joined(list(loader_of(split_of(300)).epoch(1)))
    try:
        torch.set_num_threads(threads)
        got = joined(list(loader_of(split_of(300)).epoch(1)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_each_sample_shows_the_view_that_its_index_says() -> None:
    split, augmentation = split_of(300), Augmentation()
    normalise = Normalizer(MEAN, STD, 32, device=torch.device("cpu"))
    for batch in loader_of(split, drop_last=False).epoch(2):
        wanted = normalise(augmentation.apply(split.images[batch.sample_ids], batch.views))
        assert torch.equal(batch.images, wanted)
        assert torch.equal(batch.labels, split.labels[batch.sample_ids])


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_start_is_the_tail_of_the_epoch(start: int, drop_last: bool) -> None:
    loader = loader_of(split_of(300), batch_size=70, drop_last=drop_last)
    whole = list(loader.epoch(4))
    assert len(whole) == loader.steps_per_epoch == (4 if drop_last else 5)
    tail = list(loader.epoch(4, start))
    assert len(tail) == len(whole) - start
    for a, b in zip(whole[start:], tail, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_epoch_refuses_a_start_that_is_not_there() -> None:
    loader = loader_of(split_of(300))
    assert list(loader.epoch(0, 2)) == []
    with pytest.raises(ValueError, match="got 0 and 3"):
        loader.epoch(0, 3)
    with pytest.raises(ValueError, match="got -1 and 0"):
        loader.epoch(-1)


def test_an_epoch_serves_every_sample_once_in_an_order_of_its_own() -> None:
    loader = loader_of(split_of(300), batch_size=50)
    orders = [joined(list(loader.epoch(epoch)))[2] for epoch in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(300))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(orders, 2))
    again = joined(list(loader_of(split_of(300), batch_size=50).epoch(1)))[2]
    assert torch.equal(again, orders[1])
    other_seed = joined(list(loader_of(split_of(300), batch_size=50, seed=4).epoch(1)))[2]
    assert not torch.equal(other_seed, orders[1])


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"augmentation": None}, {"drop_last": False}])
def test_what_is_shown_is_known_without_the_images(options: dict[str, object]) -> None:
    """300 samples in batches of 70, of which drop_last leaves 20 out: another 20 in each epoch."""
    loader = loader_of(split_of(300), batch_size=70, **options)
    for epoch, steps in itertools.product((0, 3), (1, loader.steps_per_epoch)):
        served = list(itertools.islice(loader.epoch(epoch), steps))
        shown = torch.stack(loader.shown(epoch, steps), 1)
        wanted = torch.cat([torch.stack((batch.sample_ids, batch.views), 1) for batch in served])
        assert sorted(shown.tolist()) == sorted(wanted.tolist())


def test_views_change_with_the_epoch_and_the_seed() -> None:
    def views(seed: int, epoch: int) -> Tensor:
        batch = next(loader_of(split_of(300), batch_size=300, seed=seed).epoch(epoch))
        return batch.views[batch.sample_ids.argsort()]

    base = views(3, 0)
    # 300 draws of 162 views agree in 1.9 places on average.
    assert (base == views(3, 1)).sum() < 12
    assert (base == views(4, 0)).sum() < 12
    assert torch.equal(base, views(3, 0))


def test_a_sample_looks_the_same_in_a_subset() -> None:
    split = split_of(300)
    chosen = torch.arange(0, 300, 3)
    subset = Split(split.images[chosen], split.labels[chosen], split.sample_ids[chosen])
    images, _, ids, views = joined(list(loader_of(split, batch_size=60).epoch(1)))
    some_images, _, some_ids, some_views = joined(list(loader_of(subset, batch_size=50).epoch(1)))
    kept = ids % 3 == 0
    assert torch.equal(ids[kept], some_ids)
    assert torch.equal(views[kept], some_views)
    assert torch.equal(images[kept], some_images)


def test_the_last_part_of_a_batch_is_dropped_or_served() -> None:
    assert [len(b.labels) for b in loader_of(split_of(300)).epoch(0)] == [128, 128]
    assert [len(b.labels) for b in loader_of(split_of(300), drop_last=False).epoch(0)] == [128, 128, 44]
    assert [len(b.labels) for b in loader_of(split_of(256), drop_last=False).epoch(0)] == [128, 128]


@pytest.mark.parametrize("drop_last", [False, True])
def test_fewer_samples_than_a_batch_are_one_batch(drop_last: bool) -> None:
    loader = loader_of(split_of(5), drop_last=drop_last)
    assert loader.steps_per_epoch == 1
    assert [len(b.labels) for b in loader.epoch(0)] == [5]


def test_evaluation_serves_the_images_themselves_in_their_order() -> None:
    split = split_of(300, first=1000)
    loader = loader_of(split, augmentation=None, shuffle=False, drop_last=False)
    images, labels, ids, views = joined(list(loader.epoch(0)))
    wanted = Normalizer(MEAN, STD, 32, device=torch.device("cpu"))(split.images)
    assert torch.equal(images, wanted)
    assert torch.equal(labels, split.labels)
    assert torch.equal(ids, split.sample_ids)
    assert views.eq(0).all()


def test_grey_images() -> None:
    split = Split(torch.arange(128, dtype=torch.uint8).view(2, 8, 8, 1), torch.tensor([0, 1]), torch.arange(2))
    loader = MemoryLoader(split, batch_size=2, mean=(100.0,), std=(50.0,), shuffle=False)
    assert loader.sample_shape == (1, 8, 8)
    assert torch.equal(next(loader.epoch(0)).images.view(-1), (torch.arange(128) - 100.0) / 50.0)


def test_what_a_loader_tells() -> None:
    loader = loader_of(split_of(300))
    assert loader.exact_resume
    assert len(loader) == 300
    assert loader.sample_shape == (3, 32, 32)
    batch = next(loader.epoch(0))
    assert batch.images.dtype == torch.float32
    assert {t.dtype for t in batch[1:]} == {torch.int64}


def test_images_stay_bytes_and_are_not_copied() -> None:
    split = split_of(300)
    loader = loader_of(split, drop_last=False)
    list(loader.epoch(0))
    own = {t.untyped_storage().data_ptr() for t in (split.images, split.labels, split.sample_ids)}
    parts = [loader, *(v for v in vars(loader).values() if hasattr(v, "__dict__"))]
    held = {t.untyped_storage() for part in parts for t in vars(part).values() if isinstance(t, Tensor)}
    extra = sum(storage.nbytes() for storage in held if storage.data_ptr() not in own)
    assert extra < 10_000  # tables of crops and constants; the images are 921,600 bytes


def test_an_epoch_left_early_leaves_nothing_behind() -> None:
    loader = loader_of(split_of(300), batch_size=50)
    gc.collect()
    gc.disable()  # nothing may wait for the collector either
    try:
        for _ in range(3):
            epoch = loader.epoch(0)
            batch = next(epoch)
            ghosts = [weakref.ref(epoch), weakref.ref(batch.images), weakref.ref(batch.views)]
            del epoch, batch
            assert [ghost() for ghost in ghosts] == [None, None, None]
    finally:
        gc.enable()


def test_two_epochs_at_once_do_not_disturb_each_other() -> None:
    loader = loader_of(split_of(300), batch_size=50)
    alone = [list(loader.epoch(e)) for e in (0, 1)]
    together = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    for step, pair in enumerate(together):
        for epoch in (0, 1):
            assert torch.equal(pair[epoch].images, alone[epoch][step].images)


def test_torch_random_state_is_not_used() -> None:
    before = torch.random.get_rng_state()
    list(loader_of(split_of(300)).epoch(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_wrong_settings() -> None:
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        loader_of(split_of(3), batch_size=0)
    with pytest.raises(UserError, match="not one sample"):
        loader_of(split_of(0))
    with pytest.raises(ValueError, match="mean and std must have 3 values each, got 1 and 3"):
        loader_of(split_of(3), mean=(1.0,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("fill", ["reflect", "zero"])
def test_same_bits_on_the_gpu(fill: str, channels_last: bool) -> None:
    augmentation = Augmentation(fill=fill)  # type: ignore[arg-type]
    for epoch in range(3):
        here, there = (
            joined(
                list(
                    loader_of(
                        split_of(301), device=device, channels_last=channels_last, augmentation=augmentation
                    ).epoch(epoch)
                )
            )
            for device in ("cpu", "cuda")
        )
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
