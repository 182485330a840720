# SPDX-License-Identifier: Apache-2.0
"""Runs of a benchmark on Ray: rows come back, a killed worker's run is started again, and the default needs no Ray."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from anomalib_intra import cli
from anomalib_intra.benchmark import benchmark
from anomalib_intra.benchmark.job import BenchmarkRun, BenchmarkRuns
from anomalib_intra.benchmark.ray_runner import RayRunner, _run_on_node

from ..conftest import InThisProcess


@pytest.fixture
def config(few_root: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a config of one short run for each seed."""

    def write(seeds: list[int], accelerator: str = "cpu", **arguments: Any) -> Path:
        (tmp_path / "trained").mkdir(exist_ok=True)
        model = {
            "class_path": "tests.benchmark.recorded.Recorded",
            "init_args": {"folder": str(tmp_path / "trained"), **arguments},
            "trainer": {"enable_progress_bar": False},
        }
        data = {"class_path": "anomalib_intra.TextureDemo", "init_args": {"root": str(few_root), "num_workers": 0}}
        entries = {"image_size": [64, 64], "seed": {"grid": seeds}, "data": data, "model": model}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"accelerator": accelerator, "benchmark": entries}))
        return path

    return write


def runs_of(config: Path, output: Path) -> list[BenchmarkRun]:
    return list(BenchmarkRuns(output, "cpu")(yaml.safe_load(config.read_text())["benchmark"]))


# ---- a real Ray ------------------------------------------------------------------------------------------------------


def trained(folder: Path, seed: int) -> list[tuple[int, int]]:
    """Process and worker of each training with a seed, the last one last."""
    files = sorted((folder / "trained").glob(f"{seed}-*"), key=lambda file: file.stat().st_mtime_ns)
    return [(int(process), int(worker)) for _, process, worker in (file.name.split("-") for file in files)]


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # ended, and nobody has asked for its exit code


def wait_until(condition: Callable[[], Any], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (held := bool(condition())) and time.monotonic() < end:
        time.sleep(0.05)
    return held


@pytest.fixture
def two_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray of this machine alone with room for two runs of two CPUs each, whatever the machine has."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else it keeps a token in the home folder
    # Newer versions of Ray end what a worker has started, as long as its node is there: we do not rely on that.
    monkeypatch.setenv("RAY_process_group_cleanup_enabled", "0")
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = signal.getsignal(signal.SIGTERM)  # Ray sets its own
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield ray
    ray.shutdown()
    signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes as Linux shows them")
def test_the_run_of_a_killed_worker_is_started_again(
    two_workers: Any, config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    seen = {}

    def kill_a_worker() -> None:
        seen["in the middle"] = wait_until(lambda: trained(tmp_path, seed=1), 300)  # a busy machine begins late
        process, worker = trained(tmp_path, seed=1)[0]
        seen["ran"] = is_running(process)
        os.kill(worker, signal.SIGKILL)
        seen["ended with its worker"] = wait_until(lambda: not is_running(process), 10)

    killer = Thread(target=kill_a_worker)
    killer.start()
    rows = benchmark(config([1, 2], waits=1), tmp_path / "out", "ray", cpus_per_run=2)
    killer.join()
    assert seen == {"in the middle": True, "ran": True, "ended with its worker": True}

    (first, second), (other,) = trained(tmp_path, seed=1), trained(tmp_path, seed=2)
    assert len({first[1], other[1], os.getpid()}) == 3  # two workers, neither of them the test
    assert second[1] != first[1]
    assert list(rows["seed"]) == [1, 2]
    assert list(rows["error"]) == ["", ""]
    assert rows["image_AUROC"].between(0.5, 1).all()
    assert rows["device"].str.endswith(", 2 threads").all()
    for seed in (1, 2):
        assert (tmp_path / f"out/Recorded/weave/seed{seed}/row.json").is_file()
    assert "Missing" not in (tmp_path / "out/benchmark.md").read_text()
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 of 2 runs go to Ray, 2 at once: 2 CPUs each" in printed
    assert "(1 of 2): image / pixel AUROC" in printed
    assert two_workers.is_initialized()  # it was not the benchmark that connected


# ---- a Ray that does at once, in this process, what it is told -------------------------------------------------------


class Cluster:
    """The part of ray that a benchmark uses."""

    class exceptions:  # noqa: N801
        class RayError(Exception): ...

    def __init__(self, nodes: list[dict[str, float]], lost: int | None = None, stops: int | None = None) -> None:
        self.resources, self.lost, self.stops = nodes, lost, stops
        self.options: dict[str, Any] = {}
        self.started: list[int] = []
        self.cancelled: list[int] = []
        self.log: list[str] = []

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        self.log.append("init")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray has one of its own, too

    def shutdown(self) -> None:
        self.log.append("shutdown")

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in self.resources]

    def cluster_resources(self) -> dict[str, float]:
        return {name: sum(node.get(name, 0) for node in self.resources) for name in ("CPU", "GPU")}

    def remote(self, **options: Any) -> Callable[[Callable], Any]:
        self.options = options
        task = lambda function: SimpleNamespace(remote=lambda run, folder: (run, function, folder))  # noqa: E731
        return lambda function: SimpleNamespace(options=lambda name: task(function))

    def wait(self, tasks: list[tuple]) -> tuple[list, list]:
        return tasks[:1], tasks[1:]

    def get(self, task: tuple) -> dict[str, str]:
        run, function, folder = task
        self.started.append(run.seed)
        if run.seed == self.lost:
            raise self.exceptions.RayError("The node was lost.")
        if run.seed == self.stops:
            raise KeyboardInterrupt
        return function(run, folder)

    def cancel(self, task: tuple, force: bool) -> None:
        assert force  # a run is waited for in C, where nothing else is noticed
        self.cancelled.append(task[0].seed)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Cluster]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("multiprocessing.context.SpawnContext.Process", InThisProcess)

    def start(*nodes: dict[str, float], **fate: int) -> Cluster:
        made = Cluster([*nodes] or [{"CPU": 2}], **fate)
        monkeypatch.setitem(sys.modules, "ray", made)
        return made

    return start


