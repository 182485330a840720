# SPDX-License-Identifier: Apache-2.0
"""Which pixels the comparison is taught to find."""

import pytest
import torch
from einops import reduce, repeat
from torch.nn.functional import binary_cross_entropy_with_logits

from anomalib_intra.one_pass.comparison import ComparisonHead, comparison_loss
from anomalib_intra.one_pass.spoiling import spoil


def by_loops(of_cells, of_pixels, images, spoiled, replaced):
    """The loss patch by patch and pixel by pixel, in float64."""
    count, _, height, width = images.shape
    K = height // of_cells.shape[1]
    visible = (spoiled - images).double().abs().amax(dim=1) > 0.04

    def mean_loss(logits, answers):
        """Answers are True, False, or None where either is right."""
        losses = [
            0.0
            if answer is None
            else float(binary_cross_entropy_with_logits(logit, torch.tensor(float(answer)).double()))
            for logit, answer in zip(logits.double().flatten(), answers, strict=True)
        ]
        return sum(losses) / len(losses)

    patches, pixels = [], []
    for b in range(count):
        for y in range(0, height, K):
            for x in range(0, width, K):
                share = (replaced[b, 0].double() * visible[b])[y : y + K, x : x + K].mean()
                patches.append(True if share > 0.1 else False if share == 0 else None)
        changed = visible[b] & (replaced[b, 0] > 0)
        for y in range(height):
            for x in range(width):
                around = changed[max(0, y - 4) : y + 5, max(0, x - 4) : x + 5].sum() / 81
                amount = float(replaced[b, 0, y, x])
                spoiled_here = amount > 0.5 and around > 0.1
                pixels.append(True if spoiled_here else False if amount == 0 or around == 0 else None)
    return mean_loss(of_cells, patches) + mean_loss(of_pixels, pixels)


def test_it_is_the_loss_by_loops():
    torch.manual_seed(0)
    images, donors = torch.rand(2, 4, 3, 24, 32)
    images = (images > 0.5) * 0.1 + 0.4  # so that much of what is replaced looks as before
    spoiled, replaced = spoil(images, donors.round() * 0.1 + 0.4, share=0.9)
    of_cells, of_pixels = 3 * torch.randn(4, 3, 4), 3 * torch.randn(4, 24, 32)
    assert 0 < replaced.mean() < 1
    expected = by_loops(of_cells, of_pixels, images, spoiled, replaced)
    assert float(comparison_loss(of_cells, of_pixels, images, spoiled, replaced)) == pytest.approx(expected, rel=1e-5)


def gradient(images, spoiled, replaced):
    """What pulls the logit of each pixel: up where negative, down where positive."""
    of_pixels = torch.zeros(images[:, 0].shape, requires_grad=True)
    comparison_loss(torch.zeros(1, 4, 4), of_pixels, images, spoiled, replaced).backward()
    return of_pixels.grad.sign()[0]


def test_a_defect_has_no_holes_and_its_rim_is_left_open():
    images, replaced = torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    replaced[..., 7:23, 7:23] = 0.3  # a soft rim
    replaced[..., 8:22, 8:22] = 0.8
    spoiled = images + replaced
    spoiled[..., 14:16, 14:16] = 0  # replaced by what looks as before
    pulls = gradient(images, spoiled, replaced)
    assert (pulls[8:22, 8:22] == -1).all()
    rim = torch.zeros(32, 32, dtype=torch.bool)
    rim[7:23, 7:23] = True
    rim[8:22, 8:22] = False
    assert (pulls[rim] == 0).all()
    assert (pulls[replaced[0, 0] == 0] == 1).all()


def test_what_cannot_be_seen_is_not_asked_for():
    images, replaced = torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    replaced[..., 8:20, 8:20] = 1
    assert (gradient(images, images, replaced) == 1).all()  # plain background by plain background
    assert (gradient(images, images + 0.03, torch.zeros_like(replaced)) == 1).all()


@pytest.mark.parametrize(("patch", "cell"), [(2, 2), (8, 8), (16, 8), (32, 8), (12, 6), (11, 11)])
def test_large_patches_have_several_cells(patch, cell):
    torch.manual_seed(0)
    head, images, tokens = ComparisonHead(8, patch), torch.rand(1, 3, 2 * patch, 3 * patch), torch.rand(1, 2, 3, 8)
    of_cells, of_pixels = head(tokens, tokens, images, images)
    assert of_cells.shape == (1, 2 * patch // cell, 3 * patch // cell)
    assert of_pixels.shape == (1, 2 * patch, 3 * patch)
    # Each cell sees the tokens of its patch: they change the cells in it, and those that look at their neighbours.
    other = tokens.clone()
    other[:, 1, 2] += 1
    changed = (head(tokens, other, images, images)[0] != of_cells)[0]
    inside = torch.zeros_like(changed)
    inside[max(0, patch // cell - 2) :, max(0, 2 * patch // cell - 2) :] = True
    assert changed.equal(inside)


def test_the_head_learns_where_within_a_patch():
    torch.manual_seed(0)
    K, head = 4, ComparisonHead(8, 4)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)

    def batch():
        images, replaced = 0.5 * torch.rand(8, 3, 24, 24), torch.zeros(8, 1, 24, 24)
        for one in replaced:
            y, x = torch.randint(0, 18, (2,)).tolist()
            one[:, y : y + 6, x : x + 6] = 1
        spoiled = images + 0.5 * replaced
        tokens = torch.zeros(8, 6, 6, 8)
        return images, spoiled, replaced, *head(tokens, tokens, spoiled, images)

    for _ in range(300):
        images, spoiled, replaced, of_cells, of_pixels = batch()
        optimizer.zero_grad()
        comparison_loss(of_cells, of_pixels, images, spoiled, replaced).backward()
        optimizer.step()
    _, _, replaced, _, of_pixels = batch()
    found, there = of_pixels > 0, replaced[:, 0] > 0
    overlap = (found & there).sum() / (found | there).sum()
    # The squares fill a part of most patches they touch: whole patches would make 0.5.
    touched = reduce(there, "b (n k1) (m k2) -> b n m", "any", k1=K, k2=K)
    whole = repeat(touched, "b n m -> b (n k1) (m k2)", k1=K, k2=K)
    assert (there & whole).sum() / whole.sum() < 0.6
    assert overlap > 0.75
