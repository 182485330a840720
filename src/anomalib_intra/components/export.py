# SPDX-License-Identifier: Apache-2.0
"""What anomalib's export lacks for models whose scores are computed from small differences."""

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, ImageItem
from anomalib.deploy import CompressionType
from anomalib.models.components.base.export_mixin import ExportMixin
from torchvision.transforms.v2.functional import resize

from anomalib_intra.components.checkpoint_fit import HOW_TO_CALIBRATE, HOW_TO_SET_THRESHOLDS

if TYPE_CHECKING:
    import openvino as ov


logger = logging.getLogger(__name__)

#: What converts to ONNX, and tells of each node that it looks at.
_TALKATIVE = ("onnx_ir", "onnxscript")


class CompleteExport(ExportMixin):
    """anomalib's exports, where INT8 and INT8_PTQ compress what was trained and nothing else.

    Resizing, difference map, training mean, memory bank and thresholds stay as they are: with eight bits in them,
    scores are noise. INT8_PTQ is calibrated with training images as a test would see them,
    where anomalib takes the datamodule's validation images, which may be test images.
    """

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export to a file of torch whose weights ask for no gradients; anomalib's inferencer does not switch them off.

        Args:
            *args (Any): As for anomalib's ``to_torch``.
            **kwargs (Any): The same.

        Returns:
            Path: The file.
        """
        self._refuse_uncalibrated()
        trained = [weight for weight in cast("torch.nn.Module", self).parameters() if weight.requires_grad]
        try:
            for weight in trained:
                weight.requires_grad_(False)
            return super().to_torch(*args, **kwargs)
        finally:
            for weight in trained:
                weight.requires_grad_(True)

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX.

        Args:
            export_root (Path | str): Folder in which ``weights/onnx`` is made.
            model_file_name (str): Name of the file, without suffix.
            input_size (tuple[int, int] | None): Height and width of all images; any by default.
            **kwargs (Any): Arguments of ``torch.onnx.export``.

        Returns:
            Path: The ONNX file.
        """
        self._refuse_uncalibrated()
        # What torch writes; anomalib asks for 14, to which it cannot be converted.
        kwargs.setdefault("opset_version", 18)
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        return super().to_onnx(export_root, model_file_name, input_size, **kwargs)

    def _refuse_uncalibrated(self) -> None:
        module: Any = self
        if not module.is_calibrated:
            msg = (
                f"This {module.name} cannot score images yet, so it is not exported: it was never trained, or its "
                f"training was cut off. {HOW_TO_CALIBRATE}"
            )
            raise RuntimeError(msg)
        if module.post_processor.lacks_thresholds:
            msg = f"This {module.name} has no thresholds, so it is not exported. {HOW_TO_SET_THRESHOLDS}"
            raise RuntimeError(msg)
        if module.calibrated_through:
            logger.warning(
                "Images went through the datamodule's augmentations (%s), which an exported model does not have: do "
                "the same to images before they are scored, or have the pre-processor do it.",
                module.calibrated_through,
            )

    def _compress_ov_model(
        self,
        model: "ov.Model",
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> "ov.Model":
        if compression_type not in (CompressionType.INT8, CompressionType.INT8_PTQ):
            return super()._compress_ov_model(model, compression_type, datamodule, *args, **kwargs)

        import nncf

        ignored = nncf.IgnoredScope(names=_without_trained_weights(model, self.model), validate=False)
        if compression_type == CompressionType.INT8:
            return nncf.compress_weights(model, ignored_scope=ignored)
        if datamodule is None:
            msg = "INT8_PTQ is calibrated with training images: give the datamodule that the model was trained on."
            raise ValueError(msg)
        datamodule.setup("fit")
        images = copy.copy(datamodule.train_data)
        images.augmentations = datamodule.test_augmentations  # as a test sees them, without what trains at random
        size = model.input(0).partial_shape[2:]

        def prepare(item: ImageItem) -> np.ndarray:
            image = torch.as_tensor(item.image)[None]
            return (resize(image, list(size.to_shape())) if size.is_static else image).numpy()

        return nncf.quantize(model, nncf.Dataset(images, prepare), ignored_scope=ignored)


def _without_trained_weights(model: "ov.Model", network: torch.nn.Module) -> list[str]:
    """Names of all operations but the products and convolutions with a weight of the network."""
    weights = [weight.detach().cpu().numpy() for weight in network.parameters()]

    def is_trained(operation: "ov.Node") -> bool:
        if operation.get_type_name() not in ("MatMul", "Convolution", "ConvolutionBackpropData"):
            return False
        factor = operation.input_value(1).get_node()
        # Converting renames constants and transposes them.
        return factor.get_type_name() == "Constant" and any(
            np.array_equal(factor.data, weight)
            or np.array_equal(factor.data, weight.T)
            or _is_scaled(factor.data, weight)
            for weight in weights
        )

    operations = [operation for operation in model.get_ops() if operation.get_type_name() != "Constant"]
    return [operation.get_friendly_name() for operation in operations if not is_trained(operation)]


def _is_scaled(factor: np.ndarray, weight: np.ndarray) -> bool:
    """Tell whether a factor is a convolution's weight times a number for each channel: a batch norm was put into it."""
    if factor.shape != weight.shape or factor.ndim != 4:
        return False
    of_channels, others = factor.reshape(len(factor), -1), weight.reshape(len(weight), -1)
    scale = (of_channels * others).sum(axis=1, keepdims=True) / (others**2).sum(axis=1, keepdims=True).clip(min=1e-30)
    return np.allclose(of_channels, scale * others, rtol=1e-3, atol=1e-6)
