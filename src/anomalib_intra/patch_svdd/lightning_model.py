# SPDX-License-Identifier: Apache-2.0
"""Patch-SVDD as an anomalib model: wires encoder, loss, pairs and memory bank to Lightning and anomalib.

Patch SVDD: Patch-level SVDD for Anomaly Detection and Segmentation, Yi and Yoon, https://arxiv.org/abs/2006.16067.
"""

from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from einops import rearrange
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader

from anomalib_intra.components.arguments import check_counts, check_weights, height_and_width
from anomalib_intra.components.batch import is_normal
from anomalib_intra.components.trained_module import Sampling, TrainedModule
from anomalib_intra.patch_svdd.loss import LossTerms, PatchSVDDLoss
from anomalib_intra.patch_svdd.pairs import PairBatch, check_trainable, cut_pairs, sample_pairs
from anomalib_intra.patch_svdd.torch_model import FEATURE_DIM, PatchSVDDModel
from anomalib_intra.training.command_line import as_commanded
from anomalib_intra.training.processes import gathered


class PatchSVDD(TrainedModule):
    """Patch-SVDD: patch-level support vector data description.

    An encoder learns from normal images alone to tell where patches lie relative to each other, and to give near
    patches near features. A patch is anomalous as far as its feature is from the nearest feature of all normal training
    patches, at two patch sizes of 32 and 64 pixels whose maps are multiplied. Defaults are those of the paper. The
    weights of the last epoch are used, since no test image may choose a better one.

    Args:
        image_size (tuple[int, int]): Height and width to which images are resized, at least 128 each.
        svdd_weight (float): Weight lambda of the distance between the features of near patches. One value for all
            categories; tuned per category on test images, it would flatter the model.
        learning_rate (float): Learning rate of Adam.
        pairs_per_image (int): Samples from each image and epoch; a sample is one pair for each level and task.
        pair_batch_size (int): Samples in a training step.
        pre_processor (PreProcessor | bool): True resizes to ``image_size``; False expects images of that size.
        post_processor (PostProcessor | bool): True or an :class:`UnsaturatedPostProcessor`.
        evaluator (Evaluator | bool): True gives anomalib's default metrics.
        visualizer (Visualizer | bool): True gives anomalib's default pictures.

    Raises:
        ValueError: If the image size is too small or the pre-processor normalizes.
        TypeError: If the post-processor is of another kind.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_intra import MVTec
        >>> engine = Engine(max_epochs=300)
        >>> engine.train(PatchSVDD(), datamodule=MVTec("./datasets/MVTecAD", category="bottle"))  # doctest: +SKIP
    """

    model: PatchSVDDModel
    samples_name = "pairs"
    validated_with = ("svdd_weight",)

    def __init__(
        self,
        image_size: tuple[int, int] = (256, 256),
        svdd_weight: float = 1e-3,
        learning_rate: float = 1e-4,
        pairs_per_image: int = 100,
        pair_batch_size: int = 64,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_counts(pairs_per_image=pairs_per_image, pair_batch_size=pair_batch_size)
        check_weights(learning_rate=learning_rate, svdd_weight=svdd_weight)
        super().__init__(
            height_and_width(image_size),
            pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        check_trainable(self.image_size)
        self.learning_rate = learning_rate
        self.pairs_per_image = pairs_per_image
        self.pair_batch_size = pair_batch_size
        self.model = PatchSVDDModel(self.image_size)
        self.loss = PatchSVDDLoss(svdd_weight)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, for the encoder and the position classifiers, unless the command line names another optimizer.

        Returns:
            OptimizerLRScheduler: The optimizer, and a schedule where the command line names one.
        """
        return as_commanded(self, torch.optim.Adam(self.parameters(), lr=self.learning_rate))

    def reset_parameters(self) -> None:
        """Initialise the weights of encoder and position classifiers anew."""
        self.model.reset_parameters()
        for layer in self.loss.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    # ---- training ----------------------------------------------------------------------------------------------------

    @property
    def sampling(self) -> Sampling:
        """Pairs of patches."""
        return Sampling(sample_pairs, self.pairs_per_image, self.pair_batch_size)

    def get_ready(self) -> None:
        """Compute the mean training image, which is subtracted from all images."""
        assert self._images is not None
        self.model.mean_image.copy_(self.mean_training_image(self._images.statistics))

    def training_step(self, batch: PairBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Tell the relative positions of patches, and bring near ones together.

        Args:
            batch (PairBatch): Pairs of a step.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            STEP_OUTPUT: The loss.
        """
        del args, kwargs
        terms = self._loss_of(batch)
        count: dict[str, Any] = {"batch_size": len(batch)}
        self.log_train_loss(terms.total, len(batch))
        self.log("train_position_loss", terms.position, on_step=False, on_epoch=True, **count)
        self.log("train_svdd_loss", terms.svdd, on_step=False, on_epoch=True, **count)
        return terms.total

    def validation_step(self, batch: ImageBatch, batch_idx: int, *args: Any, **kwargs: Any) -> ImageBatch:
        """While training, compute the loss on fixed pairs from held-out normal images; otherwise score the batch.

        Args:
            batch (ImageBatch): Batch of images.
            batch_idx (int): Number of the batch; it seeds the pairs.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            ImageBatch: The batch.
        """
        del args, kwargs
        if self.trainer.state.fn != "fit":
            return self.test_step(batch)
        normal = is_normal(batch)
        if normal.any():
            images = torch.as_tensor(batch.image)[normal]
            generator = torch.Generator().manual_seed(self.number_of(batch_idx))
            samples = sample_pairs(images, self.pairs_per_image, generator)
            self.add_val_loss(self._loss_of(samples, noise=0.0).total, len(samples))
        return self.test_step(batch) if self.is_calibrated else batch

    def _loss_of(self, samples: PairBatch, **noise: float) -> LossTerms:
        return self.loss(self.model.encode_pairs(cut_pairs(samples, self.model.mean_image, **noise)))

    # ---- calibration -------------------------------------------------------------------------------------------------

    not_calibrated = "This checkpoint has no memory bank (its training was cut off, or its settings were others)."

    @property
    def is_calibrated(self) -> bool:
        """Whether the memory bank is there."""
        return self.model.has_memory_bank

    def forget_calibration(self) -> None:
        """Forget the memory bank, too."""
        super().forget_calibration()
        self.model.empty_memory_bank()

    def learn_normal(self, images: DataLoader[Any]) -> None:
        """Fill the memory banks with the patches of the training images.

        Args:
            images (DataLoader): Training images, as a test would see them.
        """
        empty = torch.empty(0, FEATURE_DIM, device=self.device)  # of a process without an image
        small, big = [empty], [empty]
        for batch in track(images, "Memory bank"):
            batch = self.as_tested(batch)
            normal = is_normal(batch)
            if not normal.any():
                continue
            features = self.model.encode(torch.as_tensor(batch.image)[normal])
            small.append(rearrange(features.small, "b d h w -> (b h w) d"))
            big.append(rearrange(features.big, "b d h w -> (b h w) d"))
        self.model.bank_small, self.model.bank_big = (gathered(torch.cat(bank)) for bank in (small, big))
