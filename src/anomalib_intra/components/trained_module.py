# SPDX-License-Identifier: Apache-2.0
"""How the models of this package are trained: on draws from normal images, and calibrated when that ends."""

import logging
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from anomalib.engine.plugins import AnomalibCheckpointIO
from anomalib.pre_processing import PreProcessor
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from anomalib_intra.components.calibrated_module import CalibratedModule, has_validation_images
from anomalib_intra.data.normal_images import NormalImages, shared_loader
from anomalib_intra.data.samples import DrawLoader, Draws
from anomalib_intra.report import RunReport
from anomalib_intra.training.checkpoints import AtomicCheckpointIO
from anomalib_intra.training.command_line import drop_unreadable, seed_as_commanded
from anomalib_intra.training.finite_loss import FiniteLoss
from anomalib_intra.training.kept_memory import KeptMemory
from anomalib_intra.training.random_state import random_state, set_random_state
from anomalib_intra.training.run_folder import share_run_folder

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

#: Images that an error names.
_NAMED = 3


class DrawnModule(CalibratedModule):
    """An anomalib model that learns from random draws (windows, pairs of patches) from normal images.

    Before Lightning sets its loop up, a loader of draws takes the place of the datamodule's image loader, so that
    optimizer, clipping, precision, ``max_steps`` and progress bar are Lightning's own. When training ends, the weights
    of the best checkpoint are loaded, calibrated, and stored there with what calibration found.

    Args:
        image_size (tuple[int, int]): Height and width to which images are resized.
        pre_processor (PreProcessor | bool): As for :class:`CalibratedModule`.
        **components (Any): As for :class:`CalibratedModule`.
    """

    #: What one draw is called in the progress bar.
    draws_name = "draws"

    def __init__(self, image_size: tuple[int, int], pre_processor: PreProcessor | bool, **components: Any) -> None:
        super().__init__(image_size, pre_processor, **components)
        self._images: NormalImages | None = None
        self._draws: DrawLoader[Any] | None = None
        self._draw_seed: int | None = None
        self._random_state: dict[str, Any] | None = None
        self._resumed_from: str | None = None
        self._finite_loss = FiniteLoss()
        self._val_loss = torch.zeros(2)
        self._clock_started: float | None = None
        self._draws_since = 0
        #: A row for each epoch trained: ``epoch`` and, where there was one, ``train_loss`` and ``val_loss``.
        self.losses: list[dict[str, float]] = []

    # ---- what a model decides ----------------------------------------------------------------------------------------

    @abstractmethod
    def draw_loader(self, images: NormalImages, seed: int) -> DrawLoader[Any]:
        """Make the loader of training steps.

        Args:
            images (NormalImages): The loaders of the run; :meth:`prepare` prepares batches of the training images.
            seed (int): Seed of all draws.

        Returns:
            DrawLoader: The loader.
        """

    @abstractmethod
    def draw_weights(self) -> None:
        """Draw all weights anew."""

    # ---- components --------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add what keeps memory, and a report unless pictures are switched off or the user brought their own."""
        drop_unreadable(self)  # here, since this is the first that Lightning asks of a model
        callbacks: list[Callback] = list(super().configure_callbacks())  # type: ignore[arg-type]  # (never a single one)
        # One that is there already too: it must come after the post-processor, which gives it scores.
        all_there = self.trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
        present = [callback for callback in all_there if isinstance(callback, RunReport)]
        return [*callbacks, KeptMemory(), *(present or [RunReport()] * bool(self.visualizer))]

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer arguments the model needs: no validation before training, which would have nothing to check."""
        return {"num_sanity_val_steps": 0}

    # ---- training ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Save checkpoints so that none is lost; let several processes share one folder, and the images to evaluate.

        Args:
            stage (str): Lightning's name of what begins.
        """
        super().setup(stage)
        if stage == "fit":
            seed_as_commanded(self)
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is AnomalibCheckpointIO:
            strategy.checkpoint_io = AtomicCheckpointIO(strategy.checkpoint_io.extra_safe_globals)
        elif type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = AtomicCheckpointIO(self.checkpoint_safe_globals())
        if self.trainer.world_size > 1 and stage == "fit":
            share_run_folder(self.trainer)
        loops = {"test": self.trainer.test_loop, "validate": self.trainer.validate_loop}
        if self.trainer.world_size > 1 and stage in loops:
            source = loops[stage]._data_source
            loader = source.dataloader()
            if isinstance(loader, DataLoader) and len(loader.dataset) >= self.trainer.world_size:  # type: ignore[arg-type]
                source.instance = shared_loader(
                    loader.dataset, loader, loader.batch_size or 1, self.trainer.global_rank, self.trainer.world_size
                )

    def on_fit_start(self) -> None:
        """Put the loaders of draws and of held-out images in the place of the datamodule's image loaders."""
        self.post_processor.reset()
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        train_source = self.trainer.fit_loop._data_source
        val_source = self.trainer.fit_loop.epoch_loop.val_loop._data_source
        self._images = self._sort_out(
            train_source.dataloader(),
            val_source.dataloader() if val_source.is_defined() and has_validation_images(datamodule) else None,
        )
        if self._draw_seed is None:
            self._draw_seed = self.trainer.strategy.broadcast(torch.initial_seed() % 2**31)
        self._draws = self.draw_loader(self._images, self._draw_seed)
        train_source.instance = self._draws
        val_source.instance = self._images.held_out
        self._finite_loss = FiniteLoss()

    def on_train_start(self) -> None:
        """Go on with the random numbers of the run that is resumed."""
        self._resumed_from = str(self.trainer.ckpt_path) if self.trainer.ckpt_path else None
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def on_train_epoch_start(self) -> None:
        """Make other draws than in the epoch before."""
        # A run that begins anew, or goes on from an earlier epoch, leaves no losses of another run behind.
        self.losses = [row for row in self.losses if row["epoch"] < self.current_epoch]
        self.losses.append({"epoch": self.current_epoch})
        assert self._draws is not None
        self._draws.epoch = self.current_epoch
        self._clock_started = None

    def on_train_batch_end(self, outputs: Mapping[str, Any], batch: Draws, batch_idx: int) -> None:
        """Check the loss, show the speed, and let a run that ends by ``max_steps`` end with a validation."""
        del batch_idx
        self._finite_loss.watch(outputs["loss"], partial(self._diverged, self.trainer.global_step, batch))
        # Timed from the end of the epoch's first step, before which images are read.
        if self._clock_started is None:
            self._clock_started, self._draws_since = time.monotonic(), 0
        else:
            self._draws_since += len(batch)
            speed = self._draws_since / (time.monotonic() - self._clock_started)
            self.log(f"{self.draws_name}/s", speed, prog_bar=True, batch_size=1)
        if 0 < self.trainer.max_steps <= self.trainer.global_step:
            self.trainer.should_stop = True

    def on_train_epoch_end(self) -> None:
        """Leave a line in the log, for runs without a terminal."""
        metrics = self.trainer.callback_metrics
        train_loss, val_loss = (float(metrics.get(name, torch.nan)) for name in ("train_loss_epoch", "val_loss"))
        logger.info("Epoch %d: train_loss %.5f, val_loss %.5f", self.current_epoch, train_loss, val_loss)
        self.losses[-1]["train_loss"] = train_loss

    def on_train_end(self) -> None:
        """Go back to the weights of the best checkpoint, calibrate them, and store that in the checkpoint."""
        kept = self.trainer.checkpoint_callback
        best = getattr(kept, "best_model_path", "")
        # Only in the run's own folder: a checkpoint that was resumed from may name any other file.
        stored = bool(best) and Path(best).is_file() and Path(best).parent == Path(getattr(kept, "dirpath", None) or "")
        if stored:
            checkpoint = self.trainer.strategy.checkpoint_io.load_checkpoint(best, map_location="cpu")
            self.load_state_dict(checkpoint["state_dict"])
            logger.info("Back to the weights of epoch %d, those of %s.", checkpoint["epoch"], best)
        assert self._images is not None
        self._calibrate(self._images)
        if stored:
            checkpoint["state_dict"] = {key: value.cpu() for key, value in self.state_dict().items()}
            checkpoint["losses"] = self.losses  # of the epochs after the best one too
            if self.trainer.is_global_zero:
                self.trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, best)
            self.trainer.strategy.barrier()
        # Loaders of a run that is over must not travel with a model that is copied or exported.
        self._images = self._draws = None

    def on_fit_end(self) -> None:
        """End a run that was stopped after its last epoch: resumed, it has nothing to train and skips that end."""
        if self._images is not None:
            self._resumed_from = str(self.trainer.ckpt_path)
            self.to(self.trainer.strategy.root_device)  # which Lightning has taken the model from by now
            self.on_train_end()
            self.cpu()

    # ---- validation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Begin to add up the validation loss."""
        self._val_loss = torch.zeros(2, device=self.device)

    def add_val_loss(self, loss: torch.Tensor, count: int) -> None:
        """Add the loss of a batch of held-out images to the validation loss.

        Args:
            loss (torch.Tensor): Mean loss of the batch, a scalar.
            count (int): How many it is the mean of.
        """
        self._val_loss += torch.stack([loss.detach().float() * count, torch.full_like(loss, count)])

    def on_validation_epoch_end(self) -> None:
        """Log the validation loss: one number, the same in every process, whatever their shares of the images."""
        total, count = self.trainer.strategy.reduce(self._val_loss, reduce_op="sum")
        if count > 0:
            self.log("val_loss", total / count, prog_bar=True, batch_size=1)

    def on_validation_end(self) -> None:
        """Keep the epoch's validation loss for the training curves."""
        if self.trainer.state.fn == "fit" and "val_loss" in self.trainer.callback_metrics:
            self.losses[-1]["val_loss"] = float(self.trainer.callback_metrics["val_loss"])

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> "Self":
        """Load a model from a checkpoint, which can run no code.

        Args:
            *args (Any): As for ``AnomalibModule.load_from_checkpoint``.
            **kwargs (Any): The same.

        Returns:
            Self: The model.
        """
        # Lightning would let a checkpoint name the function that builds the model, and with it modules to import.
        return cast("Self", super().load_from_checkpoint(*args, **{**kwargs, "_instantiator": None}))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store seed and state of random numbers and the losses beside what anomalib stores; never broken weights."""
        self._finite_loss.check()
        super().on_save_checkpoint(checkpoint)
        checkpoint["losses"] = self.losses
        checkpoint["draw_seed"] = self._draw_seed
        checkpoint["random_state"] = random_state()
        self._forget_callback_state(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what was stored, whichever metrics the model was tested with."""
        super().on_load_checkpoint(checkpoint)
        self._draw_seed = checkpoint.get("draw_seed")
        self._random_state = checkpoint.get("random_state")
        self._keep_what_was_trained(checkpoint)
        self.losses = checkpoint.get("losses", [])
        self._forget_callback_state(checkpoint)
        # Some metrics have buffers. A checkpoint must also load into a model with others, as Engine.export builds it.
        stored, present = checkpoint["state_dict"], self.state_dict()
        checkpoint["state_dict"] = {
            **{key: value for key, value in stored.items() if not key.startswith("evaluator.")},
            **{key: value for key, value in present.items() if key.startswith("evaluator.")},
        }

    def _keep_what_was_trained(self, checkpoint: dict[str, Any]) -> None:
        # Engine.train gives the checkpoint that training was resumed from to the test that follows, too, which would
        # test the weights of before instead of those that were just trained.
        trainer = self._trainer
        if trainer is None or self._resumed_from is None or trainer.state.fn != "test":
            return
        if str(trainer.ckpt_path) == self._resumed_from and self.is_calibrated:
            logger.info("Testing what was just trained, not %s, which it was resumed from.", self._resumed_from)
            checkpoint["state_dict"], checkpoint["losses"] = self.state_dict(), self.losses
        self._resumed_from = None

    def _forget_callback_state(self, checkpoint: dict[str, Any]) -> None:
        # The post-processor is a module, whose buffers are in the model's state, and a callback, whose state Lightning
        # saved before calibration and would load over them.
        checkpoint.get("callbacks", {}).pop(self.post_processor.state_key, None)

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _diverged(self, step: int, batch: Draws, loss: float) -> str:
        assert self._draws is not None
        names = [self._draws.names[number] for number in batch.index.unique().tolist()]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        saved = [
            path
            for callback in reversed(self.trainer.checkpoint_callbacks)
            if (path := str(getattr(callback, "path", "") or getattr(callback, "best_model_path", "")))
            and Path(path).is_file()
        ]
        go_on = f"Go on from the last good checkpoint, {saved[0]} (--ckpt_path)," if saved else "Start again"
        return (
            f"The loss is {loss} at step {step} (epoch {self.current_epoch}); its {len(batch)} {self.draws_name} come "
            f"from {', '.join(names[:_NAMED])}{more}. Training has diverged. {go_on} with a lower learning_rate or "
            "with gradient clipping (--trainer.gradient_clip_val 1.0)."
        )
