# SPDX-License-Identifier: Apache-2.0
"""Lightning's search for a learning rate, and what of its tuners is refused."""

import logging
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from anomalib_intra.training.command_line import command_line

logger = logging.getLogger(__name__)


def refuse_batch_size_finder(trainer: Trainer, name: str) -> None:
    """Refuse Lightning's search for a batch size.

    Args:
        trainer (Trainer): The trainer.
        name (str): Name of the model.

    Raises:
        ValueError: If it is to search while it trains.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
    if trainer.state.fn == "fit" and any(isinstance(callback, BatchSizeFinder) for callback in callbacks):
        msg = (
            f"BatchSizeFinder and Tuner.scale_batch_size look for the batch size of a loader of images, but {name} "
            "trains on samples of images: set how many a step takes with the model's own argument (images_per_step, "
            "window_batch_size or pair_batch_size)."
        )
        raise ValueError(msg)


class PostponedFinders:
    """Lets Lightning look for a learning rate when there is something to train on.

    Its callback (that of ``Tuner.lr_find`` too) runs before the model is asked to get ready, whose loader of samples is
    not there yet.
    """

    def __init__(self) -> None:
        self._finders: list[LearningRateFinder] = []

    def hold_back(self, trainer: Trainer) -> None:
        """Take the callbacks out.

        Args:
            trainer (Trainer): The trainer.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
        self._finders = [callback for callback in callbacks if isinstance(callback, LearningRateFinder)]
        callbacks[:] = [callback for callback in callbacks if callback not in self._finders]

    @property
    def are_held_back(self) -> bool:
        """Whether there are some, which have not run yet."""
        return bool(self._finders)

    def run(self, trainer: Trainer, module: LightningModule) -> None:
        """Put them back and do what they would have done, unless a run goes on, which has its learning rate.

        Args:
            trainer (Trainer): The trainer.
            module (LightningModule): The model, ready to be trained.
        """
        finders, self._finders = self._finders, []
        trainer.callbacks[:0] = finders  # type: ignore[attr-defined]
        if finders and trainer.ckpt_path:
            logger.info("No learning rate is looked for: the training goes on with that of its checkpoint.")
            return
        for finder in finders:
            finder.on_fit_start(trainer, module)
        if finders and not command_line(module).get("optimizer"):  # whose rate is not the model's
            # Lightning puts the rate into the optimizer alone, from which a schedule takes it away again.
            trainer.strategy.setup_optimizers(trainer)
