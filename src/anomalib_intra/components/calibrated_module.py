# SPDX-License-Identifier: Apache-2.0
"""What the models of this package need before they score images: numbers from normal images, with the final weights."""

import copy
import logging
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from rich.progress import track
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize

from anomalib_intra.components.batch import UnroundedBatch, is_normal
from anomalib_intra.components.checkpoint_fit import HOW_TO_SET_THRESHOLDS
from anomalib_intra.components.evaluator import selective
from anomalib_intra.components.export import CompleteExport
from anomalib_intra.components.pre_processor import UnnormalizedPreProcessor, refuse_unfit
from anomalib_intra.components.reconstruction_post_processor import InTraPostProcessor
from anomalib_intra.components.thresholds import UnsaturatedPostProcessor
from anomalib_intra.components.visualizer import NamedImageVisualizer
from anomalib_intra.data.folders import refuse_contradictory, warn_of_folders
from anomalib_intra.data.image_files import check_image_files, paths_of, warn_of_test_images
from anomalib_intra.data.image_range import check_range
from anomalib_intra.data.image_shapes import usual_size, warn_of_other_shape
from anomalib_intra.data.normal_images import NormalImages
from anomalib_intra.data.pipeline import datasets_of, described, parts_of, refuse_random, transform_of
from anomalib_intra.data.samples import Prepared
from anomalib_intra.training.command_line import command_line
from anomalib_intra.training.internals import resize_as_the_model_does, trainer_of

logger = logging.getLogger(__name__)

#: What weights and steps may be in; difference maps and scores are in float32 with each.
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


