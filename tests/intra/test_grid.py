# SPDX-License-Identifier: Apache-2.0
"""Patch grid, positions and windows (eq. 1, 2 and 13-15) against plain loops."""

import re

import pytest
import torch

from anomalib_intra.intra.grid import (
    centred_origin,
    check_image_size,
    cut_windows,
    f_global,
    f_local,
    patchify,
    unpatchify,
    windows_of_inference,
)

GRIDS = [(1, 1), (3, 3), (4, 4), (7, 7), (3, 5), (5, 3), (2, 9), (8, 4)]
GRIDS_AND_WINDOWS = [(n, m, window) for n, m in GRIDS for window in (1, 2, 3, 4, 7) if window <= min(n, m)]


@pytest.mark.parametrize(("rows", "columns", "window_size"), GRIDS_AND_WINDOWS)
def test_f_local_is_eq_1_in_every_window(rows, columns, window_size):
    L = window_size
    for r in range(1, rows - L + 2):
        for s in range(1, columns - L + 2):
            positions = []
            for i in range(r, r + L):
                for j in range(s, s + L):
                    got = f_local(torch.tensor(i), torch.tensor(j), torch.tensor(r), torch.tensor(s), L)
                    assert int(got) == (i - r) * L + j - s + 1
                    positions.append(int(got))
            assert positions == list(range(1, L * L + 1))


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_f_global_counts_the_patches_from_the_upper_left(rows, columns):
    # Eq. 2 with the row stride M: the paper's own words, "their 1-dimensional position when starting to count from the
    # upper left patch in the whole image".
    i, j = torch.meshgrid(torch.arange(1, rows + 1), torch.arange(1, columns + 1), indexing="ij")
    got = f_global(i, j, columns)
    count = 0
    for row in range(rows):
        for column in range(columns):
            count += 1
            assert int(got[row, column]) == count


def test_f_global_multiplies_by_the_columns_where_images_are_not_square():
    # 3 rows, 5 columns: patch (2, 1) is the sixth; a stride of N = 3 would make it the fourth, a second time.
    assert int(f_global(torch.tensor(2), torch.tensor(1), columns=5)) == 6


