# SPDX-License-Identifier: Apache-2.0
"""Freed memory is kept while a model is trained on a CPU, and given back."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from anomalib_intra import TextureDemo, kept_memory

from ..conftest import tiny_engine, tiny_intra

_ALLOCATIONS = """
import ctypes
import resource
from pathlib import Path
import torch
from anomalib_intra.training.kept_memory import kept_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, of which there would be a few only

def faults_of_an_allocation():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**20)  # 256 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident_mib():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 2**10

with kept_memory(torch.device("cpu")):
    kept = min(faults_of_an_allocation() for _ in range(5))  # the first ones find no block that is large enough
    full = resident_mib()
print(kept, full - resident_mib(), faults_of_an_allocation())
"""


def allocations(**variables: str) -> list[float]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment.update(variables)
    done = subprocess.run(
        [sys.executable, "-c", _ALLOCATIONS], capture_output=True, text=True, check=True, env=environment
    )
    return [float(word) for word in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
def test_freed_memory_is_kept_and_given_back() -> None:
    kept, mib_less, given_back = allocations()
    assert kept < 100  # page faults, of the 65,536 pages
    assert mib_less > 200
    assert given_back > 10_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
def test_what_the_environment_says_of_memory_stays() -> None:
    kept, *_ = allocations(MALLOC_TRIM_THRESHOLD_="131072")
    assert kept > 10_000


@pytest.mark.parametrize("fails", [False, True])
def test_training_on_a_cpu_keeps_memory_to_its_end(demo: TextureDemo, tmp_path: Path, monkeypatch, fails) -> None:
    happened = []

    @contextmanager
    def kept(device: torch.device) -> Iterator[None]:
        happened.append(f"keep on {device}")
        yield
        happened.append("give back")

    monkeypatch.setattr(kept_memory, "kept_memory", kept)
    model = tiny_intra()
    training_step = model.training_step

    def step(*args: object) -> torch.Tensor:
        happened.append("step")
        if fails:
            raise OSError("The disk is gone.")
        return training_step(*args)

    monkeypatch.setattr(model, "training_step", step)
    engine = tiny_engine(tmp_path, max_epochs=1)
    if fails:
        with pytest.raises(OSError, match="disk"):
            engine.fit(model, datamodule=demo)
    else:
        engine.fit(model, datamodule=demo)
    assert happened[:2] == ["keep on cpu", "step"]
    assert happened[-1] == "give back"
    assert happened.count("give back") == 1
