# SPDX-License-Identifier: Apache-2.0
"""The command ``speed``: reconstruction and training, beside the best matrix products the machine can do."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import mean
from typing import Any

import torch
from pandas import DataFrame
from rich.console import Console

from anomalib_intra.benchmark.machine import device_name, forget_peak_memory, peak_memory_mib, seconds_of
from anomalib_intra.components.reconstruction_module import ReconstructionModule
from anomalib_intra.experiments.speed.ceiling import Ceiling
from anomalib_intra.experiments.speed.of_intra import InTraWorkload
from anomalib_intra.experiments.speed.of_one_pass import OnePassWorkload
from anomalib_intra.experiments.speed.training import time_training
from anomalib_intra.experiments.speed.workload import Task, Workload
from anomalib_intra.intra.lightning_model import InTra
from anomalib_intra.one_pass.lightning_model import OnePassInTra

#: What is timed is timed up to so many times, and not again once that took so many seconds.
_TURNS, _SECONDS_OF_A_MEASUREMENT = 10, 20.0
#: Before and after each, the ceiling is measured for this share of the time it takes, at least for so many seconds.
_SHARE_OF_THE_CEILING = 0.1
_SECONDS_OF_THE_CEILING = 0.2


def speed(
    model: Callable[[tuple[int, int]], ReconstructionModule] = InTra,
    image_sizes: Sequence[int] = (256, 320, 512),
    batch_sizes: Sequence[int] = (1, 8),
    training_steps: int = 3,
    device: str | torch.device | None = None,
) -> DataFrame:
    """Measure reconstruction and training in float32 and bf16, all in one run.

    Shares are ratios to the rate of torch's matrix products at the model's own shapes: the fastest of them is timed
    before and after each measurement, since a machine's clock and what else runs on it change from second to second.
    Where products in bf16 do not even reach half the rate of float32, because the processor has no
    instructions for them, nothing else is measured in bf16.

    Args:
        model (Callable): Makes an :class:`InTra` or :class:`OnePassInTra` of an image size; the paper's by default.
        image_sizes (Sequence[int]): Sides of square images in pixels.
        batch_sizes (Sequence[int]): Images reconstructed at once.
        training_steps (int): Training steps that are timed, after one that is not.
        device (str | torch.device | None): Defaults to the accelerator there is, else the CPU.

    Returns:
        DataFrame: A row for each measurement: ``what``, ``precision``, ``image_size``, ``batch_size``,
        ``ms_per_image``, ``windows_per_s`` or ``images_per_s``, ``gflop_per_s``, ``ceiling_gflop_per_s`` beside it,
        ``share_of_ceiling``, ``times_the_loop`` or ``times_plain`` (the ratio of the shares) and ``peak_memory_mib``
        (of the process on a CPU). ``attrs["device"]`` names the machine.

    Raises:
        ValueError: If it is another model.

    Example:
        >>> tiny = partial(InTra, patch_size=8, window_size=3, embed_dim=32, depth=1, num_heads=2)
        >>> table = speed(tiny, image_sizes=[64], batch_sizes=[1], device="cpu")  # doctest: +SKIP
        >>> sorted(table["what"].unique())  # doctest: +SKIP
        ['matrix products', 'reconstruct', 'training step', 'training step, windows sampled before', 'window by window']
    """
    device = torch.device(device or (torch.accelerator.current_accelerator(check_available=True) or "cpu"))
    if isinstance(model, torch.nn.Module):  # one that is no ReconstructionModule: the command line calls it callable
        raise _unknown(model)
    progress = Console(stderr=True)
    rows = []
    for row in _measurements(model, image_sizes, batch_sizes, training_steps, device):
        progress.print(", ".join(f"{key} {_short(value)}" for key, value in row.items()), style="dim")
        rows.append(row)
    if rows[-1]["what"] == "matrix products":
        progress.print("This machine is slower in bf16 than in float32: nothing else was measured in bf16.")
    table = DataFrame(rows)
    table.attrs["device"] = device_name(device)
    return table


def workload_of(model: ReconstructionModule) -> Workload:
    """Tell the work of a model.

    Args:
        model (ReconstructionModule): Model on a device.

    Returns:
        Workload: Its work.

    Raises:
        ValueError: If its work is not known.

    Example:
        >>> workload_of(OnePassInTra(image_size=(64, 64), embed_dim=32, depth=1, num_heads=2)).unit
        'images'
    """
    if isinstance(model, InTra):
        return InTraWorkload(model)
    if isinstance(model, OnePassInTra):
        return OnePassWorkload(model)
    raise _unknown(model)


def _unknown(model: torch.nn.Module) -> ValueError:
    return ValueError(f"The speed of InTra and OnePassInTra can be measured, not that of {type(model).__name__}.")


def _measurements(
    model: Callable[[tuple[int, int]], ReconstructionModule],
    image_sizes: Sequence[int],
    batch_sizes: Sequence[int],
    training_steps: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    def build(size: int) -> Workload:
        return workload_of(model((size, size)).to(device).eval())

    rates: dict[str, float] = {}
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        first = build(image_sizes[0])
        ceiling = Ceiling(first.products, device, dtype)
        rates[precision] = ceiling.rate(10 * _SECONDS_OF_THE_CEILING)
        yield {"what": "matrix products", "precision": precision, "gflop_per_s": rates[precision] / 1e9}
        if rates[precision] < rates["float32"] / 2:
            return

        measure = partial(_measure, device, precision, first.unit, ceiling)
        autocast = partial(torch.autocast, device.type, torch.bfloat16) if precision == "bf16" else nullcontext
        # (in inference mode, the loop would cast all weights for every window)
        with torch.no_grad(), autocast():
            plain = measure(first.plainly())
            yield plain
            for size in image_sizes:
                workload = build(size)
                for batch_size in batch_sizes:
                    task = workload.reconstruct(torch.rand(batch_size, 3, size, size, device=device))
                    row = measure(task)
                    yield {
                        **row,
                        "image_size": size,
                        "batch_size": batch_size,
                        "ms_per_image": 1000 * task.samples / batch_size / row[f"{first.unit}_per_s"],
                        first.ratio: row["share_of_ceiling"] / plain["share_of_ceiling"],
                    }
        samples = training_steps * first.module.sampling.per_step
        flops = 3 * samples * first.flops_of_a_sample  # backwards takes twice the work of forwards
        train = partial(time_training, first.module, training_steps, device, autocast)
        for what, timed in (
            ("training step", train),
            (f"training step, {first.unit} sampled before", partial(train, sampled_before=True)),
        ):
            # (its first step does not count, so it has its own clock)
            yield {**measure(Task(what, samples, flops, timed), timed), "image_size": image_sizes[0]}


def _measure(
    device: torch.device,
    precision: str,
    unit: str,
    ceiling: Ceiling,
    task: Task,
    timed: Callable[[], float] | None = None,
) -> dict[str, Any]:
    timed = timed or partial(seconds_of, device, task.run)
    if device.type != "cpu":  # the first loads what the device needs
        timed()
    seconds, ceiling_beside, peak = _in_turns(device, timed, ceiling)
    rate = task.flops / seconds
    return {
        "what": task.what,
        "precision": precision,
        f"{unit}_per_s": task.samples / seconds,
        "gflop_per_s": rate / 1e9,
        "ceiling_gflop_per_s": ceiling_beside / 1e9,
        "share_of_ceiling": rate / ceiling_beside,
        "peak_memory_mib": peak,
    }


def _in_turns(device: torch.device, timed: Callable[[], float], ceiling: Ceiling) -> tuple[float, float, float | None]:
    """Measure in turns with the ceiling: mean seconds, mean rate of the ceiling beside them, and peak memory."""
    rates = [ceiling.rate(_SECONDS_OF_THE_CEILING)]
    measured: list[float] = []
    peaks: list[float | None] = []
    while len(measured) < _TURNS and sum(measured) < _SECONDS_OF_A_MEASUREMENT:
        forget_peak_memory(device)
        measured.append(timed())
        peaks.append(peak_memory_mib(device))
        rates.append(ceiling.rate(max(_SECONDS_OF_THE_CEILING, _SHARE_OF_THE_CEILING * measured[-1])))
    return mean(measured), mean(rates), max((peak for peak in peaks if peak is not None), default=None)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
