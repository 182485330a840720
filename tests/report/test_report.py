# SPDX-License-Identifier: Apache-2.0
"""The report of a run: what is in it, that it needs nothing else, and that a browser shows it."""

import base64
import math
import shutil
import subprocess
from collections import Counter
from copy import deepcopy
from datetime import datetime
from functools import partial
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from pandas import Series
from PIL import Image
from torchmetrics.functional.classification import binary_auroc

from anomalib_intra import InTra, InTraPostProcessor, TextureDemo
from anomalib_intra.report import RunReport
from anomalib_intra.report.page import render
from anomalib_intra.report.plots import score_histogram, training_curves
from anomalib_intra.report.record import Scored, TestRecord, auroc

from ..conftest import Run, tiny_engine, tiny_intra

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH to open the report with (apt install chromium)"
)
DAY = datetime(2025, 1, 1)


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "input"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.text += data.split()

    @property
    def words(self) -> str:
        return " ".join(self.text)

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == "img"]

    def headings(self) -> int:
        return sum(tag == "h2" for tag, _ in self.elements)


def open_in_browser(report: Path, profile: Path, *args: str) -> str:
    quiet = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}",
    ]  # fmt: skip
    done = subprocess.run([CHROMIUM, *quiet, *args, report.as_uri()], capture_output=True, timeout=90, check=True)
    return done.stdout.decode()


@pytest.fixture
def trained(trained_intra: Run) -> Run:
    return Run(deepcopy(trained_intra.model), trained_intra.folder, trained_intra.metrics)


