# SPDX-License-Identifier: Apache-2.0
"""Loading training samples, here windows (sec. 4.1)."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from anomalib_intra.data import samples as samples_module
from anomalib_intra.data.samples import Prepared, SampleLoader, as_bytes, as_fractions
from anomalib_intra.intra.windows import cut_training_windows, sample_windows

K = 2


class CountingImages(Dataset):
    """Images that hold their own number everywhere, and a count of how often each was read."""

    def __init__(self, count, rows=4, columns=4):
        self.count, self.shape, self.reads = count, (3, rows * K, columns * K), Counter()

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        self.reads[number] += 1
        return torch.full(self.shape, number / self.count)


def loader_of(dataset, windows_per_image=5, batch_size=8, read_at_once=3, seed=0, rows=4, columns=4, **options):
    images = DataLoader(dataset, batch_size=read_at_once, shuffle=True, generator=torch.Generator())
    return SampleLoader(
        images,
        prepare=lambda batch: Prepared(batch, [str(float(image.max())) for image in batch]),
        sample=partial(sample_windows, patch_size=K, window_size=3, augment=True),
        samples_per_image=windows_per_image,
        batch_size=batch_size,
        image_size=(rows * K, columns * K),
        seed=seed,
        **options,
    )


def numbers_of(step, dataset):
    return (as_fractions(step.image[step.index, 0, 0, 0]) * dataset.count).round().int().tolist()


def samples_of(loader, dataset):
    fields = ("r", "s", "t", "u", "transposed", "flipped_h", "flipped_v")
    return [(numbers_of(step, dataset), *(getattr(step, field).tolist() for field in fields)) for step in loader]


@pytest.fixture(params=[None, 1, 4, 7], ids=["one pool", "pools of a batch", "pools of 3 images", "pools of 6 images"])
def pool_images(request, monkeypatch):
    """How many images of 4 x 4 patches the pool has room for."""
    if request.param is not None:
        monkeypatch.setattr(samples_module, "POOL_BYTES", request.param * 3 * (4 * K) ** 2)
    return request.param


@pytest.mark.parametrize("count", [1, 3, 6, 7, 12])
@pytest.mark.parametrize(("windows_per_image", "batch_size"), [(3, 4), (5, 8), (4, 4), (2, 100)])
def test_length_is_the_number_of_steps_and_every_window_comes_once(pool_images, count, windows_per_image, batch_size):
    dataset = CountingImages(count)
    loader = loader_of(dataset, windows_per_image, batch_size)
    steps = list(loader)
    assert len(loader) == len(steps)
    assert all(1 <= len(step) <= batch_size for step in steps)
    seen = Counter(number for step in steps for number in numbers_of(step, dataset))
    assert seen == dict.fromkeys(range(count), windows_per_image)
    held = max(len(step.image) for step in steps)
    # Pools are whole batches of 3 images.
    assert held == min(count, {None: count, 1: 3, 4: 3, 7: 6}[pool_images])


@pytest.mark.usefixtures("pool_images")
def test_every_image_is_read_exactly_once_in_an_epoch():
    dataset = CountingImages(7)
    loader = loader_of(dataset)
    for epoch in range(1, 4):
        for _ in loader:
            pass
        assert dataset.reads == dict.fromkeys(range(7), epoch)


def test_images_are_kept_as_bytes_and_cut_as_what_they_stand_for():
    images = torch.rand(3, 3, 4 * K, 4 * K, generator=torch.Generator().manual_seed(0))
    (step,) = loader_of(images, windows_per_image=4, batch_size=12, read_at_once=3)
    assert step.image.dtype == torch.uint8
    order = [int((as_fractions(step.image[n]) - images).abs().sum(dim=(1, 2, 3)).argmin()) for n in range(3)]
    exact = cut_training_windows(replace(step, image=images[order]), K, 3)
    assert (cut_training_windows(step, K, 3) - exact).abs().max() <= 1 / 510 + 1e-7
    bytes_of_files = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_bytes(as_fractions(bytes_of_files)), bytes_of_files)  # those lose nothing


@pytest.mark.parametrize(("pool", "reads"), [(7, 1), (6, 3)], ids=["fit into the pool", "do not"])
def test_images_that_never_change_are_read_once_where_they_fit(pool, reads, monkeypatch):
    monkeypatch.setattr(samples_module, "POOL_BYTES", pool * 3 * (4 * K) ** 2)
    dataset = CountingImages(7)
    loader = loader_of(dataset, read_at_once=1, same_every_epoch=True)
    epochs = []
    for loader.epoch in range(3):
        epochs.append(samples_of(loader, dataset))
    assert dataset.reads == dict.fromkeys(range(7), reads)
    assert epochs[0] != epochs[1] != epochs[2]
    # A run that is resumed at the last epoch makes that epoch's draws.
    resumed = loader_of(CountingImages(7), read_at_once=1, same_every_epoch=True)
    resumed.epoch = 2
    assert samples_of(resumed, dataset) == epochs[2]


def test_steps_have_the_batch_size_but_for_the_last():
    sizes = [len(step) for step in loader_of(CountingImages(7), windows_per_image=5, batch_size=8)]
    assert sizes == [8, 8, 8, 8, 3]


def test_windows_of_a_step_come_from_many_images():
    dataset = CountingImages(10)
    for step in loader_of(dataset, windows_per_image=40, batch_size=50):
        # 50 windows of 10 images: an image is left out with a chance of 1 in 200.
        assert len(set(numbers_of(step, dataset))) >= 8


@pytest.mark.usefixtures("pool_images")
def test_draws_depend_on_seed_and_epoch_alone():
    dataset = CountingImages(7)
    loader = loader_of(dataset, seed=5)
    first = samples_of(loader, dataset)
    assert samples_of(loader, dataset) == first
    torch.manual_seed(99)
    assert samples_of(loader_of(dataset, seed=5), dataset) == first

    loader.epoch = 1
    second = samples_of(loader, dataset)
    assert second != first
    loader.epoch = 0
    assert samples_of(loader, dataset) == first
    assert samples_of(loader_of(dataset, seed=6), dataset) != first


def test_another_epoch_draws_every_kind_of_number_anew():
    dataset = CountingImages(7)
    loader = loader_of(dataset, windows_per_image=20, batch_size=200)
    (first,) = samples_of(loader, dataset)
    loader.epoch = 1
    (second,) = samples_of(loader, dataset)
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_batches_go_through_prepare():
    dataset = CountingImages(4)
    loader = loader_of(dataset)
    loader.prepare = lambda batch: Prepared(1 - batch, [""] * len(batch))
    for step in loader:
        for image in step.image:
            assert image[0, 0, 0].item() in (255, 191, 128, 64)  # 1 - n / 4
