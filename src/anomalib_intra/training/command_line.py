# SPDX-License-Identifier: Apache-2.0
"""What a command line says and anomalib does not hear: seed, optimizer and schedule, in all commands that train."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback, instantiate_class
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from anomalib_intra.training.internals import trainer_of

logger = logging.getLogger(__name__)


def as_commanded(
    module: LightningModule, default: Optimizer, schedule: LRScheduler | None = None
) -> OptimizerLRScheduler:
    """Heed ``--optimizer`` and ``--lr_scheduler``.

    anomalib takes these arguments for ``train`` and drops them without a word; for ``fit`` it heeds them in a way that
    Lightning cannot read, see :func:`drop_unreadable`. The parsed command line is in the callback that saves it.

    Args:
        module (LightningModule): Model that is about to be trained.
        default (Optimizer): Its own optimizer.
        schedule (LRScheduler | None): Its own schedule, by steps, where the command line names neither.

    Returns:
        OptimizerLRScheduler: What ``configure_optimizers`` may return: the optimizer named, or the model's own, and the
        schedule, if one is named.

    Example:
        >>> from anomalib_intra import InTra
        >>> model = InTra(image_size=(64, 64), window_size=3, embed_dim=32, depth=2, num_heads=4)
        >>> type(model.configure_optimizers()).__name__  # no command line: the model's own
        'Adam'
    """
    optimizer = default
    chosen = command_line(module)
    if chosen.get("optimizer"):
        optimizer = instantiate_class(module.parameters(), chosen["optimizer"])
        logger.info("Optimizer of the command line: %s", type(optimizer).__name__)
    if schedule is not None and not chosen.get("optimizer") and not chosen.get("lr_scheduler"):
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
    scheduler = instantiate_class(optimizer, chosen["lr_scheduler"]) if chosen.get("lr_scheduler") else None
    configured: OptimizerLRScheduler = LightningCLI.configure_optimizers(module, optimizer, scheduler)
    return configured


def seed_as_commanded(module: LightningModule, reset_parameters: Callable[[], None]) -> None:
    """Heed ``--seed_everything``, which anomalib takes and drops.

    The model has initialised its weights by then, so it does that anew.

    Args:
        module (LightningModule): Model that is about to be trained.
        reset_parameters (Callable): Initialises its weights anew.
    """
    seed = command_line(module).get("seed_everything")
    if isinstance(seed, int) and not isinstance(seed, bool):
        seed_everything(seed, workers=True)
        reset_parameters()


def drop_unreadable(module: LightningModule) -> None:
    """Take back what anomalib's ``fit`` does for ``--optimizer``; :func:`as_commanded` does it for all commands.

    It puts a method of a ``functools.partial`` on the model. Lightning looks for that method's code before it trains,
    and such a method has none: an AttributeError.

    Args:
        module (LightningModule): Model that is about to be trained.
    """
    own = module.__dict__.get("configure_optimizers")
    if isinstance(getattr(own, "__func__", None), partial):
        del module.configure_optimizers


def keep_config_of_training(module: LightningModule) -> None:
    """Let a training alone save its command line: a test or a prediction would write over it in the run's folder.

    Args:
        module (LightningModule): Model that is about to be used.
    """
    trainer = trainer_of(module)
    if trainer is not None and trainer.state.fn != "fit":
        for callback in _saving(module):
            callback.already_saved = True


def command_line(module: LightningModule) -> dict[str, Any]:
    """Find the parsed command line, which is in the callback that saves it.

    Args:
        module (LightningModule): Model of a command.

    Returns:
        dict[str, Any]: Its arguments; nothing where there was no command line.
    """
    saving = _saving(module)
    return saving[0].config.as_dict() if saving else {}


def _saving(module: LightningModule) -> list[SaveConfigCallback]:
    callbacks: list[Callback] = getattr(trainer_of(module), "callbacks", [])
    return [callback for callback in callbacks if isinstance(callback, SaveConfigCallback)]