def page_of(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_training_and_testing_leave_a_report_with_curves(trained: Run, demo_root: Path) -> None:
    model, run, metrics = trained
    page = page_of(run)
    assert "InTra · TextureDemo · weave" in page.words
    assert "52 images, 20 normal, 32 anomalous" in page.words
    assert f"Images {demo_root / 'weave/test'} Checkpoint {trained.checkpoint}" in page.words
    assert f"Image AUROC {metrics['image_AUROC']:.3f}" in page.words
    for heading in ("Scores", "Training", "Kinds of images", "Lowest-scored anomalous images", "Settings"):
        assert heading in page.words
    assert "window_size 3" in page.words
    drawings = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    assert drawings == ["Histogram of the anomaly scores", "Training and validation loss of every epoch"]
    with Image.open(run / "training_curves.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    assert [row["epoch"] for row in model.losses] == [0, 1, 2]
    assert all(np.isfinite([row["train_loss"], row["val_loss"]]).all() for row in model.losses)


def test_report_is_one_small_file_that_points_nowhere_else(trained: Run) -> None:
    run = trained.folder
    page = page_of(run)
    assert (run / "report.html").stat().st_size < 2e6
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/webp;base64,"))
    styles = (run / "report.html").read_text(encoding="utf-8")
    assert "@import" not in styles
    assert {part[:1] for part in styles.split("url(")[1:]} <= {"#"}


def test_every_picture_can_be_read_and_is_described(trained: Run) -> None:
    images = page_of(trained.folder).images()
    assert len(images) == 4 * 4 * 4  # lists, cases, panels
    for image in images:
        with Image.open(BytesIO(base64.b64decode(image["src"].split(",")[1]))) as picture:
            assert picture.size == (int(image["width"]), int(image["height"])) == (256, 256)
        assert image["alt"]
    titles = Counter(image["alt"].split(" of ")[0] for image in images)
    assert titles == {
        "Image": 16, "Reconstruction": 16, "Anomaly map": 16, "Masks (red: predicted, cyan: true)": 16
    }  # fmt: skip


def test_cases_are_the_most_wrongly_and_the_most_clearly_scored_images(
    trained: Run, demo_root: Path, tmp_path: Path
) -> None:
    trained.model.visualizer = None
    scores = {}
    for batch in tiny_engine(tmp_path).predict(trained.model, data_path=demo_root / "weave/test"):
        scores |= dict(zip(batch.image_path, batch.pred_score.tolist(), strict=True))
    anomalous = sorted(score for path, score in scores.items() if "/good/" not in path)
    normal = sorted(score for path, score in scores.items() if "/good/" in path)
    words = page_of(trained.folder).words
    for heading, expected in (
        ("Lowest-scored anomalous images", anomalous[:4]),
        ("Highest-scored normal images", normal[::-1][:4]),
        ("Highest-scored anomalous images", anomalous[::-1][:4]),
        ("Lowest-scored normal images", normal[:4]),
    ):
        section = words.split(heading)[1]
        shown = [part.split()[0].rstrip(":,") for part in section.split("score ")[1:5]]
        assert shown == [f"{score:.3f}" for score in expected]


def test_later_test_of_the_checkpoint_shows_the_curves_of_its_training(
    trained: Run, few: TextureDemo, tmp_path: Path
) -> None:
    later = tiny_engine(tmp_path, limit_test_batches=1)
    loaded = InTra.load_from_checkpoint(trained.checkpoint)
    later.test(loaded, datamodule=few)
    assert loaded.losses == trained.model.losses
    assert "Training" in page_of(Path(later.trainer.default_root_dir)).words
    by_path = tiny_intra()
    tiny_engine(tmp_path / "by_path", limit_test_batches=1).test(by_path, datamodule=few, ckpt_path=trained.checkpoint)
    assert by_path.losses == trained.model.losses


def test_losses_survive_resuming_and_a_new_training_begins_anew(
    trained: Run, demo: TextureDemo, tmp_path: Path
) -> None:
    model, run, _ = trained
    resumed = tiny_intra()
    tiny_engine(tmp_path, max_epochs=5).fit(resumed, datamodule=demo, ckpt_path=run / "weights/lightning/last.ckpt")
    assert [row["epoch"] for row in resumed.losses] == [0, 1, 2, 3, 4]
    assert resumed.losses[:3] == model.losses
    tiny_engine(tmp_path / "anew", max_epochs=1).fit(resumed, datamodule=demo)
    assert [row["epoch"] for row in resumed.losses] == [0]


def test_epochs_without_validation_have_no_validation_loss(demo: TextureDemo, tmp_path: Path) -> None:
    model = tiny_intra()
    tiny_engine(tmp_path, max_epochs=2, check_val_every_n_epoch=2).fit(model, datamodule=demo)
    assert ["val_loss" in row for row in model.losses] == [False, True]


def test_without_a_visualizer_there_is_neither_report_nor_curves(few: TextureDemo, tmp_path: Path) -> None:
    tiny_engine(tmp_path, max_epochs=1).train(tiny_intra(visualizer=False), datamodule=few)
    assert list(tmp_path.rglob("*.html")) == list(tmp_path.rglob("*.png")) == []


def test_own_report_of_the_user_is_the_one_that_is_written(trained: Run, few: TextureDemo, tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, callbacks=[RunReport(cases=1)], limit_test_batches=1)
    engine.test(trained.model, datamodule=few)
    assert len(page_of(Path(engine.trainer.default_root_dir)).images()) == 4 * 1 * 4


def test_report_of_raw_scores_without_metrics_shows_the_raw_threshold(
    trained: Run, few: TextureDemo, tmp_path: Path
) -> None:
    raw = tiny_intra(visualizer=True, post_processor=InTraPostProcessor(enable_normalization=False), evaluator=False)
    raw.load_state_dict(trained.model.state_dict())
    engine = tiny_engine(tmp_path, limit_test_batches=1)
    engine.test(raw, datamodule=few)
    page = page_of(Path(engine.trainer.default_root_dir))
    assert f"threshold {float(raw.post_processor.image_threshold):.3g}" in page.words
    assert "Image AUROC" not in page.words


def test_report_of_normal_images_alone_and_without_a_threshold(trained: Run, demo_root: Path, tmp_path: Path) -> None:
    undecided = tiny_intra(
        visualizer=True, post_processor=InTraPostProcessor(enable_thresholding=False), evaluator=False
    )
    undecided.load_state_dict(trained.model.state_dict())
    good = Folder(
        "good", normal_dir="train/good", normal_test_dir="test/good", root=demo_root / "weave", num_workers=0,
        val_split_mode="from_train", test_split_mode="none",
    )  # fmt: skip
    good.setup()
    engine = tiny_engine(tmp_path)
    engine.test(undecided, dataloaders=good.val_dataloader())
    page = page_of(Path(engine.trainer.default_root_dir))
    assert "There is no threshold" in page.words
    assert "false alarm" not in page.words
    assert "Lowest-scored normal images" in page.words
    assert "scored anomalous images" not in page.words


def rendered(
    *images: Scored,
    threshold: float | None = 0.5,
    metrics: dict | None = None,
    losses: tuple = (),
    settings: dict | None = None,
) -> Page:
    record = TestRecord(cases=2)
    for image in images:
        record.add(image, lambda: {"Image": Image.new("RGB", (8, 8))})
    return Page(render(record, "InTra", DAY, threshold, metrics or {}, losses, settings or {}))


@pytest.mark.parametrize(("anomalous", "absent"), [(False, "anomalous"), (True, "normal")])
def test_report_of_one_kind_of_images_says_so(anomalous: bool, absent: str) -> None:
    one, other = Scored("a/0.png", 0.1, anomalous, False), Scored("b/0.png", 0.2, not anomalous, False)
    assert f"The test has no {absent} images" in rendered(one).words
    for images in ((one, other), (Scored("a/0.png", 0.1, None, False),)):
        assert "The test has no" not in rendered(*images).words


def test_names_and_settings_of_strangers_stay_text() -> None:
    evil = '"><script>alert(1)</script>&amp;'
    page = rendered(
        Scored(f"{evil}/{evil}.png", 0.7, True, True), settings={evil: evil}, losses=({"epoch": 0, "train_loss": 1.0},)
    )
    assert "script" not in {tag for tag, _ in page.elements}
    assert "alert(1)" in page.words


def test_report_of_images_of_unknown_label_shows_the_highest_and_lowest() -> None:
    page = rendered(*(Scored(f"part/{n}.png", n / 10) for n in range(6)))
    assert "Highest-scored images" in page.words
    assert "Lowest-scored images" in page.words
    assert len(page.images()) == 4
    assert "missed" not in page.words


def test_report_without_any_image_or_score_can_still_be_read() -> None:
    assert "0 images" in rendered().words
    page = rendered(Scored("a/1.png", float("nan"), True, False), Scored("a/2.png", 0.3, False, False))
    assert "1 of the images got no score" in page.words
    assert len(page.images()) == 1


def test_decisions_are_counted_and_named() -> None:
    page = rendered(
        Scored("crack/0.png", 0.9, True, True),
        Scored("crack/1.png", 0.2, True, False),
        Scored("good/0.png", 0.6, False, True),
        Scored("good/1.png", 0.1, False, False),
    )
    assert "1 of 2 normal images raises a false alarm and 1 of 2 anomalous images is missed" in page.words
    assert "crack/1.png score 0.200: missed" in page.words
    assert "good/0.png score 0.600: false alarm" in page.words
    assert "crack/0.png score 0.900: found" in page.words
    assert "crack 2 1 0.200 0.550 0.900 0.750" in page.words


def test_pictures_kept_do_not_grow_with_the_images_tested() -> None:
    generator, drawn = np.random.default_rng(0), []
    record = TestRecord(cases=4)
    for n, score in enumerate(generator.random(3000)):
        record.add(Scored(f"good/{n}.png", score, False), lambda n=n: drawn.append(n) or {})
    assert len(record.images) == 3000
    assert sum(len(cases.cases) for cases in record.case_lists()) == 8
    assert len(drawn) < 120  # only what was among the first or last four when it came


def test_records_of_several_processes_are_one_without_the_images_that_fill_them_up() -> None:
    parts = [TestRecord(cases=2), TestRecord(cases=2)]
    whole = TestRecord(cases=2)
    for n, score in enumerate(np.random.default_rng(1).random(21)):
        image = Scored(f"good/{n}.png", score, n % 3 == 0)
        whole.add(image, lambda n=n: {"Image": Image.new("RGB", (n + 1, 1))})
        parts[n % 2].add(image, lambda n=n: {"Image": Image.new("RGB", (n + 1, 1))})
        if n == 0:  # a distributed sampler repeats images to give every process as many
            parts[1].add(image, lambda n=n: {"Image": Image.new("RGB", (n + 1, 1))})
    merged = TestRecord.merged(parts)
    assert sorted(image.path for image in merged.images) == sorted(image.path for image in whole.images)

    def cases(record: TestRecord) -> list[tuple[str, str, int]]:
        lists = record.case_lists()
        return [(one.title, case.image.path, case.panels["Image"].width) for one in lists for case in one.cases]

    assert cases(merged) == cases(whole)


def test_auroc_of_a_kind_is_that_of_torchmetrics() -> None:
    generator = np.random.default_rng(2)
    anomalous, normal = generator.integers(0, 12, 40) / 12, generator.integers(0, 9, 25) / 12
    scores = torch.tensor(np.concatenate([anomalous, normal]))
    expected = binary_auroc(scores, torch.tensor([1] * 40 + [0] * 25))
    assert auroc(Series(anomalous), Series(normal)) == pytest.approx(float(expected), abs=1e-6)
    large = (1000 * Series(scores) for scores in (anomalous, normal))  # a sigmoid would tie them
    assert auroc(*large) == pytest.approx(float(expected), abs=1e-6)


def test_auroc_of_a_kind_leaves_out_images_without_a_score_and_needs_both_labels() -> None:
    nan = float("nan")
    assert auroc(Series([0.9, nan, 0.4]), Series([0.1, 0.5, nan])) == 0.75
    assert math.isnan(auroc(Series([0.9]), Series([nan])))
    assert math.isnan(auroc(Series(dtype=float), Series([0.1])))


def test_histogram_holds_every_image_and_the_threshold() -> None:
    record = TestRecord()
    for n, score in enumerate(np.random.default_rng(3).random(50)):
        record.add(Scored(f"a/{n}.png", score, n < 30), dict)
    normal, anomalous = score_histogram(record.frame(), threshold=1.5).axes
    assert sum(bar.get_height() for bar in normal.patches) == 20
    assert sum(bar.get_height() for bar in anomalous.patches) == 30
    assert all(line.get_xdata()[0] == 1.5 for axes in (normal, anomalous) for line in axes.lines)
    assert normal.get_xlim()[1] > 1.5


def test_curves_mark_the_epoch_of_the_lowest_validation_loss() -> None:
    rows = [{"epoch": n, "train_loss": 1 / (n + 1), "val_loss": abs(n - 2) + 1.0} for n in range(5)]
    lines = training_curves(rows).axes[0].lines
    assert [line.get_label() for line in lines] == ["training", "validation", "lowest validation: epoch 2"]
    assert training_curves([{"epoch": 0, "train_loss": float("nan")}]) is None


@needs_chromium
def test_a_browser_shows_the_report(trained: Run, tmp_path: Path) -> None:
    browse = partial(open_in_browser, trained.folder / "report.html", tmp_path / "profile")
    seen = Page(browse("--dump-dom").replace("<!DOCTYPE html>", ""))
    assert len(seen.images()) == 64
    assert "Lowest-scored anomalous images" in seen.words
    pictures = {}
    for name, size, scheme in (("dark", "1280,1800", 0), ("phone", "400,1800", 1)):
        browse(f"--screenshot={tmp_path / name}.png", f"--window-size={size}",
               f"--blink-settings=preferredColorScheme={scheme}")  # fmt: skip
        with Image.open(tmp_path / f"{name}.png") as picture:
            pictures[name] = np.asarray(picture.convert("RGB"))
    assert [picture.shape[1] for picture in pictures.values()] == [1280, 400]
    for picture in pictures.values():
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000  # photographs, not a blank page
    assert pictures["phone"][5, 5].min() > 240
    assert pictures["dark"][5, 5].max() < 40


def test_images_without_a_score_do_not_move_the_auroc_of_their_kind() -> None:
    nan = float("nan")
    assert (
        auroc(Series([0.9, nan, 0.4]), Series([0.1, 0.5, nan])) == auroc(Series([0.9, 0.4]), Series([0.1, 0.5])) == 0.75
    )
    assert np.isnan(auroc(Series([nan]), Series([0.1])))
    assert np.isnan(auroc(Series([0.1]), Series([nan])))
    record = TestRecord()
    for kind, score in (("good", 0.1), ("good", 0.5), ("hole", 0.9), ("hole", nan), ("hole", 0.4)):
        record.add(Scored(f"{kind}/{score}.png", score, anomalous=kind == "hole"), dict)
    assert record.by_kind().set_index("kind").auroc["hole"] == 0.75
