# SPDX-License-Identifier: Apache-2.0
"""The second pass, and what may change after training: suspicious patches are covered, the calibration follows."""

import logging
from pathlib import Path

import pytest
import torch
from anomalib.data.utils import read_image

from anomalib_intra import InTra, InTraPostProcessor, TextureDemo
from anomalib_intra.components.anomaly_map import difference_map
from anomalib_intra.intra.second_pass import second_pass
from anomalib_intra.intra.torch_model import InpaintingTransformer

from ..conftest import Run, tiny_engine, tiny_intra

K = 8


@pytest.fixture
def model() -> InpaintingTransformer:
    torch.manual_seed(0)
    model = InpaintingTransformer((40, 48), patch_size=K, window_size=3, embed_dim=16, depth=2, num_heads=2).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


@torch.no_grad()
def test_patches_with_a_suspicious_pixel_are_covered_and_only_those(model: InpaintingTransformer) -> None:
    images = torch.rand(3, 3, 40, 48)
    suspicious = torch.zeros(3, 1, 40, 48, dtype=torch.bool)
    suspicious[0, 0, 2 * K, 3 * K] = suspicious[0, 0, 3 * K - 1, 5 * K - 1] = True  # corners of patches (3, 4), (3, 5)
    suspicious[2, 0, 0, 0] = True
    first = model(images)
    second = second_pass(model, first, suspicious)
    covered = images.clone()
    covered[0, :, 2 * K : 3 * K, 3 * K : 5 * K] = first.reconstruction[0, :, 2 * K : 3 * K, 3 * K : 5 * K].clamp(0, 1)
    covered[2, :, :K, :K] = first.reconstruction[2, :, :K, :K].clamp(0, 1)
    torch.testing.assert_close(second.reconstruction[[0, 2]], model.reconstruct(covered[[0, 2]]), atol=1e-6, rtol=0)
    assert torch.equal(second.reconstruction[1], first.reconstruction[1])  # nothing suspicious, not looked at again
    assert torch.equal(second.image, images)  # it is the image itself that is compared with it


