# SPDX-License-Identifier: Apache-2.0
"""The one-pass model as an anomalib model: spoiled images go in, clean ones are asked for."""

import logging
import time
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
from rich.progress import track
from torch.nn.functional import interpolate
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from anomalib_intra.components.anomaly_map import difference_map
from anomalib_intra.components.arguments import check_counts, check_weights, height_and_width
from anomalib_intra.components.batch import is_normal
from anomalib_intra.components.reconstruction import Comparison
from anomalib_intra.components.reconstruction_module import ReconstructionModule
from anomalib_intra.components.trained_module import Sampling
from anomalib_intra.data.images import ImageSamples, cut_images, sample_images
from anomalib_intra.data.samples import as_fractions
from anomalib_intra.one_pass.augmentation import turn, vary_light
from anomalib_intra.one_pass.comparison import comparison_loss
from anomalib_intra.one_pass.loss import SHORTEST_SIDE, PaintingLoss
from anomalib_intra.one_pass.optimizer import Muon, one_cycle
from anomalib_intra.one_pass.spoiling import spoil
from anomalib_intra.one_pass.torch_model import OnePassTransformer
from anomalib_intra.training.callbacks import best_epoch
from anomalib_intra.training.checkpoints import BestCheckpoint, keeper_of_the_best
from anomalib_intra.training.command_line import as_commanded, command_line
from anomalib_intra.training.internals import trainer_of

logger = logging.getLogger(__name__)

#: Weight of eq. 16 beside the learned comparison, whose values are logits.
_GMS_WEIGHT = 5.0
#: Share of the pixels whose mean is the score of an image, chosen by synthetic defects: docs/lab/settings.md.
_SCORE_SHARE = 0.005
#: Shares of the training images that are spoiled, and that are seen in another light where that was asked for.
_SPOILED, _IN_ANOTHER_LIGHT = 0.85, 0.7
#: The best epoch came too early if its learning rate was above this share of the peak; fewer epochs do not tell.
_STILL_HIGH, _EPOCHS_TO_TELL = 0.25, 20


