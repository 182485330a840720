# SPDX-License-Identifier: Apache-2.0
"""The console script ``anomalib-intra``: anomalib's own command line with this package made known first.

It adds the few commands that anomalib has no place for.
"""

import signal
import sys
from argparse import ArgumentParser as PlainParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from anomalib.cli.cli import main as anomalib_main
from anomalib.data import AnomalibDataModule
from jsonargparse import ArgumentParser

from anomalib_intra.ablations import ablations
from anomalib_intra.benchmark import benchmark
from anomalib_intra.select_size import select_size
from anomalib_intra.speed import speed
from anomalib_intra.yardsticks import yardsticks


def main() -> None:
    """Run one of our own commands, or hand all arguments over to anomalib's command line.

    Short names of models and datamodules are understood in any order. ``benchmark`` takes the place of anomalib's,
    which accepts no model from outside anomalib; its configs have the same layout.
    """
    own: dict[str, Callable[..., None]] = {
        "ablations": _ablations,
        "benchmark": _benchmark,
        "speed": _speed,
        "yardsticks": _print_yardsticks,
    }
    if sys.argv[1:2] == ["select-size"]:
        _select_size(sys.argv[2:])
    elif len(sys.argv) > 1 and sys.argv[1] in own:
        _run(own[sys.argv[1]], sys.argv[1], sys.argv[2:])
    else:
        anomalib_main()


def _run(command: Callable[..., None], name: str, args: list[str]) -> None:
    parser = ArgumentParser(prog=f"anomalib-intra {name}", description=(command.__doc__ or name).splitlines()[0])
    parser.add_function_arguments(command, as_positional=False)
    if "config" not in signature(command).parameters:
        parser.add_argument("--config", action="config", help="Arguments from a YAML file.")
    given = parser.instantiate_classes(parser.parse_args(args)).as_dict()
    command(**{key: value for key, value in given.items() if key in signature(command).parameters})


@contextmanager
def _stoppable(goes_on: str) -> Iterator[None]:
    """End with a sentence where a command that can go on later is stopped."""
    # A process that is told to end must not leave its run going on alone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nStopped. The same command goes on {goes_on}.")
        sys.exit(130)


def _benchmark(config: Path, output: Path = Path("results/benchmark")) -> None:
    """Run what is missing of a benchmark and write its tables, page and chart.

    Args:
        config: YAML file in the format of anomalib's benchmark, see configs/benchmark.yaml.
        output: Folder for benchmark.csv, benchmark.md, benchmark.png and the runs.
    """
    with _stoppable("with the runs that are missing"):
        rows = benchmark(config, output)
    print(rows.to_string(index=False))
    print(f"\nThe page with all tables: {output / 'benchmark.md'}")
    if rows["error"].any():
        sys.exit(1)


def _ablations(
    configs: Path = Path("configs/ablations"),
    only: str | None = None,
    root: Path | None = None,
    output: Path = Path("results/ablations"),
) -> None:
    """Run what is missing of the paper's ablation studies and tabulate them like its Tables 3 to 6.

    Args:
        configs: Folder with a YAML file for each study, in the format of a benchmark.
        only: The one study to run, such as position.
        root: Folder of the data set, in the place of that in the configs.
        output: Folder for ablations.csv, ablations.md and the runs.
    """
    with _stoppable("with the runs that are missing"):
        rows = ablations(configs, only, root, output)
    print((output / "ablations.md").read_text(encoding="utf-8"))
    if rows["error"].any():
        sys.exit(1)


def _select_size(args: list[str]) -> None:
    # All other arguments are anomalib's, so none of them may be taken for ours.
    parser = PlainParser(
        prog="anomalib-intra select-size",
        description="Train at several image sizes and choose one by the validation loss, as the paper does (sec. 4.1).",
        epilog="All other arguments are those of anomalib train, such as --config or --data.category.",
        allow_abbrev=False,
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 320, 512], help="Sides of the images in pixels.")
    parser.add_argument("--epochs", type=int, default=200, help="Epochs of every size, at least 11.")
    parser.add_argument("--output", type=Path, default=Path("results/select-size"), help="Folder for all results.")
    own, others = parser.parse_known_args(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        table = select_size(others, own.sizes, own.epochs, own.output)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        parser.exit(2, f"anomalib-intra select-size: {error}\n")
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where it was stopped.")
        sys.exit(130)
    print(table.to_string(index=False))
    print(f"\nGo on with: anomalib train --config {own.output / 'config.yaml'}")


def _speed(
    model: dict[str, Any] | None = None,
    image_sizes: tuple[int, ...] = (256, 320, 512),
    batch_sizes: tuple[int, ...] = (1, 8),
    training_steps: int = 3,
    output: Path = Path("results/speed.json"),
) -> None:
    """Measure how fast this machine reconstructs and trains, beside what it could do at best.

    Args:
        model: Arguments of InTra; the paper's model without any.
        image_sizes: Sides of square images in pixels.
        batch_sizes: Images reconstructed at once.
        training_steps: Training steps that are timed, after one that is not.
        output: JSON file for the table.
    """
    table = speed(model, image_sizes, batch_sizes, training_steps)
    output.parent.mkdir(parents=True, exist_ok=True)
    table.to_json(output, orient="records", indent=2)
    print(table.to_string(index=False, na_rep="-", float_format="{:.2f}".format))
    print(f"\nMeasured on {table.attrs['device']}; written to {output}.")


def _print_yardsticks(data: AnomalibDataModule, image_size: tuple[int, int] = (256, 256)) -> None:
    """Print what a flat and the mean-image reconstruction score.

    Args:
        data: Datamodule to train and test on.
        image_size: Height and width to which images are resized.
    """
    print(yardsticks(data, image_size).round(4).to_string())