@torch.no_grad()
def test_what_is_beside_a_defect_is_not_painted_from_it(model: InpaintingTransformer) -> None:
    images = torch.rand(1, 3, 40, 48)
    other = images.clone()
    other[:, :, K : 2 * K, K : 2 * K] = torch.rand(1, 3, K, K)  # two images that differ in the suspicious patch (2, 2)
    suspicious = torch.zeros(1, 1, 40, 48, dtype=torch.bool)
    suspicious[..., K : 2 * K, K : 2 * K] = True
    first, second = ([model(x), second_pass(model, model(x), suspicious)] for x in (images, other))
    assert not torch.allclose(first[0].reconstruction, second[0].reconstruction, atol=1e-3)
    torch.testing.assert_close(first[1].reconstruction, second[1].reconstruction, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def trained(few_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[InTra, Path]:
    torch.manual_seed(0)
    model = tiny_intra(second_pass=True)
    engine = tiny_engine(tmp_path_factory.mktemp("second"), max_epochs=1)
    engine.fit(model, datamodule=TextureDemo(few_root, num_workers=0))
    return model, Path(engine.best_model_path)


@torch.no_grad()
def test_suspicion_is_the_first_pass_and_thresholds_are_the_second_over_held_out_images(
    trained: tuple, few: TextureDemo
) -> None:
    model, _ = trained
    model.eval()
    few.setup()
    maps = []
    for path in few.val_data.samples.image_path:
        image = model.pre_processor(read_image(path, as_tensor=True)[None])
        first = model.model(image)
        difference = difference_map(*first)
        of_first = model.post_processor.raw_anomaly_map(difference)
        suspicious = of_first > model.post_processor.suspicion_threshold
        assert torch.equal(model.post_processor.suspicious(difference), suspicious)
        second = second_pass(model.model, first, suspicious)
        of_second = model.post_processor.raw_anomaly_map(difference_map(*second))
        maps.append(torch.stack([of_first, of_second]))
    first, second = torch.stack(maps, dim=1).flatten(1).double()
    assert not torch.equal(first, second)
    thresholds = [float(model.post_processor.suspicion_threshold), float(model.post_processor.pixel_threshold)]
    expected = [float(torch.quantile(x, model.post_processor.pixel_quantile)) for x in (first, second)]
    assert thresholds == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_a_checkpoint_and_an_export_score_as_the_model_does(trained: tuple, demo_root: Path, tmp_path: Path) -> None:
    model, checkpoint = trained
    images = torch.stack([
        read_image(demo_root / f"weave/test/{name}/000.png", as_tensor=True) for name in ("good", "hole", "smear")
    ])  # fmt: skip
    expected = model.eval()(images)
    one_pass = tiny_intra().eval()
    one_pass.load_state_dict(model.state_dict())
    assert not torch.allclose(one_pass(images).anomaly_map, expected.anomaly_map, atol=1e-3)
    loaded = InTra.load_from_checkpoint(checkpoint).eval()
    assert loaded.second_pass
    assert torch.equal(loaded(images).anomaly_map, expected.anomaly_map)

    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(model.to_onnx(tmp_path))
    got = dict(zip([x.name for x in session.get_outputs()], session.run(None, {"input": images.numpy()}), strict=True))
    torch.testing.assert_close(torch.from_numpy(got["anomaly_map"]), expected.anomaly_map, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.from_numpy(got["pred_score"]), expected.pred_score, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changed",
    [{"second_pass": False}, {"window_shift": 1}, {"post_processor": InTraPostProcessor(colour_weight=0.5)}],
    ids=["second_pass", "window_shift", "colour_weight"],
)
def test_what_changes_after_training_is_calibrated_anew(
    trained: tuple,
    few: TextureDemo,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changed: dict,
    request: pytest.FixtureRequest,
) -> None:
    _, checkpoint = trained
    with caplog.at_level(logging.WARNING):
        model = InTra.load_from_checkpoint(checkpoint, **changed)
    assert f"calibrated with {request.node.callspec.id}=" in caplog.text
    assert not model.post_processor.is_calibrated
    with caplog.at_level(logging.WARNING):
        tiny_engine(tmp_path).test(model, datamodule=few)
    assert "Computing it from the training images" in caplog.text

    maps = []
    with torch.no_grad():
        for path in few.train_data.samples.image_path:
            image = model.pre_processor(read_image(path, as_tensor=True)[None])
            maps.append(difference_map(*model.model(image), model.post_processor.colour_weight))
    torch.testing.assert_close(
        model.post_processor.training_mean, torch.cat(maps).mean(dim=0, keepdim=True), atol=1e-6, rtol=0
    )


def test_nothing_is_suspicious_before_there_is_a_threshold() -> None:
    post_processor = tiny_intra().post_processor
    post_processor.set_training_mean(torch.zeros(1, 1, 64, 64))
    images = torch.rand(1, 3, 64, 64)
    assert not post_processor.suspicious(torch.rand(len(images), 1, *images.shape[-2:])).any()


def test_a_checkpoint_from_before_there_was_a_second_pass_scores_as_it_did(
    trained_intra: Run, demo_root: Path, tmp_path: Path
) -> None:
    image = read_image(demo_root / "weave/test/hole/000.png", as_tensor=True)[None]
    scores = []
    for name in ("calibrated_with", "hyper_parameters", "state_dict"):  # each of which is shorter in an old one
        checkpoint = torch.load(trained_intra.checkpoint, weights_only=True)
        if name == "calibrated_with":
            del checkpoint[name]
        elif name == "hyper_parameters":
            del checkpoint[name]["second_pass"], checkpoint[name]["window_shift"]
        else:
            del checkpoint[name]["post_processor.suspicion_threshold"]
        torch.save(checkpoint, tmp_path / "old.ckpt")
        with torch.no_grad():
            scores.append(float(InTra.load_from_checkpoint(tmp_path / "old.ckpt").eval()(image).pred_score))
    with torch.no_grad():
        expected = float(InTra.load_from_checkpoint(trained_intra.checkpoint).eval()(image).pred_score)
    assert scores == [expected] * 3
