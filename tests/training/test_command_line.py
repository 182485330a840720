# SPDX-License-Identifier: Apache-2.0
"""Seed, optimizer and schedule from the command line, with each command that trains."""

from pathlib import Path

import pytest
import torch
from anomalib.cli.cli import AnomalibCLI

from ..conftest import TINY


def trained_by_command(command: str, few_root: Path, root: Path, *args: str, model: str = "InTra") -> list:
    sizes = {"image_size": "[128, 128]", "pairs_per_image": 1} if model == "PatchSVDD" else TINY
    cli = AnomalibCLI(
        [
            command,
            f"--model=anomalib_intra.{model}",
            *(f"--model.{name}={list(value) if isinstance(value, tuple) else value}" for name, value in sizes.items()),
            "--data=anomalib_intra.TextureDemo",
            f"--data.root={few_root}",
            "--data.num_workers=0",
            f"--default_root_dir={root}",
            "--trainer.max_epochs=1",
            "--trainer.limit_train_batches=2",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--model.evaluator=false",
            "--model.visualizer=false",
            *args,
        ]
    )
    return [cli.engine.trainer.optimizers, cli.engine.trainer.lr_scheduler_configs]


@pytest.mark.parametrize("model", ["InTra", "PatchSVDD"])
def test_a_seed_on_the_command_line_makes_runs_equal(model: str, few_root: Path, tmp_path: Path) -> None:
    weights = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(weights))
        (optimizer,), _ = trained_by_command("fit", few_root, tmp_path, f"--seed_everything={seed}", model=model)
        weights.append([weight for group in optimizer.param_groups for weight in group["params"]])
    first, again, other = weights
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True) if a.ndim > 1)


@pytest.mark.parametrize("command", ["train", "fit"])
def test_optimizer_and_schedule_of_the_command_line_train_the_model(
    command: str, few_root: Path, tmp_path: Path
) -> None:
    arguments = ("--optimizer=AdamW", "--optimizer.lr=0.002", "--optimizer.weight_decay=0.1")
    schedule = ("--lr_scheduler=CosineAnnealingLR", "--lr_scheduler.T_max=10")
    (optimizer,), (scheduler,) = trained_by_command(command, few_root, tmp_path, *arguments, *schedule)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["initial_lr"] == 0.002
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert isinstance(scheduler.scheduler, torch.optim.lr_scheduler.CosineAnnealingLR)
    assert optimizer.param_groups[0]["lr"] < 0.002  # one epoch is over


def test_a_schedule_alone_goes_with_the_models_own_optimizer(few_root: Path, tmp_path: Path) -> None:
    arguments = ("--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.5")
    (optimizer,), _ = trained_by_command("train", few_root, tmp_path, *arguments)
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * TINY["learning_rate"])


def test_a_schedule_can_watch_the_validation_loss(few_root: Path, tmp_path: Path) -> None:
    arguments = ("--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=val_loss", "--lr_scheduler.patience=3")
    _, (scheduler,) = trained_by_command("train", few_root, tmp_path, *arguments)
    assert scheduler.monitor == "val_loss"
    assert scheduler.scheduler.best < float("inf")


def test_without_a_word_the_papers_optimizer_trains(few_root: Path, tmp_path: Path) -> None:
    (optimizer,), schedulers = trained_by_command("train", few_root, tmp_path)
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.param_groups[0]["lr"] == TINY["learning_rate"]
    assert schedulers == []


def test_patch_svdd_heeds_the_command_line_too(few_root: Path, tmp_path: Path) -> None:
    (optimizer,), _ = trained_by_command(
        "train", few_root, tmp_path, "--optimizer=SGD", "--optimizer.lr=0.01", model="PatchSVDD"
    )
    assert type(optimizer) is torch.optim.SGD
