# SPDX-License-Identifier: Apache-2.0
"""CutPaste as an anomalib model: wires the three forms, the network and the Gaussian to Lightning and anomalib.

CutPaste: Self-Supervised Learning for Anomaly Detection and Localization, Li, Sohn, Yoon and Pfister,
https://arxiv.org/abs/2104.04015.
"""

import math
from functools import partial
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from rich.progress import track
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from anomalib_intra.components.arguments import check_counts, check_weights, height_and_width
from anomalib_intra.components.batch import is_normal
from anomalib_intra.components.trained_module import Sampling, TrainedModule
from anomalib_intra.cutpaste.augmentation import ThreeForms
from anomalib_intra.cutpaste.gaussian import Moments
from anomalib_intra.cutpaste.torch_model import FEATURE_DIM, CutPasteModel, check_sizes
from anomalib_intra.data.images import ImageSamples, sample_images
from anomalib_intra.data.samples import as_fractions
from anomalib_intra.training.command_line import as_commanded


class CutPaste(TrainedModule):
    """CutPaste: a network that tells normal images from images with a part of themselves pasted elsewhere.

    A ResNet-18 learns from scratch, and from normal images alone, to tell three forms of an image apart: normal, with a
    patch of it pasted elsewhere (CutPaste), with a thin and turned one (CutPaste-scar). An image is anomalous as far as
    its pooled features are from a Gaussian of those of the normal training images. The paper has two such models, and
    ``patch_size`` chooses: that of whole images explains its scores by GradCAM, that of patches is for localization.
    Defaults are those of the paper, which trains for 256 epochs. The weights of the last epoch are used, since no test
    image may choose better ones.

    Args:
        image_size (tuple[int, int]): Height and width to which images are resized, at least 64 each.
        patch_size (int | None): None trains on whole images and scores them. A side length in pixels (the paper's is
            32) trains on random crops, and scores all patches at stride 4.
        learning_rate (float): Learning rate of SGD, with which its cosine begins.
        samples_per_image (int): Samples from each image and epoch. The default makes the paper's epoch of 256 steps
            from some 200 images.
        images_per_step (int): Images in a training step, which takes each of them in its three forms.
        pre_processor (PreProcessor | bool): True resizes to ``image_size``; False expects images of that size.
        post_processor (PostProcessor | bool): True or an :class:`UnsaturatedPostProcessor`.
        evaluator (Evaluator | bool): True gives anomalib's default metrics.
        visualizer (Visualizer | bool): True gives anomalib's default pictures.

    Raises:
        ValueError: If a size is too small, an argument no number of its kind, or the pre-processor normalizes.
        TypeError: If the post-processor is of another kind.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_intra import MVTec
        >>> engine = Engine(max_epochs=256)
        >>> engine.train(CutPaste(), datamodule=MVTec("./datasets/MVTecAD", category="bottle"))  # doctest: +SKIP
    """

    model: CutPasteModel
    samples_name = "images"
    architecture = ("image_size", "patch_size")

    def __init__(
        self,
        image_size: tuple[int, int] = (256, 256),
        patch_size: int | None = None,
        learning_rate: float = 0.03,
        samples_per_image: int = 40,
        images_per_step: int = 32,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_counts(samples_per_image=samples_per_image, images_per_step=images_per_step)
        check_weights(learning_rate=learning_rate)
        super().__init__(
            height_and_width(image_size),
            pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        check_sizes(self.image_size, patch_size)
        self.learning_rate = learning_rate
        self.samples_per_image = samples_per_image
        self.images_per_step = images_per_step
        self.model = CutPasteModel(self.image_size, patch_size)
        self.three_forms = ThreeForms(self.image_size, patch_size)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with half a cosine over the training, unless the command line names others.

        Returns:
            OptimizerLRScheduler: The optimizer and its schedule.
        """
        optimizer = torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=3e-5)
        cosine = LambdaLR(optimizer, lambda _: (1 + math.cos(math.pi * self.share_trained)) / 2)
        return as_commanded(self, optimizer, cosine)

    def reset_parameters(self) -> None:
        """Initialise the weights of network and head anew."""
        self.model.reset_parameters()

    # ---- training ----------------------------------------------------------------------------------------------------

    @property
    def sampling(self) -> Sampling:
        """Whole images."""
        return Sampling(partial(sample_images, augment=False), self.samples_per_image, self.images_per_step)

    def training_step(self, batch: ImageSamples, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Tell the three forms of images apart.

        Args:
            batch (ImageSamples): Images of a step.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            STEP_OUTPUT: The loss.
        """
        del args, kwargs
        loss, accuracy = self._loss_of(as_fractions(batch.image[batch.index]))
        self.log_train_loss(loss, len(batch))
        self.log("train_accuracy", accuracy, on_step=False, on_epoch=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int, *args: Any, **kwargs: Any) -> ImageBatch:
        """While training, compute the loss on fixed forms of held-out normal images; otherwise score the batch.

        Args:
            batch (ImageBatch): Batch of images.
            batch_idx (int): Number of the batch; it seeds the forms.
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
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.number_of(batch_idx))
                loss, _ = self._loss_of(torch.as_tensor(batch.image)[normal])
            self.add_val_loss(loss, int(normal.sum()))
        return self.test_step(batch) if self.is_calibrated else batch

    def _loss_of(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give cross entropy and accuracy of the forms of images."""
        forms, labels = self.three_forms(images)
        logits = self.model.classify(forms).float()
        return cross_entropy(logits, labels), (logits.argmax(dim=1) == labels).float().mean()

    # ---- calibration -------------------------------------------------------------------------------------------------

    not_calibrated = (
        "This checkpoint has no Gaussian of normal features (its training was cut off, or its settings were others)."
    )

    @property
    def is_calibrated(self) -> bool:
        """Whether the Gaussian is there."""
        return self.model.gaussian.is_fitted

    def forget_calibration(self) -> None:
        """Forget the Gaussian, too."""
        super().forget_calibration()
        self.model.gaussian.forget()

    def learn_normal(self, images: DataLoader[Any]) -> None:
        """Fit the Gaussian to the features of the training images.

        Args:
            images (DataLoader): Training images, as a test would see them.
        """
        sums = Moments.of(torch.empty(0, FEATURE_DIM, device=self.device))  # those of a process without an image
        for batch in track(images, "Gaussian of normal features"):
            batch = self.as_tested(batch)
            normal = is_normal(batch)
            if normal.any():
                sums = sums.plus(Moments.of(self.model.features(torch.as_tensor(batch.image)[normal])))
        self.model.gaussian.fit(Moments(*(self.trainer.strategy.reduce(part, reduce_op="sum") for part in sums)))
