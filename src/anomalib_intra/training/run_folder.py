# SPDX-License-Identifier: Apache-2.0
"""One results folder for all processes of a run."""

from contextlib import suppress
from pathlib import Path

from lightning.pytorch import Trainer


def share_run_folder(trainer: Trainer) -> None:
    """Let every process write into the folder of the first one.

    anomalib's Engine runs in every process and makes each a versioned folder of its own (v0, v1, ...), with ``latest``
    pointing to whichever came last.

    Args:
        trainer (Trainer): The trainer of this process.
    """
    own = Path(trainer.default_root_dir)
    shared = Path(trainer.strategy.broadcast(str(own)))
    if own != shared:
        trainer._default_root_dir = str(shared)  # type: ignore[attr-defined]  # has no setter
        with suppress(OSError):  # not empty, or on another machine
            own.rmdir()
    trainer.strategy.barrier("run folder")
    latest = shared.parent / "latest"
    if trainer.is_global_zero and latest.is_symlink() and latest.resolve() != shared.resolve():
        latest.unlink()
        latest.symlink_to(shared, target_is_directory=True)
