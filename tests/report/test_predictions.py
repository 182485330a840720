# SPDX-License-Identifier: Apache-2.0
"""The page of a prediction: all images by their scores, the threshold that can be moved, and what is counted."""

import base64
import os
import shutil
import signal
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from anomalib.data import ImageItem
from lightning.pytorch import Callback, Trainer
from PIL import Image

from anomalib_intra import CutPaste, InTraPostProcessor, TextureDemo
from anomalib_intra.components.batch import InTraBatch
from anomalib_intra.report import RunReport
from anomalib_intra.report.page import render_predictions
from anomalib_intra.report.panels import draw_thumbnails
from anomalib_intra.report.record import PredictionRecord, Scored, path_below
from anomalib_intra.training import one_run

from ..conftest import Run, latest_prediction, tiny_engine, tiny_intra, tiny_patch_svdd
from .test_report import DAY, Page, needs_chromium, open_in_browser, page_of


class Predicted(NamedTuple):
    """A prediction of all test images of a folder, whose labels nobody tells."""

    run: Path
    scores: dict[str, float]
    called: dict[str, bool]


def predict(model: object, root: Path, **what: object) -> Predicted:
    engine = tiny_engine(root)
    batches = engine.predict(model, **what)
    paths = [path for batch in batches for path in batch.image_path]
    values = [torch.cat([getattr(batch, name) for batch in batches]).tolist() for name in ("pred_score", "pred_label")]
    scores, called = (dict(zip(paths, each, strict=True)) for each in values)
    return Predicted(latest_prediction(engine), scores, called)


