# SPDX-License-Identifier: Apache-2.0
"""anomalib's commands with each model, as they are typed, in one process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.metrics import AUPRO, Evaluator

from .conftest import TINY, TINY_ONE_PASS, latest_prediction

pytest.importorskip("openvino")  # without it, `export` has no arguments for it

MODELS = {
    "InTra": TINY,
    "OnePassInTra": {**TINY_ONE_PASS, "minutes": "null"},
    "PatchSVDD": {"image_size": (128, 128), "pairs_per_image": 2, "pair_batch_size": 16},
    "CutPaste": {"image_size": (64, 64), "samples_per_image": 1, "images_per_step": 6},
    "RIAD": {"image_size": (64, 64), "width": 4},
}
METRICS = {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"}

Command = Callable[..., AnomalibCLI]


@pytest.fixture(scope="module", params=MODELS)
def command(request: pytest.FixtureRequest, few_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Run `anomalib COMMAND` with a model; every run has its own folder of results unless it is told one."""
    model, arguments = request.param, MODELS[request.param]
    given = [
        x
        for name, value in arguments.items()
        for x in (f"--model.{name}", str(list(value) if isinstance(value, tuple) else value))
    ]
    data = ["--data", "anomalib_intra.TextureDemo", "--data.root", str(few_root), "--data.num_workers", "0"]

    def run(name: str, *more: str | Path, with_data: bool = True) -> AnomalibCLI:
        folder = tmp_path_factory.mktemp(name)
        trainer = [
            "--trainer.max_epochs",
            "1",
            "--trainer.accelerator",
            "cpu",
            "--trainer.enable_progress_bar",
            "false",
        ]
        return AnomalibCLI(
            [
                name,
                *("--model", f"anomalib_intra.{model}"),
                *given,
                *(data if with_data else []),
                *(trainer if name != "export" else []),
                *("--default_root_dir", str(folder)),
                *map(str, more),
            ]
        )

    return run


@pytest.fixture(scope="module")
def trained(command: Command) -> AnomalibCLI:
    return command("train")


@pytest.fixture(scope="module")
def checkpoint(trained: AnomalibCLI) -> Path:
    return Path(trained.engine.best_model_path)


def metrics_of(cli: AnomalibCLI) -> dict[str, float]:
    return {name: float(value) for name, value in cli.engine.trainer.callback_metrics.items() if name in METRICS}


def test_train_fits_tests_and_writes_checkpoint_config_and_pictures(
    trained: AnomalibCLI, checkpoint: Path, few_root: Path
) -> None:
    assert set(metrics_of(trained)) == METRICS
    assert checkpoint.parts[-4:] == ("v0", *Path("weights/lightning/model.ckpt").parts)
    results = checkpoint.parents[2]
    assert (results / "config.yaml").is_file()
    images = {path.relative_to(few_root / "weave") for path in (few_root / "weave" / "test").rglob("*.png")}
    assert {path.relative_to(results / "images") for path in (results / "images").rglob("*.png")} == images


def test_fit_writes_a_model_that_can_score(command: Command) -> None:
    fitted = command("fit")
    assert fitted.model.is_calibrated
    assert Path(fitted.engine.best_model_path).is_file()
    assert not metrics_of(fitted)


def test_validate_scores_the_checkpoint(command: Command, checkpoint: Path) -> None:
    validated = command("validate", "--ckpt_path", checkpoint)
    assert validated.model.is_calibrated
    assert not torch.isnan(validated.model.post_processor.image_threshold)
    if validated.model.name not in ("PatchSVDD", "CutPaste"):  # those two only score, but while they train
        assert float(validated.engine.trainer.callback_metrics["val_loss"]) > 0


def test_a_checkpoint_loads_whatever_the_metrics(command: Command, trained: AnomalibCLI, checkpoint: Path) -> None:
    """Some metrics have buffers, which the model that `export` builds has not."""
    kind = type(trained.model)
    metrics = [AUPRO(fields=["anomaly_map", "gt_mask"], strict=False)]
    tested = kind.load_from_checkpoint(checkpoint, evaluator=Evaluator(test_metrics=metrics))
    stored = torch.load(checkpoint, weights_only=True)
    stored["state_dict"] = tested.state_dict()
    assert any("fpr_limit" in key for key in stored["state_dict"])
    trained.model.on_load_checkpoint(stored)
    assert stored["state_dict"].keys() == trained.model.state_dict().keys()


def test_test_repeats_the_metrics_of_training(command: Command, trained: AnomalibCLI, checkpoint: Path) -> None:
    config = checkpoint.parents[2] / "config.yaml"
    before = config.read_bytes()
    assert metrics_of(command("test", "--ckpt_path", checkpoint)) == metrics_of(trained)
    assert config.read_bytes() == before, "the command line of the test, in the place of the training's"


def test_predict_takes_a_folder_and_an_image_file(command: Command, checkpoint: Path, few_root: Path) -> None:
    folder = few_root / "weave" / "test" / "hole"
    predicted = [
        command("predict", "--data", path, "--ckpt_path", checkpoint, "--return_predictions", "true", with_data=False)
        for path in (folder, folder / "001.png")
    ]
    of_folder, of_file = (
        {Path(batch.image_path[0]).name: batch for batch in cli.engine.trainer.predict_loop.predictions}
        for cli in predicted
    )
    assert set(of_folder) == {path.name for path in folder.iterdir()}
    assert set(of_file) == {"001.png"}
    assert torch.equal(of_file["001.png"].pred_score, of_folder["001.png"].pred_score)
    assert torch.equal(of_file["001.png"].anomaly_map, of_folder["001.png"].anomaly_map)
    for cli, count in zip(predicted, (len(of_folder), 1), strict=True):
        assert len(list(Path(cli.engine.trainer.default_root_dir).rglob("*.png"))) == count


def test_predict_keeps_no_predictions_and_writes_the_report(command: Command, checkpoint: Path, few_root: Path) -> None:
    """They would fill the memory: a command line hands them to nobody."""
    folder = few_root / "weave" / "test" / "hole"
    engine = command("predict", "--data", folder, "--ckpt_path", checkpoint, with_data=False).engine
    assert not engine.trainer.predict_loop.return_predictions
    assert engine.trainer.predict_loop.predictions == []
    assert "001.png" in (latest_prediction(engine) / "report.html").read_text(encoding="utf-8")


def test_export_writes_a_torch_model(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    to = ("--ckpt_path", checkpoint, "--export_root", tmp_path)
    command("export", "--export_type", "torch", *to, with_data=False)
    exported = torch.load(tmp_path / "weights/torch/model.pt", weights_only=False)["model"]
    assert exported.is_calibrated


@pytest.mark.parametrize("command", ["InTra"], indirect=True)
def test_export_writes_an_onnx_model_with_the_reconstruction(
    command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    to = ("--ckpt_path", checkpoint, "--export_root", tmp_path)
    command("export", "--export_type", "onnx", "--onnx_kwargs", '{"reconstruction": true}', *to, with_data=False)
    graph = onnx.load(tmp_path / "weights/onnx/model.onnx").graph
    assert [output.name for output in graph.output][-1] == "reconstruction"


@pytest.mark.parametrize("command", ["PatchSVDD"], indirect=True)
def test_export_writes_an_int8_openvino_model(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    to = ("--ckpt_path", checkpoint, "--export_root", tmp_path)
    command("export", "--export_type", "openvino", "--compression_type", "INT8_PTQ", *to)
    assert "FakeQuantize" in (tmp_path / "weights/openvino/model.xml").read_text()
