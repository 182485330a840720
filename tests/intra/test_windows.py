# SPDX-License-Identifier: Apache-2.0
"""Drawing and cutting training windows (sec. 3.4, 4.1)."""

import itertools
import math
from collections import Counter
from functools import partial

import pytest
import torch

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
