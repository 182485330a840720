# SPDX-License-Identifier: Apache-2.0
"""What a person looks at: image, reconstruction, anomaly map and masks, drawn alike over a whole run."""

import io
from typing import NamedTuple

import torch
from anomalib.data import ImageItem
from anomalib.visualization.image.functional import visualize_anomaly_map, visualize_image
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
from PIL.Image import Resampling

# Told apart with every kind of colour vision; green beside red is not.
_PREDICTED, _TRUE = (255, 48, 32), (0, 224, 255)
_TITLE_SIZE, _GAP = 16, 4


def draw_panels(item: ImageItem, size: tuple[int, int] = (256, 256), scale: float = 1.0) -> dict[str, Image.Image]:
    """Draw what is known of an image, each in a panel of its own.

    Args:
        item (ImageItem): Image in [0, 1], shape ``(3, H, W)``, with anomaly map and, where known, reconstruction and
            masks.
        size (tuple[int, int]): Width and height within which a panel fits, in pixels; images keep their proportions.
        scale (float): What the anomaly map is multiplied by to be shown from 0 (blue) to 1 (red); one value for a whole
            run, so that colours can be compared, see :attr:`UnsaturatedPostProcessor.display_scale`.

    Returns:
        dict[str, Image.Image]: Panels of one size by their titles.

    Example:
        >>> panels = draw_panels(ImageItem(image=torch.rand(3, 32, 64), anomaly_map=torch.rand(32, 64)), (128, 128))
        >>> {title: panel.size for title, panel in panels.items()}
        {'Image': (128, 64), 'Anomaly map': (128, 64)}
    """
    image = ImageOps.contain(_picture(torch.as_tensor(item.image)), size)
    panels = {"Image": image}
    reconstruction = getattr(item, "reconstruction", None)
    if reconstruction is not None:
        panels["Reconstruction"] = _picture(reconstruction).resize(image.size)
    if item.anomaly_map is not None:
        scaled = (item.anomaly_map.detach().float() * scale).clamp(0, 1).cpu()
        # Resized before it is coloured: between two colours of the scale lies a third that means another value.
        grey = visualize_anomaly_map(scaled, colormap=False).convert("L").resize(image.size, Resampling.BILINEAR)
        panels["Anomaly map"] = visualize_anomaly_map(grey)
    masks = {"true": (item.gt_mask, _TRUE), "predicted": (item.pred_mask, _PREDICTED)}
    known = {name: drawn for name, drawn in masks.items() if drawn[0] is not None}
    if known:
        outlined = image.copy()
        for mask, colour in known.values():
            outlined.paste(colour, mask=_outline(torch.as_tensor(mask), image.size))
        colours = {"true": "cyan: true", "predicted": "red: predicted"}
        panels[f"Masks ({', '.join(colours[name] for name in reversed(known))})"] = outlined
    return panels


class Thumbnail(NamedTuple):
    """A small picture, encoded: thousands of them fit into memory, and into a page."""

    width: int
    height: int
    jpeg: bytes


def draw_thumbnails(item: ImageItem, scale: float = 1.0) -> dict[str, Thumbnail]:
    """Draw the panels of an image small.

    Args:
        item (ImageItem): As for :func:`draw_panels`.
        scale (float): The same.

    Returns:
        dict[str, Thumbnail]: Thumbnails of one size by their titles.

    Example:
        >>> thumbnail = draw_thumbnails(ImageItem(image=torch.rand(3, 32, 64)))["Image"]
        >>> thumbnail.width, thumbnail.height
        (160, 80)
    """
    return {title: _thumbnail(panel) for title, panel in draw_panels(item, (160, 160), scale).items()}


def _thumbnail(panel: Image.Image) -> Thumbnail:
    buffer = io.BytesIO()
    panel.save(buffer, format="JPEG", quality=75)
    return Thumbnail(*panel.size, buffer.getvalue())


def side_by_side(panels: dict[str, Image.Image]) -> Image.Image:
    """Put panels in a row, each below its title, which so hides nothing.

    Args:
        panels (dict[str, Image.Image]): Panels of one size by their titles.

    Returns:
        Image.Image: The row.

    Example:
        >>> side_by_side({"A": Image.new("RGB", (100, 50)), "B": Image.new("RGB", (100, 50))}).size
        (204, 74)
    """
    width, height = next(iter(panels.values())).size
    head = _TITLE_SIZE * 3 // 2
    row = Image.new("RGB", ((width + _GAP) * len(panels) - _GAP, head + height), "black")
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(_TITLE_SIZE)
    for i, (title, panel) in enumerate(panels.items()):
        left = i * (width + _GAP)
        row.paste(panel, (left, head))
        draw.text((left + 4, head / 2), title, "white", font, anchor="lm")
    return row


def _picture(image: torch.Tensor) -> Image.Image:
    return visualize_image(image.detach().float().clamp(0, 1).cpu()).convert("RGB")


def _outline(mask: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    # A line just outside of the mask: it leaves what is inside to be seen, however small that is.
    filled = visualize_image(mask.detach().cpu().bool().float()).resize(size, Resampling.NEAREST)
    return ImageChops.subtract(filled.filter(ImageFilter.MaxFilter(5)), filled)
