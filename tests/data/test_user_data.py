"""Loaders of users' own tensors and DataLoaders."""

import multiprocessing
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from ban_fast.data import Batch, TensorLoader, WrappedDataLoader
from ban_fast.errors import UserError

X = torch.randn(50, 3, 4, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(50) % 7


def joined(batches: list[Batch]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


class TestTensorLoader:
    def test_values_are_served_as_they_are(self) -> None:
        images, labels, ids, views = joined(list(TensorLoader(X, Y, batch_size=8, drop_last=False).epoch(0)))
        assert torch.equal(ids.sort().values, torch.arange(50))
        assert torch.equal(images, X[ids])
        assert torch.equal(labels, Y[ids])
        assert views.eq(0).all()

    @pytest.mark.parametrize("shape", [(50,), (50, 6), (50, 2, 3, 4, 5)])
    def test_any_shape(self, shape: tuple[int, ...]) -> None:
        x = torch.rand(shape)
        loader = TensorLoader(x, Y, batch_size=8, shuffle=False, drop_last=False)
        assert loader.sample_shape == shape[1:]
        assert torch.equal(joined(list(loader.epoch(0)))[0], x)

    def test_same_numbers_at_every_batch_size_and_from_every_start(self) -> None:
        epochs = [joined(list(TensorLoader(X, Y, batch_size=n, drop_last=False).epoch(2))) for n in (1, 7, 50)]
        for other in epochs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(epochs[0], other, strict=True))
        loader = TensorLoader(X, Y, batch_size=8)
        assert loader.exact_resume
        for a, b in zip(list(loader.epoch(2))[4:], loader.epoch(2, 4), strict=True):
            assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))

    def test_seeds_and_epochs_have_their_own_order(self) -> None:
        def order(seed: int, epoch: int) -> list[int]:
            return joined(list(TensorLoader(X, Y, batch_size=50, seed=seed).epoch(epoch)))[2].tolist()

        assert order(0, 0) == order(0, 0)
        assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4

    def test_bytes_are_scaled_to_one(self) -> None:
        x = torch.arange(250, dtype=torch.uint8).view(50, 5)
        loader = TensorLoader(x, Y, batch_size=50, shuffle=False)
        got = next(loader.epoch(0)).images
        assert got.dtype == torch.float32
        assert torch.equal(got, x.float() / 255)

    @pytest.mark.parametrize("given", [torch.float64, torch.float16])
    def test_floats_are_cast(self, given: torch.dtype) -> None:
        x = X.to(given)
        batch = next(TensorLoader(x, Y, batch_size=50, shuffle=False).epoch(0))
        assert torch.equal(batch.images, x.float())
        batch = next(TensorLoader(x, Y, batch_size=50, shuffle=False, dtype=torch.bfloat16).epoch(0))
        assert torch.equal(batch.images, x.bfloat16())

    def test_channels_last_is_for_images(self) -> None:
        batch = next(TensorLoader(X, Y, batch_size=50, channels_last=True).epoch(0))
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        batch = next(TensorLoader(X.flatten(1), Y, batch_size=50, channels_last=True).epoch(0))
        assert batch.images.shape == (50, 60)

    def test_no_gradient_reaches_the_samples(self) -> None:
        batch = next(TensorLoader(X.clone().requires_grad_(), Y, batch_size=8).epoch(0))
        assert not batch.images.requires_grad

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
    def test_labels_of_any_integer_type(self, dtype: torch.dtype) -> None:
        loader = TensorLoader(X, Y.to(dtype), batch_size=8)
        assert next(loader.epoch(0)).labels.dtype == torch.int64

    @pytest.mark.parametrize(
        ("x", "y", "message"),
        [
            (X, Y[:49], r"shapes \[50, 3, 4, 5\] and \[49\]"),
            (torch.tensor(1.0), Y, r"shapes \[\] and \[50\]"),
            (X, Y.float(), r"got torch.float32 of shape \[50\]"),
            (X, Y > 3, r"got torch.bool of shape \[50\]"),
            (X, torch.zeros(50, 7, dtype=torch.int64), r"of shape \[50, 7\]"),
            (X, Y - 1, "labels must be in 0..6, got -1"),
            (X, Y + 1, "labels must be in 0..6, got 7"),
            (X.long(), Y, r"got torch.int64; use .float\(\)"),
            (X.numpy(), Y, "samples must be a tensor, got ndarray"),
            (X, list(Y), "labels must be a tensor, got list"),
            (X[:0], Y[:0], "not one sample"),
        ],
    )
    def test_mistakes(self, x: Tensor, y: Tensor, message: str) -> None:
        with pytest.raises(UserError, match=message):
            TensorLoader(x, y, batch_size=8, num_classes=7)

    def test_negative_labels_where_any_class_may_be(self) -> None:
        with pytest.raises(UserError, match="labels must be 0 or more, got -1"):
            TensorLoader(X, Y - 1, batch_size=8)


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter([(X[0], 1)])


