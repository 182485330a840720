# SPDX-License-Identifier: Apache-2.0
"""What is measured on and how: the name of card or processor, what is installed, memory used and seconds passed."""

import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """Name the card, or the processor and the number of threads.

    Args:
        device (torch.device): A device.

    Returns:
        str: Its name.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def versions() -> str:
    """Name the versions that figures depend on.

    Returns:
        str: Those of anomalib, this package and torch.

    Example:
        >>> [one.split()[0] for one in versions().split(", ")]
        ['anomalib', 'anomalib-intra', 'torch']
    """
    return ", ".join(f"{name} {version(name)}" for name in ("anomalib", "anomalib-intra", "torch"))


def peak_memory_mib(device: torch.device) -> float | None:
    """Tell the most memory in use since the start, or since :func:`forget_peak_memory`.

    Args:
        device (torch.device): A device.

    Returns:
        float | None: That of the device on CUDA, else that of the process in MiB; None where it is not known.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux; there, getrusage begins with the peak of the parent process
        (line,) = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 2**10
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def forget_peak_memory(device: torch.device) -> None:
    """Let the peak begin anew at the memory that is in use now, where the system can do that.

    Args:
        device (torch.device): A device.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # not Linux, or not allowed: the peak is then that since the start
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was told.

    Args:
        device (torch.device): A device; there is nothing to wait for on a CPU.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(device: torch.device, work: Callable[[], object], times: int = 1) -> float:
    """Time work, from when the device has nothing else to do until it is done.

    Args:
        device (torch.device): The device it runs on.
        work (Callable): The work.
        times (int): How often it is done.

    Returns:
        float: Seconds of all times together.

    Example:
        >>> seconds_of(torch.device("cpu"), lambda: time.sleep(0.01), times=2) >= 0.02
        True
    """
    wait_for(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait_for(device)
    return time.perf_counter() - started
