# SPDX-License-Identifier: Apache-2.0
"""How the models of this package are trained: on samples of normal images, and calibrated when that ends."""

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from anomalib.engine.plugins import AnomalibCheckpointIO
from anomalib.pre_processing import PreProcessor
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from anomalib_intra.components.arguments import differing, with_defaults
from anomalib_intra.components.calibrated_module import CalibratedModule, has_validation_images
from anomalib_intra.components.checkpoint_fit import check_architecture, check_class, forget_stale_calibration
from anomalib_intra.components.evaluator import SelectiveEvaluator
from anomalib_intra.components.monitoring import agree_on_metrics, has_an_end, validates
from anomalib_intra.components.pre_processor import OnImagesOnly
from anomalib_intra.components.resume import keep_patience, seek_best_anew, set_learning_rate, tell_what_changed
from anomalib_intra.data.image_files import fingerprint
from anomalib_intra.data.normal_images import NormalImages, Share, shared_loader
from anomalib_intra.data.samples import SampleLoader
from anomalib_intra.report import RunReport
from anomalib_intra.training.callbacks import FiniteLoss, LossHistory, Throughput, ValidatedEnd
from anomalib_intra.training.checkpoints import (
    AtomicCheckpointIO,
    keep_last_and_best,
    keeper_of_the_best,
    weights_were_averaged,
)
from anomalib_intra.training.command_line import (
    command_line,
    drop_unreadable,
    keep_config_of_training,
    seed_as_commanded,
)
from anomalib_intra.training.console import print_each_line_once
from anomalib_intra.training.internals import (
    evaluation_source,
    is_trial,
    trainer_of,
    training_source,
    validation_source,
)
from anomalib_intra.training.one_run import OneRun
from anomalib_intra.training.processes import share_of_time, share_run_folder
from anomalib_intra.training.random_state import random_state, set_random_state
from anomalib_intra.training.tuners import PostponedFinders, refuse_batch_size_finder

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)


class Sampling(NamedTuple):
    """What a model trains on.

    Args:
        sample (Callable): As for :class:`~anomalib_intra.data.samples.SampleLoader`.
        per_image (int): Samples of each image and epoch.
        per_step (int): Samples in a training step, of all processes together.
    """

    sample: Callable[..., Any]  # a batch of the model's own kind of Samples
    per_image: int
    per_step: int


