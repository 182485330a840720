# SPDX-License-Identifier: Apache-2.0
"""Exported models score image files like Engine.predict: torch, ONNX Runtime, OpenVINO, int8."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize, Transform

from anomalib_intra import RIAD, CutPaste, InTra, OnePassInTra, PatchSVDD, TextureDemo
from anomalib_intra.components.exportable_resize import exportable, resize_matrix
from anomalib_intra.one_pass import OnePassTransformer

from ..conftest import Run, tiny_engine, tiny_intra

nncf = pytest.importorskip("nncf")
onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")

#: Width, height and noise of the image files: larger and smaller than the models, square and not, as they were.
FILES = {
    "good/002": (128, 128, 0), "hole/000": (128, 128, 0), "scratch/000": (900, 900, 30), "good/000": (640, 400, 30),
    "good/001": (300, 1100, 10), "smear/000": (90, 70, 0),
}  # fmt: skip
#: Models, and the fixtures that train them.
MODELS = {
    "InTra": "trained_intra", "OnePassInTra": "trained_one_pass", "PatchSVDD": "trained_patch_svdd",
    "RIAD": "trained_riad", "CutPaste": "trained_cutpaste",
}  # fmt: skip
LAYERS = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)
TOLERANCE = {"rtol": 0, "atol": 1e-5}


class Predictions(NamedTuple):
    """Of N images: scores ``(N,)``, labels ``(N,)``, maps ``(N, H, W)`` and masks ``(N, H, W)``."""

    pred_score: np.ndarray
    pred_label: np.ndarray
    anomaly_map: np.ndarray
    pred_mask: np.ndarray


def gathered(batches: list) -> Predictions:
    def join(name: str) -> np.ndarray:
        values = [np.asarray(batch[name] if isinstance(batch, Mapping) else getattr(batch, name)) for batch in batches]
        return np.stack([value.squeeze() for value in values])

    return Predictions(*map(join, Predictions._fields))


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None] / 255


class Trained(NamedTuple):
    model: InTra | OnePassInTra | PatchSVDD | RIAD | CutPaste
    engine: Engine
    files: list[Path]
    expected: Predictions
    onnx: Path
    openvino: Path

    def run_onnx(self, images: np.ndarray, path: Path | None = None) -> dict[str, np.ndarray]:
        session = onnxruntime.InferenceSession(path or self.onnx)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, {"input": images}), strict=True))


@pytest.fixture(scope="module")
def files(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Image files, some with fine detail, which a resize without antialiasing turns into something else."""
    folder = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(0)
    for n, (name, (width, height, noise)) in enumerate(FILES.items()):
        with Image.open(demo_root / f"weave/test/{name}.png") as image:
            pixels = np.asarray(image.convert("RGB").resize((width, height))) + rng.normal(0, noise, (height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{n}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def trained(request: pytest.FixtureRequest, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    run: Run = request.getfixturevalue(request.param)
    root = tmp_path_factory.mktemp("export")
    model, engine = deepcopy(run.model), tiny_engine(root)
    expected = gathered(engine.predict(model, data_path=files[0].parent))
    assert 0 < expected.pred_label.sum() < len(files)  # the labels can tell a difference
    onnx = engine.export(model, "onnx", export_root=root)
    with pytest.MonkeyPatch.context() as patch:  # anomalib would write the same ONNX file again to convert it
        patch.setattr(model, "to_onnx", lambda *_, **__: onnx)
        ir = engine.export(model, "openvino", export_root=root)
    return Trained(model, engine, files, expected, onnx, ir)


def only(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("trained", [MODELS[name] for name in names], indirect=True, ids=names)


intra_only = only("InTra")
intra_and_one_pass = only("InTra", "OnePassInTra")
#: Eight bits move the scores of a CutPaste of a hundred steps by a quarter; of a trained one nobody knows.
measured_in_int8 = only("InTra", "OnePassInTra", "PatchSVDD", "RIAD")


def assert_same(got: Predictions, expected: Predictions) -> None:
    np.testing.assert_allclose(got.pred_score, expected.pred_score, **TOLERANCE)
    np.testing.assert_allclose(got.anomaly_map, expected.anomaly_map, **TOLERANCE)
    np.testing.assert_array_equal(got.pred_label, expected.pred_label)
    # A pixel may lie on the threshold.
    assert (got.pred_mask != expected.pred_mask).mean() < 1e-4


# ---- the same scores, maps, labels and masks everywhere --------------------------------------------------------------


def test_torch_inferencer_predicts_like_the_model(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained.engine.export(trained.model, "torch", export_root=tmp_path)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    inferencer = TorchInferencer(path, device="cpu")
    with torch.inference_mode():
        got = gathered([inferencer.predict(file) for file in trained.files])
    assert_same(got, trained.expected)


def test_onnx_runtime_predicts_like_the_model(trained: Trained) -> None:
    got = gathered([trained.run_onnx(read(file)) for file in trained.files])
    assert_same(got, trained.expected)


def test_openvino_inferencer_predicts_like_the_model(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it leaves a cache folder behind
    inferencer = OpenVINOInferencer(trained.openvino, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = gathered([inferencer.predict(file) for file in trained.files])
    assert_same(got, trained.expected)


def test_without_antialiasing_the_scores_would_be_others(trained: Trained) -> None:
    """What the tests above would not see if the files had no fine detail."""
    aliased = Resize(trained.model.image_size, antialias=False)
    got = gathered([trained.run_onnx(aliased(torch.from_numpy(read(file))).numpy()) for file in trained.files])
    assert np.abs(got.pred_score - trained.expected.pred_score).max() > 0.02


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batches_of_any_size_score_like_single_images(trained: Trained, batch: int) -> None:
    rng = np.random.default_rng(batch)
    images = rng.random((batch, 3, 70, 90), dtype=np.float32)
    compiled = openvino.Core().compile_model(trained.openvino, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        expected = trained.model.eval()(torch.from_numpy(images))
    for got in (trained.run_onnx(images), compiled(images)):
        assert got["pred_score"].shape == (batch,)
        assert got["anomaly_map"].shape == (batch, 1, *trained.model.image_size)
        np.testing.assert_allclose(got["pred_score"], expected.pred_score, **TOLERANCE)
        np.testing.assert_allclose(got["anomaly_map"], expected.anomaly_map, **TOLERANCE)


def test_conversion_to_onnx_does_not_tell_of_every_node(
    trained_one_pass: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trained_one_pass.model.to_onnx(tmp_path)
    assert [record.name for record in caplog.records if record.name.startswith("onnx")] == []


# ---- int8 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_reconstruction(trained: Trained) -> Path:
    """A model for images of one size, in which resizing is a product with constants, like a trained layer."""
    return trained.engine.export(
        trained.model,
        "onnx",
        model_file_name="with_reconstruction",
        export_root=trained.onnx.parents[2],
        input_size=(70, 90),
        onnx_kwargs={"reconstruction": True},
    )


def assert_only_trained_layers_are_quantized(model: Any, network: torch.nn.Module) -> None:
    factors = [
        operation.input_value(1)
        for operation in model.get_ops()
        if operation.get_type_name() in ("MatMul", "Convolution", "ConvolutionBackpropData", "GroupConvolution")
        and any(value.get_node().get_type_name() == "FakeQuantize" for value in operation.input_values())
    ]
    layers = [layer for layer in network.modules() if isinstance(layer, LAYERS)]
    if isinstance(network, OnePassTransformer):
        # No image has a part in the first queries; what is the same for all images is not quantized.
        layers.remove(network.blocks[0].attention.query)
    shapes = [tuple(layer.weight.shape) for layer in layers]
    assert len(factors) == len(layers)
    assert all(tuple(f.get_shape()) in shapes or tuple(f.get_shape())[::-1] in shapes for f in factors)


@measured_in_int8
def test_int8_quantizes_trained_layers_alone(trained: Trained, few: TextureDemo) -> None:
    """With int8 in resizing, difference map or memory bank, scores are noise."""
    model = openvino.Core().read_model(trained.openvino)
    model = trained.model._compress_ov_model(model, CompressionType.INT8_PTQ, few)
    assert_only_trained_layers_are_quantized(model, trained.model.model)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = gathered([compiled(read(file)) for file in trained.files])
    assert 1e-5 < np.abs(got.pred_score - trained.expected.pred_score).mean() < 0.15


@intra_only
def test_int8_takes_models_for_images_of_one_size(
    trained: Trained, with_reconstruction: Path, few: TextureDemo
) -> None:
    model = openvino.convert_model(with_reconstruction)
    model = trained.model._compress_ov_model(model, CompressionType.INT8_PTQ, few)  # images of 128 x 128 pixels
    assert_only_trained_layers_are_quantized(model, trained.model.model)


def test_int8_is_calibrated_with_images_as_a_test_sees_them(
    trained: Trained, demo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Black(Transform):
        def transform(self, inpt: Any, params: dict) -> Any:
            return torch.zeros_like(inpt)

    seen = []

    def quantize(model: Any, data: Any, **_: Any) -> Any:
        seen.extend(next(iter(data.get_inference_data([number]))) for number in range(3))
        return model

    monkeypatch.setattr(nncf, "quantize", quantize)
    data = TextureDemo(demo_root, num_workers=0, train_augmentations=Black(), test_augmentations=Resize((100, 100)))
    trained.model._compress_ov_model(openvino.Core().read_model(trained.openvino), CompressionType.INT8_PTQ, data)
    assert all(image.max() > 0.1 for image in seen)
    assert {image.shape[-2:] for image in seen} == {(100, 100)}
    assert torch.as_tensor(data.train_data[0].image).max() == 0  # (which training still sees)


def test_int8_without_training_images_is_refused(trained: Trained) -> None:
    with pytest.raises(ValueError, match="give the datamodule"):
        trained.model._compress_ov_model(openvino.Core().read_model(trained.openvino), CompressionType.INT8_PTQ)


@measured_in_int8
def test_int8_weights_are_those_of_trained_layers_and_score_alike(trained: Trained) -> None:
    model = openvino.Core().read_model(trained.openvino)
    model = trained.model._compress_ov_model(model, CompressionType.INT8)
    kinds = [op.get_element_type().get_type_name() for op in model.get_ops() if op.get_type_name() == "Constant"]
    # (a weight, and its zero points where they are not all alike)
    assert kinds.count("u8") >= sum(isinstance(layer, LAYERS) for layer in trained.model.model.modules())
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = gathered([compiled(read(file)) for file in trained.files])
    np.testing.assert_allclose(got.pred_score, trained.expected.pred_score, rtol=0, atol=0.05)


# ---- the reconstruction ----------------------------------------------------------------------------------------------


@intra_and_one_pass
def test_the_reconstruction_is_an_output_on_request(trained: Trained, with_reconstruction: Path) -> None:
    image = read(trained.files[-1])
    assert image.shape[-2:] == (70, 90)
    got, without = trained.run_onnx(image, with_reconstruction), trained.run_onnx(image)
    assert list(got) == [*without, "image", "reconstruction"]
    for name, value in without.items():
        np.testing.assert_allclose(got[name].astype(float), value.astype(float), **TOLERANCE)
    resized = Resize((64, 64))(torch.from_numpy(image))
    np.testing.assert_allclose(got["image"], resized, **TOLERANCE)
    with torch.no_grad():
        expected = trained.model.compare(resized).reconstruction
        np.testing.assert_allclose(got["reconstruction"], expected, **TOLERANCE)
        assert len(trained.model(resized)) == 4  # the model itself is as before


# ---- the resize ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((900, 900), (64, 64)),
        ((301, 1100), (64, 96)),
        ((50, 40), (64, 64)),
        ((64, 200), (64, 64)),
        ((1, 3000), (9, 256)),
    ],
)
def test_resize_as_matrix_products_is_that_of_torchvision(old: tuple[int, int], new: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *old, generator=torch.Generator().manual_seed(0))
    transform = Resize(new, antialias=True)
    torch.testing.assert_close(exportable(transform)(images), transform(images), rtol=0, atol=3e-6)


def test_images_of_the_right_size_are_not_touched() -> None:
    assert torch.equal(resize_matrix(64, 64), torch.eye(64))
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(exportable(Resize((64, 64)))(images), images)


def test_transforms_are_exported_with_all_their_parts() -> None:
    transform = Compose([Resize((64, 80)), CenterCrop(48)])
    images = torch.rand(2, 3, 100, 130)
    torch.testing.assert_close(exportable(transform)(images), transform(images), rtol=0, atol=3e-6)


@pytest.mark.parametrize("transform", [Resize(64), Resize((64, 64), InterpolationMode.BICUBIC)])
def test_a_resize_that_openvino_gets_wrong_is_named(transform: Resize, caplog: pytest.LogCaptureFixture) -> None:
    assert exportable(transform) is transform
    assert "OpenVINO ignores the antialiasing" in caplog.text


def test_a_resize_without_antialiasing_stays_one(caplog: pytest.LogCaptureFixture) -> None:
    transform = Resize((64, 64), antialias=False)
    assert exportable(transform) is transform
    assert not caplog.text


def test_the_pre_processor_of_anomalib_keeps_its_antialiasing() -> None:
    model = tiny_intra(pre_processor=PreProcessor(Resize((64, 64), antialias=True)))
    images = torch.rand(1, 3, 300, 200)
    batch = ImageBatch(image=images.clone())
    model.pre_processor.on_predict_batch_start(None, None, batch, 0)
    assert torch.equal(model.pre_processor(images), torch.as_tensor(batch.image))