class CalibratedModule(CompleteExport, AnomalibModule):  # type: ignore[misc]  # anomalib's to_onnx is not Lightning's
    """An anomalib model that is calibrated on normal images: when its training ends, or else before it is tested.

    Args:
        image_size (tuple[int, int]): Height and width to which images are resized.
        pre_processor (PreProcessor | bool): True resizes to ``image_size``; False expects images of that size.
        **components (Any): Post-processor, evaluator and visualizer, as for ``AnomalibModule``. Of a post-processor, a
            copy is taken: models may be given the same one.

    Raises:
        ValueError: If the pre-processor normalizes, is random, or leaves another number of channels than 3.
        TypeError: If the post-processor is of another kind than ``post_processor_kind``.
    """

    post_processor_kind: type[UnsaturatedPostProcessor] = UnsaturatedPostProcessor
    batch_kind: type[UnroundedBatch] = UnroundedBatch

    pre_processor: PreProcessor | None
    post_processor: UnsaturatedPostProcessor

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
            refuse_unfit(self.pre_processor)
        given, kind = self.post_processor, self.post_processor_kind
        # That of reconstructions is one of the general kind, too.
        is_for_maps, wants_maps = isinstance(given, InTraPostProcessor), issubclass(kind, InTraPostProcessor)
        if not isinstance(given, kind) or is_for_maps != wants_maps:
            msg = (
                f"{self.name} needs post_processor=True or this package's {kind.__name__} (with "
                "enable_normalization=False for raw scores): that of anomalib clamps scores, which moves AUROC, and "
                "InTraPostProcessor is for reconstructions. On a "
                f"command line: --model.post_processor anomalib_intra.{kind.__name__}, before its arguments."
            )
            raise TypeError(msg)
        self.post_processor = copy.deepcopy(given)
        self._asks_for_pre_processor = pre_processor is not True
        if isinstance(self.evaluator, Evaluator):
            self.evaluator = selective(self.evaluator)
        self.image_size = image_size
        #: What the datamodule did to the images of the calibration, but for the pre-processor's own resize, in words;
        #: None where that is not known.
        self.calibrated_through: str | None = None
        #: Height and width of the image files it was calibrated on; None where that is not known.
        self.calibrated_size: tuple[int, int] | None = None

    # ---- what a model decides ----------------------------------------------------------------------------------------

    @property
    def evaluated_at_once(self) -> int:
        """Images in a batch of validation and calibration."""
        return 1

    @property
    def turns_images(self) -> bool:
        """Whether training images are turned, by a quarter or by any angle."""
        return False

    @property
    @abstractmethod
    def is_calibrated(self) -> bool:
        """Whether the model can score images."""

    @abstractmethod
    def learn_normal(self, images: DataLoader[Any]) -> None:
        """Compute from normal images what scoring needs, with the present weights.

        Args:
            images (DataLoader): Training images, as a test would see them.
        """

    def test_step(self, batch: Any, *args: Any, **kwargs: Any) -> ImageBatch:
        """Give a batch what the post-processor scores: raw scores and maps, or what it makes them from.

        Args:
            batch (Any): Batch of images.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            ImageBatch: The batch.
        """
        del args, kwargs
        scores = self.model(torch.as_tensor(batch.image))
        return batch.update(pred_score=scores.pred_score, anomaly_map=scores.anomaly_map)

    def set_thresholds(self, images: DataLoader[Any]) -> None:
        """Set the thresholds, with what :meth:`learn_normal` computed.

        Args:
            images (DataLoader): Images to set them on, as a test would see them.
        """
        self.post_processor.forget_observed()
        for batch in track(images, "Thresholds"):
            self.post_processor.observe(self.test_step(self.as_tested(batch)))
        self.post_processor.set_thresholds()

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

    @classmethod
    def configure_visualizer(cls) -> Visualizer:
        """Name the pictures of anomalib.

        Returns:
            Visualizer: A :class:`NamedImageVisualizer`.
        """
        return NamedImageVisualizer()

    @property
    def learning_type(self) -> LearningType:
        """The model learns from normal images alone."""
        return LearningType.ONE_CLASS

    # ---- test and prediction -----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse a precision that this model cannot work with; look at the images of a training and of its test.

        Args:
            stage (str): Lightning's name of what begins.

        Raises:
            ValueError: If the trainer has such a precision, or a file is a good and a bad image at once.
        """
        super().setup(stage)
        if self.trainer.precision not in _PRECISIONS:
            msg = (
                f"{self.name} does not work with precision={self.trainer.precision}: its difference maps and scores "
                f"need float32 beside it. Take {', '.join(_PRECISIONS[:-1])} or {_PRECISIONS[-1]}."
            )
            raise ValueError(msg)
        if stage == "fit":
            datamodule = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning
            refuse_contradictory(datamodule)
            if self.trainer.is_global_zero:
                warn_of_folders(datamodule)
                warn_of_test_images(getattr(datamodule, "test_data", None))

    def on_validation_start(self) -> None:
        """Make sure that images and model are fit for validation outside training."""
        if self.trainer.state.fn != "fit":
            self._ensure_fit(self.trainer.val_dataloaders)

    def on_test_start(self) -> None:
        """Make sure that images and model are fit for a test."""
        self._ensure_fit(self.trainer.test_dataloaders)

    def on_predict_start(self) -> None:
        """Make sure that images and model are fit for prediction, and that it keeps nothing which nobody can take."""
        if commanded := command_line(self):
            # Lightning would keep all predictions to return them, megabytes an image; a command line returns none.
            self.trainer.predict_loop.return_predictions = bool(commanded.get("return_predictions"))
        self._ensure_fit(self.trainer.predict_dataloaders)

    def _ensure_fit(self, loaders: Any) -> None:
        self._check_files(loaders)
        for dataset in datasets_of(loaders):
            refuse_random(transform_of(dataset), "What the datamodule does to test images")
        self._ensure_calibrated()
        for dataset in datasets_of(loaders):
            through = self._described(dataset)
            if self.calibrated_through is not None and through != self.calibrated_through:
                logger.warning(
                    "%s was calibrated on images that went through %s, but these go through %s, and its thresholds are "
                    "not for such images: give this datamodule the same augmentations.",
                    self.name,
                    self.calibrated_through or "no augmentations",
                    through or "none",
                )
            elif self._only_resizes([dataset]):
                warn_of_other_shape(usual_size(paths_of(dataset)), self.calibrated_size)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn image batches into those of the model, which keep what anomalib's would round or drop."""
        del dataloader_idx
        if isinstance(batch, ImageBatch) and not isinstance(batch, self.batch_kind):
            return self.batch_kind.of(batch)
        return batch

    def on_validation_batch_start(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse images that do not fit the model."""
        del batch_idx, dataloader_idx
        self._check_shape(torch.as_tensor(batch.image))

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def predict_step(self, batch: UnroundedBatch, batch_idx: int, dataloader_idx: int = 0) -> ImageBatch:
        """Do with a batch what a test step does.

        Args:
            batch (UnroundedBatch): Batch of images.
            batch_idx (int): Number of the batch.
            dataloader_idx (int): Unused.

        Returns:
            ImageBatch: The batch.
        """
        del dataloader_idx
        return self.test_step(batch, batch_idx)

    # ---- calibration -------------------------------------------------------------------------------------------------

    def _ensure_calibrated(self) -> None:
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning
        lacks_thresholds = self.is_calibrated and self.post_processor.lacks_thresholds
        if datamodule is None and lacks_thresholds and self.trainer.state.fn != "validate":  # which sets them
            logger.warning(
                "This %s has no thresholds: scores are raw, and no image is called anomalous. %s",
                self.name,
                HOW_TO_SET_THRESHOLDS,
            )
        if datamodule is None or (self.is_calibrated and not lacks_thresholds):
            return  # without a datamodule, the model says what is missing
        missing = "This checkpoint has no thresholds." if lacks_thresholds else self.not_calibrated
        logger.warning("%s Computing it from the training images of %s, some held out.", missing, datamodule.name)
        val_loader = datamodule.val_dataloader() if has_validation_images(datamodule) else None
        self._calibrate(self._sort_out(datamodule.train_dataloader(), val_loader))

    @torch.inference_mode(False)  # that of a test, whose tensors no checkpoint can be loaded into
    @torch.no_grad()
    def _calibrate(self, images: NormalImages) -> None:
        was_training = self.training
        self.eval()
        self.calibrate(images)
        self.train(was_training)

    def calibrate(self, images: NormalImages) -> None:
        """Learn what is normal, unless that is known already, and set the thresholds.

        Args:
            images (NormalImages): The loaders of the run.
        """
        if not self.is_calibrated:
            self.learn_normal(images.statistics)
        self.set_thresholds(images.thresholds)
        self.calibrated_through = self._described(images.statistics.dataset)
        self.calibrated_size = usual_size(paths_of(images.statistics.dataset))

    def forget_calibration(self) -> None:
        """Forget what belongs to weights that are about to change."""
        self.post_processor.reset()
        self.calibrated_through = self.calibrated_size = None

    def _described(self, dataset: Any) -> str:
        own = parts_of(getattr(self.pre_processor, "transform", None))
        return described(transform_of(dataset), next((part for part in own if isinstance(part, Resize)), None))

    def as_tested(self, batch: ImageBatch) -> ImageBatch:
        """Bring a batch of a calibration loader to where and what a test step gets.

        Args:
            batch (ImageBatch): Batch as it was loaded.

        Returns:
            ImageBatch: The batch on the model's device, pre-processed.
        """
        batch = self.on_after_batch_transfer(self.transfer_batch_to_device(batch, self.device, 0), 0)
        if self.pre_processor is not None:
            self.pre_processor.on_test_batch_start(self.trainer, self, batch, 0)
        self._check_images(torch.as_tensor(batch.image))
        return batch

    # ---- images ------------------------------------------------------------------------------------------------------

    def _sort_out(self, train_loader: Any, val_loader: Any, scored: bool = False) -> NormalImages:
        for loader in (train_loader, val_loader):
            if loader is not None and not isinstance(loader, DataLoader):
                msg = f"{self.name} takes one DataLoader for training and one for validation, not {type(loader)}."
                raise TypeError(msg)
        self._check_files([train_loader, val_loader], self.turns_images and self.trainer.state.fn == "fit")
        return NormalImages.of(
            train_loader,
            val_loader,
            self.trainer.datamodule,  # type: ignore[attr-defined]  # set by Lightning
            evaluated_at_once=self.evaluated_at_once,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            scored=scored,
        )

    def prepare(self, batch: ImageBatch) -> Prepared:
        """Bring a batch of training images to the model's device and size.

        Args:
            batch (ImageBatch): Batch of images.

        Returns:
            Prepared: Its normal images in [0, 1], shape ``(B, 3, H, W)``, and their paths.

        Raises:
            ValueError: If they are of another size or range.
        """
        batch = self.transfer_batch_to_device(batch, self.device, 0)
        if self.pre_processor is not None:
            self.pre_processor.on_train_batch_start(self.trainer, self, batch, 0)
        images, normal = torch.as_tensor(batch.image), is_normal(batch)
        self._check_images(images)
        paths = batch.image_path or ["an image without a path"] * len(normal)
        return Prepared(images[normal], [path for path, is_one in zip(paths, normal.tolist(), strict=True) if is_one])

    def _check_files(self, loaders: Any, turned: bool = False) -> None:
        only_resized = self._only_resizes(datasets_of(loaders))
        check_image_files(loaders, self.image_size if only_resized else None, turned)

    def _only_resizes(self, datasets: Iterable[Any]) -> bool:
        own = parts_of(getattr(self.pre_processor, "transform", None))
        return [type(part) for part in own] == [Resize] and not any(map(self._described, datasets))

    def _check_images(self, images: torch.Tensor) -> None:
        self._check_shape(images)
        check_range(images)

    def _check_shape(self, images: torch.Tensor) -> None:
        channels, height, width = images.shape[1:]
        if channels != 3:
            msg = (
                f"Images have {channels} channels after the pre-processor: the model takes 3. Turn grey ones into "
                "colour in the data set, with torchvision.transforms.v2.RGB()."
            )
            raise ValueError(msg)
        if (height, width) != self.image_size:
            msg = (
                f"Images are {height} x {width} pixels after the pre-processor, but image_size is "
                f"{self.image_size[0]} x {self.image_size[1]}: make both the same."
            )
            raise ValueError(msg)

    def mean_of_all(self, total: torch.Tensor, count: int) -> torch.Tensor:
        """Average over the images of all processes of a run.

        Args:
            total (torch.Tensor): Sum over the images of this process.
            count (int): How many they are.

        Returns:
            torch.Tensor: The mean, the same in every process; NaN where there are no images.
        """
        counted = torch.tensor(float(count), device=total.device)
        return self.trainer.strategy.reduce(total, reduce_op="sum") / self.trainer.strategy.reduce(
            counted, reduce_op="sum"
        )

    def mean_training_image(self, images: DataLoader[Any]) -> torch.Tensor:
        """Average the training images.

        Args:
            images (DataLoader): Training images, as a test would see them.

        Returns:
            torch.Tensor: Their mean, shape ``(3, H, W)``.
        """
        total, count = torch.zeros(3, *self.image_size, device=self.device), 0
        for batch in track(images, "Mean training image"):
            batch = self.as_tested(batch)
            normal = torch.as_tensor(batch.image)[is_normal(batch)]
            total += normal.sum(dim=0)
            count += len(normal)
        return self.mean_of_all(total, count)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store beside the calibration what it is for."""
        super().on_save_checkpoint(checkpoint)
        self.store_calibration(checkpoint)

    def store_calibration(self, checkpoint: dict[str, Any]) -> None:
        """Store what images were calibrated on, and what they went through; the numbers are in the weights.

        Args:
            checkpoint (dict[str, Any]): The checkpoint, which is changed in place.
        """
        checkpoint["calibrated_through"], checkpoint["calibrated_size"] = self.calibrated_through, self.calibrated_size

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it, and the pre-processor; checkpoints of before do not have it.

        Raises:
            ValueError: If another pre-processor was asked for.
        """
        here = self._pre_processor_in_words
        super().on_load_checkpoint(checkpoint)
        self.calibrated_through = checkpoint.get("calibrated_through")
        self.calibrated_size = checkpoint.get("calibrated_size")
        restored = self._pre_processor_in_words
        if here != restored and self._asks_for_pre_processor:
            msg = (
                f"The checkpoint was made with another pre-processor ({restored or 'none'}; here {here or 'none'}): "
                "leave pre_processor out, which takes that of the checkpoint, or train anew, without a checkpoint."
            )
            raise ValueError(msg)
        trainer = trainer_of(self)
        if here != restored and trainer is not None:
            resize_as_the_model_does(trainer)

    @property
    def _pre_processor_in_words(self) -> str:
        # A checkpoint has lists where tuples were.
        return described(getattr(self.pre_processor, "transform", None)).replace("[", "(").replace("]", ")")


def has_validation_images(datamodule: Any) -> bool:
    """Tell whether a datamodule can make a loader of validation images.

    Args:
        datamodule (Any): Datamodule that was set up. With ``val_split_mode=none``, those of anomalib fail to make one.

    Returns:
        bool: Whether it has some.
    """
    return not isinstance(datamodule, AnomalibDataModule) or hasattr(datamodule, "val_data")
