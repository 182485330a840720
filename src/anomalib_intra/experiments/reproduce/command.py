# SPDX-License-Identifier: Apache-2.0
"""The command ``reproduce``: train, test and compare, and go on where an earlier call was stopped."""

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from anomalib.data import MVTecAD
from lightning.pytorch import Trainer

from anomalib_intra.experiments.loss_curve import LossCurve, read_curve
from anomalib_intra.experiments.reproduce.forecast import forecast
from anomalib_intra.experiments.reproduce.page import write_page
from anomalib_intra.experiments.reproduce.time_budget import TimeBudget, read_sessions
from anomalib_intra.experiments.train_command import TrainCommand
from anomalib_intra.intra.lightning_model import InTra
from anomalib_intra.one_pass.lightning_model import OnePassInTra
from anomalib_intra.training.atomic_file import write_atomically
from anomalib_intra.training.checkpoints import BestCheckpoint, LastCheckpoint
from anomalib_intra.yardsticks import yardsticks

#: Epochs where neither call nor config says how many, and no time does; the paper names none.
_EPOCHS = 200


def reproduce(
    arguments: Sequence[str],
    epochs: int | None = None,
    minutes: float | None = None,
    output: str | Path = "results/reproduce",
) -> dict[str, Any] | None:
    """Train, test and compare with the yardsticks and the paper; go on where an earlier call was stopped.

    The first line that is printed says how long the training has yet to take, from the speed of a few training steps;
    of a :class:`OnePassInTra` with ``minutes`` of its own, what is left of these.
    All that is trained lies in ``output/CATEGORY``, and the same call goes on from there. Nothing is downloaded.

    Args:
        arguments (Sequence[str]): Arguments of ``anomalib train``, such as ``["--config", "configs/mvtec/wood.yaml"]``.
        epochs (int | None): Epochs after which training ends, if it has not stopped by itself before (the paper's
            patience of 50, or the model's own ``minutes``). Defaults to the config's ``max_epochs``, else to 200, or to
            no end where the model has ``minutes``. As many as are done already, or fewer, give a test of what is there.
        minutes (float | None): This call stops training after so long, to go on in the next; never by default.
        output (str | Path): Folder with a folder for each category, which gets ``result.json``, ``result.md`` (a page
            with all figures), ``losses.png``, ``weights`` and the test's pictures and report.

    Returns:
        dict | None: What ``result.json`` holds; None if the time was up before the training ended.

    Raises:
        ValueError: If the arguments cannot be used.
        FileNotFoundError: If the category is not there.
        KeyboardInterrupt: If it was stopped.

    Example:
        >>> reproduce(["--config", "configs/mvtec/bottle.yaml"], minutes=9)  # doctest: +SKIP
    """
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    command = TrainCommand(arguments)
    category = _check(command)
    folder = Path(output) / category
    weights = folder / "weights"
    command.claim(folder)
    command.datamodule.setup()

    model = command.model
    own_minutes = model.minutes if isinstance(model, OnePassInTra) else None
    epochs = epochs or max(command.settings.get("trainer", {}).get("max_epochs") or 0, 0)
    epochs = epochs or (_EPOCHS if own_minutes is None else None)
    done = len(read_curve(folder / "losses.csv"))
    if (folder / "result.json").is_file() and json.loads((folder / "result.json").read_text(encoding="utf-8"))[
        "ended_by_itself"
    ]:
        epochs = done
    last = weights / "last.ckpt"
    seconds = forecast(command, None if epochs is None else max(0, epochs - done), last)
    of_all = "" if epochs is None else f" of {epochs}"
    left = f"about {timedelta(seconds=round(seconds))} of training left"
    if isinstance(model, InTra):
        left += " (less if the validation loss stops improving)"
    elif own_minutes is not None:
        left += ", without validation"
    print(f"{category}: {done}{of_all} epochs done, {left}.", flush=True)

    # Where the model's time was over with the last call's, one more step ends the training as it should, validated.
    budget = TimeBudget(folder / "sessions.json", ends if seconds > 0 else None)
    callbacks = [
        budget,
        LossCurve(folder / "losses.csv", category, epochs),
        BestCheckpoint(weights),
        LastCheckpoint(weights),
    ]
    trainer = {
        "max_epochs": -1 if epochs is None else max(epochs, done),
        "max_steps": -1,
        "max_time": None,
        "check_val_every_n_epoch": 1,
    }
    engine = command.make_engine(folder, callbacks, **trainer)
    try:
        command.train(engine, last if last.is_file() else None)
    except KeyboardInterrupt:
        if budget.is_used_up:
            return None
        raise
    ended_by_itself = any(one.stopped_epoch > 0 for one in engine.trainer.early_stopping_callbacks)
    if isinstance(model, OnePassInTra):
        ended_by_itself = model.seconds_left == 0
    result = {
        "category": category,
        model.samples_name: _samples(command, engine.trainer, len(read_curve(folder / "losses.csv"))),
        **_test(command, folder),
        "minutes": own_minutes,
        "ended_by_itself": ended_by_itself,
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=2))
    write_page(result, model.losses, folder)
    return result


def _samples(command: TrainCommand, trainer: Trainer, epochs: int) -> int:
    """Count what was trained on; a time may have ended the last epoch before it was whole."""
    _, per_image, per_step = command.model.sampling
    steps = trainer.global_step * trainer.accumulate_grad_batches
    return min(epochs * len(command.datamodule.train_data) * per_image, steps * per_step)


def _test(command: TrainCommand, folder: Path) -> dict[str, Any]:
    """Test what was trained in a folder, and the yardsticks beside it."""
    testing = command.make_engine(folder / "test", [])
    (metrics,) = testing.test(command.model, datamodule=command.datamodule, verbose=False)
    size = command.model.image_size
    compared = yardsticks(command.datamodule, size, command.model.post_processor.original_size, folder / "yardsticks")
    return {
        "settings": command.settings,
        "parameters": sum(weight.numel() for weight in command.model.model.parameters()),
        "epochs": len(read_curve(folder / "losses.csv")),
        "sessions": read_sessions(folder / "sessions.json"),
        "metrics": metrics,
        "yardsticks": compared.rename(columns={"PSNR": "good_PSNR"}).to_dict(orient="index"),
        "test": str(Path(testing.trainer.default_root_dir)),
    }


def _check(command: TrainCommand) -> str:
    datamodule = command.datamodule
    if not isinstance(datamodule, MVTecAD):
        msg = f"Only categories of MVTec AD have published figures; the data is {type(datamodule).__name__}."
        raise ValueError(msg)
    if not (Path(datamodule.root) / datamodule.category).is_dir():
        msg = (
            f"There is no folder {Path(datamodule.root) / datamodule.category}: give the folder that holds the "
            "categories with --data.root."
        )
        raise FileNotFoundError(msg)
    return str(datamodule.category)