class OnePassInTra(ReconstructionModule):
    """All patches of an image painted in one pass, none seeing itself; small enough to be trained on a CPU.

    As in InTra, a transformer paints each patch of an image from the patches around it. There, every patch is painted
    from a window of its own; here all are painted at once, and so in a hundredth of the time. A hole around each patch
    is hidden from it: the patch alone, or also the patches up to ``radius`` away. Training images are spoiled, and the
    clean image is asked for, so that the model does not go on with a defect that it sees beside a hole. A head learns
    to tell spoiled cells of at most 8 x 8 pixels, and pixels, from the others by what was expected in their place.

    Args:
        image_size (tuple[int, int]): Height and width to which images are resized, multiples of ``patch_size``, at
            least 10.
        patch_size (int): Side length K of a patch in pixels.
        embed_dim (int): Latent dimension D.
        depth (int): Number n of transformer blocks.
        num_heads (int): Number h of attention heads.
        radii (Sequence[int]): Radii of the holes in patches, each in -1 .. 4; -1 hides nothing. A radius is drawn for
            each training step; the difference maps of all are averaged.
        alpha (float): Weight of the gradient magnitude term of the loss (eq. 12).
        beta (float): Weight of the structural similarity term of the loss (eq. 12).
        learning_rate (float): Highest learning rate.
        images_per_step (int): Images in a training step. Few images and many steps learn most in a given time.
        minutes (float | None): Time to train for, that of the training steps; learning rate and end follow it.
            Validation comes on top, a tenth or so. None trains for the trainer's epochs or steps, which makes a run
            repeatable, or for its ``max_time``.
        augment (bool): Flip and turn images by right angles. Only where a flipped part is a good one.
        rotate (bool): Turn images by any angle, for parts that lie anyhow.
        vary_light (bool): Let the light differ from image to image in training, for a light that drifts from day to
            day. Where it never does, False learns a little faster.
        pre_processor (PreProcessor | bool): True resizes to ``image_size``; False expects images of that size.
        post_processor (PostProcessor | bool): True or an :class:`InTraPostProcessor`.
        evaluator (Evaluator | bool): True gives anomalib's default metrics.
        visualizer (Visualizer | bool): True gives :class:`InTraVisualizer`.

    Raises:
        ValueError: If sizes or options do not fit together.
        TypeError: If the post-processor is of another kind.

    Example:
        >>> model = OnePassInTra(image_size=(64, 64), embed_dim=32, depth=2, num_heads=4)
        >>> model.model(torch.rand(1, 3, 64, 64)).painted.shape
        torch.Size([1, 3, 3, 64, 64])
    """

    model: OnePassTransformer
    samples_name = "images"
    architecture = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "radii")
    validated_with = ("alpha", "beta")

    def __init__(
        self,
        image_size: tuple[int, int] = (256, 256),
        patch_size: int = 8,
        embed_dim: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        radii: Sequence[int] = (0, 1, 2),
        alpha: float = 0.01,
        beta: float = 0.01,
        learning_rate: float = 2e-3,
        images_per_step: int = 1,
        minutes: float | None = 30.0,
        augment: bool = False,
        rotate: bool = False,
        vary_light: bool = True,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(
            height_and_width(image_size),
            pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        if minutes is not None and minutes <= 0:
            msg = f"minutes must be more than 0, got {minutes}; None trains for the trainer's epochs."
            raise ValueError(msg)
        check_counts(images_per_step=images_per_step)
        check_weights(alpha=alpha, beta=beta, learning_rate=learning_rate)
        self.post_processor.expect_other_differences(
            "The difference maps of OnePassInTra are logits: leave deviation out of its post-processor.",
            deviation="half",
        )
        if "score_share" not in self.post_processor.asked_settings:
            self.post_processor.score_share = _SCORE_SHARE
        self.learning_rate = learning_rate
        self.images_per_step = images_per_step
        self.minutes = minutes
        self.augment = augment
        self.rotate = rotate
        self.vary_light = vary_light
        self.model = OnePassTransformer(
            self.image_size,
            patch_size,
            embed_dim,
            depth,
            num_heads,
            radii=radii,
            shortest_side=SHORTEST_SIDE,
        )
        self.loss = PaintingLoss(alpha, beta)
        self._seconds = 0.0
        self._step_started: float | None = None

    # ---- components --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Muon with one cycle of the learning rate, unless the command line names others.

        Returns:
            OptimizerLRScheduler: The optimizer and its schedule.
        """
        matrices = self.model.matrices_between_tokens()
        head = list(self.model.comparison.parameters())
        others = {*self.model.parameters()} - {*matrices, *head}
        groups: list[dict[str, Any]] = [
            {"params": matrices, "matrices": True, "lr": self.learning_rate / 2},
            {"params": [weight for weight in self.model.parameters() if weight in others]},
            {"params": head, "lr": self.learning_rate / 2},
        ]
        optimizer = Muon(groups, self.learning_rate, dtype=torch.bfloat16 if self._learns_in_bf16 else torch.float32)
        return as_commanded(self, optimizer, LambdaLR(optimizer, lambda _: one_cycle(self.progress)))

    @property
    def _learns_in_bf16(self) -> bool:
        trainer = trainer_of(self)
        if trainer is None:
            return torch.is_autocast_enabled(self.device.type)
        return trainer.precision == "bf16-mixed"

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of each group of weights to a norm of 1, unless the trainer clips in its own way."""
        if gradient_clip_val is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for group in optimizer.param_groups:
            clip_grad_norm_(group["params"], 1.0)

    def reset_parameters(self) -> None:
        """Initialise the weights anew."""
        self.model.reset_parameters()

    # ---- training ----------------------------------------------------------------------------------------------------

    @property
    def turns_images(self) -> bool:
        """Whether training images are turned, by a quarter or by any angle; ``augment`` turns square ones."""
        return self.rotate or (self.augment and self.image_size[0] == self.image_size[1])

    @property
    def ends_by_itself(self) -> bool:
        """Whether it is trained to a time."""
        return self.minutes is not None

    @property
    def sampling(self) -> Sampling:
        """Whole images."""
        return Sampling(partial(sample_images, augment=self.augment), 1, self.images_per_step)

    @property
    def seconds_left(self) -> float | None:
        """Seconds of the ``minutes`` that are left, None if there are none to keep to."""
        return None if self.minutes is None else max(0.0, 60 * self.minutes - self._seconds)

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]: of the minutes or of the steps, whichever is more."""
        of_minutes = 0.0 if self.minutes is None else self._seconds / (60 * self.minutes)
        return min(1.0, max(of_minutes, self.share_trained))

    def forget_run(self) -> None:
        """Forget, too, how long another run has trained."""
        super().forget_run()
        self._seconds = 0.0

    def get_ready(self) -> None:
        """Compute mean and standard deviation of each channel, by which images are normalised."""
        self._step_started = None  # that of a step that was broken off
        assert self._images is not None
        total, count = torch.zeros(2, 3, device=self.device), 0
        for batch in track(self._images.statistics, "Mean and standard deviation of the colours"):
            batch = self.as_tested(batch)
            images = torch.as_tensor(batch.image)[is_normal(batch)]
            total += torch.stack([images.mean(dim=(2, 3)).sum(dim=0), images.square().mean(dim=(2, 3)).sum(dim=0)])
            count += len(images)
        mean, mean_square = self.mean_of_all(total, count)
        self.model.set_channel_statistics(mean, (mean_square - mean**2).clamp(min=0).sqrt())

    def on_train_batch_start(self, batch: ImageSamples, batch_idx: int) -> None:
        """Start the clock of the step."""
        del batch, batch_idx
        self._step_started = time.monotonic()

    def loss_of(self, batch: ImageSamples) -> torch.Tensor:
        """Paint spoiled images and compare them with the clean ones.

        Args:
            batch (ImageSamples): Images of a step.

        Returns:
            torch.Tensor: The loss, a scalar: eq. 12, and the cross-entropy of which cells and pixels were spoiled.
        """
        images = cut_images(batch)
        others = torch.randint(len(batch.image), (len(batch),))
        donors = as_fractions(batch.image[others.to(batch.image.device)])
        if self.rotate:
            images, donors = turn(images), turn(donors)
        if self.vary_light and torch.rand(()) < _IN_ANOTHER_LIGHT:
            images = vary_light(images)
        spoiled, replaced = spoil(images, donors, _SPOILED)
        radius = self.model.radii[int(torch.randint(len(self.model.radii), ()))]

        _, painted, *of_each = self.model.paint(spoiled, (radius,))
        of_cells, of_pixels = (logits[:, 0] for logits in of_each)
        return self.loss(images, painted[:, 0]) + comparison_loss(of_cells, of_pixels, images, spoiled, replaced)

    def on_train_batch_end(self, outputs: Any, batch: ImageSamples, batch_idx: int) -> None:
        """Stop the clock of the step, and the training when its time is up."""
        del outputs, batch, batch_idx
        self._stop_clock()
        if self.seconds_left == 0:
            self.trainer.should_stop = True

    def _stop_clock(self) -> None:
        if self._step_started is None:
            return
        seconds = torch.tensor(time.monotonic() - self._step_started, device=self.device)
        if self.minutes is not None:
            # By clocks of their own, processes would take other learning rates, and end at other steps.
            seconds = self.trainer.strategy.reduce(seconds, reduce_op="max")
        self._seconds += float(seconds)
        self._step_started = None

    def end_training(self) -> None:
        """Calibrate the weights that are kept, and say so if a shorter training would have done as well."""
        super().end_training()
        epochs = int(self.losses[-1]["epoch"]) + 1 if self.losses else 0
        if epochs < _EPOCHS_TO_TELL or not isinstance(keeper_of_the_best(self.trainer), BestCheckpoint):
            return
        best = best_epoch(self.losses)
        enough = epochs if best is None else best + 1
        if one_cycle(enough / epochs) < _STILL_HIGH:
            return
        shorter = f"max_epochs={enough}"
        if self.minutes is not None and self.seconds_left == 0:  # it was these that ended the training
            shorter = f"minutes={self.minutes * enough / epochs:.2g}"
        logger.warning(
            "Held-out images were painted best after %d of %d epochs, when the learning rate was still high, and those "
            "weights are kept. So few images are learned sooner: with %s, the learning rate is down by then, which "
            "takes less time and finds about as much, or more.",
            enough,
            epochs,
            shorter,
        )

    # ---- comparison --------------------------------------------------------------------------------------------------

    def compare(self, images: torch.Tensor) -> Comparison:
        """Paint images with all radii, and compare: by the head and by eq. 16.

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.

        Returns:
            Comparison: Images, the means of what was painted, and difference maps, whose values are logits.
        """
        image, painted, of_cells, of_pixels = self.model(images)
        radii = painted.shape[1]
        originals = image[:, None].expand_as(painted).flatten(0, 1)
        of_each = difference_map(originals, painted.flatten(0, 1), self.post_processor.colour_weight)
        by_gms = reduce(of_each, "(b r) 1 h w -> b 1 h w", "mean", r=radii)
        cells, pixels = (reduce(x.float(), "b r h w -> b 1 h w", "mean") for x in (of_cells, of_pixels))
        by_head = (interpolate(cells, size=pixels.shape[-2:], mode="bilinear", align_corners=False) + pixels) / 2
        return Comparison(image, painted.float().mean(dim=1), by_head + _GMS_WEIGHT * by_gms)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store how long the model has been trained."""
        super().on_save_checkpoint(checkpoint)
        self._stop_clock()  # a run that is told to stop saves before its step ends
        checkpoint["seconds_trained"] = self._seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore how long the model has been trained.

        Raises:
            ValueError: If the checkpoint is of another architecture, of a version with another head, or of a training
                with another optimizer that is to go on.
        """
        super().on_load_checkpoint(checkpoint)
        shapes = {name: weight.shape for name, weight in checkpoint["state_dict"].items()}
        head = self.model.comparison.state_dict(prefix="model.comparison.")
        if any(shapes.get(name) != weight.shape for name, weight in head.items()):
            msg = (
                "This checkpoint is of an earlier OnePassInTra, whose head compared in another way: train it anew, or "
                "load the checkpoint with the version that made it."
            )
            raise ValueError(msg)
        trainer = trainer_of(self)
        if trainer is not None and trainer.state.fn == "fit":
            self._refuse_other_optimizer(checkpoint)
        self._seconds = checkpoint.get("seconds_trained", 0.0)

    def _refuse_other_optimizer(self, checkpoint: dict[str, Any]) -> None:
        if type(self).configure_optimizers is not OnePassInTra.configure_optimizers:
            return  # one of the user's own
        groups = [group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]]
        was_muon, is_muon = any("matrices" in group for group in groups), not command_line(self).get("optimizer")
        if groups and was_muon != is_muon:
            msg = (
                "This training was begun with another optimizer (that of earlier versions was AdamW): train anew, "
                "without the checkpoint, or go on with the --optimizer, or the version, that it was begun with."
            )
            raise ValueError(msg)
