# SPDX-License-Identifier: Apache-2.0
"""The console script ``anomalib-intra``: anomalib's own command line with this package made known first.

It adds the few commands that anomalib has no place for.
"""

import logging
import re
import signal
import sys
from argparse import SUPPRESS
from argparse import ArgumentParser as PlainParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

from anomalib.cli.cli import AnomalibCLI
from anomalib.data import AnomalibDataModule
from anomalib.loggers import configure_logger
from anomalib.models import AnomalibModule
from jsonargparse import ArgumentParser, Namespace

from anomalib_intra.benchmark import benchmark
from anomalib_intra.components.calibrated_module import CalibratedModule
from anomalib_intra.components.checkpoint_fit import not_given
from anomalib_intra.components.reconstruction_module import ReconstructionModule
from anomalib_intra.components.trained_module import TrainedModule
from anomalib_intra.experiments.ablations import ablations
from anomalib_intra.experiments.map_options import OPTIONS, map_options
from anomalib_intra.experiments.reproduce import reproduce
from anomalib_intra.experiments.select_size import select_size
from anomalib_intra.experiments.speed import speed
from anomalib_intra.experiments.synthetic_defects import synthetic_defects
from anomalib_intra.intra.lightning_model import InTra
from anomalib_intra.one_pass import OnePassInTra
from anomalib_intra.training.console import ignore_what_no_user_can_mend, print_each_line_once
from anomalib_intra.training.named_configs import CONFIGS, find_config, with_config_paths
from anomalib_intra.training.refusals import build, refusing, sentence_of_refusal
from anomalib_intra.yardsticks import yardsticks

logger = logging.getLogger(__name__)

#: Exit code of a command that was given too little time, and goes on in the next call.
_MORE_TO_DO = 75

#: By what our own commands refuse what they are asked for.
_OWN_REFUSALS = (ValueError, FileNotFoundError, FloatingPointError, ImportError)

#: How anomalib begins where it takes no path with other letters than ASCII, or a long one.
_REFUSED_PATHS = ("Path contains non-printable characters", "Path is too long")

#: How it begins where a folder is not there.
_NO_PATH = "Path does not exist"

#: How numpy ends it where anomalib gives bad images their masks and counts differ.
_OTHER_COUNT = re.compile(r"NumPy boolean array indexing assignment cannot assign (\d+) .* the (\d+) output")


def main() -> None:
    """Run one of our own commands, or hand all arguments over to anomalib's command line.

    Short names of models and datamodules are understood in any order, and ``--config`` takes the name of a config that
    comes with the package. ``benchmark`` takes the place of anomalib's, which accepts no model from outside anomalib;
    its configs have the same layout.
    """
    with _refusing("anomalib-intra"):
        arguments = with_config_paths(sys.argv[1:])
    ignore_what_no_user_can_mend()
    own: dict[str, Callable[..., None]] = {
        "ablations": _ablations,
        "benchmark": _benchmark,
        "map-options": _map_options,
        "speed": _speed,
        "synthetic-defects": _synthetic_defects,
        "yardsticks": _print_yardsticks,
    }
    with_anomalibs_arguments = {"reproduce": _reproduce, "select-size": _select_size}
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        _list_commands({**own, **with_anomalibs_arguments})
    if name in with_anomalibs_arguments:
        with_anomalibs_arguments[name](arguments[1:])
    elif name in own:
        _run(own[name], name, arguments[1:])
    else:
        configure_logger()
        print_each_line_once()
        with refusing(_in_clear_words):
            CommandLine(arguments)


def _list_commands(commands: Mapping[str, Callable[..., None]]) -> None:
    print("Commands of anomalib-intra, each with a --help of its own:\n")
    for name, command in sorted(commands.items()):
        print(f"  {name:19}{_summary(command)}")
    print("\nCommands of anomalib, but for its benchmark:\n")


def _summary(command: Callable[..., None]) -> str:
    return (command.__doc__ or "").splitlines()[0]


class CommandLine(AnomalibCLI):
    """anomalib's command line, which heeds a little more, and where a mistake ends in a sentence."""

    @staticmethod
    def init_parser(**kwargs: Any) -> ArgumentParser:
        """Let what a constructor refuses end the command."""
        parser = AnomalibCLI.init_parser(**kwargs)
        parser.add_instantiator(build, object)
        return parser

    def add_predict_arguments(self, parser: ArgumentParser) -> None:
        """Take the config of a training, too."""
        super().add_predict_arguments(parser)
        _pass_over_training(parser)

    def add_export_arguments(self, parser: ArgumentParser) -> None:
        """Take the config of a training, too."""
        super().add_export_arguments(parser)
        _pass_over_training(parser)

    def before_instantiate_classes(self) -> None:
        """Build the model as that of the checkpoint, where nothing else was asked for."""
        super().before_instantiate_classes()
        given = self.config[self.subcommand]
        if given.get("ckpt_path") and Path(given.ckpt_path).is_file():
            _build_as_saved(given.model, Path(given.ckpt_path))

    def instantiate_classes(self) -> None:
        """Have ``export`` heed the post-processor that was given, where the Engine builds a model without it."""
        super().instantiate_classes()
        given = self.config_init[self.subcommand]
        if self.subcommand == "export" and given.ckpt_path and isinstance(self.model, CalibratedModule):
            self.model = type(self.model).load_from_checkpoint(
                given.ckpt_path, post_processor=self.model.post_processor
            )
            given.ckpt_path = None  # it is loaded


