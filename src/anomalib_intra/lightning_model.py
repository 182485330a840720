# SPDX-License-Identifier: Apache-2.0
"""InTra as an anomalib model: wires transformer, loss, windows and post-processor to Lightning and anomalib.

InTra: Inpainting Transformer for Anomaly Detection, Pirnay and Chai, https://arxiv.org/abs/2104.13897.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib import LearningType
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Batch, ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from einops import rearrange
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.progress import track
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize

from anomalib_intra.batch import InTraBatch
from anomalib_intra.grid import patchify
from anomalib_intra.loss import InpaintingLoss
from anomalib_intra.normal_images import NormalImages
from anomalib_intra.post_processor import InTraPostProcessor
from anomalib_intra.pre_processor import InTraPreProcessor, refuse_normalization
from anomalib_intra.torch_model import InpaintingTransformer, check_range
from anomalib_intra.visualizer import InTraVisualizer
from anomalib_intra.windows import WindowBatch, WindowLoader, cut_training_windows

logger = logging.getLogger(__name__)

# The arguments that decide the shape of the weights, or what they mean.
_ARCHITECTURE = (
    "image_size", "patch_size", "window_size", "embed_dim", "depth", "num_heads", "feature_dim", "attention",
    "position", "long_residuals", "readout",
)  # fmt: skip


class InTra(AnomalibModule):
    """InTra: the inpainting transformer for anomaly detection.

    Images of normal parts are cut into K x K patches. A transformer sees a window of L x L patches with one hidden and
    paints that patch; the whole image is rebuilt this way, patch by patch, and what differs from it is anomalous. The
    model is trained from scratch on normal images alone. Defaults are those of the paper.

    Args:
        image_size (tuple[int, int]): Height and width to which images are resized.
        patch_size (int): Side length K of a patch in pixels.
        window_size (int): Side length L of a window in patches.
        embed_dim (int): Latent dimension D.
        depth (int): Number n of transformer blocks.
        num_heads (int): Number h of attention heads.
        feature_dim (int | None): Dimension F of queries and keys in MFSA. Defaults to ``embed_dim // 2``.
        attention (str): ``"mfsa"`` (eq. 10) or plain ``"msa"`` (eq. 6).
        position (str): ``"global"`` (eq. 2) or ``"local"`` (eq. 1) positions.
        long_residuals (bool): Long residual connections between blocks (sec. 3.3).
        readout (str): ``"mean"`` over the output sequence, or the hidden patch's ``"token"``.
        alpha (float): Weight of the gradient magnitude term of the loss (eq. 12).
        beta (float): Weight of the structural similarity term of the loss (eq. 12).
        learning_rate (float): Learning rate of Adam.
        windows_per_image (int): Windows drawn from each image and epoch.
        window_batch_size (int): Windows in a training step, and windows inpainted at once in reconstruction.
        patience (int): Epochs without a better validation loss after which training stops.
        augment (bool): Flip and turn the windows' images at random. Switch it off where a flipped part is a defect.
        pre_processor (PreProcessor | bool): True resizes to ``image_size``; False expects images of that size.
        post_processor (PostProcessor | bool): True or an :class:`InTraPostProcessor`.
        evaluator (Evaluator | bool): True gives anomalib's default metrics.
        visualizer (Visualizer | bool): True gives :class:`InTraVisualizer`.

    Raises:
        ValueError: If sizes or options do not fit together.
        TypeError: If the post-processor is of another kind.

    Example:
        >>> model = InTra(image_size=(64, 64), window_size=3, embed_dim=32, depth=2, num_heads=4)
        >>> model.model.reconstruct(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 3, 64, 64])
    """

    model: InpaintingTransformer

    def __init__(
        self,
        image_size: tuple[int, int] = (256, 256),
        patch_size: int = 16,
        window_size: int = 7,
        embed_dim: int = 512,
        depth: int = 13,
        num_heads: int = 8,
        feature_dim: int | None = None,
        attention: Literal["mfsa", "msa"] = "mfsa",
        position: Literal["global", "local"] = "global",
        long_residuals: bool = True,
        readout: Literal["mean", "token"] = "mean",
        alpha: float = 0.01,
        beta: float = 0.01,
        learning_rate: float = 1e-4,
        windows_per_image: int = 600,
        window_batch_size: int = 256,
        patience: int = 50,
        augment: bool = True,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        image_size = (image_size[0], image_size[1])
        super().__init__(
            # Checkpoints build the model before they restore the pre-processor, so the size must be given here.
            pre_processor=self.configure_pre_processor(image_size) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        if self.pre_processor is not None:
            refuse_normalization(self.pre_processor)
        if not isinstance(self.post_processor, InTraPostProcessor):
            msg = (
                "InTra computes anomaly maps and scores in its post-processor (eq. 16-18): pass post_processor=True or "
                "an InTraPostProcessor (with enable_normalization=False for raw scores)."
            )
            raise TypeError(msg)
        self.image_size = image_size
        self.patch_size = patch_size
        self.window_size = window_size
        self.learning_rate = learning_rate
        self.windows_per_image = windows_per_image
        self.window_batch_size = window_batch_size
        self.patience = patience
        self.augment = augment
        self.model = InpaintingTransformer(
            image_size=image_size,
            patch_size=patch_size,
            window_size=window_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            feature_dim=feature_dim,
            attention=attention,
            position=position,
            long_residuals=long_residuals,
            readout=readout,
        )
        self.loss = InpaintingLoss(alpha, beta)
        self._images: NormalImages | None = None
        self._windows: WindowLoader | None = None
        self._window_seed: int | None = None
        self._clock_started: float | None = None
        self._windows_since = 0

    # ---- components --------------------------------------------------------------------------------------------------

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize only: images stay in [0, 1].

        Args:
            image_size (tuple[int, int] | None): Height and width. Defaults to ``(256, 256)``.

        Returns:
            PreProcessor: The pre-processor.
        """
        return InTraPreProcessor(Resize(image_size or (256, 256), antialias=True))

    def configure_post_processor(self) -> PostProcessor:
        """Anomaly maps, scores and thresholds of the paper.

        Returns:
            PostProcessor: An :class:`InTraPostProcessor`.
        """
        return InTraPostProcessor()

    @classmethod
    def configure_visualizer(cls) -> Visualizer:
        """Original, reconstruction, anomaly map and masks side by side.

        Returns:
            Visualizer: An :class:`InTraVisualizer`.
        """
        return InTraVisualizer()

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add early stopping and a checkpoint of the best epoch, unless the user brought their own."""
        callbacks = list(super().configure_callbacks())
        present = self.trainer.callbacks
        if not any(isinstance(callback, EarlyStopping) for callback in present):
            callbacks.append(EarlyStopping("val_loss", mode="min", patience=self.patience))
        checkpoints = [callback for callback in present if isinstance(callback, Checkpoint)]
        if len(checkpoints) == 1 and _is_engine_default(checkpoints[0]):
            # Takes the place of the Engine's own, which keeps the last epoch; "last" is there to resume from.
            callbacks.append(
                ModelCheckpoint(
                    dirpath=checkpoints[0].dirpath,
                    filename="model",
                    monitor="val_loss",
                    mode="min",
                    save_last=True,
                    auto_insert_metric_name=False,
                    enable_version_counter=False,
                )
            )
        return callbacks

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam (sec. 4.1).

        Returns:
            torch.optim.Optimizer: The optimizer.
        """
        return torch.optim.Adam(self.model.parameters(), lr=self.learning_rate)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer arguments that InTra needs: no validation before training, which would have nothing to check."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """InTra learns from normal images alone."""
        return LearningType.ONE_CLASS

    # ---- training ----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Put the loaders of windows and of held-out images in the place of the datamodule's image loaders."""
        self.post_processor.reset()
        train_source = self.trainer.fit_loop._data_source
        val_source = self.trainer.fit_loop.epoch_loop.val_loop._data_source
        self._images = self._sort_out(
            train_source.dataloader(), val_source.dataloader() if val_source.is_defined() else None
        )
        if self._window_seed is None:
            self._window_seed = torch.initial_seed() % 2**31
        self._windows = WindowLoader(
            self._images.training,
            self._prepare,
            image_size=self.image_size,
            patch_size=self.patch_size,
            window_size=self.window_size,
            windows_per_image=self.windows_per_image,
            batch_size=self.window_batch_size,
            augment=self.augment,
            seed=self._window_seed,
        )
        train_source.instance = self._windows
        val_source.instance = self._images.held_out

    def on_train_epoch_start(self) -> None:
        """Draw other windows than in the epoch before."""
        self._windows.epoch = self.current_epoch
        self._clock_started = None

    def training_step(self, batch: WindowBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Inpaint the hidden patch of every window and compare it with the original (eq. 12).

        Args:
            batch (WindowBatch): Windows of a step.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            STEP_OUTPUT: The loss.
        """
        del args, kwargs
        windows = cut_training_windows(batch, self.patch_size, self.window_size)
        hidden = windows[torch.arange(len(batch), device=windows.device), batch.t - batch.r, batch.u - batch.s]
        inpainted = self.model.inpaint(windows, batch.r, batch.s, batch.t, batch.u)
        loss = self.loss(self._as_images(hidden), self._as_images(inpainted))
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=len(batch))
        return loss

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: WindowBatch, batch_idx: int) -> None:
        """Show the speed, and let a run that ends by ``max_steps`` end with a validation."""
        del outputs, batch_idx
        # Timed from the end of the epoch's first step, before which images are read.
        if self._clock_started is None:
            self._clock_started, self._windows_since = time.monotonic(), 0
        else:
            self._windows_since += len(batch)
            speed = self._windows_since / (time.monotonic() - self._clock_started)
            self.log("windows/s", speed, prog_bar=True, batch_size=1)
        if 0 < self.trainer.max_steps <= self.trainer.global_step:
            self.trainer.should_stop = True

    def on_train_epoch_end(self) -> None:
        """Leave a line in the log, for runs without a terminal."""
        metrics = self.trainer.callback_metrics
        train_loss, val_loss = (float(metrics.get(name, torch.nan)) for name in ("train_loss_epoch", "val_loss"))
        logger.info("Epoch %d: train_loss %.5f, val_loss %.5f", self.current_epoch, train_loss, val_loss)

    def validation_step(self, batch: InTraBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Inpaint every patch of the normal images of a batch and compare it with the original (sec. 4.1).

        Args:
            batch (InTraBatch): Batch of images; gets reconstructions.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            STEP_OUTPUT: The batch.
        """
        del args, kwargs
        batch.reconstruction = self._reconstruct(batch.image)
        normal = _normal(batch)
        if normal.any():
            original, inpainted = (
                rearrange(patchify(images[normal].float(), self.patch_size), "b n m d -> (b n m) d")
                for images in (batch.image, batch.reconstruction)
            )
            loss = self.loss(self._as_images(original), self._as_images(inpainted))
            self.log("val_loss", loss, prog_bar=True, on_epoch=True, batch_size=int(normal.sum()), sync_dist=True)
        return batch

    def on_train_end(self) -> None:
        """Go back to the best weights, calibrate with them, and store that in the best checkpoint."""
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if best and Path(best).is_file():
            checkpoint = self.trainer.strategy.checkpoint_io.load_checkpoint(best, map_location="cpu")
            self.load_state_dict(checkpoint["state_dict"])
            logger.info("Back to the weights of epoch %d, the best on held-out images.", checkpoint["epoch"])
        self._calibrate(self._images)
        if best and Path(best).is_file():
            prefix = "post_processor."
            state = {prefix + key: value.cpu() for key, value in self.post_processor.state_dict().items()}
            checkpoint["state_dict"].update(state)
            if self.trainer.is_global_zero:
                self.trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, best)
            self.trainer.strategy.barrier()
        # Loaders of a run that is over must not travel with a model that is copied or exported.
        self._images = self._windows = None

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
        """Give image batches a place for their reconstructions."""
        del dataloader_idx
        if isinstance(batch, ImageBatch) and not isinstance(batch, InTraBatch):
            return InTraBatch.of(batch)
        return batch

    def test_step(self, batch: InTraBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Reconstruct a batch; the post-processor scores it.

        Args:
            batch (InTraBatch): Batch of images; gets reconstructions.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            STEP_OUTPUT: The batch.
        """
        del args, kwargs
        batch.reconstruction = self._reconstruct(batch.image)
        return batch

    def predict_step(self, batch: InTraBatch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Reconstruct a batch; the post-processor scores it.

        Args:
            batch (InTraBatch): Batch of images; gets reconstructions.
            batch_idx (int): Unused.
            dataloader_idx (int): Unused.

        Returns:
            STEP_OUTPUT: The batch.
        """
        del batch_idx, dataloader_idx
        return self.test_step(batch)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the seed of the windows beside what anomalib stores."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["intra_window_seed"] = self._window_seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture, then restore what was stored."""
        saved = checkpoint.get("hyper_parameters", {})
        differing = [
            f"{name}={_plain(saved[name])!r} (here {_plain(self.hparams[name])!r})"
            for name in _ARCHITECTURE
            if name in saved and name in self.hparams and _plain(saved[name]) != _plain(self.hparams[name])
        ]
        if differing:
            msg = (
                f"The checkpoint holds an InTra with {', '.join(differing)}: build the model with the checkpoint's "
                "values, or use InTra.load_from_checkpoint, which does."
            )
            raise ValueError(msg)
        super().on_load_checkpoint(checkpoint)
        self._window_seed = checkpoint.get("intra_window_seed")

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _sort_out(self, train_loader: Any, val_loader: Any) -> NormalImages:
        for loader in (train_loader, val_loader):
            if loader is not None and not isinstance(loader, DataLoader):
                msg = f"InTra takes one DataLoader of images for training and one for validation, not {type(loader)}."
                raise TypeError(msg)
        transform = self.pre_processor.transform if self.pre_processor is not None else None
        patches_of_one = (self.image_size[0] // self.patch_size) * (self.image_size[1] // self.patch_size)
        return NormalImages.of(
            train_loader,
            val_loader,
            self.trainer.datamodule,
            resize=transform,
            reconstructed_at_once=max(1, self.window_batch_size // patches_of_one),
        )

    def _prepare(self, batch: ImageBatch) -> torch.Tensor:
        """Bring a batch of training images to the model's device and size."""
        images = torch.as_tensor(batch.image[_normal(batch)]).to(self.device)
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

    def _as_images(self, patches: torch.Tensor) -> torch.Tensor:
        return rearrange(patches, "b (k1 k2 c) -> b c k1 k2", k1=self.patch_size, k2=self.patch_size)

    def _reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.reconstruct(torch.as_tensor(images), self.window_batch_size)

    def _ensure_calibrated(self) -> None:
        datamodule = self.trainer.datamodule
        if self.post_processor.is_calibrated or datamodule is None:
            return  # without a datamodule, the post-processor says what is missing
        logger.warning(
            "This checkpoint has no training mean (its training was cut off): computing it from the training images "
            "of %s.",
            datamodule.name,
        )
        self._calibrate(self._sort_out(datamodule.train_dataloader(), datamodule.val_dataloader()))

    @torch.no_grad()
    def _calibrate(self, images: NormalImages) -> None:
        """Compute the training mean (eq. 17) and the thresholds with the present weights."""
        was_training = self.training
        self.eval()
        total, count = 0, 0
        for batch in track(images.statistics, "Training mean (eq. 17)"):
            batch = self._reconstructed(batch)
            normal = _normal(batch)
            maps = self.post_processor.difference_map(batch.image[normal], batch.reconstruction[normal])
            total = total + maps.sum(dim=0, keepdim=True)
            count += len(maps)
        self.post_processor.set_training_mean(total / count)
        for batch in track(images.thresholds, "Thresholds"):
            self.post_processor.observe(self._reconstructed(batch))
        self.post_processor.set_thresholds()
        self.train(was_training)

    def _reconstructed(self, batch: ImageBatch) -> InTraBatch:
        batch = InTraBatch.of(self.transfer_batch_to_device(batch, self.device, 0))
        if self.pre_processor is not None and self.pre_processor.transform:
            batch.image, batch.gt_mask = self.pre_processor.transform(batch.image, batch.gt_mask)
        with self.trainer.precision_plugin.forward_context():
            batch.reconstruction = self._reconstruct(batch.image)
        return batch


def _normal(batch: ImageBatch) -> torch.Tensor:
    """Which images of a batch are normal: all that are not labelled anomalous."""
    if batch.gt_label is None:
        return torch.ones(len(batch.image), dtype=torch.bool, device=batch.image.device)
    return ~batch.gt_label.bool()


def _is_engine_default(checkpoint: Checkpoint) -> bool:
    return type(checkpoint) is ModelCheckpoint and checkpoint.monitor is None and checkpoint.filename == "model"


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
