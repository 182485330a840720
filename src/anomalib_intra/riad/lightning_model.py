# SPDX-License-Identifier: Apache-2.0
"""RIAD as an anomalib model: wires U-Net, masks and loss to Lightning and anomalib.

Reconstruction by inpainting for visual anomaly detection, Zavrtanik, Kristan and Skočaj, Pattern Recognition 112, 2021,
https://doi.org/10.1016/j.patcog.2020.107706.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from einops import reduce
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from anomalib_intra.components.arguments import check_counts, check_weights, height_and_width
from anomalib_intra.components.reconstruction import Comparison
from anomalib_intra.components.reconstruction_module import ReconstructionModule
from anomalib_intra.components.trained_module import Sampling
from anomalib_intra.data.images import ImageSamples, cut_images, sample_images
from anomalib_intra.riad.loss import RIADLoss
from anomalib_intra.riad.masks import draw_sets
from anomalib_intra.riad.msgms import msgms_map
from anomalib_intra.riad.torch_model import RIADModel
from anomalib_intra.training.command_line import as_commanded

#: Share of the training after which the learning rate falls to a tenth: epoch 250 of 300.
_FALLS_AFTER = 5 / 6


class RIAD(ReconstructionModule):
    """RIAD: reconstruction by inpainting.

    An image is divided into cells, and the cells into three sets. A U-Net sees the image with one set hidden at a time
    and inpaints it; the three inpainted parts, put together, are what it expected. This is done with cells of several
    sizes, and the difference maps are averaged. The model is trained from scratch on normal images alone. Defaults are
    those of the paper, which trains for 300 epochs.

    Args:
        image_size (tuple[int, int]): Height and width to which images are resized, multiples of 16, at least 32.
        cell_sizes (Sequence[int]): Side lengths k of the cells in pixels, divisors of 16. One is drawn for each
            training step; the difference maps of all are averaged.
        width (int): Channels of the U-Net at full size; up to 8 times as many at the coarser scales.
        learning_rate (float): Learning rate of Adam; a tenth of it in the last sixth of the trainer's epochs, steps or
            ``max_time``.
        images_per_step (int): Images in a training step.
        pre_processor (PreProcessor | bool): True resizes to ``image_size``; False expects images of that size.
        post_processor (PostProcessor | bool): True or an :class:`InTraPostProcessor`, whose options of the map are left
            out, since they are those of eq. 16 and 17 of InTra.
        evaluator (Evaluator | bool): True gives anomalib's default metrics.
        visualizer (Visualizer | bool): True gives :class:`InTraVisualizer`.

    Raises:
        ValueError: If sizes or options do not fit together.
        TypeError: If the post-processor is of another kind.

    Example:
        >>> model = RIAD(image_size=(32, 48), width=4).eval()
        >>> model.model(torch.rand(1, 3, 32, 48)).inpainted.shape
        torch.Size([1, 4, 3, 32, 48])
    """

    model: RIADModel
    samples_name = "images"
    architecture = ("image_size", "cell_sizes", "width")
    not_calibrated = "This checkpoint has no thresholds (its training was cut off, or its settings were others)."

    def __init__(
        self,
        image_size: tuple[int, int] = (256, 256),
        cell_sizes: Sequence[int] = (2, 4, 8, 16),
        width: int = 64,
        learning_rate: float = 1e-4,
        images_per_step: int = 4,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_counts(images_per_step=images_per_step)
        check_weights(learning_rate=learning_rate)
        super().__init__(
            height_and_width(image_size),
            pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.post_processor.expect_other_differences(
            "RIAD has a difference map of its own: leave deviation and colour_weight out of its post-processor.",
            deviation="raw",
            colour_weight=0.0,
        )
        self.learning_rate = learning_rate
        self.images_per_step = images_per_step
        self.model = RIADModel(self.image_size, cell_sizes, width)
        self.loss = RIADLoss()

    # ---- components --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, its learning rate a tenth at last, unless the command line names others.

        Returns:
            OptimizerLRScheduler: The optimizer and its schedule.
        """
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.learning_rate)
        falls = LambdaLR(optimizer, lambda _: 0.1 if self.share_trained >= _FALLS_AFTER else 1.0)
        return as_commanded(self, optimizer, falls)

    def reset_parameters(self) -> None:
        """Initialise the weights of the U-Net anew."""
        self.model.reset_parameters()

    # ---- training ----------------------------------------------------------------------------------------------------

    @property
    def sampling(self) -> Sampling:
        """Whole images, each once in an epoch."""
        return Sampling(partial(sample_images, augment=False), 1, self.images_per_step)

    @property
    def evaluated_at_once(self) -> int:
        """As many images as a training step has."""
        return self.images_per_step

    def loss_of(self, batch: ImageSamples) -> torch.Tensor:
        """Inpaint images with cells of one size, drawn for this step as the sets are, and compare.

        Args:
            batch (ImageSamples): Images of a step.

        Returns:
            torch.Tensor: The loss, a scalar.
        """
        images = cut_images(batch)
        generator = self.batch_generator()
        cell_size = self.model.cell_sizes[int(torch.randint(len(self.model.cell_sizes), (), generator=generator))]
        sets = draw_sets(self.image_size, cell_size, generator).to(images.device)
        loss: torch.Tensor = self.loss(images, self.model.inpaint(images, sets[None])[:, 0])
        return loss

    # ---- comparison --------------------------------------------------------------------------------------------------

    def compare(self, images: torch.Tensor) -> Comparison:
        """Inpaint images with cells of all sizes, and compare each by multiscale GMS.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.

        Returns:
            Comparison: Images, the means of what was inpainted, and the means of the difference maps.
        """
        image, inpainted = self.model(images)
        originals = image[:, None].expand_as(inpainted)
        of_each = msgms_map(originals.flatten(0, 1), inpainted.flatten(0, 1))
        difference = reduce(of_each, "(b k) 1 h w -> b 1 h w", "mean", k=inpainted.shape[1])
        return Comparison(image, inpainted.mean(dim=1), difference)

    def learn_normal(self, images: DataLoader[Any]) -> None:
        """Keep a training mean of zero: RIAD takes none off.

        Args:
            images (DataLoader): Unused.
        """
        del images
        self.post_processor.set_training_mean(torch.zeros(1, 1, *self.image_size))
