# SPDX-License-Identifier: Apache-2.0
"""Runs of the benchmark as jobs of anomalib's pipelines: isolated, resumable, and never in each other's way."""

import copy
import json
import multiprocessing
import os
import traceback
from collections.abc import Generator
from datetime import timedelta
from inspect import signature
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.pipelines.components import Job, JobGenerator
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from pandas import DataFrame
from rich import print as rich_print
from rich.markup import escape

from anomalib_intra.benchmark.runs import MODEL_KEYS, build_datamodule, images_of, measure, model_class, parse
from anomalib_intra.training.atomic_file import write_atomically

_KEYS = {"seed", "model", "data", "image_size"}
#: Files of a run's folder that tell how it went: its row and, where it failed, the traceback.
_RECORDS = ("row.json", "error.txt")


class BenchmarkRun(Job):
    """One model on one category with one seed, in a process of its own.

    The process makes the peak memory that of this run alone, and a run that crashes leaves the others in peace. The
    result is one row, kept as ``row.json`` in the run's folder; a run whose row is there is not run again, unless its
    settings or images have changed or it failed. Nobody sees whether the code behind it has changed: delete the folder
    then.

    Args:
        config (dict): ``model``, ``data``, ``seed`` and ``image_size`` of the run.
        output (Path): Folder of the benchmark.
        accelerator (str): As Lightning's.
    """

    name = "benchmark"

    def __init__(self, config: dict[str, Any], output: Path, accelerator: str) -> None:
        self.config = json.loads(json.dumps(config))  # plain data, as it will be read again
        self.accelerator = accelerator
        entry = self.config["model"]
        self.model = entry.get("name") or entry["class_path"].rsplit(".", 1)[-1]
        self.category = _category(self.config["data"])
        self.seed = self.config["seed"]
        self.folder = output / self.model / self.category / f"seed{self.seed}"
        self.all = [self]

    @property
    def row(self) -> dict[str, Any] | None:
        """The row of this run with these settings, or None if it was not run yet."""
        stored = self._stored
        return stored["row"] if stored else None

    @property
    def _stored(self) -> dict[str, Any] | None:
        try:
            stored = json.loads((self.folder / "row.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        return stored if stored["config"] == self.config else None

    @property
    def is_of_these_images(self) -> bool:
        """Whether the row is of the images that are there now, as far as is known."""
        then, now = (self._stored or {}).get("images"), self._images
        # Rows of before do not tell, nor do images that lie on another machine.
        return then is None or now is None or then == now

    @property
    def _images(self) -> str | None:
        return images_of(json.dumps(self.config["data"], sort_keys=True), self.seed)

    @property
    def is_done(self) -> bool:
        """Whether the run ended well, with the images that are there now."""
        return self.row is not None and not self.row["error"] and self.is_of_these_images

    def run(self, task_id: int | None = None) -> dict[str, Any]:
        """Run, unless it was done before.

        Args:
            task_id (int | None): Device to use, where several runs go on at once.

        Returns:
            dict: The row; ``error`` is empty if all went well.
        """
        if self.is_done and (row := self.row):
            rich_print(f"[dim]{escape(str(self))}: done before, {outcome(row)}[/dim]")
            return row
        number = self.all.index(self) + 1
        rich_print(f"[bold]{escape(str(self))}[/bold] ({number} of {len(self.all)}){time_left(self.all[number - 1 :])}")
        row = self.execute(task_id)
        rich_print(f"[bold]{escape(str(self))}[/bold]: {outcome(row)}")
        return row

    def execute(self, task_id: int | None = None) -> dict[str, Any]:
        """Run in a process of its own, also if it was done before, and say nothing about it.

        Args:
            task_id (int | None): Device to use, where several runs go on at once.

        Returns:
            dict: The row; ``error`` is empty if all went well.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.records = {}
        process = multiprocessing.get_context("spawn").Process(target=self._measure, args=(task_id,))
        process.start()
        try:
            process.join()
        finally:
            process.kill()
        if self.row is None:
            code = f"the process ended with exit code {process.exitcode}"
            self._store({}, f"{code} (-9: out of memory, or killed; 1 at once: a script without a __main__ guard)")
        row = self.row
        assert row is not None, "stored by the process, or just now"
        return row

    @property
    def records(self) -> dict[str, str]:
        """How the run went, for another machine: the texts of ``row.json`` and ``error.txt``, where there are such."""
        files = [self.folder / name for name in _RECORDS]
        return {file.name: file.read_text(encoding="utf-8") for file in files if file.is_file()}

    @records.setter
    def records(self, records: dict[str, str]) -> None:
        for name in _RECORDS:
            if name in records:
                write_atomically(self.folder / name, records[name])
            else:
                (self.folder / name).unlink(missing_ok=True)

    def alone(self) -> "BenchmarkRun":
        """Copy it for another process: without the other runs, and its folder does not depend on where that runs."""
        one = copy.copy(self)
        one.all, one.folder = [one], self.folder.absolute()
        return one

    def fail(self, error: Exception) -> None:
        """Store an exception, which is being handled, as the outcome of the run.

        Args:
            error (Exception): What the row says; ``error.txt`` gets the whole traceback of what is being handled.
        """
        self._store({}, " ".join(f"{type(error).__name__}: {error}".split()))
        (self.folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")

    def __str__(self) -> str:
        """Name model, category and seed."""
        return f"{self.model} on {self.category}, seed {self.seed}"

    def _measure(self, task_id: int | None) -> None:
        _end_with_parent()
        try:
            row = measure(self.config, self.folder, self.accelerator, "auto" if task_id is None else [task_id])
            self._store(row, "")
        except Exception as error:
            self.fail(error)

    def _store(self, measured: dict[str, Any], error: str) -> None:
        pretrained = self.config["model"].get("pretrained") or _pretrained(self.config["model"])
        head = {"model": self.model, "category": self.category, "seed": self.seed, "pretrained": pretrained}
        stored = {"config": self.config, "images": self._images, "row": {**head, **measured, "error": error}}
        write_atomically(self.folder / "row.json", json.dumps(stored, indent=1))

    @staticmethod
    def collect(results: list[dict[str, Any]]) -> DataFrame:
        """Put rows, which need not have the same columns, into one table."""
        return DataFrame(results)

    @staticmethod
    def save(result: DataFrame) -> None:
        """Leave it to the report, which also knows the rows of earlier sessions."""


class BenchmarkRuns(JobGenerator):
    """All runs of a config in anomalib's benchmark format: every combination of its ``grid`` lists.

    Beside what anomalib knows, an entry of a model may have a ``name`` for the table, ``trainer`` arguments,
    ``backbone_weights`` (a file) and ``pretrained`` (a few words on what it was allowed to see). ``image_size`` is one
    height and width for all runs, or one for each category by its name, as in the paper's Table A.7.

    Args:
        output (Path): Folder of the benchmark.
        accelerator (str): As Lightning's.
    """

    def __init__(self, output: Path, accelerator: str = "auto") -> None:
        self.output = output
        self.accelerator = accelerator

    @property
    def job_class(self) -> type[BenchmarkRun]:
        """The class of the jobs."""
        return BenchmarkRun

    def generate_jobs(
        self, args: dict[str, Any] | None = None, prev_stage_result: Any = None
    ) -> Generator[BenchmarkRun, None, None]:
        """Check all entries, then yield the runs.

        Args:
            args (dict): The ``benchmark`` part of a config.
            prev_stage_result (Any): Unused.

        Yields:
            BenchmarkRun: The runs, in the order of the config.

        Raises:
            ValueError: If an entry is wrong, there is none, or two runs have the same name.
        """
        del prev_stage_result
        images_of.cache_clear()  # they may have changed since the last benchmark of this process
        args = {"seed": 42, "image_size": [256, 256], **(args or {})}
        size = args.pop("image_size")  # a category called grid would make it a grid
        configs = list(get_iterator_from_grid_dict(args))
        if not configs:
            raise ValueError("The benchmark has no runs: one of its 'grid' lists is empty.")
        for config in configs:
            _check(config)
            config["image_size"] = _size_of(config["data"], size)
        runs = [BenchmarkRun(config, self.output, self.accelerator) for config in configs]
        # Some disks do not tell upper case from lower.
        folders = [str(run.folder).casefold() for run in runs]
        for run, folder in zip(runs, folders, strict=True):
            run.all = runs
            if folders.count(folder) > 1:
                msg = (
                    f"The benchmark has two runs called '{run}': a 'grid' can be over whole model entries, each with a "
                    "name of its own, categories and seeds; other data needs another benchmark and output folder."
                )
                raise ValueError(msg)
        yield from runs


def _check(config: dict[str, Any]) -> None:
    entry = config.get("model")
    if not isinstance(entry, dict) or "class_path" not in entry or not isinstance(config.get("data"), dict):
        raise ValueError("A benchmark needs 'model' and 'data', each with a class_path: see configs/benchmark.yaml.")
    unknown = (set(config) - _KEYS) | (set(entry) - MODEL_KEYS)
    if unknown:
        msg = (
            f"A benchmark has {', '.join(sorted(_KEYS))}, and a model {', '.join(sorted(MODEL_KEYS))}; this one has "
            f"{', '.join(sorted(unknown))}."
        )
        raise ValueError(msg)
    fixed = {"accelerator", "devices", "strategy", "num_nodes"} & set(entry.get("trainer", {}))
    if fixed:
        msg = (
            f"The trainer of {entry['class_path']} sets {', '.join(sorted(fixed))}, but all models run on the same "
            "device: set the accelerator of the whole benchmark."
        )
        raise ValueError(msg)
    if set(str(entry.get("name", ""))) & set('<>:"/\\|?*'):
        raise ValueError(f"The model's name {entry['name']!r} cannot be a folder's: take the special characters out.")
    build_datamodule(config["data"], config["seed"])
    model_class(entry)


def _size_of(data: dict[str, Any], size: Any) -> list[int]:
    """Give the image size of a run, which may be one for all or one for each category."""
    if isinstance(size, dict):
        category = _category(data)
        if category not in size:
            raise ValueError(
                f"The benchmark's image_size has none for {category}: give its height and width in pixels."
            )
        size = size[category]
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
        raise ValueError(f"The benchmark's image_size is {size}: give height and width in pixels, such as [256, 256].")
    return size


def _category(entry: dict[str, Any]) -> str:
    """Name the data; names alone stand for MVTec AD, for which there are published figures."""
    kind, _ = parse(AnomalibDataModule, entry)
    asks = signature(kind).parameters.get("category")
    category = entry.get("init_args", {}).get("category", asks.default if asks else "")
    return str(category) if issubclass(kind, MVTecAD) else f"{kind.__name__} {category}".strip()


def _pretrained(entry: dict[str, Any]) -> str:
    if "backbone_weights" in entry:
        return f"features of {Path(entry['backbone_weights']).name}"
    model = model_class(entry)
    if model.__module__.startswith(f"{__package__.split('.')[0]}."):
        return "nothing"
    asks = signature(model).parameters.get("pre_trained")
    if asks is None:
        return "not stated"
    return "pretrained features" if entry.get("init_args", {}).get("pre_trained", asks.default) else "nothing"


def _end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, even by SIGKILL: nobody takes its row then.

    It would train on beside the next attempt, in the same folder.
    """
    parent = multiprocessing.parent_process()

    def watch(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    if parent is not None:  # tests also measure in their own process
        Thread(target=watch, args=(parent,), daemon=True).start()


def time_left(runs: list[BenchmarkRun], at_once: int = 1) -> str:
    """Estimate from the runs of all sessions, those of the same model where there are any.

    Args:
        runs (list[BenchmarkRun]): The runs to come, at least one.
        at_once (int): How many go on at the same time.

    Returns:
        str: A part of a sentence, empty as long as nothing is known.
    """
    known = [(run.model, row["fit_s"] + row["test_s"]) for run in runs[0].all if run.is_done and (row := run.row)]
    if not known:
        return ""
    seconds = 0.0
    for run in runs:
        same = [took for model, took in known if model == run.model] or [took for _, took in known]
        seconds += 0 if run.is_done else sum(same) / len(same)
    return f", about {timedelta(seconds=round(seconds / at_once))} left"


def outcome(row: dict[str, Any]) -> str:
    """Say how a run went.

    Args:
        row (dict): Its row.

    Returns:
        str: A line in the markup of rich: the error, or scores and times.

    Example:
        >>> outcome({"error": "ValueError: no images"})
        '[red]ValueError: no images[/red]'
    """
    if row["error"]:
        return f"[red]{escape(row['error'])}[/red]"
    scores = " / ".join("-" if row[name] is None else f"{row[name]:.3f}" for name in ("image_AUROC", "pixel_AUROC"))
    return f"image / pixel AUROC {scores}, trained in {row['fit_s']:.0f} s, {row['ms_per_image']:.0f} ms per image"
