# SPDX-License-Identifier: Apache-2.0
"""InTra as an anomalib model: wires transformer, loss, windows and post-processor to Lightning and anomalib.

InTra: Inpainting Transformer for Anomaly Detection, Pirnay and Chai, https://arxiv.org/abs/2104.13897.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from einops import rearrange
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.utils.data import DataLoader

from anomalib_intra.components.anomaly_map import difference_map
from anomalib_intra.components.arguments import check_counts, check_weights, height_and_width
from anomalib_intra.components.monitoring import validates
from anomalib_intra.components.reconstruction import Comparison, Reconstruction
from anomalib_intra.components.reconstruction_module import ReconstructionModule
from anomalib_intra.components.trained_module import Sampling
from anomalib_intra.intra.grid import patchify
from anomalib_intra.intra.loss import InpaintingLoss
from anomalib_intra.intra.second_pass import second_pass
from anomalib_intra.intra.torch_model import InpaintingTransformer
from anomalib_intra.intra.windows import WindowBatch, cut_training_windows, sample_windows
from anomalib_intra.training.command_line import as_commanded

logger = logging.getLogger(__name__)


class InTra(ReconstructionModule):
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
        windows_per_image (int): Windows sampled from each image and epoch.
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
    samples_name = "windows"
    architecture = (
        "image_size", "patch_size", "window_size", "embed_dim", "depth", "num_heads", "feature_dim", "attention",
        "position", "long_residuals", "readout",
    )  # fmt: skip
    validated_with = ("alpha", "beta", "window_shift")

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
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_counts(windows_per_image=windows_per_image, window_batch_size=window_batch_size)
        check_weights(learning_rate=learning_rate, alpha=alpha, beta=beta, patience=patience)
        image_size = height_and_width(image_size)
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

    # ---- components --------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add early stopping, unless the user brought their own or nothing is validated."""
        callbacks = list(super().configure_callbacks())
        present = self.trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
        if validates(self.trainer) and not any(isinstance(callback, EarlyStopping) for callback in present):
            callbacks.append(EarlyStopping("val_loss", mode="min", patience=self.patience))
        return callbacks

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam (sec. 4.1), unless the command line names another optimizer.

        Returns:
            OptimizerLRScheduler: The optimizer, and a schedule where the command line names one.
        """
        return as_commanded(self, torch.optim.Adam(self.model.parameters(), lr=self.learning_rate))

    def reset_parameters(self) -> None:
        """Initialise the weights of the transformer anew."""
        self.model.reset_parameters()

    # ---- training ----------------------------------------------------------------------------------------------------

    @property
    def turns_images(self) -> bool:
        """Whether training images are turned by a quarter, as square ones are."""
        return self.augment and self.image_size[0] == self.image_size[1]

    @property
    def sampling(self) -> Sampling:
        """Windows with a hidden patch (sec. 4.1)."""
        sample = partial(
            sample_windows,
            patch_size=self.patch_size,
            window_size=self.window_size,
            augment=self.augment,
            centred=self.centred_windows,
        )
        return Sampling(sample, self.windows_per_image, self.window_batch_size)

    @property
    def evaluated_at_once(self) -> int:
        """As many images as fill a batch of windows."""
        patches_of_one = (self.image_size[0] // self.patch_size) * (self.image_size[1] // self.patch_size)
        return max(1, self.window_batch_size // patches_of_one)

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

    def validation_loss(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        """Compare every patch of normal images with the inpainted one (eq. 12).

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.
            reconstructions (torch.Tensor): Reconstructions, shape ``(B, 3, H, W)``.

        Returns:
            torch.Tensor: The loss, a scalar.
        """
        patches = (rearrange(patchify(x, self.patch_size), "b n m d -> (b n m) d") for x in (images, reconstructions))
        return self.loss(*(self._as_images(x) for x in patches))

    def _as_images(self, patches: torch.Tensor) -> torch.Tensor:
        return rearrange(patches, "b (k1 k2 c) -> b c k1 k2", k1=self.patch_size, k2=self.patch_size)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @classmethod
    def completed(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Write out what the arguments of a model mean, for MFSA its feature dimension among them.

        Args:
            arguments (Mapping[str, Any]): Arguments that were given, of this or an older version.

        Returns:
            dict[str, Any]: All arguments; equal models have equal ones.

        Example:
            >>> [InTra.completed({"attention": attention})["feature_dim"] for attention in ("mfsa", "msa")]
            [256, None]
        """
        complete = super().completed(arguments)
        of_mfsa = complete["feature_dim"] or complete["embed_dim"] // 2
        return {**complete, "feature_dim": of_mfsa if complete["attention"] == "mfsa" else None}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store beside the weights what they mean in the middle of an even number of blocks."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["doubles_middle"] = self.model.doubles_middle

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it; older versions did not say so, but did it."""
        super().on_load_checkpoint(checkpoint)
        self.model.doubles_middle = checkpoint.get("doubles_middle", True)

    # ---- second pass -------------------------------------------------------------------------------------------------

    @property
    def scored_with(self) -> dict[str, Any]:
        """The options of this model that the calibration depends on."""
        return {"window_shift": self.window_shift, "second_pass": self.second_pass}

    def compare(self, images: torch.Tensor) -> Comparison:
        """Inpaint every patch of images, a second time where that was asked for, and compare both (eq. 16).

        Args:
            images (torch.Tensor): Images in [0, 1], shape ``(B, 3, H, W)``.

        Returns:
            Comparison: Images, reconstructions and difference maps.
        """
        first = super().compare(images)
        if not self.second_pass or not self.is_calibrated:  # (in training, or for the training mean, there is one pass)
            return first
        suspicious = self.post_processor.suspicious(first.difference)
        second = second_pass(self.model, Reconstruction(first.image, first.reconstruction), suspicious)
        return Comparison(*second, difference_map(*second, self.post_processor.colour_weight))

    def set_thresholds(self, images: DataLoader[Any]) -> None:
        """Set the thresholds, those of the first pass before those of the second.

        Args:
            images (DataLoader): Images to set them on, as a test would see them.
        """
        super().set_thresholds(images)
        if self.second_pass:
            self.post_processor.suspect_above_pixel_threshold()
            super().set_thresholds(images)
