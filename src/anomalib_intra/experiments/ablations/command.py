# SPDX-License-Identifier: Apache-2.0
"""The command ``ablations``: the runs of several studies, those they share run once."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

from pandas import DataFrame

from anomalib_intra.benchmark.command import read_settings, run_missing
from anomalib_intra.benchmark.job import BenchmarkRun, BenchmarkRuns
from anomalib_intra.experiments.ablations.published import STUDIES
from anomalib_intra.experiments.ablations.tables import write_ablations


class StudyRuns(BenchmarkRuns):
    """The runs of several studies; what they have in common, such as the paper's own model, is run once."""

    def generate_jobs(
        self, args: dict[str, Any] | None = None, prev_stage_result: Any = None
    ) -> Generator[BenchmarkRun, None, None]:
        """Check all entries of all studies, then yield the runs.

        Args:
            args (dict): The ``benchmark`` parts of configs, by the names of the studies.
            prev_stage_result (Any): Unused.

        Yields:
            BenchmarkRun: The runs.

        Raises:
            ValueError: If an entry is wrong.
        """
        runs: dict[Path, BenchmarkRun] = {}
        for part in (args or {}).values():
            for run in super().generate_jobs(part, prev_stage_result):
                runs.setdefault(run.folder, run)
        for run in runs.values():
            run.all = list(runs.values())
        yield from runs.values()


def ablations(
    configs: str | Path = "configs/ablations",
    only: str | None = None,
    root: str | Path | None = None,
    output: str | Path = "results/ablations",
) -> DataFrame:
    """Run what is missing of the ablation studies and tabulate them like Tables 3 to 6, the paper's figures beside.

    Args:
        configs (str | Path): Folder with a YAML file for each study, in the format of a benchmark.
        only (str | None): The one study to run; the page has the rows of the others all the same.
        root (str | Path | None): Folder of the data set, in the place of that in the configs.
        output (str | Path): Folder for ``ablations.csv``, ``ablations.md`` and the runs.

    Returns:
        DataFrame: A row for each run of each study, with metrics in 0 .. 1 and an ``error``, empty where all went well.

    Raises:
        ValueError: If a config is wrong or there is no such study; nothing is run then.

    Example:
        >>> rows = ablations(only="position", root="./datasets/MVTecAD")  # doctest: +SKIP
    """
    in_order = [*STUDIES]
    paths = sorted(
        Path(configs).glob("*.yaml"),
        key=lambda path: (in_order.index(path.stem) if path.stem in STUDIES else len(in_order), path.stem),
    )
    settings = {path.stem: read_settings(path) for path in paths}
    if not settings or only not in {None, *settings}:
        msg = f"{configs} has no study {only or 'at all'}; it has {', '.join(settings) or 'no YAML file'}."
        raise ValueError(msg)
    accelerators = {one.get("accelerator", "auto") for one in settings.values()}
    if len(accelerators) > 1:
        msg = f"The studies have several accelerators ({', '.join(sorted(accelerators))}): they are measured on one."
        raise ValueError(msg)
    parts = {name: one["benchmark"] for name, one in settings.items()}
    if root is not None:
        for part in parts.values():
            if isinstance(part.get("data"), dict):
                part["data"].setdefault("init_args", {})["root"] = str(root)

    output = Path(output)
    generator = StudyRuns(output, accelerators.pop())
    studies = {name: list(generator.generate_jobs({name: part})) for name, part in parts.items()}
    _check_shared(studies)
    try:
        run_missing(generator, {name: part for name, part in parts.items() if only in (None, name)})
    finally:  # also when it was interrupted
        rows = write_ablations(studies, output)
    return rows


def _check_shared(studies: dict[str, list[BenchmarkRun]]) -> None:
    first: dict[Path, tuple[str, BenchmarkRun]] = {}
    for study, runs in studies.items():
        for run in runs:
            other, known = first.setdefault(run.folder, (study, run))
            if known.config != run.config:
                msg = (
                    f"The studies {other} and {study} have different settings for '{run}': give one of the models "
                    "another name, or both the same settings."
                )
                raise ValueError(msg)
