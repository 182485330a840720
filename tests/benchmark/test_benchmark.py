# SPDX-License-Identifier: Apache-2.0
"""The benchmark: entries, isolation, resuming, tables, and the whole command on the generated data."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from anomalib.data import ImageBatch
from anomalib.models import AnomalibModule, Padim
from anomalib.models.components import TimmFeatureExtractor
from PIL import Image
from sklearn.metrics import roc_auc_score

from anomalib_intra import InTra, cli
from anomalib_intra.benchmark import benchmark
from anomalib_intra.benchmark.charts import chart_of_time
from anomalib_intra.benchmark.evaluation import evaluator
from anomalib_intra.benchmark.job import BenchmarkRun, BenchmarkRuns
from anomalib_intra.benchmark.page import write_page
from anomalib_intra.benchmark.published import OBJECTS, TEXTURES, published
from anomalib_intra.benchmark.runs import build_datamodule, build_model, look_at_images, parse
from anomalib_intra.benchmark.tables import comparison, published_means

from ..conftest import CONFIGS, TINY, InThisProcess

DOCUMENTED = Path(__file__).parents[2] / "docs/benchmark"
PADIM = {"class_path": "anomalib.models.Padim", "init_args": {"layers": ["layer1"], "n_features": 8}}


# ---- evaluation ------------------------------------------------------------------------------------------------------


def metrics_of(scores: torch.Tensor, labels: torch.Tensor, at_once: int = 50) -> dict[str, float]:
    metrics = [metric for metric in evaluator().test_metrics if metric.name.startswith("image_")]
    for part in map(slice, range(0, len(scores), at_once), range(at_once, len(scores) + at_once, at_once)):
        images = torch.rand(len(scores[part]), 3, 2, 2)
        batch = ImageBatch(image=images, pred_score=scores[part], gt_label=labels[part])
        for metric in metrics:
            metric.update(batch)
    return {metric.name: float(metric.compute()) for metric in metrics}


@pytest.mark.parametrize("magnitude", [1e-7, 1.0, 50.0, 1e7])
def test_scores_of_any_magnitude_are_neither_tied_nor_clamped(magnitude: float) -> None:
    """torchmetrics would take those above 1 for logits, and a sigmoid ties all above 17."""
    torch.manual_seed(0)
    scores = magnitude * (0.8 + 0.2 * torch.rand(200))
    labels = (scores + 0.1 * magnitude * torch.randn(200) > 0.9 * magnitude).int()
    assert metrics_of(scores, labels)["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)


def test_scores_next_to_each_other_are_not_tied() -> None:
    near = torch.tensor([1e-8, 1e-3, 1.0, 17.0, 50.0, 1e4, 1e7])
    near = torch.cat([-near, near])
    above = torch.nextafter(near, torch.tensor(torch.inf))
    for low, high in [*zip(near, above, strict=True), (torch.tensor(50.0), torch.tensor(51.0))]:
        assert metrics_of(torch.stack([low, high]), torch.tensor([0, 1]), at_once=1)["image_AUROC"] == 1


def test_best_f1_is_that_of_the_best_threshold() -> None:
    scores, labels = torch.tensor([30.0, 40.0, 35.0, 80.0]), torch.tensor([0, 0, 1, 1])
    assert metrics_of(scores, labels)["image_F1Max"] == pytest.approx(0.8)


@pytest.mark.parametrize("prefix", ["image", "pixel"])
def test_scores_that_are_not_finite_are_refused(prefix: str) -> None:
    (metric,) = [metric for metric in evaluator().test_metrics if metric.name == f"{prefix}_AUROC"]
    scores, labels = torch.tensor([0.0, torch.nan]), torch.tensor([0, 1])
    maps, masks = scores.expand(2, 1, 2, 2), labels.expand(2, 2, 2)
    batch = ImageBatch(
        image=torch.rand(2, 3, 2, 2), pred_score=scores, gt_label=labels, anomaly_map=maps, gt_mask=masks
    )
    with pytest.raises(ValueError, match=metric.name):
        metric.update(batch)


# ---- entries ---------------------------------------------------------------------------------------------------------


def test_all_models_get_the_same_size_and_give_raw_scores() -> None:
    ours = build_model({"class_path": "anomalib_intra.InTra", "init_args": {"depth": 1, "embed_dim": 32}}, (128, 112))
    theirs = build_model({**PADIM, "init_args": {**PADIM["init_args"], "pre_trained": False}}, (128, 112))
    assert isinstance(ours, InTra)
    assert isinstance(theirs, Padim)
    for model in (ours, theirs):
        assert model.pre_processor.transform(torch.rand(1, 3, 200, 300)).shape == (1, 3, 128, 112)
        assert not model.post_processor.enable_normalization
        assert model.visualizer is None
    assert [m.name for m in ours.evaluator.test_metrics] == [m.name for m in theirs.evaluator.test_metrics]


def test_backbone_weights_come_from_the_file(tmp_path: Path) -> None:
    other = Padim(backbone="resnet18", layers=["layer1", "layer2", "layer3"], pre_trained=False)
    (extractor,) = [module for module in other.modules() if isinstance(module, TimmFeatureExtractor)]
    torch.save({**extractor.feature_extractor.state_dict(), "fc.weight": torch.rand(3)}, tmp_path / "weights.pth")
    model = build_model({**PADIM, "backbone_weights": str(tmp_path / "weights.pth")}, (64, 64))
    (loaded,) = [module for module in model.modules() if isinstance(module, TimmFeatureExtractor)]
    for key, value in loaded.feature_extractor.state_dict().items():
        assert torch.equal(value, extractor.feature_extractor.state_dict()[key])

    with pytest.raises(FileNotFoundError, match="take backbone_weights out"):
        build_model({**PADIM, "backbone_weights": str(tmp_path / "none.pth")}, (64, 64))
    torch.save({"conv1.weight": torch.rand(3)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="does not hold the backbone"):
        build_model({**PADIM, "backbone_weights": str(tmp_path / "wrong.pth")}, (64, 64))


def test_every_model_gets_the_same_split() -> None:
    from_train = {"val_split_mode": "from_train"}
    entry = {"class_path": "anomalib.data.MVTecAD", "init_args": from_train}
    assert build_datamodule(entry, seed=3).seed == 3
    assert build_datamodule({**entry, "init_args": {"seed": 5, **from_train}}, seed=3).seed == 5
    assert build_datamodule({**entry, "init_args": {"seed": None, **from_train}}, seed=3).seed == 3
    assert build_datamodule({"class_path": "anomalib_intra.MVTec"}, seed=3).seed == 0  # a fixed choice of its own


def own_images(root: Path, **folders: str) -> dict:
    given = {"name": "mine", "root": str(root), "normal_dir": "train/good", "val_split_mode": "from_train", **folders}
    return {"class_path": "anomalib.data.Folder", "init_args": {**given, "num_workers": 0}}


def test_images_that_would_give_wrong_figures_are_refused_whatever_the_model(few_root: Path, tmp_path: Path) -> None:
    config = {"seed": 1, "data": own_images(few_root / "weave")}
    with pytest.raises(ValueError, match="test images of mine are all normal, so there is nothing to measure"):
        look_at_images(config)
    shutil.copytree(few_root / "weave", tmp_path / "weave")
    config["data"] = own_images(tmp_path / "weave", abnormal_dir="test/hole")
    look_at_images(config)
    file = next((tmp_path / "weave/train/good").iterdir())
    Image.new("I;16", (128, 128)).save(file)
    with pytest.raises(ValueError, match=f"{file} has values of more than 8 bits"):
        look_at_images(config)


def test_a_row_of_other_images_does_not_count(few_root: Path, tmp_path: Path) -> None:
    shutil.copytree(few_root / "weave", tmp_path / "weave")
    data = own_images(tmp_path / "weave", abnormal_dir="test/hole", normal_test_dir="test/good")

    def run() -> BenchmarkRun:
        (one,) = runs_of(tmp_path / "results", data=data)
        return one

    run().folder.mkdir(parents=True)
    run()._store({}, "")
    assert run().is_done
    good, bad = (next((tmp_path / "weave/test" / kind).iterdir()) for kind in ("good", "hole"))
    sorted_anew = good.rename(bad.with_name("sorted_anew.png"))
    assert not run().is_done
    assert run().row is not None  # a run that has just ended is not lost because images were added meanwhile
    sorted_anew.rename(good)
    assert run().is_done
    shutil.rmtree(tmp_path / "weave")
    assert run().is_done  # they lie on another machine


def test_validation_on_test_images_is_refused() -> None:
    with pytest.raises(ValueError, match="set val_split_mode to from_train"):
        build_datamodule({"class_path": "anomalib.data.MVTecAD"}, seed=3)
    with pytest.raises(ValueError, match="set val_split_mode to from_train"):
        build_datamodule({"class_path": "anomalib.data.MVTecAD", "init_args": {"val_split_mode": "none"}}, seed=3)


@pytest.mark.parametrize("own", [{"image_size": [32, 32]}, {"pre_processor": False}, {"post_processor": False}])
def test_a_model_with_images_of_its_own_is_refused(own: dict) -> None:
    with pytest.raises(ValueError, match=f"has its own {next(iter(own))}"):
        build_model({"class_path": "anomalib_intra.InTra", "init_args": own}, (64, 64))


def test_a_model_of_one_size_only_is_refused(monkeypatch) -> None:
    one_size = Padim.configure_pre_processor((240, 240))
    monkeypatch.setattr(Padim, "configure_pre_processor", staticmethod(lambda image_size=None: one_size))
    entry = {**PADIM, "init_args": {**PADIM["init_args"], "pre_trained": False}}
    with pytest.raises(ValueError, match="240 x 240 pixels only: leave it out"):
        build_model(entry, (64, 64))


def test_models_are_built_for_the_size_of_their_images() -> None:
    model = build_model({"class_path": "anomalib.models.Ganomaly"}, (64, 64))
    assert model.input_size == (64, 64)
    assert model.model.generator.encoder1.input_layers[0].in_channels == 3


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"class_path": "anomalib.models.NoSuchModel"}, "NoSuchModel"),
        ({"class_path": "anomalib_intra.InTra", "init_args": {"window_sise": 5}}, "window_sise"),
        ({"init_args": {}}, "class_path|init_args"),
    ],
)
def test_wrong_entries_are_refused_before_anything_runs(entry: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse(AnomalibModule, entry)


def runs_of(tmp_path: Path, **config: object) -> list[BenchmarkRun]:
    data = {"class_path": "anomalib_intra.TextureDemo", "init_args": {"category": {"grid": ["weave", "speckle"]}}}
    return list(BenchmarkRuns(tmp_path)({"data": data, "model": {"grid": [PADIM]}, **config}))


def test_runs_are_all_combinations(tmp_path: Path) -> None:
    entries = [{**PADIM, "name": "A"}, {**PADIM, "name": "B"}]
    runs = runs_of(tmp_path, seed={"grid": [1, 2]}, model={"grid": entries})
    names = {(run.model, run.category, run.seed) for run in runs}
    assert names == {(m, c, s) for m in "AB" for c in ("weave", "speckle") for s in (1, 2)}
    assert len({run.folder for run in runs}) == 8


def test_every_category_may_have_its_own_size(tmp_path: Path) -> None:
    data = {"class_path": "anomalib_intra.MVTec", "init_args": {"category": {"grid": ["grid", "wood"]}}}
    runs = runs_of(tmp_path, data=data, image_size={"wood": [320, 320], "grid": [512, 512]})
    assert {run.category: run.config["image_size"] for run in runs} == {"grid": [512, 512], "wood": [320, 320]}
    rows = pd.DataFrame([{"model": "A", "category": "wood", "seed": 1, "pretrained": "nothing", "error": "it failed"}])
    page = write_page(rows, {"benchmark": {"image_size": {"wood": [320, 320], "grid": [512, 512]}}}, tmp_path)
    assert "reduced to 320 x 320 (wood), 512 x 512 (grid) pixels" in page.read_text()


@pytest.mark.parametrize(
    ("class_path", "arguments", "name"),
    [
        ("anomalib_intra.MVTec", {}, "bottle"),
        ("anomalib.data.MVTecAD", {"category": "screw"}, "screw"),
        ("anomalib.data.Visa", {"category": "pcb1"}, "Visa pcb1"),
        ("anomalib.data.Folder", {"name": "mine", "normal_dir": "good"}, "Folder"),
    ],
)
def test_only_mvtec_ad_bears_bare_category_names(class_path: str, arguments: dict, name: str, tmp_path: Path) -> None:
    data = {"class_path": class_path, "init_args": {**arguments, "val_split_mode": "from_train"}}
    if class_path == "anomalib_intra.MVTec":
        del data["init_args"]["val_split_mode"]
    (run,) = runs_of(tmp_path, data=data)
    assert run.category == name


def test_unknown_keys_and_equal_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="epochs"):
        runs_of(tmp_path, epochs=3)
    with pytest.raises(ValueError, match="wheights"):
        runs_of(tmp_path, model={"grid": [{**PADIM, "wheights": "x"}]})
    with pytest.raises(ValueError, match="a name of its own"):
        runs_of(tmp_path, model={"grid": [PADIM, PADIM]})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model": None}, "needs 'model' and 'data'"),
        ({"model": {"name": "x"}}, "needs 'model' and 'data'"),
        ({"data": None}, "needs 'model' and 'data'"),
        ({"image_size": 256}, "image_size is 256"),
        ({"image_size": {"weave": [64, 64]}}, "none for speckle"),
        ({"image_size": {"weave": 64, "speckle": 64}}, "image_size is 64"),
        ({"model": {**PADIM, "name": "a/b"}}, "special characters"),
        ({"seed": {"grid": []}}, "grid' lists is empty"),
        ({"model": {**PADIM, "trainer": {"devices": 2}}}, "sets devices"),
        (
            {"model": {"class_path": "anomalib_intra.InTra", "init_args": {"image_size": [32, 32]}}},
            "its own image_size",
        ),
    ],
)
def test_wrong_configs_are_refused_with_the_reason(config: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        runs_of(tmp_path, **config)


def test_an_accelerator_is_one(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("accelerator: [cpu, cuda]\nbenchmark: {model: {}, data: {}}")
    with pytest.raises(ValueError, match="measured on one"):
        benchmark(tmp_path / "config.yaml")


def test_shipped_config_is_right_and_gives_all_models_that_train_the_same_time() -> None:
    settings = yaml.safe_load((CONFIGS / "benchmark.yaml").read_text())
    times: dict[str, object] = {}
    for run in BenchmarkRuns(Path())(settings["benchmark"]):
        times.setdefault(run.model, run.config["model"].get("trainer", {}).get("max_time"))
    trained = ["OnePassInTra", "InTra", "PatchSVDD", "RIAD", "CutPaste"]
    assert times == dict.fromkeys(trained, "00:00:30:00") | dict.fromkeys(
        ["PaDiM", "PatchCore", "flat image", "mean image"]
    )


def test_documented_benchmark_is_that_of_the_shipped_config() -> None:
    shipped, documented = (
        yaml.safe_load(path.read_text()) for path in (CONFIGS / "benchmark.yaml", DOCUMENTED / "config.yaml")
    )
    for entry in documented["benchmark"]["model"]["grid"]:
        entry.pop("backbone_weights", None)
    assert documented["benchmark"] == shipped["benchmark"]


def test_documented_benchmark_can_be_gone_on_with() -> None:
    """Its page is that of the rows that are kept, and the command would not run them again."""
    settings = yaml.safe_load((DOCUMENTED / "config.yaml").read_text())
    done = [run for run in BenchmarkRuns(DOCUMENTED)(settings["benchmark"]) if run.is_done]
    rows = pd.read_csv(DOCUMENTED / "benchmark.csv")
    assert len(done) == len(list(DOCUMENTED.rglob("row.json"))) == len(rows) > 0
    assert [run.row["image_AUROC"] for run in done] == pytest.approx(rows["image_AUROC"].tolist())


# ---- running ---------------------------------------------------------------------------------------------------------


def finished(run: BenchmarkRun, error: str = "") -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    measured = {"image_AUROC": 0.75, "pixel_AUROC": None, "fit_s": 2.0, "test_s": 1.0, "ms_per_image": 3.0}
    run._store({} if error else measured, error)


def test_a_finished_run_is_not_run_again_but_a_failed_or_changed_one_is(tmp_path: Path, monkeypatch) -> None:
    started = []

    class Process:
        exitcode = 0

        def __init__(self, target: object, args: tuple) -> None:
            self.run = target.__self__

        def start(self) -> None:
            started.append(str(self.run))
            finished(self.run)

        def join(self) -> None: ...

        def kill(self) -> None: ...

    monkeypatch.setattr("multiprocessing.context.SpawnContext.Process", Process)
    first, second = runs_of(tmp_path)
    finished(first)
    finished(second, error="it failed")
    assert [first.run()["error"], second.run()["error"]] == ["", ""]
    assert started == [str(second)]

    started.clear()
    changed, same = runs_of(tmp_path, image_size=[64, 64])[0], runs_of(tmp_path)[1]
    assert (changed.row, same.is_done) == (None, True)
    changed.run()
    same.run()
    assert started == [str(changed)]


def test_a_process_that_dies_leaves_a_row(tmp_path: Path, monkeypatch) -> None:
    class Dies:
        exitcode = -9

        def __init__(self, **kwargs: object) -> None: ...

        start = join = kill = lambda self: None

    monkeypatch.setattr("multiprocessing.context.SpawnContext.Process", Dies)
    (run, _) = runs_of(tmp_path)
    assert "-9" in run.run()["error"]
    assert not run.is_done


def test_text_in_brackets_is_printed_as_it_is(tmp_path: Path, monkeypatch, capsys) -> None:
    class Fails:
        exitcode = 0

        def __init__(self, target: object, **kwargs: object) -> None:
            self.run = target.__self__

        def start(self) -> None:
            finished(self.run, error="ValueError: [/tmp/x] is not in [cpu, cuda]")

        join = kill = lambda self: None

    monkeypatch.setattr("multiprocessing.context.SpawnContext.Process", Fails)
    monkeypatch.setattr("rich._console", None)  # a new one: that of an earlier test may still hold its lines back
    (run, _) = runs_of(tmp_path)
    run.run()
    assert "[/tmp/x] is not in [cpu, cuda]" in " ".join(capsys.readouterr().out.split())


def test_a_damaged_row_counts_as_missing(tmp_path: Path) -> None:
    (run, _) = runs_of(tmp_path)
    finished(run)
    (run.folder / "row.json").write_text('{"config"')
    assert run.row is None


@pytest.fixture(scope="module")
def whole(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """The command, with one model that works and one whose backbone file is missing, each in its own process."""
    folder = tmp_path_factory.mktemp("benchmark")
    intra = {
        "class_path": "anomalib_intra.InTra",
        "init_args": {key: value for key, value in TINY.items() if key != "image_size"},
    }
    config = {
        "accelerator": "cpu",
        "benchmark": {
            "image_size": [64, 64],
            "data": {
                "class_path": "anomalib_intra.TextureDemo",
                "init_args": {"root": str(demo_root), "category": {"grid": ["weave"]}, "num_workers": 0},
            },
            "model": {
                "grid": [
                    {**PADIM, "name": "Broken", "backbone_weights": str(folder / "none.pth")},
                    {**intra, "trainer": {"max_epochs": 1, "enable_progress_bar": False}},
                ]
            },
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, folder / "out", run_command(path, folder / "out")


def run_command(config: Path, output: Path) -> int:
    """Run the command and give its exit code; signal handlers are put back."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["anomalib-intra", "benchmark", "--config", str(config), "--output", str(output)])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code)
        finally:
            signal.signal(signal.SIGTERM, before)
    return 0