class TrainedModule(CalibratedModule):
    """An anomalib model that learns from random samples (windows, pairs of patches, whole images) of normal images.

    Before Lightning sets its loop up, a loader of samples takes the place of the datamodule's image loader, so that
    optimizer, clipping, precision, ``max_steps`` and progress bar are Lightning's own. When training ends, the last
    weights, or those of the best checkpoint where one is chosen, are calibrated, and stored with what that found.

    Args:
        image_size (tuple[int, int]): Height and width to which images are resized.
        pre_processor (PreProcessor | bool): As for :class:`CalibratedModule`.
        **components (Any): As for :class:`CalibratedModule`.
    """

    #: The arguments that decide the shape of the weights, or what they mean.
    architecture: ClassVar[tuple[str, ...]] = ("image_size",)

    #: The arguments that the validation loss depends on.
    validated_with: ClassVar[tuple[str, ...]] = ()

    #: Whether the outcome of a training is the epoch with the lowest validation loss, not the last one.
    keeps_best: ClassVar[bool] = False

    #: What samples are called in the progress bar.
    samples_name = "samples"

    def __init__(self, image_size: tuple[int, int], pre_processor: PreProcessor | bool, **components: Any) -> None:
        super().__init__(image_size, pre_processor, **components)
        self._images: NormalImages | None = None
        self._loader: SampleLoader[Any] | None = None
        self._sample_seed: int | None = None
        self._random_state: dict[str, Any] | None = None
        self._trained_on: str | None = None
        self._resumed_from: str | None = None
        #: The checkpoint that the model was built from, if it was.
        self.loaded_from: str | None = None
        self._finders = PostponedFinders()
        self._first_epoch = 0
        self._scores_validation = False
        self._val_loss = MeanMetric()
        #: A row for each epoch trained: ``epoch`` and, where there was one, ``train_loss`` and ``val_loss``.
        self.losses: list[dict[str, float]] = []

    # ---- what a model decides ----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def sampling(self) -> Sampling:
        """What the model trains on."""

    @property
    def ends_by_itself(self) -> bool:
        """Whether a training comes to an end that the trainer does not know of."""
        return False

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise all weights anew."""

    @property
    def scored_with(self) -> dict[str, Any]:
        """What the calibration depends on beside weights and post-processor."""
        return {}

    @classmethod
    def completed(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Write out what the arguments of a model mean: all defaults, and what follows from other arguments.

        Args:
            arguments (Mapping[str, Any]): Arguments that were given, of this or an older version.

        Returns:
            dict[str, Any]: All arguments; equal models have equal ones.
        """
        return with_defaults(cls, arguments)

    # ---- components --------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add what watches and saves a training, and a report unless pictures are off or the user brought their own."""
        refuse_batch_size_finder(self.trainer, self.name)
        drop_unreadable(self)  # here, since this is the first that Lightning asks of a model
        if command_line(self):
            print_each_line_once()
            keep_config_of_training(self)
        runs = [callback for callback in self._callbacks if isinstance(callback, OneRun)]
        run = runs[0] if runs else OneRun()
        run.take_out_others(self.trainer)
        components: Any = super().configure_callbacks()
        own: list[Callback] = [
            OnImagesOnly(component) if isinstance(component, PreProcessor) else component for component in components
        ]
        own += [FiniteLoss(), Throughput(), LossHistory(), ValidatedEnd()]
        # One that is there already must come after the post-processor, which gives it scores.
        reports = [callback for callback in self._callbacks if isinstance(callback, RunReport)]
        own += [RunReport()] * (bool(self.visualizer) and not reports)
        run.remember(self, own)
        kept = keep_last_and_best(self.trainer, self.keeps_best and validates(self.trainer))
        return [*([] if runs else [run]), *own, *reports, *kept]

    @property
    def _callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
        return callbacks

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
            self._finders.hold_back(self.trainer)
            seed_as_commanded(self, self.reset_parameters)
            if self.trainer.global_step == 0:  # else a run that was stopped goes on in its own trainer
                self.forget_run()
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is AnomalibCheckpointIO:
            strategy.checkpoint_io = AtomicCheckpointIO(strategy.checkpoint_io.extra_safe_globals)
        elif type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = AtomicCheckpointIO(self.checkpoint_safe_globals())
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        if world_size > 1 and stage == "fit":
            share_run_folder(self.trainer)
        if world_size > 1 and stage in ("test", "validate"):
            source = evaluation_source(self.trainer, stage)
            loader = source.dataloader()
            if isinstance(loader, DataLoader) and len(loader.dataset) >= world_size:  # type: ignore[arg-type]
                source.instance = shared_loader(loader.dataset, loader, loader.batch_size or 1, rank, world_size)

    def forget_run(self) -> None:
        """Forget what another run left in the model; one that goes on from a checkpoint finds its own there."""
        self._sample_seed = self._random_state = self._trained_on = self._resumed_from = None
        self.loaded_from, self.losses = None, []

    def on_fit_start(self) -> None:
        """Put the loaders of samples and of held-out images in the place of the datamodule's image loaders."""
        self.forget_calibration()
        training, validation = training_source(self.trainer), validation_source(self.trainer)
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        has_some = validation.is_defined() and has_validation_images(datamodule)
        val_loader = validation.dataloader() if has_some else None
        wants_scores = isinstance(self.evaluator, SelectiveEvaluator) and self.evaluator.wants_scores
        self._images = self._sort_out(training.dataloader(), val_loader, wants_scores)
        trained_on = fingerprint(self._images.training.dataset)
        if self._trained_on not in (None, trained_on) and self.trainer.is_global_zero:
            logger.warning(
                "The training goes on with other images than it had until now. Those that set the thresholds may have "
                "been learned from: give the data that it began with, or train anew, without a checkpoint."
            )
        self._trained_on = trained_on
        self._scores_validation = wants_scores and self._images.anomalies_held_out and validates(self.trainer)
        agree_on_metrics(self.trainer, self.evaluator, self._scores_validation)
        if self._scores_validation:
            logger.warning(
                "While training, validation images are scored by comparison with %d training images for the time "
                "being: their metrics tell one epoch from another, and only those of the test are the model's.",
                len(self._images.few.dataset),  # type: ignore[union-attr, arg-type]
            )
        if self._sample_seed is None:
            self._sample_seed = self.trainer.strategy.broadcast(torch.initial_seed() % 2**31)
        self._loader = SampleLoader(
            self._images.training,
            self.prepare,
            *self.sampling,
            self.image_size,
            self._sample_seed,
            self._images.same_every_epoch,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        if not self.ends_by_itself and not has_an_end(self.trainer) and self.trainer.is_global_zero:
            logger.warning(
                "Nothing ends this training but Ctrl-C, after which its checkpoints score no images: give "
                "--trainer.max_epochs, or --trainer.max_time 00:00:30:00 for half an hour."
            )
        training.instance = self._loader
        validation.instance = self._images.held_out
        self._first_epoch = self.current_epoch
        self.get_ready()
        self._finders.run(self.trainer, self)

    def get_ready(self) -> None:
        """Compute what a model needs before its first step; the loaders are there."""

    def on_train_start(self) -> None:
        """Go on with the random numbers of the run that is resumed."""
        self._resumed_from = str(self.trainer.ckpt_path) if self.trainer.ckpt_path else None
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def on_train_epoch_start(self) -> None:
        """Take other samples than in the epoch before."""
        assert self._loader is not None
        self._loader.epoch = self.current_epoch

    @property
    def share_trained(self) -> float:
        """Share of the training that is done, in [0, 1]; learning rates follow it.

        Of the trainer's epochs, steps or ``max_time``, whichever is more; 0 where none of them ends.
        """
        trainer = trainer_of(self)
        if trainer is None:
            return 0.0
        shares = [0.0]
        if trainer.max_steps > 0:
            shares.append(trainer.global_step / trainer.max_steps)
        if self._loader is not None and (epochs := trainer.max_epochs or -1) > 0:
            batches = min(len(self._loader), trainer.num_training_batches)  # fewer by limit_train_batches
            steps = math.ceil(batches / trainer.accumulate_grad_batches)
            shares.append(trainer.global_step / (epochs * steps))
        shares += [share_of_time(timer, trainer) for timer in self._callbacks if isinstance(timer, Timer)]
        return min(1.0, max(shares))

    def batch_generator(self) -> torch.Generator:
        """Give randomness that is another for each batch, and the same in all processes, whose global one may differ.

        Returns:
            torch.Generator: A generator on the CPU.
        """
        assert self._sample_seed is not None
        trainer = trainer_of(self)
        batch = 0 if trainer is None else trainer.fit_loop.total_batch_idx
        return torch.Generator().manual_seed(self._sample_seed * 1_000_003 + batch)

    def log_train_loss(self, loss: torch.Tensor, count: int) -> None:
        """Log the loss of a step, and show it.

        Args:
            loss (torch.Tensor): Mean loss of the step, a scalar.
            count (int): Samples of the step.
        """
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=count)
        # Under a short name, and once: with val_loss it fits into a line of the progress bar.
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=count)

    def on_train_end(self) -> None:
        """End the training, or a trial, of which nothing stays."""
        if not is_trial(self.trainer):
            self.end_training()
        elif self._loader is not None:
            self._loader.epoch = self._first_epoch

    def end_training(self) -> None:
        """Go back to the weights of the best checkpoint, if one was chosen, calibrate them, and store that in it."""
        kept = keeper_of_the_best(self.trainer)
        best, checkpoint = self._outcome(kept)
        if checkpoint and weights_were_averaged(self.trainer):
            logger.info("Keeping the averaged weights, which go into %s.", best)
        elif checkpoint and kept.monitor is not None:
            self.load_state_dict(checkpoint["state_dict"])
            logger.info("Back to the weights of epoch %d, those of %s.", checkpoint["epoch"], best)
        assert self._images is not None
        self.forget_calibration()  # that of the run which the best checkpoint was taken over from
        self._calibrate(self._images)
        if checkpoint:
            checkpoint["state_dict"] = {key: value.cpu() for key, value in self.state_dict().items()}
            checkpoint["losses"] = self.losses  # of the epochs after the best one too
            self.store_calibration(checkpoint)
            if self.trainer.is_global_zero:
                self.trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, best)
            self.trainer.strategy.barrier()
        self.loaded_from = best or None
        if isinstance(self.evaluator, SelectiveEvaluator):
            self.evaluator.do_without([])
        # Loaders of a run that is over must not travel with a model that is copied or exported.
        self._images = self._loader = None

    def calibrate(self, images: NormalImages) -> None:
        """Say so if some of the images that set the thresholds may have been learned from; then calibrate.

        Args:
            images (NormalImages): The loaders of the run.
        """
        is_other = self._trained_on not in (None, fingerprint(images.training.dataset))
        if is_other and self.trainer.is_global_zero:
            logger.warning(
                "The datamodule holds out other images than in the training of this model, which may have learned from "
                "those that set its thresholds: give the datamodule the images, and the seed, of that training."
            )
        super().calibrate(images)

    def _outcome(self, kept: Any) -> tuple[str, dict[str, Any]]:
        """Give the file that the model is kept in, and what it holds; nothing where none is to be kept."""
        load = partial(self.trainer.strategy.checkpoint_io.load_checkpoint, map_location="cpu")
        best = str(getattr(kept, "best_model_path", ""))
        # Only in the run's own folder: a checkpoint that was resumed from may name any other file.
        is_own = Path(getattr(kept, "dirpath", None) or "") in Path(best).parents and Path(best).is_file()
        if is_own:
            checkpoint = load(best)
            # One that monitors nothing is to keep the last weights, but saves only when images are validated.
            if kept.monitor is not None or checkpoint["global_step"] == self.trainer.global_step:
                return best, checkpoint
        is_dry = self.trainer.fast_dev_run  # type: ignore[attr-defined]  # set by Lightning
        if not isinstance(kept, ModelCheckpoint) or kept.save_top_k == 0 or is_dry or (kept.monitor and best):
            return "", {}
        # The epoch that has just ended counts as one done already.
        epoch = self.trainer.current_epoch - self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        now = {"epoch": torch.tensor(epoch), "step": torch.tensor(self.trainer.global_step)}
        last = kept.format_checkpoint_name({**self.trainer.callback_metrics, **now})
        self.trainer.save_checkpoint(last, kept.save_weights_only)
        if is_own and kept.save_top_k == 1 and best != last:
            self.trainer.strategy.remove_checkpoint(best)
        kept.best_model_path = last
        return last, load(last)

    def on_fit_end(self) -> None:
        """End a run that was stopped after its last epoch: resumed, it has nothing to train and skips that end."""
        if self._images is not None:
            self._resumed_from = str(self.trainer.ckpt_path)
            self.to(self.trainer.strategy.root_device)  # which Lightning has taken the model from by now
            self.end_training()
            self.cpu()

    # ---- validation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Begin to average the validation loss; where images are to be scored, compare them with some for now."""
        self._val_loss.reset()
        if self.trainer.state.fn == "fit" and self._scores_validation:
            assert self._images is not None
            assert self._images.few is not None
            self.learn_normal(self._images.few)

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Forget what the images were compared with for now: it must get into no checkpoint, nor into an average."""
        del outputs, batch, dataloader_idx
        trainer = self.trainer
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        if trainer.state.fn == "fit" and self._scores_validation and batch_idx + 1 == sum(batches):
            self.forget_calibration()

    def number_of(self, batch_idx: int) -> int:
        """Number a batch of held-out images as a single process would; it seeds what is random about its loss.

        Args:
            batch_idx (int): Number of the batch in this process.

        Returns:
            int: Its number.
        """
        assert self._images is not None
        share = self._images.held_out.sampler
        assert isinstance(share, Share)
        return share.rank + batch_idx * share.num_replicas

    def add_val_loss(self, loss: torch.Tensor, count: int) -> None:
        """Add the loss of a batch of held-out images to the validation loss.

        Args:
            loss (torch.Tensor): Mean loss of the batch, a scalar.
            count (int): How many it is the mean of.
        """
        self._val_loss.update(loss.detach().float(), count)

    def on_validation_epoch_end(self) -> None:
        """Log the validation loss: one number, the same in every process, whatever their shares of the images."""
        # All processes ask or none, also one without normal images. Outside a training, not every model has a loss.
        some_have = self.trainer.strategy.reduce_boolean_decision(self._val_loss.update_called, all=False)
        if self.trainer.state.fn != "fit" and not some_have:
            return
        mean = self._val_loss.compute()
        if mean.isfinite():
            self.log("val_loss", mean, prog_bar=True, batch_size=1)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @classmethod
    def read_checkpoint(cls, path: str | Path) -> dict[str, Any]:
        """Read all that is in a checkpoint but the values of its tensors.

        Args:
            path (str | Path): The file.

        Returns:
            dict: Its content, with tensors on the device ``meta``.

        Raises:
            ValueError: If it is no checkpoint.
        """
        return AtomicCheckpointIO(cls.checkpoint_safe_globals()).load_checkpoint(path, map_location="meta")

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> "Self":
        """Load a model from a checkpoint, which can run no code.

        Args:
            *args (Any): As for ``AnomalibModule.load_from_checkpoint``.
            **kwargs (Any): The same.

        Returns:
            Self: The model.

        Raises:
            ValueError: If the file is no checkpoint, or an argument that decides what the weights are for is not that
                of the checkpoint.
        """
        path = args[0] if args else kwargs.get("checkpoint_path")
        asked = {name: kwargs.pop(name) for name in cls.architecture if name in kwargs}
        try:
            # Lightning would let a checkpoint name the function that builds the model, and with it modules to import.
            model = cast("Self", super().load_from_checkpoint(*args, **{**kwargs, "_instantiator": None}))
        except Exception:
            if isinstance(path, str | Path) and kwargs.get("weights_only", True):
                # These say so where it is none, or is one of another class, whose arguments were refused.
                check_class(cls.__name__, signature(cls).parameters, cls.read_checkpoint(path))
            raise
        saved = cls.completed(model.hparams)
        check_architecture(model.name, list(asked), saved, cls.completed({**saved, **asked}))
        model.loaded_from = str(path) if isinstance(path, str | Path) else None
        return model

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store seed and state of random numbers, which images, and losses."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["losses"] = self.losses
        checkpoint["draw_seed"] = self._sample_seed
        checkpoint["trained_on"] = self._trained_on
        checkpoint["random_state"] = random_state()
        self._forget_callback_state(checkpoint)

    def store_calibration(self, checkpoint: dict[str, Any]) -> None:
        """Store, too, how images are scored: the best epoch may be one of before a run went on with other settings.

        Args:
            checkpoint (dict[str, Any]): The checkpoint, which is changed in place.
        """
        super().store_calibration(checkpoint)
        checkpoint["hyper_parameters"].update(self.scored_with)
        checkpoint["anomalib_post_processor_config"] = self.post_processor.checkpoint_config()
        checkpoint["calibrated_with"] = {**self.scored_with, **self.post_processor.calibrated_with}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another class or architecture, then restore what was stored and still holds.

        Raises:
            ValueError: If it is of another class or architecture.
        """
        weights = [f"model.{name}" for name, _ in self.model.named_parameters()]
        check_class(self.name, signature(type(self)).parameters, checkpoint, weights)
        saved, present = self.completed(checkpoint.get("hyper_parameters", {})), self.completed(self.hparams)
        check_architecture(self.name, self.architecture, saved, present)
        trainer = trainer_of(self)
        if not self._keep_what_was_trained(checkpoint):
            self.loaded_from = str(trainer.ckpt_path) if trainer is not None else None
        self._forget_stale_calibration(checkpoint)
        super().on_load_checkpoint(checkpoint)
        self._trained_on = checkpoint.get("trained_on")
        if trainer is not None and trainer.state.fn == "fit":
            self._go_on(checkpoint, saved, present)  # one that is only loaded is trained anew, on other samples
        self.losses = checkpoint.get("losses", [])
        self._forget_callback_state(checkpoint)
        # Some metrics have buffers. A checkpoint must also load into a model with others, as Engine.export builds it.
        stored, present = checkpoint["state_dict"], self.state_dict()
        checkpoint["state_dict"] = {
            **{key: value for key, value in stored.items() if not key.startswith("evaluator.")},
            **{key: value for key, value in present.items() if key.startswith("evaluator.")},
        }

    def _go_on(self, checkpoint: dict[str, Any], saved: Mapping[str, Any], present: dict[str, Any]) -> None:
        rate = saved.get("learning_rate")
        by_default = self.completed({}).get("learning_rate") == present.get("learning_rate")
        if rate and by_default and self._finders.are_held_back:  # which found it when the run began
            self.learning_rate = self.hparams["learning_rate"] = present["learning_rate"] = rate
        if self.trainer.is_global_zero:
            tell_what_changed(saved, present)
        if rate and not command_line(self).get("optimizer"):  # which has a rate of its own
            set_learning_rate(checkpoint, rate, present["learning_rate"])
        if differing(self.validated_with, saved, present):
            if self.trainer.is_global_zero:
                logger.warning("With these, losses are others than before: the best epoch is sought anew.")
            seek_best_anew(checkpoint)
        keep_patience(checkpoint, self._callbacks)
        self._sample_seed = checkpoint.get("draw_seed")
        self._random_state = checkpoint.get("random_state")

    def _forget_stale_calibration(self, checkpoint: dict[str, Any]) -> None:
        stored = {**self.completed({}), **checkpoint.get("anomalib_post_processor_config", {})}
        stored |= checkpoint.get("calibrated_with", {})
        present = {**self.scored_with, **self.post_processor.asked_calibration}
        blank = self.configure_post_processor().state_dict(prefix="post_processor.")
        forget_stale_calibration(checkpoint, stored, present, blank)

    def _keep_what_was_trained(self, checkpoint: dict[str, Any]) -> bool:
        # Engine.train gives the checkpoint that training was resumed from to the test that follows, too, which would
        # test the weights of before instead of those that were just trained.
        trainer = trainer_of(self)
        if trainer is None or self._resumed_from is None or trainer.state.fn != "test":
            return False
        is_that = str(trainer.ckpt_path) == self._resumed_from and self.is_calibrated
        if is_that:
            logger.info("Testing what was just trained, not %s, which it was resumed from.", self._resumed_from)
            checkpoint["state_dict"] = self.state_dict()
            self.on_save_checkpoint(checkpoint)
        self._resumed_from = None
        return is_that

    def _forget_callback_state(self, checkpoint: dict[str, Any]) -> None:
        # The post-processor is a module, whose buffers are in the model's state, and a callback, whose state Lightning
        # saved before calibration and would load over them.
        checkpoint.get("callbacks", {}).pop(self.post_processor.state_key, None)
