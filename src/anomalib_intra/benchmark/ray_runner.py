# SPDX-License-Identifier: Apache-2.0
"""The runs of a benchmark on a Ray cluster: a task each, whose row comes back to where the benchmark was started."""

import os
import signal
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import current_thread, main_thread
from typing import Any

from anomalib.pipelines.components import Runner
from pandas import DataFrame
from rich import print as rich_print
from rich.markup import escape

from anomalib_intra.benchmark.job import BenchmarkRun, BenchmarkRuns, outcome, time_left

#: How often a run is started again whose worker or node was lost. (A run that fails by itself stores that in its row.)
_RETRIES = 3


class RayRunner(Runner):
    """Run what is missing as tasks of Ray, beside anomalib's ``SerialRunner`` and ``ParallelRunner``.

    Without a connection to Ray, it makes one as ``ray.init()`` does: to the cluster of ``RAY_ADDRESS``, else to one of
    this machine alone. Every run has ``cpus_per_run`` CPUs, as many threads of torch (Ray sets ``OMP_NUM_THREADS`` if
    nobody did) and a GPU, where the cluster has some and the accelerator is not another. The run of a worker or a node
    that is lost is started again.

    Rows are stored one by one as they come, in the folder of each run on this machine. Where a node shares that folder,
    checkpoints lie in it, too; other nodes keep nothing.

    Args:
        generator (BenchmarkRuns): Makes the runs.
        cpus_per_run (int): CPUs of a run.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: If a run would have no CPU.

    Example:
        >>> RayRunner(BenchmarkRuns(Path("results"), "cpu"), cpus_per_run=4).run(config)  # doctest: +SKIP
    """

    generator: BenchmarkRuns

    def __init__(self, generator: BenchmarkRuns, cpus_per_run: int = 1) -> None:
        super().__init__(generator)
        try:
            import ray  # takes seconds, and few users have it
        except ImportError as error:
            msg = 'The runner ray needs Ray, which is not installed: pip install "anomalib-intra[cluster]".'
            raise ImportError(msg) from error
        if cpus_per_run < 1:
            raise ValueError(f"A run cannot have {cpus_per_run} CPUs: set cpus_per_run to 1 or more.")
        self.ray: Any = ray
        self.cpus_per_run = cpus_per_run

    def run(self, args: dict[str, Any], prev_stage_results: Any = None) -> DataFrame:
        """Run what is missing.

        Args:
            args (dict): What the runs are made of.
            prev_stage_results (Any): Unused.

        Returns:
            DataFrame: The rows of all runs, those of earlier sessions included.
        """
        runs = list(self.generator.generate_jobs(args, prev_stage_results))
        missing = [run for run in runs if not run.is_done]
        connects = bool(missing) and not self.ray.is_initialized()
        if connects:
            self._connect()
        try:
            if missing:
                self._run(missing)
        finally:
            if connects:
                self.ray.shutdown()
        return BenchmarkRun.collect([row for run in runs if (row := run.row)])

    def _connect(self) -> None:
        on_sigterm = signal.getsignal(signal.SIGTERM)
        self.ray.init(log_to_driver=False)  # the progress bars of all runs at once say nothing
        if current_thread() is main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's aborts: the runs would not be cancelled, no page written

    def _run(self, missing: list[BenchmarkRun]) -> None:
        uses_gpu = self.generator.accelerator in ("gpu", "cuda") or (
            self.generator.accelerator == "auto" and self.ray.cluster_resources().get("GPU", 0) >= 1
        )
        at_once = self._room_for(self.cpus_per_run, int(uses_gpu))
        rich_print(
            f"{len(missing)} of {len(missing[0].all)} runs go to Ray, "
            + (f"{at_once} at once" if at_once else "and wait for a node that has what a run needs; none has now")
            + f": {self.cpus_per_run} CPU{'s' * (self.cpus_per_run > 1)}{' and a GPU' * uses_gpu} each"
        )
        task = self.ray.remote(num_cpus=self.cpus_per_run, num_gpus=int(uses_gpu), max_retries=_RETRIES)(_run_on_node)
        waiting: dict[Any, BenchmarkRun] = {}
        try:
            for run in missing:
                run.folder.mkdir(parents=True, exist_ok=True)  # tells a node whether it shares the disk
                waiting[task.options(name=str(run)).remote(run.alone(), Path.cwd())] = run
            while waiting:
                (reference,), _ = self.ray.wait([*waiting])
                run = waiting[reference]
                row = self._receive(run, reference)
                del waiting[reference]
                left = time_left([*waiting.values()], min(at_once or 1, len(waiting))) if waiting else ""
                place = f"({len(missing) - len(waiting)} of {len(missing)})"
                rich_print(f"[bold]{escape(str(run))}[/bold] {place}: {outcome(row)}{left}")
        finally:
            for reference in waiting:  # interrupted: a cluster would go on with them
                self.ray.cancel(reference, force=True)

    def _room_for(self, cpus: int, gpus: int) -> int:
        """Count how many runs the nodes have room for at the same time."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        needs = [(name, needed) for name, needed in (("CPU", cpus), ("GPU", gpus)) if needed]
        return sum(min(int(node.get(name, 0) // needed) for name, needed in needs) for node in nodes)

    def _receive(self, run: BenchmarkRun, reference: Any) -> dict[str, Any]:
        """Store how a run went; also that it could not begin, or that its worker was lost too often."""
        try:
            run.records = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            run.fail(getattr(error, "cause", None) or error)
        row = run.row
        assert row is not None, "just stored"
        return row


def _run_on_node(run: BenchmarkRun, started_in: Path) -> dict[str, str]:
    """Do what a task does.

    Args:
        run (BenchmarkRun): The run alone.
        started_in (Path): Where the benchmark was started, from which relative paths of its config lead.

    Returns:
        dict: The run's records.
    """
    with suppress(OSError):  # not every machine has it
        os.chdir(started_in)
    with ExitStack() as stack:
        if not run.folder.is_dir():  # the disk is another: nobody would look here
            run.folder = Path(stack.enter_context(TemporaryDirectory()))
        run.execute()
        return run.records
