# SPDX-License-Identifier: Apache-2.0
"""The command ``synthetic-defects``: how well trained models find defects that were added to held-out images."""

import logging
from collections.abc import Iterable, Sequence
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
from torch.utils.data import Subset
from torchmetrics.classification import BinaryAUROC
from torchvision.io import read_image
from torchvision.utils import save_image

from anomalib_intra.data.normal_images import SPLITS_FROM_TEST
from anomalib_intra.experiments.synthetic_defects.defects import KINDS, add_defect

logger = logging.getLogger(__name__)

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
        output (Path): Folder for ``synthetic-defects.csv``, the images, to look at, and their masks.

    Returns:
        DataFrame: A row for each checkpoint, the best first: ``checkpoint``, ``image_AUROC`` and ``pixel_AUROC`` (means
        over the kinds), and ``image_KIND`` and ``pixel_KIND`` of each kind, all in 0 .. 1.

    Raises:
        ValueError: If there are no held-out normal images, or if they are drawn without a seed.

    Example:
        >>> synthetic_defects(OnePassInTra, [Path("model.ckpt")], MVTec(category="screw"))  # doctest: +SKIP
    """
    kinds = _write_images(_held_out(datamodule), seed, output)
    rows = []
    for checkpoint in checkpoints:
        trained = model.load_from_checkpoint(checkpoint, visualizer=False, evaluator=False)
        post_processor: Any = trained.post_processor
        post_processor.enable_normalization = False  # that of most models clamps scores to [0, 1], which ties them
        engine = Engine(default_root_dir=output, logger=False, enable_progress_bar=False)
        batches: Any = engine.predict(trained, data_path=output / "images")
        rows.append({"checkpoint": str(checkpoint), **_figures(kinds, output / "masks", batches)})
        DataFrame(rows).to_csv(output / "synthetic-defects.csv", index=False)
    return DataFrame(rows).sort_values("image_AUROC", ascending=False, ignore_index=True)


def _held_out(datamodule: AnomalibDataModule) -> Subset[ImageItem]:
    if datamodule.val_split_mode in SPLITS_FROM_TEST:
        msg = (
            f"The validation images of {type(datamodule).__name__} are test images, by which nothing may be chosen: "
            "take anomalib_intra.MVTec, or val_split_mode=from_train."
        )
        raise ValueError(msg)
    if datamodule.val_split_mode in (ValSplitMode.FROM_TRAIN, ValSplitMode.SYNTHETIC) and datamodule.seed is None:
        msg = (
            f"{type(datamodule).__name__} would hold out other images than in the training, and take some that were "
            "trained on for held-out ones: train with a seed for its split (--data.seed 0), and give the same here."
        )
        raise ValueError(msg)
    datamodule.setup()
    validation: Any = getattr(datamodule, "val_data", [])
    normal = [number for number, label in enumerate(validation.samples.label_index) if not label] if validation else []
    if not normal:
        raise ValueError(
            "There are no normal validation images: take anomalib_intra.MVTec, or val_split_mode=from_train."
        )
    return Subset(validation, normal)


def _write_images(held_out: Subset[ImageItem], seed: int, folder: Path) -> dict[str, str]:
    """Write normal images, and each again with a defect of each kind beside its mask, as files that a test would read.

    Returns:
        dict[str, str]: What kind each file is of.
    """
    seed_everything(seed, verbose=False)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for of_an_earlier_run in (folder / part).glob("[0-9][0-9][0-9][0-9]_*.png"):
            of_an_earlier_run.unlink()
    kinds = {}
    for number in range(len(held_out)):
        item = held_out[number]
        image = torch.as_tensor(item.image)
        stem = f"{number:04}_{Path(str(item.image_path)).stem}"
        save_image(image, folder / "images" / f"{stem}_{_NORMAL}.png")
        kinds[f"{stem}_{_NORMAL}.png"] = _NORMAL
        for kind in KINDS:
            try:
                changed, mask = add_defect(image, kind)
            except ValueError as error:
                logger.warning("%s is left out of the kind: %s", item.image_path, error)
                continue
            save_image(changed, folder / "images" / f"{stem}_{kind}.png")
            save_image(mask.float(), folder / "masks" / f"{stem}_{kind}.png")
            kinds[f"{stem}_{kind}.png"] = kind
    return kinds


def _figures(kinds: dict[str, str], masks: Path, batches: Iterable[ImageBatch]) -> dict[str, float]:
    of_item, scores, maps, truth = [], [], [], []
    for batch in batches:
        for item in batch:
            name = Path(str(item.image_path)).name
            if (kind := kinds.get(name)) is None:
                continue  # not one of ours
            anomaly_map = torch.as_tensor(item.anomaly_map).cpu()
            anomaly_map = anomaly_map.reshape(1, *anomaly_map.shape[-2:])
            mask = torch.zeros_like(anomaly_map)
            if kind != _NORMAL:
                mask = interpolate(read_image(str(masks / name))[None, :1] / 255, mask.shape[-2:])[0]
            of_item.append(kind)
            scores.append(torch.as_tensor(item.pred_score).cpu().flatten())
            maps.append(anomaly_map)
            truth.append(mask)
    present = [kind for kind in KINDS if kind in of_item]  # in plain images, some kinds cannot be seen
    figures = {}
    for kind in present:
        chosen = [number for number, one in enumerate(of_item) if one in (_NORMAL, kind)]
        labels, values, pixels, is_defect = (
            torch.cat([column[number].flatten() for number in chosen])
            for column in ([torch.tensor([int(one == kind)]) for one in of_item], scores, maps, truth)
        )
        figures[f"image_{kind}"] = _auroc(values, labels)
        figures[f"pixel_{kind}"] = _auroc(pixels, (is_defect > 0.5).int())
    means = {
        f"{what}_AUROC": sum(figures[f"{what}_{kind}"] for kind in present) / len(present)
        for what in ("image", "pixel")
    }
    return means | figures


def _auroc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    metric = BinaryAUROC(normalization=None)  # by default, torchmetrics takes scores above 1 for logits
    metric.update(scores, labels)
    return float(metric.compute())
