# SPDX-License-Identifier: Apache-2.0
"""Drawing and cutting training windows (sec. 3.4, 4.1)."""

import itertools
import math
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from anomalib_intra.data import samples as samples_module
from anomalib_intra.data.samples import Prepared, SampleLoader, as_bytes, as_fractions
from anomalib_intra.intra.windows import WindowBatch, cut_training_windows, sample_windows

from ..reference import reference_origin

K = 2


def draw(rows, columns, images=4, windows_per_image=500, window_size=3, augment=True, seed=0, centred=False):
    return sample_windows(
        torch.zeros(images, 3, rows * K, columns * K),
        windows_per_image,
        K,
        window_size,
        augment,
        torch.Generator().manual_seed(seed),
        centred,
    )


def symmetries(batch):
    return Counter(zip(batch.transposed.tolist(), batch.flipped_h.tolist(), batch.flipped_v.tolist(), strict=True))


# ---- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns", "window_size"), [(5, 5, 3), (4, 6, 3), (6, 4, 2), (3, 3, 3), (3, 5, 1)])
def test_windows_lie_in_the_grid_and_hold_their_hidden_patch(rows, columns, window_size):
    batch = draw(rows, columns, window_size=window_size)
    assert len(batch) == 2000
    assert batch.r.min() >= 1
    assert batch.s.min() >= 1
    assert (batch.r + window_size - 1).max() <= rows
    assert (batch.s + window_size - 1).max() <= columns
    for position, origin in ((batch.t, batch.r), (batch.u, batch.s)):
        assert (position - origin).min() >= 0
        assert (position - origin).max() <= window_size - 1


@pytest.mark.parametrize(("rows", "columns", "window_size"), [(5, 5, 3), (4, 6, 3), (6, 4, 2), (3, 3, 3)])
def test_centred_windows_are_those_of_inference(rows, columns, window_size):
    batch = draw(rows, columns, window_size=window_size, centred=True)
    seen = Counter(zip(batch.t.tolist(), batch.u.tolist(), batch.r.tolist(), batch.s.tolist(), strict=True))
    every_patch = list(itertools.product(range(1, rows + 1), range(1, columns + 1)))
    origin = partial(reference_origin, L=window_size)
    assert set(seen) == {(t, u, origin(t, rows), origin(u, columns)) for t, u in every_patch}
    assert max(seen.values()) < 2 * len(batch) / len(every_patch)


@pytest.mark.parametrize(("rows", "columns", "window_size"), [(5, 5, 3), (4, 6, 3), (6, 4, 2)])
def test_every_origin_with_every_hidden_patch_is_drawn_and_none_dominates(rows, columns, window_size):
    batch = draw(rows, columns, images=5, windows_per_image=2000, window_size=window_size)
    hidden_rows, hidden_columns = (batch.t - batch.r).tolist(), (batch.u - batch.s).tolist()
    seen = Counter(zip(batch.r.tolist(), batch.s.tolist(), hidden_rows, hidden_columns, strict=True))
    possible = list(
        itertools.product(
            range(1, rows - window_size + 2),
            range(1, columns - window_size + 2),
            range(window_size),
            range(window_size),
        )
    )
    assert set(seen) == set(possible)
    expected = len(batch) / len(possible)
    assert max(seen.values()) < expected + 5 * math.sqrt(expected)
    assert min(seen.values()) > expected - 5 * math.sqrt(expected)


@pytest.mark.parametrize("augment", [True, False])
def test_every_image_gets_exactly_its_number_of_windows_in_mixed_order(augment):
    batch = draw(5, 5, images=7, windows_per_image=30, augment=augment)
    assert Counter(batch.index.tolist()) == dict.fromkeys(range(7), 30)
    # A first step of 32 windows out of 7 images misses few of them.
    assert len(set(batch.index[:32].tolist())) >= 6
    # Neither sorted nor in turn: within the first seven windows some image comes twice.
    assert len(set(batch.index[:7].tolist())) < 7
    assert batch.index[:7].tolist() != batch.index[7:14].tolist()


