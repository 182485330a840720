# SPDX-License-Identifier: Apache-2.0
"""What the models of this package have in common: trained on draws from normal images, calibrated when that ends."""

import logging
import time
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch, ImageBatch
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.progress import track
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize

from anomalib_intra.batch import UnroundedBatch, is_normal
from anomalib_intra.draws import DrawLoader, Draws
from anomalib_intra.export import CompleteExport
from anomalib_intra.image_range import check_range
from anomalib_intra.normal_images import NormalImages
from anomalib_intra.pre_processor import UnnormalizedPreProcessor, refuse_normalization
from anomalib_intra.thresholds import UnsaturatedPostProcessor

logger = logging.getLogger(__name__)


class DrawnModule(CompleteExport, AnomalibModule):
    """An anomalib model that learns from random draws (windows, pairs of patches) from normal images.

    Before Lightning sets its loop up, a loader of draws takes the place of the datamodule's image loader, so that
    optimizer, clipping, precision, ``max_steps`` and progress bar are Lightning's own. When training ends, the weights
    of the best checkpoint are loaded, calibrated, and stored there with what calibration found.

    Args:
        image_size (tuple[int, int]): Height and width to which images are resized.
        pre_processor (PreProcessor | bool): True resizes to ``image_size``; False expects images of that size.
        **components (Any): Post-processor, evaluator and visualizer, as for ``AnomalibModule``.

    Raises:
        ValueError: If the pre-processor normalizes.
        TypeError: If the post-processor is of another kind than ``post_processor_kind``.
    """

    #: What one draw is called in the progress bar.
    draws_name = "draws"
    post_processor_kind: type[UnsaturatedPostProcessor] = UnsaturatedPostProcessor
    batch_kind: type[UnroundedBatch] = UnroundedBatch

    def __init__(self, image_size: tuple[int, int], pre_processor: PreProcessor | bool, **components: Any) -> None:
        super().__init__(
            # Checkpoints build the model before they restore the pre-processor, so the size must be given here.
            pre_processor=self.configure_pre_processor(image_size) if pre_processor is True else pre_processor,
            **components,
        )
        if type(self.pre_processor) is PreProcessor:
            # anomalib's own loses the antialiasing of its transform where it is exported.
            self.pre_processor = UnnormalizedPreProcessor(self.pre_processor.transform)
        elif self.pre_processor is not None:
            refuse_normalization(self.pre_processor)
        if not isinstance(self.post_processor, self.post_processor_kind):
            msg = (
                f"{self.name} needs post_processor=True or a {self.post_processor_kind.__name__} (with "
                "enable_normalization=False for raw scores): that of anomalib clamps scores, which moves AUROC."
            )
            raise TypeError(msg)
        self.image_size = image_size
        self._images: NormalImages | None = None
        self._draws: DrawLoader | None = None
        self._draw_seed: int | None = None
        self._clock_started: float | None = None
        self._draws_since = 0

    # ---- what a model decides ----------------------------------------------------------------------------------------

    @abstractmethod
    def draw_loader(self, images: NormalImages, seed: int) -> DrawLoader:
        """Make the loader of training steps.

        Args:
            images (NormalImages): The loaders of the run; :meth:`prepare` prepares batches of the training images.
            seed (int): Seed of all draws.

        Returns:
            DrawLoader: The loader.
        """

    @property
    def evaluated_at_once(self) -> int:
        """Images in a batch of validation and calibration."""
        return 1

    @property
    @abstractmethod
    def is_calibrated(self) -> bool:
        """Whether the model can score images."""

    @abstractmethod
    def calibrate(self, images: NormalImages) -> None:
        """Compute from normal images what scoring needs, with the present weights.

        Args:
            images (NormalImages): The loaders of the run.
        """

    @property
    @abstractmethod
    def not_calibrated(self) -> str:
        """What a checkpoint without calibration lacks, for a warning."""

    # ---- components --------------------------------------------------------------------------------------------------

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize only: images stay in [0, 1].

        Args:
            image_size (tuple[int, int] | None): Height and width. Defaults to ``(256, 256)``.

        Returns:
            PreProcessor: The pre-processor.
        """
        return UnnormalizedPreProcessor(Resize(image_size or (256, 256), antialias=True))

    def configure_post_processor(self) -> PostProcessor:
        """Thresholds, and scores that are not clamped.

        Returns:
            PostProcessor: Of the model's kind.
        """
        return self.post_processor_kind()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer arguments the model needs: no validation before training, which would have nothing to check."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """The model learns from normal images alone."""
        return LearningType.ONE_CLASS

    # ---- training ----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Put the loaders of draws and of held-out images in the place of the datamodule's image loaders."""
        self.post_processor.reset()
        train_source = self.trainer.fit_loop._data_source
        val_source = self.trainer.fit_loop.epoch_loop.val_loop._data_source
        self._images = self._sort_out(
            train_source.dataloader(), val_source.dataloader() if val_source.is_defined() else None
        )
        if self._draw_seed is None:
            self._draw_seed = torch.initial_seed() % 2**31
        self._draws = self.draw_loader(self._images, self._draw_seed)
        train_source.instance = self._draws
        val_source.instance = self._images.held_out

    def on_train_epoch_start(self) -> None:
        """Make other draws than in the epoch before."""
        self._draws.epoch = self.current_epoch
        self._clock_started = None

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Draws, batch_idx: int) -> None:
        """Show the speed, and let a run that ends by ``max_steps`` end with a validation."""
        del outputs, batch_idx
        # Timed from the end of the epoch's first step, before which images are read.
        if self._clock_started is None:
            self._clock_started, self._draws_since = time.monotonic(), 0
        else:
            self._draws_since += len(batch)
            speed = self._draws_since / (time.monotonic() - self._clock_started)
            self.log(f"{self.draws_name}/s", speed, prog_bar=True, batch_size=1)
        if 0 < self.trainer.max_steps <= self.trainer.global_step:
            self.trainer.should_stop = True

    def on_train_epoch_end(self) -> None:
        """Leave a line in the log, for runs without a terminal."""
        metrics = self.trainer.callback_metrics
        train_loss, val_loss = (float(metrics.get(name, torch.nan)) for name in ("train_loss_epoch", "val_loss"))
        logger.info("Epoch %d: train_loss %.5f, val_loss %.5f", self.current_epoch, train_loss, val_loss)

    def on_train_end(self) -> None:
        """Go back to the weights of the best checkpoint, calibrate them, and store that in the checkpoint."""
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        stored = bool(best) and Path(best).is_file()
        if stored:
            checkpoint = self.trainer.strategy.checkpoint_io.load_checkpoint(best, map_location="cpu")
            self.load_state_dict(checkpoint["state_dict"])
            logger.info("Back to the weights of epoch %d, those of %s.", checkpoint["epoch"], best)
        self._calibrate(self._images)
        if stored:
            checkpoint["state_dict"] = {key: value.cpu() for key, value in self.state_dict().items()}
            if self.trainer.is_global_zero:
                self.trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, best)
            self.trainer.strategy.barrier()
        # Loaders of a run that is over must not travel with a model that is copied or exported.
        self._images = self._draws = None

    # ---- test and prediction -----------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Make sure that the model is calibrated where it is validated outside training."""
        if self.trainer.state.fn != "fit":
            self._ensure_calibrated()

    def on_test_start(self) -> None:
        """Make sure that the model is calibrated."""
        self._ensure_calibrated()

    def on_predict_start(self) -> None:
        """Make sure that the model is calibrated."""
        self._ensure_calibrated()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turn image batches into those of the model, which keep what anomalib's would round or drop."""
        del dataloader_idx
        if isinstance(batch, ImageBatch) and not isinstance(batch, self.batch_kind):
            return self.batch_kind.of(batch)
        return batch

    def predict_step(self, batch: UnroundedBatch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Do with a batch what a test step does.

        Args:
            batch (UnroundedBatch): Batch of images.
            batch_idx (int): Unused.
            dataloader_idx (int): Unused.

        Returns:
            STEP_OUTPUT: The batch.
        """
        del batch_idx, dataloader_idx
        return self.test_step(batch)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the seed of the draws beside what anomalib stores."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["draw_seed"] = self._draw_seed
        self._forget_callback_state(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what was stored, whichever metrics the model was tested with."""
        super().on_load_checkpoint(checkpoint)
        self._draw_seed = checkpoint.get("draw_seed")
        self._forget_callback_state(checkpoint)
        # Some metrics have buffers. A checkpoint must also load into a model with others, as Engine.export builds it.
        stored, present = checkpoint["state_dict"], self.state_dict()
        checkpoint["state_dict"] = {
            **{key: value for key, value in stored.items() if not key.startswith("evaluator.")},
            **{key: value for key, value in present.items() if key.startswith("evaluator.")},
        }

    def _forget_callback_state(self, checkpoint: dict[str, Any]) -> None:
        # The post-processor is a module, whose buffers are in the model's state, and a callback, whose state Lightning
        # saved before calibration and would load over them.
        checkpoint.get("callbacks", {}).pop(self.post_processor.state_key, None)

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _sort_out(self, train_loader: Any, val_loader: Any) -> NormalImages:
        for loader in (train_loader, val_loader):
            if loader is not None and not isinstance(loader, DataLoader):
                msg = f"{self.name} takes one DataLoader for training and one for validation, not {type(loader)}."
                raise TypeError(msg)
        transform = self.pre_processor.transform if self.pre_processor is not None else None
        return NormalImages.of(
            train_loader,
            val_loader,
            self.trainer.datamodule,
            resize=transform,
            evaluated_at_once=self.evaluated_at_once,
        )

    def prepare(self, batch: ImageBatch) -> torch.Tensor:
        """Bring a batch of training images to the model's device and size.

        Args:
            batch (ImageBatch): Batch of images.

        Returns:
            torch.Tensor: Its normal images in [0, 1], shape ``(B, 3, H, W)``.

        Raises:
            ValueError: If they are of another size or range.
        """
        images = torch.as_tensor(batch.image[is_normal(batch)]).to(self.device)
        if self.pre_processor is not None and self.pre_processor.transform:
            images = self.pre_processor.transform(images)
        check_range(images)
        if tuple(images.shape[-2:]) != self.image_size:
            msg = (
                f"Training images are {images.shape[-2]} x {images.shape[-1]} pixels after the pre-processor, but "
                f"image_size is {self.image_size[0]} x {self.image_size[1]}: make both the same."
            )
            raise ValueError(msg)
        return images

    def mean_training_image(self, images: NormalImages) -> torch.Tensor:
        """Average the training images.

        Args:
            images (NormalImages): The loaders of the run.

        Returns:
            torch.Tensor: Their mean, shape ``(3, H, W)``.
        """
        total, count = torch.zeros(3, *self.image_size, device=self.device), 0
        for batch in track(images.statistics, "Mean training image"):
            prepared = self.prepare(batch)
            total += prepared.sum(dim=0)
            count += len(prepared)
        return total / count

    def _ensure_calibrated(self) -> None:
        datamodule = self.trainer.datamodule
        if self.is_calibrated or datamodule is None:
            return  # without a datamodule, the model says what is missing
        logger.warning("%s Computing it from the training images of %s.", self.not_calibrated, datamodule.name)
        self._calibrate(self._sort_out(datamodule.train_dataloader(), datamodule.val_dataloader()))

    @torch.no_grad()
    def _calibrate(self, images: NormalImages) -> None:
        was_training = self.training
        self.eval()
        self.calibrate(images)
        self.train(was_training)

    def on_device(self, batch: ImageBatch) -> ImageBatch:
        """Bring a batch of a calibration loader to where and what a test step gets.

        Args:
            batch (ImageBatch): Batch as it was loaded.

        Returns:
            ImageBatch: The batch on the model's device, pre-processed.
        """
        batch = self.on_after_batch_transfer(self.transfer_batch_to_device(batch, self.device, 0), 0)
        if self.pre_processor is not None and self.pre_processor.transform:
            batch.image, batch.gt_mask = self.pre_processor.transform(batch.image, batch.gt_mask)
        return batch
