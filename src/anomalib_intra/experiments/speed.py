# SPDX-License-Identifier: Apache-2.0
"""How fast InTra is on this machine, as a share of the best matrix products the machine can do."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import repeat
from statistics import mean
from typing import Any

import torch
from pandas import DataFrame
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from anomalib_intra.benchmark.machine import device_name, forget_peak_memory, peak_memory_mib, seconds_of, wait_for
from anomalib_intra.data.samples import Prepared, SampleLoader
from anomalib_intra.experiments.ceiling import Ceiling
from anomalib_intra.intra.lightning_model import InTra
from anomalib_intra.intra.torch_model import InpaintingTransformer

#: What is timed is timed up to so many times, and not again once that took so many seconds.
_TURNS, _SECONDS_OF_A_MEASUREMENT = 10, 20.0
#: Before and after each, the ceiling is measured for this share of the time it takes, at least for so many seconds.
_SHARE_OF_THE_CEILING = 0.1
_SECONDS_OF_THE_CEILING = 0.2
#: Windows that the plain loop inpaints, one after the other.
_WINDOWS_OF_THE_LOOP = 24
#: Images that training windows are sampled from.
_TRAINING_IMAGES = 4


def speed(
    model: dict[str, Any] | None = None,
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
        model (dict | None): Arguments of :class:`InTra`; the paper's model without any.
        image_sizes (Sequence[int]): Sides of square images in pixels.
        batch_sizes (Sequence[int]): Images reconstructed at once.
        training_steps (int): Training steps that are timed, after one that is not.
        device (str | torch.device | None): Defaults to the accelerator there is, else the CPU.

    Returns:
        DataFrame: A row for each measurement: ``what``, ``precision``, ``image_size``, ``batch_size``,
        ``ms_per_image``, ``windows_per_s``, ``gflop_per_s``, ``ceiling_gflop_per_s`` beside it, ``share_of_ceiling``,
        ``times_the_loop`` (the ratio of the shares) and ``peak_memory_mib`` (of the process on a CPU).
        ``attrs["device"]`` names the machine.

    Example:
        >>> tiny = {"patch_size": 8, "window_size": 3, "embed_dim": 32, "depth": 1, "num_heads": 2}
        >>> table = speed(tiny, image_sizes=[64], batch_sizes=[1], device="cpu")  # doctest: +SKIP
        >>> sorted(table["what"].unique())  # doctest: +SKIP
        ['matrix products', 'reconstruct', 'training step', 'training step, windows sampled before', 'window by window']
    """
    device = torch.device(device or (torch.accelerator.current_accelerator(check_available=True) or "cpu"))
    progress = Console(stderr=True)
    rows = []
    for row in _measurements(model or {}, image_sizes, batch_sizes, training_steps, device):
        progress.print(", ".join(f"{key} {_short(value)}" for key, value in row.items()), style="dim")
        rows.append(row)
    if rows[-1]["what"] == "matrix products":
        progress.print("This machine is slower in bf16 than in float32: nothing else was measured in bf16.")
    table = DataFrame(rows)
    table.attrs["device"] = device_name(device)
    return table


