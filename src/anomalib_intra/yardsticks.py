# SPDX-License-Identifier: Apache-2.0
"""What reconstructions without any learning score: the measure of what a trained model has learned.

Eq. 17 compares difference maps with their mean, so a flat grey image in place of a reconstruction already separates
many defects. A model that does not beat both yardsticks has learned nothing that counts, whatever its AUROC.
"""

from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from einops import reduce
from pandas import DataFrame
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from anomalib_intra.components.reconstruction import Reconstruction
from anomalib_intra.components.reconstruction_module import ReconstructionModule
from anomalib_intra.components.reconstruction_post_processor import InTraPostProcessor
from anomalib_intra.components.trained_module import Sampling
from anomalib_intra.data.images import ImageSamples, cut_images, sample_images
from anomalib_intra.metrics import PaperEvaluator


class ConstantReconstruction(nn.Module):
    """Gives the same image as the reconstruction of every image.

    Args:
        image (torch.Tensor): That image, shape ``(3, H, W)``.

    Example:
        >>> ConstantReconstruction(torch.zeros(3, 8, 8)).reconstruct(torch.rand(2, 3, 8, 8)).sum()
        tensor(0.)
    """

    image: torch.Tensor

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("image", image)

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Give the image once for each of ``(B, 3, H, W)`` images."""
        return self.image.expand_as(images).to(images)

    def forward(self, images: torch.Tensor) -> Reconstruction:
        """Give images and reconstructions."""
        return Reconstruction(images, self.reconstruct(images))


class Yardstick(ReconstructionModule):
    """One image in the place of all reconstructions; there is nothing to train.

    Args:
        image_size (tuple[int, int]): Height and width to which images are resized.
        flat (bool): Take the mean colour of the training images; False takes their mean image.
        pre_processor (PreProcessor | bool): As for ``AnomalibModule``.
        post_processor (PostProcessor | bool): As for ``AnomalibModule``.
        evaluator (Evaluator | bool): As for ``AnomalibModule``.
        visualizer (Visualizer | bool): As for ``AnomalibModule``.

    Example:
        >>> Yardstick((64, 96), flat=False).model.image.shape
        torch.Size([3, 64, 96])
    """

    model: ConstantReconstruction
    not_calibrated = "A yardstick needs the mean of the training images, and their mean difference map."

    def __init__(
        self,
        image_size: tuple[int, int] = (256, 256),
        flat: bool = True,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(
            (image_size[0], image_size[1]),
            pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.flat = flat
        self.model = ConstantReconstruction(torch.zeros(3, *self.image_size))

    def configure_optimizers(self) -> None:
        """Nothing to optimize."""

    def reset_parameters(self) -> None:
        """No weights to initialise."""

    @property
    def sampling(self) -> Sampling:
        """Whole images, of which no step is taken."""
        return Sampling(sample_images, 1, 1)

    def loss_of(self, batch: ImageSamples) -> torch.Tensor:
        """Mean squared error of a step, of which none is taken."""
        images = cut_images(batch)
        return self.validation_loss(images, self.model.reconstruct(images))

    def validation_loss(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        """Mean squared error."""
        return mse_loss(reconstructions, images)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No training: the means are computed before the test."""
        return {**super().trainer_arguments, "max_epochs": 1, "limit_train_batches": 0}

    def learn_normal(self, images: DataLoader[Any]) -> None:
        """Compute the mean of the training images, then what InTra computes.

        Args:
            images (DataLoader): Training images, as a test would see them.
        """
        mean = self.mean_training_image(images)
        self.model.image.copy_(reduce(mean, "c h w -> c 1 1", "mean").expand_as(mean) if self.flat else mean)
        super().learn_normal(images)


def yardsticks(
    datamodule: AnomalibDataModule,
    image_size: tuple[int, int] = (256, 256),
    original_size: bool = False,
    output: Path = Path("results"),
) -> DataFrame:
    """Score the flat and the mean-image reconstruction exactly as InTra is scored.

    Args:
        datamodule (AnomalibDataModule): Data to train on (the means) and to test on.
        image_size (tuple[int, int]): Height and width to which images are resized.
        original_size (bool): Compare at the size of the image files, see :class:`InTraPostProcessor`.
        output (Path): Folder for what the Engine writes.

    Returns:
        DataFrame: A row for each yardstick; AUROC and AUPRO in 0 .. 1, PSNR of good test images in dB.
    """
    rows = {}
    for name, flat in (("flat, the training images' mean colour", True), ("the mean training image", False)):
        model = Yardstick(
            image_size,
            flat,
            post_processor=InTraPostProcessor(original_size=original_size),
            evaluator=PaperEvaluator(decisions=False, psnr_prefix=""),
            visualizer=False,
        )
        engine = Engine(default_root_dir=output, logger=False, enable_progress_bar=False)
        results = engine.test(model, datamodule=datamodule, verbose=False)
        rows[name] = results[0]
    return DataFrame(rows).T
