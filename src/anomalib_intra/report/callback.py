# SPDX-License-Identifier: Apache-2.0
"""Writes a report beside the pictures of every test and every prediction."""

import logging
import os
import re
from collections.abc import Callable
from datetime import datetime
from functools import partial
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.loggers.base import ImageLoggerBase
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import CombinedLoader

from anomalib_intra.report.page import render, render_predictions
from anomalib_intra.report.panels import draw_panels, draw_thumbnails, side_by_side
from anomalib_intra.report.plots import training_curves
from anomalib_intra.report.record import PredictionRecord, Scored, TestRecord, path_below

logger = logging.getLogger(__name__)


class RunReport(Callback):
    """Writes ``report.html`` into the run's folder when a test ends, and ``training_curves.png`` when training does.

    The report is one file that needs no network: figures of merit, training curves, a histogram of the scores with the
    threshold, a table of the kinds of defects, and the most wrongly and the most clearly scored images. The pictures
    of these also go to the loggers of the run that take images (anomalib's for TensorBoard, Weights & Biases, MLflow
    and Comet).

    A prediction gets a ``report.html`` too: all images, the most suspicious first, with a threshold that can be moved.
    One that is stopped, or fails, gets that of the images it has come to.

    Every model of this package has one, unless its ``visualizer`` is False.

    Args:
        cases (int): Images shown in each of the four lists of cases.

    Example:
        >>> from anomalib.engine import Engine
        >>> engine = Engine(callbacks=[RunReport(cases=8)])
    """

    def __init__(self, cases: int = 4) -> None:
        self.cases = cases
        self._record: TestRecord = TestRecord(cases)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Draw the training curves."""
        curves = training_curves(pl_module.losses)
        if curves is not None and trainer.is_global_zero:
            curves.savefig(Path(trainer.default_root_dir) / "training_curves.png", dpi=150)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin anew."""
        del trainer, pl_module
        self._record = TestRecord(self.cases)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take down the scores of a batch."""
        del trainer, outputs, batch_idx, dataloader_idx
        self._take_down(pl_module, batch, draw_panels)

    def _take_down(self, pl_module: Any, batch: ImageBatch, draw: Callable[..., dict[str, Any]]) -> None:
        post_processor = pl_module.post_processor
        decides = post_processor.decision_threshold is not None
        # An item has its score in float32, which may lie on the other side of the threshold.
        scores = torch.as_tensor(batch.pred_score).flatten().tolist()
        for item, score in zip(batch, scores, strict=True):
            path = item.image_path or f"image {len(self._record.images)}"
            image = Scored(
                path=os.fsencode(path).decode("utf-8", "backslashreplace"),  # old archives have names that are no UTF-8
                score=score,
                anomalous=_known(item.gt_label),
                called_anomalous=_known(item.pred_label) if decides else None,
            )
            self._record.add(image, partial(draw, item, scale=post_processor.display_scale))

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the report, and give the loggers its pictures."""
        record = _of_all(trainer, self._record)
        if not record.images or not trainer.is_global_zero:
            return
        evaluator = pl_module.evaluator
        names = [metric.name for metric in evaluator.test_metrics] if evaluator else []
        metrics = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
        path = Path(trainer.default_root_dir) / "report.html"
        path.write_text(
            render(
                record,
                title=_title(trainer, pl_module),
                date=datetime.now(),
                threshold=pl_module.post_processor.decision_threshold,
                metrics=metrics,
                losses=pl_module.losses,
                settings=dict(pl_module.hparams),
                checkpoint=pl_module.loaded_from,
            ),
            encoding="utf-8",
        )
        logger.info("The report of this test: %s", path)
        _log_pictures(trainer, record)
        self._record = TestRecord(self.cases)  # the pictures are not needed any more

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin anew."""
        del trainer, pl_module
        self._record = PredictionRecord()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take down the scores of a batch."""
        del trainer, outputs, batch_idx, dataloader_idx
        self._take_down(pl_module, batch, draw_thumbnails)

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the page of the predictions."""
        self._write_predictions(trainer, pl_module, _of_all(trainer, self._record))

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write the page of what was predicted so far, where a prediction is stopped or fails."""
        del exception
        if trainer.state.fn == "predict":
            # By this process alone: the others may not be there any more.
            self._write_predictions(trainer, pl_module, self._record, stopped_of=_images_to_predict(trainer))

    def _write_predictions(
        self, trainer: Trainer, pl_module: Any, record: TestRecord, stopped_of: int | None = None
    ) -> None:
        if not isinstance(record, PredictionRecord) or not record.images or not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "report.html"
        page = render_predictions(
            record,
            title=_title(trainer, pl_module),
            date=datetime.now(),
            threshold=pl_module.post_processor.decision_threshold,
            checkpoint=pl_module.loaded_from,
            stopped_of=stopped_of,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
        which = "these predictions" if stopped_of is None else "what was predicted before the stop"
        logger.info("The report of %s: %s", which, path)
        self._record = TestRecord(self.cases)  # the pictures are not needed any more


def _known(label: torch.Tensor | bool | None) -> bool | None:
    return None if label is None else bool(label)


def _title(trainer: Trainer, pl_module: Any) -> str:
    datamodule = getattr(trainer, "datamodule", None)
    data = [getattr(datamodule, name, None) for name in ("name", "category")]
    return " · ".join([pl_module.name, *filter(None, data)])


def _images_to_predict(trainer: Trainer) -> int:
    loaders: Any = trainer.predict_dataloaders
    return sum(length_hint(getattr(loader, "dataset", ())) for loader in CombinedLoader(loaders).flattened)


def _of_all(trainer: Trainer, record: TestRecord) -> TestRecord:
    if trainer.world_size == 1:
        return record
    records: list[TestRecord | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(records, record)
    return type(record).merged(record for record in records if record is not None)


def _log_pictures(trainer: Trainer, record: TestRecord) -> None:
    folder = record.folder
    takers = [taker for taker in trainer.loggers if isinstance(taker, ImageLoggerBase)]
    for taker in takers:
        for cases in record.case_lists():
            for case in cases.cases:
                name = "_".join(re.findall(r"[\w.-]+", path_below(case.image.path, folder))).rsplit(".", 1)[0]
                taker.add_image(
                    np.asarray(side_by_side(case.panels)),
                    name=f"{cases.title.replace(' ', '_')}/{name}.png",  # MLflow needs the ending
                    global_step=trainer.global_step,
                )
        taker.save()  # Weights & Biases sends nothing before