def test_whole_command(whole) -> None:
    config, output, exit_code = whole
    assert exit_code == 1  # one of the runs failed
    rows = pd.read_csv(output / "benchmark.csv").set_index("model")
    assert rows.loc["Broken", "error"].startswith("FileNotFoundError: There is no file")
    assert "Traceback" in (output / "Broken/weave/seed42/error.txt").read_text()
    intra = rows.loc["InTra"]
    assert pd.isna(intra["error"])
    assert intra[["image_AUROC", "pixel_AUROC", "pixel_AUPRO", "image_F1Max", "pixel_F1Max"]].between(0, 1).all()
    assert (intra[["fit_s", "test_s", "ms_per_image", "peak_memory_mib", "parameters", "steps"]] > 0).all()
    assert intra["epochs"] == 1
    for chart in ("benchmark.png", "categories.png"):
        assert (output / chart).read_bytes().startswith(b"\x89PNG")
    page = (output / "benchmark.md").read_text()
    for text in ("Detection", "Segmentation", "camera-ready", "Failed runs", "none.pth", "| InTra", "nothing"):
        assert text in page
    assert yaml.safe_load(page.split("```yaml")[1].split("```")[0]) == yaml.safe_load(config.read_text())


def test_calling_again_runs_only_what_is_missing(whole, monkeypatch) -> None:
    monkeypatch.setattr("multiprocessing.context.SpawnContext.Process", InThisProcess)
    config, output, _ = whole
    before = (output / "InTra/weave/seed42/row.json").stat().st_mtime_ns
    settings = yaml.safe_load(config.read_text())
    flat = {"name": "flat", "class_path": "anomalib_intra.yardsticks.Yardstick"}
    settings["benchmark"]["model"]["grid"] = [settings["benchmark"]["model"]["grid"][1], flat]
    other = config.with_name("other.yaml")
    other.write_text(yaml.safe_dump(settings))
    rows = benchmark(other, output)
    assert (output / "InTra/weave/seed42/row.json").stat().st_mtime_ns == before
    assert list(rows["model"]) == ["InTra", "flat"]
    assert list(rows["error"]) == ["", ""]
    measured = rows.set_index("model").loc["flat"]
    assert measured["steps"] == 0
    assert 0.5 < measured["image_AUROC"] < 1
    page = (output / "benchmark.md").read_text()
    assert "Failed" not in page
    assert "Missing" not in page