@pytest.fixture(scope="module")
def predicted(trained_intra: Run, few_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Predicted:
    root = tmp_path_factory.mktemp("predicted")
    return predict(deepcopy(trained_intra.model), root, data_path=few_root / "weave/test")


def parts(page: Page) -> list[dict[str, str | None]]:
    figures = [attributes for tag, attributes in page.elements if tag == "figure"]
    return [figure for figure in figures if (figure.get("class") or "").startswith("case")]


def slider(page: Page, name: str = "threshold") -> dict[str, str | None]:
    return next(attributes for tag, attributes in page.elements if tag == "input" and attributes["id"] == name)


def rendered(*images: Scored, threshold: float | None = 0.5, cases: int = 500) -> Page:
    record = PredictionRecord(cases)
    for image in images:
        record.add(image, lambda: draw_thumbnails(ImageItem(image=torch.rand(3, 8, 8))))
    return Page(render_predictions(record, "InTra", DAY, threshold))


def test_every_image_is_there_in_the_order_of_the_scores(predicted: Predicted) -> None:
    page = page_of(predicted.run)
    assert "stopped" not in page.words
    expected = sorted(predicted.scores.items(), key=lambda pair: -pair[1])
    assert [float(part["data-score"]) for part in parts(page)] == [score for _, score in expected]
    words = page.words
    for path, score in expected:  # each behind the one before
        caption = f"{Path(path).parent.name}/{Path(path).name} score {score:.4g}:"
        assert caption in words
        words = words.split(caption)[1]
    assert "16 images, the most suspicious first" in page.words
    assert "is anomalous" not in page.words, "nobody knows"


def test_every_image_has_its_panels_as_thumbnails_in_one_file(predicted: Predicted) -> None:
    page = page_of(predicted.run)
    titles = [image["alt"].split(" of ")[0] for image in page.images()]
    assert titles == ["Image", "Reconstruction", "Anomaly map", "Masks (red: predicted)"] * 16
    for image in page.images():
        kind, data = image["src"].split(",")
        assert kind == "data:image/jpeg;base64"
        assert image["loading"] == "lazy"
        with Image.open(BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (int(image["width"]), int(image["height"])) == (160, 160)
    assert not {"link", "iframe", "object", "base", "a"} & {tag for tag, _ in page.elements}
    html = (predicted.run / "report.html").read_text(encoding="utf-8")
    assert "http" not in html
    assert "url(" not in html


def test_images_called_anomalous_are_marked_and_counted(predicted: Predicted) -> None:
    page, called = page_of(predicted.run), sum(predicted.called.values())
    assert 0 < called < 16
    assert f"{called} of 16 called anomalous." in page.words
    marked = [part["class"] for part in parts(page)]
    assert marked == ["case called"] * called + ["case"] * (16 - called)


@pytest.mark.parametrize("normalized", [True, False])
def test_slider_stands_at_the_threshold_of_the_model(
    normalized: bool, trained_intra: Run, few_root: Path, tmp_path: Path
) -> None:
    post_processor = InTraPostProcessor(enable_normalization=normalized, image_sensitivity=0.7)
    model = tiny_intra(visualizer=True, post_processor=post_processor)
    model.load_state_dict(trained_intra.model.state_dict())
    run, scores, called = predict(model, tmp_path, data_path=few_root / "weave/test/hole")
    page = page_of(run)
    threshold = float(slider(page)["value"])
    assert threshold == pytest.approx(0.3 if normalized else float(model.post_processor.image_threshold) * 3 / 7)
    assert {path: score > threshold for path, score in scores.items()} == called
    assert float(slider(page)["min"]) < min(scores.values()) < max(scores.values()) < float(slider(page)["max"])


def test_truth_is_shown_where_it_is_known(trained_intra: Run, few: TextureDemo, tmp_path: Path) -> None:
    run, _, called = predict(deepcopy(trained_intra.model), tmp_path, datamodule=few)
    alarms = sum(decision for path, decision in called.items() if "/good/" in path)
    missed = sum(not decision for path, decision in called.items() if "/good/" not in path)
    words = page_of(run).words
    assert f"called anomalous: {alarms} of 8 normal (false alarms), {missed} of 8 anomalous missed." in words
    assert words.count(", is normal") == words.count(", is anomalous") == 8


def test_without_a_visualizer_a_prediction_writes_nothing(trained_intra: Run, few_root: Path, tmp_path: Path) -> None:
    silent = tiny_intra(visualizer=False)
    silent.load_state_dict(trained_intra.model.state_dict())
    tiny_engine(tmp_path).predict(silent, data_path=few_root / "weave/test/hole")
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.name == "predictions"] == []


def test_every_prediction_has_a_folder_of_its_own_beside_the_report_of_a_test(
    trained_intra: Run, few: TextureDemo, few_root: Path, tmp_path: Path
) -> None:
    """One lot of parts follows the other, with files of equal names; two of them may be predicted in one second."""
    lots = [tmp_path / lot for lot in ("monday", "tuesday")]
    for lot, image in zip(lots, ("hole/000.png", "good/000.png"), strict=True):
        lot.mkdir()
        shutil.copy(few_root / "weave/test" / image, lot / "part.png")
    engine, model = tiny_engine(tmp_path / "results"), deepcopy(trained_intra.model)
    engine.test(model, datamodule=few)
    run = Path(engine.trainer.default_root_dir)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    folders = []
    for lot in lots:
        engine.predict(model, data_path=lot)
        assert Path(engine.trainer.default_root_dir) == run
        folders.append(latest_prediction(engine))
    assert all(path.read_bytes() == content for path, content in before.items())
    assert sorted(folders) == sorted((run / "predictions").iterdir())
    for lot, folder in zip(lots, folders, strict=True):
        assert "1 image, " in page_of(folder).words
        assert [path.name for path in (folder / "images" / lot.name).iterdir()] == ["part.png"]


def test_a_prediction_that_is_refused_leaves_no_folder(few_root: Path, tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path)
    with pytest.raises(RuntimeError, match="not calibrated"):
        engine.predict(tiny_intra(), data_path=few_root / "weave/test/hole")
    assert not list(tmp_path.rglob("predictions"))


def test_folders_of_one_second_are_told_apart(tmp_path: Path) -> None:
    folders = [one_run._new_folder(tmp_path / "predictions", "now") for _ in range(3)]
    assert [folder.name for folder in folders] == ["now", "now_2", "now_3"]
    (tmp_path / "file").touch()
    one_run._new_folder(tmp_path / "file", "now")  # refuses nothing, and comes to an end


def test_models_that_expect_nothing_have_a_page_too(trained_patch_svdd: Run, few_root: Path, tmp_path: Path) -> None:
    svdd = tiny_patch_svdd()
    svdd.load_state_dict(trained_patch_svdd.model.state_dict())
    cutpaste = CutPaste(image_size=(64, 64), samples_per_image=1, images_per_step=6)
    tiny_engine(tmp_path, max_epochs=1).fit(cutpaste, datamodule=TextureDemo(few_root, num_workers=0))
    for model in (svdd, cutpaste):
        run, scores, _ = predict(model, tmp_path / model.name, data_path=few_root / "weave/test/hole")
        page = page_of(run)
        assert sorted(float(part["data-score"]) for part in parts(page)) == sorted(scores.values())
        titles = {image["alt"].split(" of ")[0] for image in page.images()}
        assert titles == {"Image", "Anomaly map", "Masks (red: predicted)"}


def test_pictures_are_kept_of_the_highest_scores_alone_and_the_page_says_so() -> None:
    scores = np.random.default_rng(0).permutation(40) / 40
    page = rendered(*(Scored(f"day/{score}.png", score, called_anomalous=score > 0.5) for score in scores), cases=3)
    assert [image["alt"] for image in page.images()] == [f"Image of {n / 40}.png" for n in (39, 38, 37)]
    assert "Only the 3 highest-scored are shown with pictures" in page.words
    assert len(parts(page)) == 40
    assert "19 of 40 called anomalous" in page.words
    assert "Only the" not in rendered(Scored("day/1.png", 0.1)).words


def test_head_says_of_which_images_and_which_checkpoint_and_lots_with_equal_names_are_told_apart() -> None:
    record = PredictionRecord()
    for lot, score in (("lot A", 0.2), ("lot B", 0.7)):
        record.add(
            Scored(f"/parts/{lot}/good/000.png", score), lambda: draw_thumbnails(ImageItem(image=torch.rand(3, 8, 8)))
        )
    page = Page(render_predictions(record, "InTra", DAY, 0.5, checkpoint="/models/may.ckpt"))
    head, cases = page.words.split("0 of 2 called anomalous.")
    assert "2 images, the most suspicious first. Images that score above 0.5 are called anomalous." in head
    assert "Images /parts Checkpoint /models/may.ckpt" in head
    assert cases.index("lot B/good/000.png score 0.7") < cases.index("lot A/good/000.png score 0.2")
    assert "Checkpoint" not in rendered(Scored("a/1.png", 0.1)).words


@pytest.mark.parametrize(
    ("paths", "folder", "names"),
    [
        (["a/b/1.png", "a/c/1.png"], "a", ["b/1.png", "c/1.png"]),
        (["/a/1.png", "/a/1/2.png"], "/a", ["1.png", "1/2.png"]),
        (["/a/1.png", "/b/1.png"], "/", ["a/1.png", "b/1.png"]),
        (["1.png"], "", ["1.png"]),
        (["image 0", "image 1"], "", ["image 0", "image 1"]),  # those without a path
        (["/a/1.png", "image 1"], "", ["/a/1.png", "image 1"]),
        ([], "", []),
    ],
)
def test_images_are_named_below_the_folder_that_holds_all(paths: list[str], folder: str, names: list[str]) -> None:
    record = PredictionRecord()
    for path in paths:
        record.add(Scored(path, 0.5), dict)
    assert record.folder == folder
    assert [path_below(path, record.folder) for path in paths] == names


class Stop(Callback):
    """Breaks into a prediction when it has come to its third image."""

    def __init__(self, by: BaseException) -> None:
        self.by = by

    def on_predict_batch_start(self, trainer: Trainer, pl_module: object, batch: object, batch_idx: int) -> None:
        if batch_idx == 2:
            raise self.by


@pytest.mark.parametrize(
    ("by", "ends_with"), [(KeyboardInterrupt(), SystemExit), (RuntimeError("camera"), RuntimeError)]
)
def test_a_prediction_that_is_stopped_leaves_the_page_of_what_it_came_to(
    by: BaseException, ends_with: type, trained_intra: Run, few_root: Path, tmp_path: Path
) -> None:
    listener = signal.getsignal(signal.SIGINT)
    engine, folder = tiny_engine(tmp_path, callbacks=[Stop(by)]), few_root / "weave/test/good"
    try:
        with pytest.raises(ends_with):
            engine.predict(tiny_intra(visualizer=True), data_path=folder, ckpt_path=trained_intra.checkpoint)
    finally:
        signal.signal(signal.SIGINT, listener)  # Lightning lets no one stop it twice
    (report,) = tmp_path.rglob("report.html")
    page = Page(report.read_text(encoding="utf-8"))
    assert "This prediction was stopped before its end: 2 of 8 images are here." in page.words
    assert f"Images {folder} Checkpoint {trained_intra.checkpoint}" in page.words
    assert len(parts(page)) == 2


def test_images_without_a_score_come_first() -> None:
    page = rendered(Scored("a/1.png", 0.9, None, True), Scored("a/2.png", float("nan"), None, False), cases=1)
    assert [image["alt"] for image in page.images()] == ["Image of 2.png"]
    assert "1 of the images got no score" in page.words
    assert page.words.index("2.png no score") < page.words.index("1.png score 0.9")
    assert "1 of 2 called anomalous" in page.words


def test_without_a_threshold_nothing_is_called_anomalous_until_the_slider_is_moved() -> None:
    page = rendered(Scored("a/1.png", 0.9), Scored("a/2.png", 0.2), threshold=None)
    assert "0 of 2 called anomalous" in page.words
    assert "The model has no threshold" in page.words
    assert float(slider(page)["value"]) == 0.9


def test_names_of_strangers_stay_text() -> None:
    evil = '"><script>alert(1)</script>&amp;'
    page = rendered(Scored(f"{evil}/{evil}.png", 0.7, None, True))
    assert [tag for tag, _ in page.elements].count("script") == 1, "the page's own"
    assert "alert(1)" in page.words


def test_a_name_that_is_no_utf_8_is_written_with_its_bytes(trained_intra: Run, few_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(few_root / "weave/test/hole/000.png", folder / os.fsdecode(b"teil_\xe4.png"))
    engine = tiny_engine(tmp_path)
    assert engine.predict(deepcopy(trained_intra.model), data_path=folder)
    page = page_of(latest_prediction(engine))
    assert "teil_\\xe4.png" in page.words


def test_records_of_several_processes_are_one() -> None:
    pieces = [PredictionRecord(cases=3), PredictionRecord(cases=3)]
    for n, score in enumerate(np.random.default_rng(1).permutation(20)):
        pieces[n % 2].add(Scored(f"{score}.png", float(score)), lambda score=score: {"Image": score})
    merged = PredictionRecord.merged(pieces).by_suspicion()
    assert [case.image.score for case in merged] == list(range(19, -1, -1))
    assert [case.panels for case in merged] == [{"Image": 19}, {"Image": 18}, {"Image": 17}] + [{}] * 17


@needs_chromium
def test_in_a_browser_the_counts_and_marks_follow_the_slider(tmp_path: Path) -> None:
    labelled = ((0.9, True), (0.8, False), (0.6, True), (0.4, False), (0.3, True))
    record = PredictionRecord()
    for score, anomalous in labelled:
        item = ImageItem(image=torch.rand(3, 8, 8), anomaly_map=torch.rand(8, 8))
        record.add(Scored(f"day/{score}.png", score, anomalous, score > 0.5), lambda item=item: draw_thumbnails(item))
    html = render_predictions(record, "InTra", DAY, 0.5)

    def seen(*acts: str) -> tuple[Page, str]:
        path = tmp_path / "report.html"
        hand = f"<script>addEventListener('load', () => {{ {' '.join(acts)} }})</script></body>"
        path.write_text(html.replace("</body>", hand), encoding="utf-8")
        dom = open_in_browser(path, tmp_path / "profile", "--dump-dom").replace("<!DOCTYPE html>", "")
        return Page(dom), dom

    def move(name: str, value: float) -> str:
        return f"byId('{name}').value = {value}; byId('{name}').dispatchEvent(new Event('input'));"

    for acts, called, alarms, missed in (
        ((), 3, 1, 1),
        ((move("threshold", 0.7),), 2, 1, 2),
        ((move("threshold", 0.0),), 5, 2, 0),  # (no lower than the slider goes)
        ((move("threshold", 0.7), "byId('reset').click();"), 3, 1, 1),
    ):
        page, _ = seen(*acts)
        assert f"{called} of 5 called anomalous: {alarms} of 2 normal (false alarms), {missed} of 3" in page.words
        assert [part["class"] for part in parts(page)] == ["case called"] * called + ["case"] * (5 - called)
        assert page.words.count(": called anomalous") == called
    page, dom = seen(move("fade", 0.25))
    assert "Image to anomaly map" in page.words
    assert 'style="--fade: 0.25;"' in dom
    over = [image for image in page.images() if image.get("class") == "over"]
    maps = [image for image in page.images() if image["alt"].startswith("Anomaly map")]
    assert [image["src"] for image in over] == [image["src"] for image in maps]
    assert len(over) == 5


def test_scores_that_float32_would_tie_keep_their_order(trained_intra: Run) -> None:
    batch = InTraBatch(image=torch.rand(2, 3, 8, 8), anomaly_map=torch.rand(2, 8, 8), image_path=["a/1.png", "a/2.png"])
    batch.pred_score = torch.tensor([0.5, 0.5 + 1e-12], dtype=torch.float64)
    report = RunReport()
    report.on_test_batch_end(None, trained_intra.model, batch, batch, 0)
    assert [image.score for image in report._record.images] == [0.5, 0.5 + 1e-12]