def _build_as_saved(model: Namespace, checkpoint: Path) -> None:
    """Take the arguments that decide the architecture from a checkpoint, where they were not given."""
    kind = resolve_name(model.class_path)
    if not issubclass(kind, TrainedModule):
        return
    saved = kind.read_checkpoint(checkpoint).get("hyper_parameters", {})
    for name, value in not_given(kind, kind.architecture, saved, model.init_args.as_dict()).items():
        logger.info("%s=%s, as in the checkpoint.", name, value)
        model.init_args[name] = value


def _pass_over_training(parser: ArgumentParser) -> None:
    # A run's config.yaml names them, if only to say null, and what a command does not know it refuses.
    for name in ("optimizer", "lr_scheduler"):
        parser.add_argument(f"--{name}", type=dict | None, help=SUPPRESS)


def _run(command: Callable[..., None], name: str, args: list[str]) -> None:
    parser = ArgumentParser(prog=f"anomalib-intra {name}", description=_summary(command))
    parser.add_function_arguments(command, as_positional=False)
    if "config" not in signature(command).parameters:
        parser.add_argument("--config", action="config", help="Arguments from a YAML file.")
    parser.add_instantiator(build, object)
    given = parser.instantiate_classes(parser.parse_args(args)).as_dict()
    with _refusing(parser.prog):
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


def _benchmark(
    config: Path,
    output: Path = Path("results/benchmark"),
    runner: Literal["local", "ray"] = "local",
    cpus_per_run: int = 1,
) -> None:
    """Run what is missing of a benchmark and write its tables, page and chart.

    Args:
        config: YAML file in the format of anomalib's benchmark; the config benchmark is one.
        output: Folder for benchmark.csv, benchmark.md, benchmark.png and the runs.
        runner: Where the runs take place: on this machine, or on the Ray cluster of RAY_ADDRESS.
        cpus_per_run: CPUs, and threads of torch, that a run has on Ray.
    """
    with _stoppable("with the runs that are missing"):
        rows = benchmark(config, output, runner, cpus_per_run)
    print(rows.to_string(index=False))
    print(f"\nThe page with all tables: {output / 'benchmark.md'}")
    if rows["error"].any():
        sys.exit(1)


def _ablations(
    configs: Path | None = None,
    only: str | None = None,
    root: Path | None = None,
    output: Path = Path("results/ablations"),
) -> None:
    """Run what is missing of the paper's ablation studies and tabulate them like its Tables 3 to 6.

    Args:
        configs: Folder with a YAML file for each study, in the format of a benchmark; the paper's by default.
        only: The one study to run, such as position.
        root: Folder of the data set, in the place of that in the configs.
        output: Folder for ablations.csv, ablations.md and the runs.
    """
    with _stoppable("with the runs that are missing"):
        rows = ablations(configs or CONFIGS / "ablations", only, root, output)
    print((output / "ablations.md").read_text(encoding="utf-8"))
    if rows["error"].any():
        sys.exit(1)


def _map_options(
    checkpoint: Path,
    data: AnomalibDataModule,
    options: list[dict[str, Any]] = list(OPTIONS),  # noqa: B006  # never changed, and shown by --help
    output: Path = Path("results/map-options"),
) -> None:
    """Test a trained InTra with one set of options after the other that are not in the paper.

    Args:
        checkpoint: Checkpoint of the model.
        data: Datamodule that it was trained on.
        options: Sets of options, such as '[{"deviation": "scaled"}, {"second_pass": true}]'.
        output: Folder for the table.
    """
    print(map_options(checkpoint, data, options, output).to_string(index=False, float_format="{:.3f}".format))


def _synthetic_defects(
    checkpoints: list[Path],
    data: AnomalibDataModule,
    model: type[AnomalibModule] = OnePassInTra,
    seed: int = 0,
    output: Path = Path("results/synthetic-defects"),
) -> None:
    """Rank trained models without a test image, by synthetic defects in held-out normal images.

    Args:
        checkpoints: Checkpoints of the models, such as '[a/model.ckpt, b/model.ckpt]'.
        data: Datamodule that they were trained on.
        model: Class of the models.
        seed: Seed of the defects.
        output: Folder for the table and the images with defects.
    """
    table = synthetic_defects(model, checkpoints, data, seed, output)
    print(table.to_string(index=False, float_format="{:.3f}".format))