def test_a_model_that_trains_for_a_time_ends_by_it(few_root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("multiprocessing.context.SpawnContext.Process", InThisProcess)
    one_pass = {
        "class_path": "anomalib_intra.OnePassInTra",
        "init_args": {"embed_dim": 32, "depth": 1, "num_heads": 2, "minutes": 0.05},
        "trainer": {"max_epochs": -1, "enable_progress_bar": False},
    }
    data = {"class_path": "anomalib_intra.TextureDemo", "init_args": {"root": str(few_root), "num_workers": 0}}
    config = {"accelerator": "cpu", "benchmark": {"image_size": [64, 64], "data": data, "model": one_pass}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (row,) = benchmark(tmp_path / "config.yaml", tmp_path / "out").to_dict("records")
    assert row["error"] == ""
    assert (row["model"], row["pretrained"]) == ("OnePassInTra", "nothing")
    assert 3 <= row["fit_s"] < 60
    assert row["steps"] > row["epochs"] > 0
    assert all(0 <= row[name] <= 1 for name in ("image_AUROC", "pixel_AUROC", "pixel_AUPRO"))


def test_a_file_that_is_no_benchmark_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("model: {class_path: Padim}")
    with pytest.raises(ValueError, match="has no part called 'benchmark'"):
        benchmark(tmp_path / "other.yaml")


# ---- tables ----------------------------------------------------------------------------------------------------------


def rows_of(values: dict[tuple[str, str, int], float], metric: str = "image_AUROC") -> pd.DataFrame:
    return pd.DataFrame([{"model": m, "category": c, "seed": s, metric: v} for (m, c, s), v in values.items()])


def test_means_are_those_computed_by_hand() -> None:
    rows = rows_of(
        {
            ("A", "screw", 1): 0.70,
            ("A", "screw", 2): 0.80,
            ("A", "bottle", 1): 0.95,
            ("A", "grid", 1): 0.90,
            ("B", "screw", 1): 0.60,
            ("B", "bottle", 1): 0.50,
        }
    )
    table = comparison(rows, "image_AUROC")
    assert list(table.index) == [
        "grid", "bottle", "screw", "mean of textures (1)", "mean of objects (2)", "mean of all (3)",
    ]  # fmt: skip
    assert list(table["A"].round(6)) == [90.0, 95.0, 75.0, 90.0, 85.0, 86.666667]
    # B was not run on grid: its means over sets with grid would flatter or damn it.
    assert list(table["B"].fillna(-1).round(6)) == [-1, 50.0, 60.0, -1, 55.0, -1]
    assert list(table["InTra, paper"].round(6)) == [100.0, 100.0, 95.7, 100.0, 97.85, 98.566667]
    assert table["PaDiM, paper"].isna().all()  # it reports no image AUROC per category
    assert list(comparison(rows.rename(columns={"image_AUROC": "pixel_AUPRO"}), "pixel_AUPRO").columns) == ["A", "B"]


@pytest.mark.parametrize("metric", ["image_AUROC", "pixel_AUROC"])
def test_published_rows_average_to_the_published_means(metric: str) -> None:
    table = published(metric)
    assert set(table.index) == {*TEXTURES, *OBJECTS, "textures", "objects", "all"}
    assert len(TEXTURES) == 5
    assert len(OBJECTS) == 10
    for method in table.columns.drop("PaDiM" if metric == "image_AUROC" else []):
        for group, members in (("textures", TEXTURES), ("objects", OBJECTS), ("all", TEXTURES + OBJECTS)):
            mean = table.loc[list(members), method].mean()
            assert table.loc[group, method] == pytest.approx(mean, abs=0.11), (method, group)


def test_camera_ready_means_stand_beside_the_first_version() -> None:
    for metric, first, last in (("image_AUROC", 95.94, 95.0), ("pixel_AUROC", 96.98, 96.6)):
        row = published_means(metric).iloc[0]
        assert (row["InTra"], row["InTra, camera-ready"]) == (first, last)


def test_page_begins_with_advice_a_summary_and_the_chart_against_time(tmp_path: Path) -> None:
    row = {"seed": 1, "image_F1Max": 0.5, "pixel_F1Max": None, "pixel_AUPRO": 0.5, "pixel_AUROC": 0.7, "error": ""}
    costs = {"parameters": 1e6, "epochs": 1, "steps": 9, "peak_memory_mib": 9.0, "ms_per_image": 4.0}
    of_models = [
        ("A", "grid", 0.5, 60.0, "nothing"),
        ("A", "screw", 1.0, 180.0, "nothing"),
        ("B", "grid", 0.9, 0.0, "features"),
    ]
    rows = pd.DataFrame(
        [
            {**row, **costs, "model": model, "category": name, "image_AUROC": auroc, "fit_s": fit, "pretrained": saw}
            for model, name, auroc, fit, saw in of_models
        ]
    )
    page = write_page(rows, {"benchmark": {}, "notes": "Take A."}, tmp_path).read_text()
    first = page.split("## ")[0]
    places = [first.index(text) for text in ("Take A.", "| A ", "(benchmark.png)")]
    assert places == sorted(places)
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in first.splitlines()
        if "|" in line
    }
    assert cells["A"] == ["75.0", "70.0", "50.0", "2.0", "4.0", "2 of 2", "nothing"]
    assert cells["B"] == ["-", "-", "-", "0.0", "4.0", "1 of 2", "features"]
    legend = [text.get_text() for text in chart_of_time(rows).legends[0].get_texts()]
    assert legend == ["A", "B (1 of 2)"]
    warning = "Rows are of 2 devices (card; processor, 1 thread): do not compare their times."
    for devices, warns in ((["card"] * 3, False), (["card", "processor, 1 thread", None], True)):
        page = write_page(rows.assign(device=devices), {"benchmark": {}}, tmp_path).read_text()
        assert (warning in page.split("## ")[0]) == ("do not compare" in page) == warns


def test_page_of_failures_alone(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        [{"model": "A", "category": "x", "seed": 1, "pretrained": "nothing", "error": "ValueError: it failed"}]
    )
    config = {"benchmark": {}, "notes": "Look here."}
    page = write_page(rows, config, tmp_path, missing=["B on x, seed 1"]).read_text()
    assert "Look here." in page
    assert "Missing runs" in page
    assert "B on x, seed 1" in page
    assert "it failed" in page
    assert "Detection" not in page


def test_rows_are_plain_json(tmp_path: Path) -> None:
    (run, _) = runs_of(tmp_path)
    finished(run)
    stored = json.loads((run.folder / "row.json").read_text())
    assert stored["row"]["pretrained"] == "pretrained features"
    assert stored["config"]["data"]["init_args"]["category"] == "weave"