def test_only_what_is_missing_goes_to_the_cluster(
    cluster: Callable[..., Cluster], config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = config([1, 2, 3])
    on_sigterm = signal.getsignal(signal.SIGTERM)
    first = cluster(lost=2, stops=3)
    with pytest.raises(KeyboardInterrupt):
        benchmark(path, tmp_path / "out", "ray")
    assert (first.started, first.cancelled, first.log) == ([1, 2, 3], [3], ["init", "shutdown"])
    assert signal.getsignal(signal.SIGTERM) == on_sigterm
    page = (tmp_path / "out/benchmark.md").read_text()
    assert "RayError: The node was lost." in page
    assert "Recorded on weave, seed 3" in page.split("Missing runs")[1]
    failed = tmp_path / "out/Recorded/weave/seed2/error.txt"
    assert "Traceback" in failed.read_text()

    second = cluster()
    rows = benchmark(path, tmp_path / "out", "ray")
    assert (second.started, second.cancelled) == ([2, 3], [])
    assert list(rows["error"]) == ["", "", ""]
    assert not failed.exists()
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 of 3 runs go to Ray, 2 at once: 1 CPU each" in printed
    assert "Recorded on weave, seed 2 (1 of 2): image / pixel AUROC 1.000" in printed
    assert "about 0:00:0" in printed.split("(1 of 2)")[1]

    third = cluster()
    assert benchmark(path, tmp_path / "out", "ray").equals(rows)
    assert (third.started, third.log) == ([], [])


@pytest.mark.parametrize(
    ("nodes", "accelerator", "gpus", "said"),
    [
        ([{"CPU": 9}, {"CPU": 3}], "auto", 0, "2 at once: 4 CPUs each"),
        ([{"CPU": 9, "GPU": 4}, {"CPU": 8}], "auto", 1, "2 at once: 4 CPUs and a GPU each"),
        ([{"CPU": 9, "GPU": 4}, {"CPU": 8}], "cpu", 0, "4 at once: 4 CPUs each"),
        ([{"CPU": 2}], "cuda", 1, "wait for a node that has what a run needs; none has now: 4 CPUs and a GPU each"),
    ],
)
def test_each_run_has_cpus_and_where_there_are_some_a_gpu(
    cluster: Callable[..., Cluster], config: Callable[..., Path], nodes: list, accelerator: str, gpus: int, said: str,
    tmp_path: Path, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    made = cluster(*nodes, lost=1)
    benchmark(config([1], accelerator), tmp_path / "out", "ray", cpus_per_run=4)
    assert made.options == {"num_cpus": 4, "num_gpus": gpus, "max_retries": 3}
    assert said in " ".join(capsys.readouterr().out.split())


def test_the_row_comes_back_from_a_node_with_a_disk_of_its_own(
    cluster: Callable[..., Cluster], config: Callable[..., Path], few_root: Path, tmp_path: Path
) -> None:
    (run,) = runs_of(config([1]), tmp_path / "out")
    run.config["data"]["init_args"]["root"] = few_root.name  # relative to where the benchmark was started
    cluster()
    records = _run_on_node(run.alone(), few_root.parent)
    assert not run.folder.exists()
    assert list(records) == ["row.json"]
    assert json.loads(records["row.json"])["row"]["error"] == ""

    run.config["image_size"] = [0, 0]
    records = _run_on_node(run.alone(), tmp_path / "no such folder")
    assert json.loads(records["row.json"])["row"]["error"]
    assert "Traceback" in records["error.txt"]
    run.records = records
    assert run.records == records
    assert not run.is_done


# ---- without Ray -----------------------------------------------------------------------------------------------------


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["anomalib-intra", "benchmark", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def test_without_ray_its_runner_is_refused_and_the_default_works(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("multiprocessing.context.SpawnContext.Process", InThisProcess)
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["--config", config([1]), "--output", tmp_path / "out"]
    assert run_command(monkeypatch, *arguments, "--runner", "ray") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "anomalib-intra benchmark: The runner ray needs Ray, which is not installed: "
        'pip install "anomalib-intra[cluster]".'
    )
    assert not trained(tmp_path, seed=1)
    assert run_command(monkeypatch, *arguments) == 0
    assert len(trained(tmp_path, seed=1)) == 1


def test_the_command_takes_a_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_command(monkeypatch, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--runner {local,ray}" in shown
    assert "default: local" in shown
    assert "--cpus_per_run" in shown


def test_a_run_has_a_cpu_at_least(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster()
    with pytest.raises(ValueError, match="set cpus_per_run to 1 or more"):
        RayRunner(BenchmarkRuns(tmp_path), cpus_per_run=0)
