# SPDX-License-Identifier: Apache-2.0
"""InTra as an anomalib model: wires transformer, loss, windows and post-processor to Lightning and anomalib.

InTra: Inpainting Transformer for Anomaly Detection, Pirnay and Chai, https://arxiv.org/abs/2104.13897.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from einops import rearrange
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from rich.progress import track

from anomalib_intra.components.batch import InTraBatch, is_normal
from anomalib_intra.components.checkpoint_fit import check_architecture, forget_stale_calibration
from anomalib_intra.components.flat_check import FlatCheck
from anomalib_intra.components.reconstruction import Reconstruction
from anomalib_intra.components.reconstruction_post_processor import InTraPostProcessor
from anomalib_intra.components.trained_module import DrawnModule
from anomalib_intra.components.visualizer import InTraVisualizer
from anomalib_intra.data.normal_images import NormalImages
from anomalib_intra.data.samples import DrawLoader
from anomalib_intra.experiments.compiler import why_not_compiled
from anomalib_intra.intra.grid import patchify
from anomalib_intra.intra.loss import InpaintingLoss
from anomalib_intra.intra.second_pass import second_pass
from anomalib_intra.intra.torch_model import InpaintingTransformer
from anomalib_intra.intra.windows import WindowBatch, cut_training_windows, draw_windows
from anomalib_intra.training.checkpoints import BestCheckpoint, LastCheckpoint
from anomalib_intra.training.command_line import as_commanded

logger = logging.getLogger(__name__)

#: Share of a flat image's error above which a reconstruction counts as flat.
_COLLAPSED = 0.9


class InferenceWithReconstruction(NamedTuple):
    """anomalib's four outputs, and what they were computed from."""

    pred_score: torch.Tensor
    pred_label: torch.Tensor | None
    anomaly_map: torch.Tensor
    pred_mask: torch.Tensor | None
    image: torch.Tensor
    reconstruction: torch.Tensor


