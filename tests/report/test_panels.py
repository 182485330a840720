# SPDX-License-Identifier: Apache-2.0
"""Pictures: what is drawn, on one scale for a whole run, and that nothing hides what it shows."""

import numpy as np
import pytest
import torch
from anomalib.data import ImageItem
from PIL import Image

from anomalib_intra import InTraPostProcessor, UnsaturatedPostProcessor
from anomalib_intra.components.batch import InTraItem
from anomalib_intra.report.panels import draw_panels, side_by_side


def map_colour(value: float, elsewhere: float, scale: float = 1.0) -> tuple[int, ...]:
    """The colour of a pixel of some value in a map that has another value elsewhere."""
    anomaly_map = torch.full((32, 32), elsewhere)
    anomaly_map[:16] = value
    panels = draw_panels(ImageItem(image=torch.rand(3, 32, 32), anomaly_map=anomaly_map), scale=scale)
    return panels["Anomaly map"].getpixel((128, 40))


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_a_value_has_one_colour_whatever_else_is_in_its_map(scale: float) -> None:
    value = 0.3 / scale
    assert map_colour(value, 0.0, scale) == map_colour(value, 0.9 / scale, scale) == map_colour(value, value, scale)
    assert map_colour(value, 0.0, scale) != map_colour(2 * value, 0.0, scale)


def calibrated(kind: type, threshold: float, **options: bool) -> UnsaturatedPostProcessor:
    post_processor = kind(**options)
    post_processor._pixel_threshold.fill_(threshold)
    post_processor._image_threshold.fill_(threshold)
    return post_processor


def test_maps_are_shown_on_the_papers_scale_or_with_the_threshold_in_the_middle() -> None:
    nan, raw = float("nan"), {"enable_normalization": False}
    assert calibrated(InTraPostProcessor, 0.01).display_scale == 1
    assert calibrated(InTraPostProcessor, 0.01, **raw).display_scale == 50
    assert calibrated(InTraPostProcessor, nan).display_scale == 50  # nothing to normalize by: such maps are raw
    assert calibrated(UnsaturatedPostProcessor, 20.0, **raw).display_scale == pytest.approx(0.5 / 20)
    assert calibrated(UnsaturatedPostProcessor, nan).display_scale == 1


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("sensitivity", [0.5, 0.8])
def test_decision_threshold_parts_the_scores_as_the_decisions_do(normalized: bool, sensitivity: float) -> None:
    post_processor = UnsaturatedPostProcessor(enable_normalization=normalized, image_sensitivity=sensitivity)
    post_processor._image_threshold.fill_(0.2)
    post_processor._pixel_threshold.fill_(0.2)
    scores, _, labels, _ = post_processor._decide(torch.linspace(0, 1, 202), torch.rand(202, 1, 2, 2))
    assert 0 < labels.sum() < 202
    assert torch.equal(labels, scores > post_processor.decision_threshold)


def test_there_is_no_decision_threshold_where_nothing_is_decided() -> None:
    assert calibrated(UnsaturatedPostProcessor, float("nan")).decision_threshold is None
    assert calibrated(UnsaturatedPostProcessor, 0.2, enable_thresholding=False).decision_threshold is None


def test_images_keep_their_proportions() -> None:
    item = InTraItem(
        image=torch.rand(3, 32, 64), reconstruction=torch.rand(3, 32, 64), anomaly_map=torch.rand(32, 64),
        gt_mask=torch.zeros(32, 64), pred_mask=torch.zeros(32, 64),
    )  # fmt: skip
    panels = draw_panels(item)
    assert list(panels) == ["Image", "Reconstruction", "Anomaly map", "Masks (red: predicted, cyan: true)"]
    assert {panel.size for panel in panels.values()} == {(256, 128)}
    assert side_by_side(panels).size == (4 * 256 + 3 * 4, 24 + 128)


def test_outlines_leave_what_they_surround_to_be_seen() -> None:
    image, mask = torch.rand(3, 64, 64), torch.zeros(64, 64, dtype=torch.bool)
    mask[20:24, 30:34] = True
    panels = draw_panels(ImageItem(image=image, gt_mask=mask))
    plain, outlined = (np.asarray(panels[title]) for title in ("Image", "Masks (cyan: true)"))
    inside = np.asarray(Image.fromarray(mask.numpy()).resize((256, 256), Image.Resampling.NEAREST))
    assert np.array_equal(plain[inside], outlined[inside])
    assert 0 < (plain != outlined).any(axis=-1).sum() < 200


def test_titles_stand_above_the_panels_and_hide_nothing() -> None:
    panels = draw_panels(ImageItem(image=torch.rand(3, 64, 64), anomaly_map=torch.rand(64, 64)))
    row = np.asarray(side_by_side(panels))
    assert np.array_equal(row[24:, :256], np.asarray(panels["Image"]))
    assert np.array_equal(row[24:, 260:], np.asarray(panels["Anomaly map"]))
    assert row[:24].max() == 255


def test_what_is_not_known_is_left_out() -> None:
    assert list(draw_panels(ImageItem(image=torch.rand(3, 8, 8)))) == ["Image"]
