# SPDX-License-Identifier: Apache-2.0
"""What reconstructions without any learning score: the measure of what a trained model has learned.

Eq. 17 compares difference maps with their mean, so a flat grey image in place of a reconstruction already separates
many defects. A model that does not beat both yardsticks has learned nothing that counts, whatever its AUROC.
"""

import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, Evaluator
from einops import reduce
from pandas import DataFrame
from torch import nn

from anomalib_intra.lightning_model import InTra
from anomalib_intra.metrics import PSNR
from anomalib_intra.torch_model import Reconstruction


class ConstantReconstruction(nn.Module):
    """Gives the same image as the reconstruction of every image.

    Args:
        image (torch.Tensor): That image, shape ``(3, H, W)``.

    Example:
        >>> ConstantReconstruction(torch.zeros(3, 8, 8)).reconstruct(torch.rand(2, 3, 8, 8)).sum()
        tensor(0.)
    """

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("image", image)

    def reconstruct(self, images: torch.Tensor, window_batch_size: int | None = None) -> torch.Tensor:
        """Give the image once for each of ``(B, 3, H, W)`` images."""
        del window_batch_size
        return self.image.expand_as(images).to(images)

    def forward(self, images: torch.Tensor) -> Reconstruction:
        """Give images and reconstructions."""
        return Reconstruction(images, self.reconstruct(images))


def yardsticks(datamodule: AnomalibDataModule, image_size: tuple[int, int] = (256, 256)) -> DataFrame:
    """Score the flat and the mean-image reconstruction exactly as InTra is scored.

    Args:
        datamodule (AnomalibDataModule): Data to train on (the means) and to test on.
        image_size (tuple[int, int]): Height and width to which images are resized.

    Returns:
        DataFrame: A row for each yardstick; AUROC and AUPRO in 0 .. 1, PSNR of good test images in dB.
    """
    datamodule.prepare_data()
    datamodule.setup()
    resize = InTra.configure_pre_processor(image_size)
    mean_image = _mean_image(datamodule, resize)
    flat = reduce(mean_image, "c h w -> c 1 1", "mean").expand_as(mean_image)
    rows = {}
    for name, image in (("flat, the training images' mean colour", flat), ("the mean training image", mean_image)):
        model = _intra_with(ConstantReconstruction(image.clone()), image_size)
        results = Engine(logger=False, enable_progress_bar=False).test(model, datamodule=datamodule, verbose=False)
        rows[name] = results[0]
    return DataFrame(rows).T


def _mean_image(datamodule: AnomalibDataModule, resize: nn.Module) -> torch.Tensor:
    total, count = 0, 0
    for batch in datamodule.train_dataloader():
        images = resize(torch.as_tensor(batch.image))
        total = total + reduce(images, "b c h w -> c h w", "sum")
        count += len(images)
    return total / count


def _intra_with(reconstruction: nn.Module, image_size: tuple[int, int]) -> InTra:
    evaluator = Evaluator(
        test_metrics=[
            AUROC(fields=["pred_score", "gt_label"], prefix="image_", strict=False),
            AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
            AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
            PSNR(),
        ]
    )
    # A patch of one pixel fits every image size; the transformer itself is replaced at once.
    model = InTra(
        image_size,
        patch_size=1,
        window_size=1,
        embed_dim=2,
        depth=1,
        num_heads=1,
        evaluator=evaluator,
        visualizer=False,
    )
    model.model = reconstruction
    return model
