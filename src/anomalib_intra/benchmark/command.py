# SPDX-License-Identifier: Apache-2.0
"""The command ``benchmark``: its config, what is missing of its runs, and its page."""

from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from anomalib.pipelines.components.runners import ParallelRunner, SerialRunner
from pandas import DataFrame

from anomalib_intra.benchmark.job import BenchmarkRuns
from anomalib_intra.benchmark.page import write_page
from anomalib_intra.benchmark.ray_runner import RayRunner


def benchmark(
    config: str | Path,
    output: str | Path = "results/benchmark",
    runner: Literal["local", "ray"] = "local",
    cpus_per_run: int = 1,
) -> DataFrame:
    """Run what is missing of a benchmark and write its tables, page and chart.

    A stopped benchmark goes on with the runs that are missing when it is called again; failed runs leave their error in
    their row and are tried again. Where there are several CUDA devices, each takes runs of its own; Ray shares the runs
    out among the nodes of a cluster.

    Args:
        config (str | Path): YAML file in the format of anomalib's benchmark, see ``configs/benchmark.yaml``.
        output (str | Path): Folder for ``benchmark.csv``, ``benchmark.md``, ``benchmark.png`` and the runs.
        runner (str): ``"local"`` for this machine, or ``"ray"``, see :class:`RayRunner`.
        cpus_per_run (int): CPUs, and threads of torch, that a run has on Ray.

    Returns:
        DataFrame: A row for each run, with metrics in 0 .. 1 and an ``error``, empty where all went well.

    Raises:
        ValueError: If an entry of the config is wrong; nothing is run then.
        ImportError: If the runner is Ray's and Ray is not installed.

    Example:
        >>> rows = benchmark("configs/benchmark.yaml")  # doctest: +SKIP
        >>> rows = benchmark("configs/benchmark.yaml", runner="ray", cpus_per_run=4)  # doctest: +SKIP
    """
    settings = read_settings(config)
    output = Path(output)
    generator = BenchmarkRuns(output, settings.get("accelerator", "auto"))
    runs = list(generator.generate_jobs(settings["benchmark"]))
    try:
        run_missing(generator, settings["benchmark"], runner, cpus_per_run)
    finally:  # also when it was interrupted
        known = [run for run in runs if run.row is not None and run.is_of_these_images]
        rows = DataFrame([run.row for run in known])
        if len(rows):
            write_page(rows, settings, output, missing=[str(run) for run in runs if run not in known])
    return rows


def read_settings(config: str | Path) -> dict[str, Any]:
    """Read a config without looking into its entries.

    Args:
        config (str | Path): YAML file in the format of anomalib's benchmark.

    Returns:
        dict: Its content.

    Raises:
        ValueError: If it is no config of a benchmark.

    Example:
        >>> settings = read_settings("configs/benchmark.yaml")  # doctest: +SKIP
    """
    settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or not isinstance(settings.get("benchmark"), dict):
        msg = f"{config} has no part called 'benchmark' with 'model' and 'data': see configs/benchmark.yaml."
        raise ValueError(msg)
    accelerator = settings.get("accelerator", "auto")
    if not isinstance(accelerator, str):
        msg = f"The accelerator of {config} is {accelerator}: a benchmark is measured on one, such as cpu or cuda."
        raise ValueError(msg)
    return settings


def run_missing(
    generator: BenchmarkRuns, args: dict[str, Any], runner: Literal["local", "ray"] = "local", cpus_per_run: int = 1
) -> None:
    """Run what is missing, one after the other or, where there are several CUDA devices, one on each.

    Args:
        generator (BenchmarkRuns): Makes the runs.
        args (dict): What it makes them of.
        runner (str): ``"local"``, or ``"ray"`` for a cluster.
        cpus_per_run (int): As for :func:`benchmark`.

    Raises:
        ImportError: If the runner is Ray's and Ray is not installed.
    """
    if runner == "ray":
        RayRunner(generator, cpus_per_run).run(args)
        return
    devices = torch.cuda.device_count() if generator.accelerator != "cpu" else 0
    local = ParallelRunner(generator, n_jobs=devices) if devices > 1 else SerialRunner(generator)
    local.run(args)