def test_all_eight_symmetries_of_a_square_are_drawn_alike_at_every_image():
    batch = draw(4, 4, images=2, windows_per_image=4000)
    for image in range(2):
        chosen = batch.index == image
        seen = Counter(
            zip(
                batch.transposed[chosen].tolist(),
                batch.flipped_h[chosen].tolist(),
                batch.flipped_v[chosen].tolist(),
                strict=True,
            )
        )
        assert len(seen) == 8
        # 500 expected of each, with a standard deviation of 21.
        assert min(seen.values()) > 400
        assert max(seen.values()) < 600


@pytest.mark.parametrize(("rows", "columns"), [(4, 5), (5, 4)])
def test_images_that_are_not_square_are_flipped_but_never_transposed(rows, columns):
    batch = draw(rows, columns, images=2, windows_per_image=1000)
    seen = symmetries(batch)
    assert set(seen) == {(False, flip_h, flip_v) for flip_h in (False, True) for flip_v in (False, True)}
    assert min(seen.values()) > 400
    assert max(seen.values()) < 600


def test_without_augmentation_nothing_is_turned_or_flipped():
    assert set(symmetries(draw(4, 4, augment=False))) == {(False, False, False)}


# ---- cutting ---------------------------------------------------------------------------------------------------------


def explicit_window(image, r, s, transposed, flipped_h, flipped_v, window_size):
    """Turn the whole image as told, split it into patches, then slice the window out of the grid."""
    if transposed:
        image = torch.transpose(image, 1, 2)
    if flipped_h:
        image = torch.flip(image, dims=[2])
    if flipped_v:
        image = torch.flip(image, dims=[1])
    window = torch.zeros(window_size, window_size, K * K * 3)
    for i in range(window_size):
        for j in range(window_size):
            for k1 in range(K):
                for k2 in range(K):
                    for c in range(3):
                        y, x = (r - 1 + i) * K + k1, (s - 1 + j) * K + k2
                        window[i, j, (k1 * K + k2) * 3 + c] = image[c, y, x]
    return window


@pytest.mark.parametrize(
    ("rows", "columns", "window_size", "transpositions"),
    [(4, 4, 3, (False, True)), (3, 3, 3, (False, True)), (4, 4, 2, (False, True)), (3, 5, 2, (False,))],
)
def test_cutting_equals_turning_the_image_and_slicing_for_every_symmetry_and_origin(
    rows, columns, window_size, transpositions
):
    images = torch.rand(2, 3, rows * K, columns * K, generator=torch.Generator().manual_seed(1))
    cases = list(
        itertools.product(
            range(2),
            range(1, rows - window_size + 2),
            range(1, columns - window_size + 2),
            transpositions,
            (False, True),
            (False, True),
        )
    )
    index, r, s, transposed, flipped_h, flipped_v = (torch.tensor(values) for values in zip(*cases, strict=True))
    turns = {"transposed": transposed, "flipped_h": flipped_h, "flipped_v": flipped_v}
    batch = WindowBatch(image=images, index=index, r=r, s=s, t=r, u=s, **turns)
    cut = cut_training_windows(batch, K, window_size)
    assert cut.shape == (len(cases), window_size, window_size, K * K * 3)
    for number, (image, *how) in enumerate(cases):
        assert torch.equal(cut[number], explicit_window(images[image], *how, window_size)), cases[number]


def test_windows_as_drawn_are_cut_like_explicit_ones():
    images = torch.rand(3, 3, 5 * K, 5 * K, generator=torch.Generator().manual_seed(2))
    batch = sample_windows(images, 30, K, 3, True, torch.Generator().manual_seed(3))
    cut = cut_training_windows(batch, K, 3)
    assert len(symmetries(batch)) == 8
    for number in range(len(batch)):
        how = (x[number].item() for x in (batch.r, batch.s, batch.transposed, batch.flipped_h, batch.flipped_v))
        assert torch.equal(cut[number], explicit_window(images[batch.index[number]], *how, 3))


# ---- loading ---------------------------------------------------------------------------------------------------------


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