class Sizes(IterableDataset):  # type: ignore[type-arg]
    """Three batches, as its length says, or fewer."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[:size], Y[:size]) for size in self.sizes])


class Triples(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return X[index], 1, 2


def user_loader(batch_size: int = 8, **options: object) -> DataLoader:  # type: ignore[type-arg]
    return DataLoader(TensorDataset(X, Y), batch_size=batch_size, **options)  # type: ignore[arg-type]


class TestWrappedDataLoader:
    def test_batches_come_as_the_user_makes_them(self) -> None:
        loader = WrappedDataLoader(user_loader())
        assert loader.steps_per_epoch == 7
        assert not loader.exact_resume
        images, labels, ids, views = joined(list(loader.epoch(0)))
        assert torch.equal(images, X)
        assert torch.equal(labels, Y)
        assert torch.equal(ids, torch.arange(50))
        assert views.eq(0).all()

    def test_start_passes_batches_over(self) -> None:
        loader = WrappedDataLoader(user_loader())
        _, _, ids, _ = joined(list(loader.epoch(0, 2)))
        assert torch.equal(ids, torch.arange(16, 50))

    def test_its_shuffling_follows_torch_random_state(self) -> None:
        loader = WrappedDataLoader(user_loader(shuffle=True))
        labels = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            labels.append(joined(list(loader.epoch(0)))[0])
        assert torch.equal(labels[0], labels[1])
        assert not torch.equal(labels[0], labels[2])

    def test_sample_shape_leaves_the_random_state_alone(self) -> None:
        loader = WrappedDataLoader(user_loader(shuffle=True))
        before = torch.random.get_rng_state()
        assert loader.sample_shape == (3, 4, 5)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_a_distributed_sampler_is_told_the_epoch(self) -> None:
        dataset = TensorDataset(X, Y)
        sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(dataset, num_replicas=2, rank=0)
        loader = WrappedDataLoader(DataLoader(dataset, 8, sampler=sampler))
        first, again, second = (joined(list(loader.epoch(epoch)))[0] for epoch in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, second)

    def test_bytes_and_doubles(self) -> None:
        pairs = TensorDataset(torch.arange(8, dtype=torch.uint8).view(8, 1), torch.arange(8))
        batch = next(WrappedDataLoader(DataLoader(pairs, 8)).epoch(0))
        assert torch.equal(batch.images, torch.arange(8).view(8, 1) / 255)
        doubles = TensorDataset(torch.rand(8, 1, dtype=torch.float64), torch.arange(8))
        assert next(WrappedDataLoader(DataLoader(doubles, 8)).epoch(0)).images.dtype == torch.float32

    @pytest.mark.parametrize("sizes", [(8, 0, 8), (0, 8, 8)])
    def test_a_batch_of_no_samples(self, sizes: tuple[int, ...]) -> None:
        loader = WrappedDataLoader(DataLoader(Sizes(*sizes), batch_size=None))
        assert loader.sample_shape == (3, 4, 5)
        with pytest.raises(UserError, match="a batch of the DataLoader has no samples; leave such batches out"):
            list(loader.epoch(0))

    def test_a_length_and_nothing_else(self) -> None:
        loader = WrappedDataLoader(DataLoader(Sizes(), batch_size=None))
        with pytest.raises(UserError, match="ended before its first batch; its length says 3"):
            _ = loader.sample_shape

    def test_leaving_early_ends_the_workers(self) -> None:
        loader = WrappedDataLoader(user_loader(num_workers=1))
        before = set(multiprocessing.active_children())
        epoch = loader.epoch(0)
        next(epoch)
        (worker,) = set(multiprocessing.active_children()) - before
        del epoch
        worker.join(600)
        assert not worker.is_alive()

    @pytest.mark.parametrize(
        ("loader", "message"),
        [
            (DataLoader(Stream()), "has no length"),
            (user_loader(64, drop_last=True), "not one batch"),
        ],
    )
    def test_loaders_that_cannot_be_used(self, loader: DataLoader, message: str) -> None:  # type: ignore[type-arg]
        with pytest.raises(UserError, match=message):
            WrappedDataLoader(loader)

    @pytest.mark.parametrize(
        ("loader", "message"),
        [
            (DataLoader(Triples(), 2), r"two tensors \(samples, labels\), got \['Tensor', 'Tensor', 'Tensor'\]"),
            (DataLoader(TensorDataset(X)), r"got \['Tensor'\]"),
            (DataLoader([{"x": X[0]}]), "got dict"),  # type: ignore[arg-type]
            (DataLoader(TensorDataset(X, Y.float()), 8), "got torch.float32"),
            (DataLoader(TensorDataset(X, Y + 4), 8), "labels must be in 0..6, got 10"),
        ],
    )
    def test_batches_that_cannot_be_used(self, loader: DataLoader, message: str) -> None:  # type: ignore[type-arg]
        with pytest.raises(UserError, match=message):
            list(WrappedDataLoader(loader, num_classes=7).epoch(0))