class InTra(DrawnModule):
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
        window_batch_size (int): Windows in a training step.
        patience (int): Epochs without a better validation loss after which training stops.
        augment (bool): Flip and turn the windows' images at random. Switch it off where a flipped part is a defect.
        centred_windows (bool): Train on the windows of inference, in which the hidden patch is as central as possible
            (eq. 13-15), not on any window with any patch hidden, as the paper does. A small model learns more in a
            given time so, since it need not learn what it is never asked for.
        window_shift (int): Reconstruct each patch as the mean of what the windows around it give that are centred up to
            this many patches away, ``(2 * window_shift + 1) ** 2`` of them, in as many times the time. 0 takes the
            central one alone, as the paper does; more than that asks for a model trained on any window.
        second_pass (bool): Look twice at images with suspicious patches: the second time, these are covered by their
            first reconstruction, so that what is around them is not painted from a defect. Not in the paper.
        compile_blocks (bool): Have torch.compile fuse what the transformer's blocks compute. Compiling takes a minute;
            what it gains is in docs/performance.md. Where it does not work, a warning says why and it is left out.
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
    post_processor: InTraPostProcessor
    draws_name = "windows"
    post_processor_kind = InTraPostProcessor
    batch_kind = InTraBatch

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
        centred_windows: bool = False,
        window_shift: int = 0,
        second_pass: bool = False,
        compile_blocks: bool = False,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        image_size = (image_size[0], image_size[1])
        super().__init__(
            image_size,
            pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.patch_size = patch_size
        self.window_size = window_size
        self.learning_rate = learning_rate
        self.windows_per_image = windows_per_image
        self.window_batch_size = window_batch_size
        self.patience = patience
        self.augment = augment
        self.centred_windows = centred_windows
        self.window_shift = window_shift
        self.second_pass = second_pass
        self.compile_blocks = compile_blocks
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
            window_shift=window_shift,
        )
        self.loss = InpaintingLoss(alpha, beta)
        self._flat_check = FlatCheck()
        self._exports_reconstruction = False

    # ---- components --------------------------------------------------------------------------------------------------

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
        present = self.trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
        if not any(isinstance(callback, EarlyStopping) for callback in present):
            callbacks.append(EarlyStopping("val_loss", mode="min", patience=self.patience))
        checkpoints = [callback for callback in present if isinstance(callback, Checkpoint)]
        if len(checkpoints) == 1 and _is_engine_default(checkpoints[0]):
            # The Engine's own keeps the last epoch, without its validation loss.
            present.remove(checkpoints[0])
            callbacks += [BestCheckpoint(checkpoints[0].dirpath), LastCheckpoint(checkpoints[0].dirpath)]
        return callbacks

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam (sec. 4.1), unless the command line names another optimizer.

        Returns:
            OptimizerLRScheduler: The optimizer, and a schedule where the command line names one.
        """
        return as_commanded(self, torch.optim.Adam(self.model.parameters(), lr=self.learning_rate))

    def draw_weights(self) -> None:
        """Draw the weights of the transformer anew."""
        self.model.draw_weights()

    # ---- training ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compile, where that was asked for and works.

        Args:
            stage (str): Lightning's name of what begins.
        """
        super().setup(stage)
        if not self.compile_blocks:
            return
        reason = why_not_compiled(self.trainer.strategy.root_device)
        if reason is None:
            self.model.compile_blocks()
        else:
            logger.warning("torch.compile does not work here (%s): going on without it.", reason)

    def draw_loader(self, images: NormalImages, seed: int) -> DrawLoader[WindowBatch]:
        """Draw windows with a hidden patch (sec. 4.1).

        Args:
            images (NormalImages): The loaders of the run.
            seed (int): Seed of all draws.

        Returns:
            DrawLoader: Loader of :class:`WindowBatch`.
        """
        return DrawLoader(
            images.training,
            self.prepare,
            self.draw_windows,
            self.windows_per_image,
            self.window_batch_size,
            self.image_size,
            seed,
            images.same_every_epoch,
            self.trainer.global_rank,
            self.trainer.world_size,
        )

    @property
    def draw_windows(self) -> Callable[..., WindowBatch]:
        """How training windows are drawn: :func:`~anomalib_intra.intra.windows.draw_windows` with this model's sizes."""
        return partial(
            draw_windows,
            patch_size=self.patch_size,
            window_size=self.window_size,
            augment=self.augment,
            centred=self.centred_windows,
        )

    @property
    def evaluated_at_once(self) -> int:
        """As many images as fill a batch of windows."""
        patches_of_one = (self.image_size[0] // self.patch_size) * (self.image_size[1] // self.patch_size)
        return max(1, self.window_batch_size // patches_of_one)

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
        loss = self.loss_of(batch)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=len(batch))
        return loss

    def loss_of(self, batch: WindowBatch) -> torch.Tensor:
        """Inpaint the hidden patches of windows and compare them with the original ones (eq. 12).

        Args:
            batch (WindowBatch): Windows of a step.

        Returns:
            torch.Tensor: The loss, a scalar.
        """
        windows = cut_training_windows(batch, self.patch_size, self.window_size)
        hidden = windows[torch.arange(len(batch), device=windows.device), batch.t - batch.r, batch.u - batch.s]
        inpainted = self.model.inpaint(windows, batch.r, batch.s, batch.t, batch.u)
        return self.loss(self._as_images(hidden), self._as_images(inpainted))

    def validation_step(self, batch: InTraBatch, *args: Any, **kwargs: Any) -> InTraBatch:
        """Inpaint every patch of the normal images of a batch and compare it with the original (sec. 4.1).

        Args:
            batch (InTraBatch): Batch of images; gets reconstructions.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            InTraBatch: The batch.
        """
        del args, kwargs
        batch.reconstruction = self._reconstruct(batch)
        normal = is_normal(batch)
        if normal.any():
            images, reconstructions = (torch.as_tensor(x)[normal].float() for x in (batch.image, batch.reconstruction))
            self._flat_check.update(images, reconstructions)
            original, inpainted = (
                rearrange(patchify(x, self.patch_size), "b n m d -> (b n m) d") for x in (images, reconstructions)
            )
            self.add_val_loss(self.loss(self._as_images(original), self._as_images(inpainted)), int(normal.sum()))
        return batch

    def on_validation_epoch_start(self) -> None:
        """Begin to compare the reconstructions with a flat image anew."""
        super().on_validation_epoch_start()
        self._flat_check.reset()

    def on_train_end(self) -> None:
        """Say so if the model has learned nothing; then calibrate it."""
        error, flat = self._flat_check.compute()
        if error > _COLLAPSED * flat:
            logger.warning(
                "The reconstructions of held-out images are hardly better than a flat image of their mean colour (mean "
                "squared error %.5f, flat %.5f): the model has learned next to nothing. Train for longer, or with "
                "another learning_rate.",
                error,
                flat,
            )
        super().on_train_end()

    # ---- calibration -------------------------------------------------------------------------------------------------

    not_calibrated = "This checkpoint has no training mean (its training was cut off)."

    @property
    def is_calibrated(self) -> bool:
        """Whether the training mean is there."""
        return self.post_processor.is_calibrated

    def calibrate(self, images: NormalImages) -> None:
        """Compute the training mean (eq. 17) and the thresholds.

        Args:
            images (NormalImages): The loaders of the run.
        """
        total, count = torch.zeros(2, 1, *self.image_size, device=self.device), 0
        for batch in track(images.statistics, "Training mean (eq. 17)"):
            batch = self._reconstructed(batch)
            normal = is_normal(batch)
            image, reconstruction = (torch.as_tensor(x)[normal] for x in (batch.image, batch.reconstruction))
            maps = self.post_processor.difference_map(image, reconstruction, self.post_processor.colour_weight)
            total += torch.stack([maps.sum(dim=0), maps.square().sum(dim=0)])
            count += len(maps)
        mean, mean_square = self.mean_of_all(total, count)[:, None]
        self.post_processor.set_training_mean(mean, (mean_square - mean**2).clamp(min=0).sqrt())
        self._set_thresholds(images)
        if self.second_pass:
            self.post_processor.suspect_above_pixel_threshold()
            self._set_thresholds(images)

    def _set_thresholds(self, images: NormalImages) -> None:
        for batch in track(images.thresholds, "Thresholds"):
            self.post_processor.observe(self._reconstructed(batch))
        self.post_processor.set_thresholds()

    # ---- test and prediction -----------------------------------------------------------------------------------------

    def test_step(self, batch: InTraBatch, *args: Any, **kwargs: Any) -> InTraBatch:
        """Reconstruct a batch; the post-processor scores it.

        Args:
            batch (InTraBatch): Batch of images; gets reconstructions.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            InTraBatch: The batch.
        """
        del args, kwargs
        batch.reconstruction = self._reconstruct(batch)
        return batch

    # ---- export ------------------------------------------------------------------------------------------------------

    def forward(self, batch: torch.Tensor, *args: Any, **kwargs: Any) -> InferenceBatch | InferenceWithReconstruction:
        """Score images of any size, as an exported model does.

        Args:
            batch (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            InferenceBatch | InferenceWithReconstruction: Scores ``(B,)``, labels, and maps and masks of the model's
            size; while :meth:`to_onnx` exports it, also the reconstruction.
        """
        del args, kwargs
        predictions = self._predict(self.pre_processor(batch) if self.pre_processor else batch)
        scored = self.post_processor(predictions)
        return InferenceWithReconstruction(*scored, **predictions._asdict()) if self._exports_reconstruction else scored

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        reconstruction: bool = False,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX, on request with what the model expected to see.

        Engine and command line hand ``onnx_kwargs`` on to this method, for OpenVINO too.

        Args:
            export_root (Path | str): Folder in which ``weights/onnx`` is made.
            model_file_name (str): Name of the file, without suffix.
            input_size (tuple[int, int] | None): Height and width of all images; any by default.
            reconstruction (bool): Give the outputs ``image``, resized as the model saw it, and ``reconstruction``, both
                of shape ``(B, 3, H, W)``, beside the four standard ones. anomalib's inferencers refuse models with more
                outputs than those four.
            **kwargs (Any): Arguments of ``torch.onnx.export``.

        Returns:
            Path: The ONNX file.

        Example:
            >>> engine.export(model, "onnx", onnx_kwargs={"reconstruction": True})  # doctest: +SKIP
        """
        self._exports_reconstruction = reconstruction
        try:
            return super().to_onnx(export_root, model_file_name, input_size, **kwargs)
        finally:
            self._exports_reconstruction = False

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture, then restore what was stored and still holds."""
        check_architecture(checkpoint.get("hyper_parameters", {}), self.hparams)
        blank = self.configure_post_processor().state_dict(prefix="post_processor.")
        forget_stale_calibration(checkpoint, {**self._scored_with, **self.post_processor.asked_options}, blank)
        super().on_load_checkpoint(checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store beside the weights what the calibration depends on."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["calibrated_with"] = {**self._scored_with, **self.post_processor.map_options}

    @property
    def _scored_with(self) -> dict[str, Any]:
        return {"window_shift": self.window_shift, "second_pass": self.second_pass}

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _as_images(self, patches: torch.Tensor) -> torch.Tensor:
        return rearrange(patches, "b (k1 k2 c) -> b c k1 k2", k1=self.patch_size, k2=self.patch_size)

    def _predict(self, images: torch.Tensor) -> Reconstruction:
        predictions: Reconstruction = self.model(images)
        if not self.second_pass or not self.is_calibrated:  # (in training, or for the training mean, there is one pass)
            return predictions
        return second_pass(self.model, predictions, self.post_processor.suspicious(predictions))

    def _reconstruct(self, batch: InTraBatch) -> torch.Tensor:
        return self._predict(torch.as_tensor(batch.image)).reconstruction

    def _reconstructed(self, batch: ImageBatch) -> InTraBatch:
        batch = self.on_device(batch)
        assert isinstance(batch, InTraBatch), "the batch_kind"
        with self.trainer.precision_plugin.forward_context():
            batch.reconstruction = self._reconstruct(batch)
        return batch


def _is_engine_default(checkpoint: Checkpoint) -> TypeGuard[ModelCheckpoint]:
    return type(checkpoint) is ModelCheckpoint and checkpoint.monitor is None and checkpoint.filename == "model"
