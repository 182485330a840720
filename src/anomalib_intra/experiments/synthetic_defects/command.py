# SPDX-License-Identifier: Apache-2.0
"""The command ``synthetic-defects``: how well trained models find defects that were added to held-out images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, ImageBatch, ImageItem
from anomalib.data.utils import ValSplitMode
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning.pytorch import seed_everything
from pandas import DataFrame
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc
from torchvision.utils import save_image

from anomalib_intra.data.normal_images import SPLITS_FROM_TEST
from anomalib_intra.experiments.synthetic_defects.defects import KINDS, add_defect

_NORMAL = "normal"


def synthetic_defects(
    model: type[AnomalibModule],
    checkpoints: Sequence[Path],
    datamodule: AnomalibDataModule,
    seed: int = 0,
    output: Path = Path("results/synthetic-defects"),
) -> DataFrame:
    """Rank trained models by the AUROC of held-out normal images against the same with synthetic defects.

    The error of the reconstruction does not tell which settings find defects, and by test images nothing may be chosen.
    All models see the same defects, of the six kinds of
    :data:`~anomalib_intra.experiments.synthetic_defects.defects.KINDS`, as files of the test would be seen.

    Args:
        model (type): Class of the models.
        checkpoints (Sequence[Path]): Their checkpoints.
        datamodule (AnomalibDataModule): The data that they were trained on; its validation images are held-out training
            images.
        seed (int): Seed of the defects.
        output (Path): Folder for ``synthetic-defects.csv`` and the images, to look at.

    Returns:
        DataFrame: A row for each checkpoint, the best first: ``checkpoint``, ``image_AUROC`` and ``pixel_AUROC`` (means
        over the kinds), and ``image_KIND`` and ``pixel_KIND`` of each kind, all in 0 .. 1.

    Raises:
        ValueError: If there are no held-out normal images, or if they are drawn without a seed.

    Example:
        >>> synthetic_defects(OnePassInTra, [Path("model.ckpt")], MVTec(category="screw"))  # doctest: +SKIP
    """
    kinds, items = _images(datamodule, seed)
    _save(kinds, items, output / "images")
    images: Any = items  # as good as a Dataset
    loader = DataLoader(images, batch_size=datamodule.eval_batch_size, collate_fn=ImageBatch.collate)
    rows = []
    for checkpoint in checkpoints:
        trained = model.load_from_checkpoint(checkpoint, visualizer=False, evaluator=False)
        engine = Engine(default_root_dir=output, logger=False, enable_progress_bar=False)
        batches: Any = engine.predict(trained, dataloaders=loader)
        rows.append({"checkpoint": str(checkpoint), **_figures(kinds, items, batches)})
        DataFrame(rows).to_csv(output / "synthetic-defects.csv", index=False)
    return DataFrame(rows).sort_values("image_AUROC", ascending=False, ignore_index=True)


def _images(datamodule: AnomalibDataModule, seed: int) -> tuple[list[str], list[ImageItem]]:
    """Held-out normal images, and each again with a defect of each kind; the kinds beside them."""
    if datamodule.val_split_mode in SPLITS_FROM_TEST:
        msg = (
            f"The validation images of {type(datamodule).__name__} are test images, by which nothing may be chosen: "
            "take anomalib_intra.MVTec, or val_split_mode=from_train."
        )
        raise ValueError(msg)
    if datamodule.val_split_mode == ValSplitMode.FROM_TRAIN and datamodule.seed is None:
        msg = (
            f"{type(datamodule).__name__} would hold out other images than in the training, and take some that were "
            "trained on for held-out ones: train with a seed for its split (--data.seed 0), and give the same here."
        )
        raise ValueError(msg)
    datamodule.setup()
    validation: Any = datamodule.val_data
    held_out = [item for item in validation if not item.gt_label]
    if not held_out:
        raise ValueError(
            "There are no normal validation images: take anomalib_intra.MVTec, or val_split_mode=from_train."
        )
    seed_everything(seed, verbose=False)
    kinds, items = [], []
    for item in held_out:
        image = torch.as_tensor(item.image)
        for kind in (_NORMAL, *KINDS):
            changed, mask = (image, image[0] < 0) if kind == _NORMAL else add_defect(image, kind)
            label = torch.tensor(kind != _NORMAL)
            kinds.append(kind)
            items.append(ImageItem(image=changed, gt_mask=mask, gt_label=label, image_path=item.image_path))
    return kinds, items


def _save(kinds: list[str], items: list[ImageItem], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, item in zip(kinds, items, strict=True):
        save_image(torch.as_tensor(item.image), folder / f"{Path(str(item.image_path)).stem}_{kind}.png")


def _figures(kinds: list[str], items: list[ImageItem], batches: Sequence[ImageBatch]) -> dict[str, float]:
    scores = torch.cat([torch.as_tensor(batch.pred_score).flatten().cpu() for batch in batches])
    maps = torch.cat([torch.as_tensor(batch.anomaly_map).cpu() for batch in batches])
    maps = maps.reshape(len(items), *maps.shape[-2:])
    masks = torch.stack([torch.as_tensor(item.gt_mask) for item in items]).float()
    masks = interpolate(masks[:, None], size=maps.shape[-2:])[:, 0]
    figures = {}
    for kind in KINDS:
        chosen = torch.tensor([of_item in (_NORMAL, kind) for of_item in kinds])
        is_defective = torch.tensor([of_item == kind for of_item in kinds])
        figures[f"image_{kind}"] = float(binary_auroc(scores[chosen], is_defective[chosen].int()))
        figures[f"pixel_{kind}"] = float(binary_auroc(maps[chosen].flatten(), masks[chosen].flatten().int()))
    means = {
        f"{what}_AUROC": sum(figures[f"{what}_{kind}"] for kind in KINDS) / len(KINDS) for what in ("image", "pixel")
    }
    return means | figures