def _measurements(
    arguments: dict[str, Any],
    image_sizes: Sequence[int],
    batch_sizes: Sequence[int],
    training_steps: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    seconds = partial(seconds_of, device)
    rates: dict[str, float] = {}
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        intra = _intra(arguments, image_sizes[0], device)
        ceiling = Ceiling(intra, dtype)
        rates[precision] = ceiling.rate(10 * _SECONDS_OF_THE_CEILING)
        yield {"what": "matrix products", "precision": precision, "gflop_per_s": rates[precision] / 1e9}
        if rates[precision] < rates["float32"] / 2:
            return

        flops = _flops_of_a_window(intra.model)
        measure = partial(_measure, device, precision, flops, ceiling)
        autocast = partial(torch.autocast, device.type, torch.bfloat16) if precision == "bf16" else nullcontext
        # (in inference mode, the loop would cast all weights for every window)
        with torch.no_grad(), autocast():
            loop = measure("window by window", _WINDOWS_OF_THE_LOOP, partial(seconds, partial(_loop, intra.model)))
            yield loop
            for size in image_sizes:
                model = _intra(arguments, size, device).model
                for batch_size in batch_sizes:
                    images = torch.rand(batch_size, 3, size, size, device=device)
                    windows = batch_size * model.grid[0] * model.grid[1]
                    row = measure("reconstruct", windows, partial(seconds, partial(model.reconstruct, images)))
                    yield {
                        **row,
                        "image_size": size,
                        "batch_size": batch_size,
                        "ms_per_image": 1000 * windows / batch_size / row["windows_per_s"],
                        "times_the_loop": row["share_of_ceiling"] / loop["share_of_ceiling"],
                    }
        windows = training_steps * intra.window_batch_size
        train = partial(time_training, intra, training_steps, device, autocast)
        # Backwards takes twice the work of forwards.
        for what, timed in (
            ("training step", train),
            ("training step, windows sampled before", partial(train, sampled_before=True)),
        ):
            yield {**measure(what, windows, timed, work=3), "image_size": image_sizes[0]}


def _measure(
    device: torch.device,
    precision: str,
    flops: int,
    ceiling: Ceiling,
    what: str,
    windows: int,
    timed: Callable[[], float],
    work: int = 1,
) -> dict[str, Any]:
    if device.type != "cpu":  # the first loads what the device needs
        timed()
    seconds, ceiling_beside, peak = _in_turns(device, timed, ceiling)
    rate = windows * work * flops / seconds
    return {
        "what": what,
        "precision": precision,
        "windows_per_s": windows / seconds,
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


def _intra(arguments: dict[str, Any], size: int, device: torch.device) -> InTra:
    return InTra(**{**arguments, "image_size": (size, size)}, visualizer=False).to(device).eval()


def _flops_of_a_window(model: InpaintingTransformer) -> int:
    """Count the work of the plain formulas: every token of one window through every block."""
    patches = torch.rand(1, model.window_size**2, 3 * model.patch_size**2, device=model.inpaint_embedding.device)
    # (the counter does not know the CPU's own kernel of attention)
    plainly = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), plainly:
        y = model.patch_embedding(patches)
        for block in model.blocks:
            y = block(y)
        model.to_pixels(y.mean(dim=1))
    return counter.get_total_flops()


def _loop(model: InpaintingTransformer) -> None:
    side = model.window_size
    origin = torch.ones(1, dtype=torch.long, device=model.inpaint_embedding.device)
    hidden = origin + side // 2
    for _ in range(_WINDOWS_OF_THE_LOOP):
        patches = torch.rand(1, side, side, 3 * model.patch_size**2, device=origin.device)
        model.inpaint(patches, origin, origin, hidden, hidden)


def time_training(
    intra: InTra, steps: int, device: torch.device, autocast: Callable[[], Any], sampled_before: bool = False
) -> float:
    """Time training steps with Adam on random images, from sampling the windows to the changed weights.

    Args:
        intra (InTra): Model on the device; its weights change.
        steps (int): Steps that are timed, after one that is not.
        device (torch.device): The device.
        autocast (Callable): Makes a context of the precision, such as ``contextlib.nullcontext``.
        sampled_before (bool): Take the same windows in every step, sampled before the clock starts: what a step takes
            where nothing waits for data.

    Returns:
        float: Seconds of all steps.
    """
    random: Any = torch.rand(_TRAINING_IMAGES, 3, *intra.image_size)  # as good as a Dataset
    images = DataLoader(random, generator=torch.Generator())
    per_image = -(-(steps + 1) * intra.window_batch_size // _TRAINING_IMAGES)
    loader = SampleLoader(
        images,
        lambda x: Prepared(x.to(device), ["random"] * len(x)),
        intra.sampling.sample,
        per_image,
        intra.window_batch_size,
        intra.image_size,
        seed=0,
    )
    optimizer = torch.optim.Adam(intra.model.parameters(), lr=intra.learning_rate)
    intra.train()
    started = 0.0
    batches = repeat(next(iter(loader))) if sampled_before else loader
    for number, batch in enumerate(batches):
        with autocast():
            loss = intra.loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number == 0:
            wait_for(device)
            started = time.perf_counter()
        if number == steps:
            break
    wait_for(device)
    seconds = time.perf_counter() - started
    intra.eval()
    return seconds


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