def _select_size(args: list[str]) -> None:
    """Train at several image sizes; choose one by the validation loss, as the paper does (sec. 4.1)."""
    parser = _parser_beside_anomalibs("select-size", _summary(_select_size))
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 320, 512], help="Sides of the images in pixels.")
    parser.add_argument("--epochs", type=int, default=200, help="Epochs of every size, at least 11.")
    parser.add_argument("--output", type=Path, default=Path("results/select-size"), help="Folder for all results.")
    own, others = parser.parse_known_args(args)
    with _stoppable("where it was stopped"), _refusing(parser.prog):
        table = select_size(others, own.sizes, own.epochs, own.output)
    print(table.to_string(index=False))
    print(f"\nGo on with: anomalib train --config {own.output / 'config.yaml'}")


def _reproduce(args: list[str]) -> None:
    """Train and test a category of MVTec AD with the paper's settings, beside its figures."""
    parser = _parser_beside_anomalibs("reproduce", _summary(_reproduce))
    parser.add_argument("category", help="Category, such as bottle.")
    parser.add_argument("--config", help="Config, a file or a name; defaults to mvtec/CATEGORY, the paper's.")
    parser.add_argument(
        "--epochs",
        type=int,
        help="Epochs at most; defaults to the config's max_epochs, else to 200, or no end for a model with minutes.",
    )
    parser.add_argument(
        "--minutes", type=float, help=f"Stop after so long, with exit code {_MORE_TO_DO}, to go on in the next call."
    )
    parser.add_argument("--output", type=Path, default=Path("results/reproduce"), help="Folder for all results.")
    own, others = parser.parse_known_args(args)
    with _stoppable("where it was stopped"), _refusing(parser.prog):
        config = own.config or find_config(f"mvtec/{own.category}")
        arguments = ["--config", config, "--data.category", own.category, *others]
        result = reproduce(arguments, own.epochs, own.minutes, own.output)
    if result is None:
        print("\nThe time is up; the training is not done. The same command goes on where it was stopped.")
        sys.exit(_MORE_TO_DO)
    print((own.output / own.category / "result.md").read_text(encoding="utf-8"))
    print(f"The pictures and the report: {result['test']}")


def _parser_beside_anomalibs(name: str, description: str) -> PlainParser:
    # All other arguments are anomalib's, so none of them may be taken for ours.
    return PlainParser(
        prog=f"anomalib-intra {name}",
        description=description,
        epilog="All other arguments are those of anomalib train, such as --config or --data.category.",
        allow_abbrev=False,
    )


def _refusing(name: str) -> AbstractContextManager[None]:
    """End with a sentence where a command of ours cannot do what it is asked for."""
    return refusing(lambda error: str(error) if isinstance(error, _OWN_REFUSALS) else None, name)


def _in_clear_words(error: Exception) -> str | None:
    """As any refusal, but where anomalib refuses folders in words that do not tell: what is wrong, and what helps."""
    if str(error).startswith(_REFUSED_PATHS):
        # Of whole paths alone, it does not follow links before it looks.
        return (
            f"{error}. Rename the folder, or make a link to it whose path has at most 512 ASCII characters, and give "
            "whole paths through it: --data.normal_dir /LINK/good --data.abnormal_dir /LINK/bad to train, "
            "--data /LINK/new to predict."
        )
    if str(error).startswith(_NO_PATH):
        return f"{error}. Check the path; where there are no images of bad parts, train with --data.abnormal_dir null."
    if counts := _OTHER_COUNT.match(str(error)):
        return "mask_dir holds {} masks for the {} images of abnormal_dir: give each a mask of its name.".format(
            *counts.groups()
        )
    return sentence_of_refusal(error)


def _speed(
    # Not InTra itself: what another model has in common with it would be its, by default.
    model: Callable[[tuple[int, int]], ReconstructionModule] | None = None,
    image_sizes: tuple[int, ...] = (256, 320, 512),
    batch_sizes: tuple[int, ...] = (1, 8),
    training_steps: int = 3,
    output: Path = Path("results/speed.json"),
) -> None:
    """Measure how fast this machine reconstructs and trains, beside what it could do at best.

    Args:
        model: InTra or OnePassInTra, with arguments of its own but for the size; the paper's InTra by default.
        image_sizes: Sides of square images in pixels.
        batch_sizes: Images reconstructed at once.
        training_steps: Training steps that are timed, after one that is not.
        output: JSON file for the table.
    """
    table = speed(model or InTra, image_sizes, batch_sizes, training_steps)
    output.parent.mkdir(parents=True, exist_ok=True)
    table.to_json(output, orient="records", indent=2)
    print(table.to_string(index=False, na_rep="-", float_format="{:.2f}".format))
    print(f"\nMeasured on {table.attrs['device']}; written to {output}.")


def _print_yardsticks(
    data: AnomalibDataModule,
    image_size: tuple[int, int] = (256, 256),
    original_size: bool = False,
    output: Path = Path("results"),
) -> None:
    """Print what a flat and the mean-image reconstruction score.

    Args:
        data: Datamodule to train and test on.
        image_size: Height and width to which images are resized.
        original_size: Compare at the size of the image files, as the paper's configs do.
        output: Folder for what anomalib's Engine writes.
    """
    print(yardsticks(data, image_size, original_size, output).round(4).to_string())