@pytest.mark.parametrize(("rows", "columns", "window_size"), GRIDS_AND_WINDOWS)
def test_centred_origin_is_eq_13_to_15_for_every_patch(rows, columns, window_size):
    def g(c):
        return max(1, c - window_size // 2)

    t = torch.arange(1, rows + 1)
    u = torch.arange(1, columns + 1)
    r = centred_origin(t, rows, window_size)
    s = centred_origin(u, columns, window_size)
    for t_ in range(1, rows + 1):
        for u_ in range(1, columns + 1):
            assert int(r[t_ - 1]) == g(t_) - max(0, g(t_) + window_size - rows - 1)
            assert int(s[u_ - 1]) == g(u_) - max(0, g(u_) + window_size - columns - 1)


@pytest.mark.parametrize(("rows", "columns", "window_size"), GRIDS_AND_WINDOWS)
def test_centred_window_lies_in_the_grid_holds_the_patch_and_is_as_central_as_possible(rows, columns, window_size):
    for length in (rows, columns):
        origins = centred_origin(torch.arange(1, length + 1), length, window_size).tolist()
        for c, origin in enumerate(origins, start=1):
            assert origin >= 1
            assert origin + window_size - 1 <= length
            assert origin <= c <= origin + window_size - 1
            # No other window of the grid has the patch nearer to its middle, place L // 2 from its beginning.
            distances = [abs(c - other - window_size // 2) for other in range(1, length - window_size + 2)]
            assert abs(c - origin - window_size // 2) == min(distances)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize(("rows", "columns", "window_size"), GRIDS_AND_WINDOWS)
def test_windows_of_inference_are_those_of_eq_13_to_15_and_around(rows, columns, window_size, shift):
    def origin(c, length, by):
        g = max(1, c - window_size // 2)
        centred = g - max(0, g + window_size - length - 1)
        step = 1 if by > 0 else -1
        for _ in range(abs(by)):  # as far as the patch stays in the window and the window in the image
            other = centred + step
            if 1 <= other <= length - window_size + 1 and other <= c < other + window_size:
                centred = other
        return centred

    expected = [
        (origin(t, rows, i), origin(u, columns, j), t, u)
        for i in range(-shift, shift + 1)
        for j in range(-shift, shift + 1)
        for t in range(1, rows + 1)
        for u in range(1, columns + 1)
    ]
    got = windows_of_inference(rows, columns, window_size, shift)
    assert list(zip(*(x.tolist() for x in got), strict=True)) == expected


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (2, 4), (3, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_patchify_orders_a_patch_by_row_column_channel(rows, columns, channels):
    K = 3
    images = torch.randn(2, channels, rows * K, columns * K, generator=torch.Generator().manual_seed(0))
    patches = patchify(images, K)
    assert patches.shape == (2, rows, columns, K * K * channels)
    for b in range(2):
        for i in range(rows):
            for j in range(columns):
                expected = []
                for k1 in range(K):
                    for k2 in range(K):
                        for c in range(channels):
                            expected.append(images[b, c, i * K + k1, j * K + k2].item())
                assert patches[b, i, j].tolist() == expected


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (2, 4), (3, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_unpatchify_puts_every_element_back_in_its_place(rows, columns, channels):
    K = 3
    patches = torch.randn(2, rows, columns, K * K * channels, generator=torch.Generator().manual_seed(1))
    images = unpatchify(patches, K)
    assert images.shape == (2, channels, rows * K, columns * K)
    for b in range(2):
        for c in range(channels):
            for y in range(rows * K):
                for x in range(columns * K):
                    element = ((y % K) * K + x % K) * channels + c
                    assert images[b, c, y, x] == patches[b, y // K, x // K, element]


def test_unpatchify_and_patchify_are_inverse_to_each_other():
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, 8, 12, generator=generator)
    patches = torch.randn(2, 2, 3, 48, generator=generator)
    assert torch.equal(unpatchify(patchify(images, 4), 4), images)
    assert torch.equal(patchify(unpatchify(patches, 4), 4), patches)


@pytest.mark.parametrize("window_size", [1, 2, 3, 4])
def test_cut_windows_equals_slicing_at_every_origin(window_size):
    rows, columns = 4, 6
    tokens = torch.randn(2, rows, columns, 5, generator=torch.Generator().manual_seed(3))
    origins = [(r, s) for r in range(1, rows - window_size + 2) for s in range(1, columns - window_size + 2)]
    windows = cut_windows(
        tokens, torch.tensor([r for r, _ in origins]), torch.tensor([s for _, s in origins]), window_size
    )
    assert windows.shape == (2, len(origins), window_size, window_size, 5)
    for p, (r, s) in enumerate(origins):
        expected = tokens[:, r - 1 : r - 1 + window_size, s - 1 : s - 1 + window_size]
        assert torch.equal(windows[:, p], expected)


@pytest.mark.parametrize("size", [(112, 112), (256, 256), (256, 320), (112, 512)])
def test_check_image_size_accepts_grids_that_hold_a_window(size):
    check_image_size(*size, patch_size=16, window_size=7)


@pytest.mark.parametrize(
    ("height", "width", "patch_size", "window_size"),
    [
        (250, 256, 16, 7),
        (256, 250, 16, 7),
        (96, 256, 16, 7),
        (256, 96, 16, 7),
        (64, 64, 16, 7),
        (1, 1, 16, 7),
        (100, 1000, 16, 7),
        (113, 127, 16, 7),
        (17, 22, 5, 3),
        (14, 15, 5, 3),
    ],
)
def test_check_image_size_refuses_others_and_names_them_with_the_nearest_that_works(
    height, width, patch_size, window_size
):
    with pytest.raises(ValueError, match=f"{height} x {width}") as error:
        check_image_size(height, width, patch_size, window_size)
    message = str(error.value)
    assert f"{patch_size} x {patch_size} pixels" in message
    assert f"{window_size} x {window_size} patches" in message

    near = re.search(r"nearest size that works is (\d+) x (\d+)", message)
    assert near is not None
    near_height, near_width = int(near[1]), int(near[2])
    check_image_size(near_height, near_width, patch_size, window_size)
    for side, near_side in ((height, near_height), (width, near_width)):
        works = range(patch_size * window_size, side + patch_size * (window_size + 1), patch_size)
        assert abs(near_side - side) == min(abs(other - side) for other in works)
