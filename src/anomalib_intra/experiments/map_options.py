# SPDX-License-Identifier: Apache-2.0
"""What the options of scoring gain or lose on a model that is trained already."""

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from pandas import DataFrame
from rich.progress import track

from anomalib_intra.components.reconstruction_post_processor import InTraPostProcessor
from anomalib_intra.intra.lightning_model import InTra
from anomalib_intra.metrics import PaperEvaluator

#: Arguments of :class:`InTra` and :class:`InTraPostProcessor`, each set measured alone.
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"colour_weight": 0.25},
    {"colour_weight": 0.5},
    {"colour_weight": 1.0},
    {"deviation": "positive"},
    {"deviation": "scaled"},
    {"colour_weight": 0.5, "deviation": "scaled"},
    {"score_share": 0.005},
    {"second_pass": True},
    {"window_shift": 1},
)
_OF_THE_MODEL = ("second_pass", "window_shift")


def map_options(
    checkpoint: Path,
    datamodule: AnomalibDataModule,
    options: Sequence[dict[str, Any]] = OPTIONS,
    output: Path = Path("results/map-options"),
) -> DataFrame:
    """Test a trained InTra with one set of options after the other, each image reconstructed once for all of them.

    The figures are those of a test of the checkpoint with the same options. They tell what the options do on data that
    is labelled; chosen by them, the options would be tuned on test images.

    Args:
        checkpoint (Path): Checkpoint of the model.
        datamodule (AnomalibDataModule): Data that it was trained on, and to test it on.
        options (Sequence[dict]): Sets of ``colour_weight``, ``deviation``, ``score_share``, ``second_pass`` and
            ``window_shift``; what a set does not name is as in the checkpoint.
        output (Path): Folder for ``map-options.csv``, written anew after each set.

    Returns:
        DataFrame: A row for each set: the options, AUROC and AUPRO in 0 .. 1, PSNR of good test images in dB.
    """
    output.mkdir(parents=True, exist_ok=True)
    known: dict[int, dict[bytes, torch.Tensor]] = {}
    rows = []
    for chosen in track(options, "Options"):
        of_the_map = {name: value for name, value in chosen.items() if name not in _OF_THE_MODEL}
        model = InTra.load_from_checkpoint(
            checkpoint,
            **{name: value for name, value in chosen.items() if name in _OF_THE_MODEL},
            post_processor=InTraPostProcessor(**of_the_map),
            evaluator=PaperEvaluator(decisions=False, psnr_prefix=""),
            visualizer=False,
        )
        reconstructions = known.setdefault(model.window_shift, {})
        model.model.reconstruct = _remembered(model.model.reconstruct, reconstructions)  # type: ignore[method-assign]
        engine = Engine(default_root_dir=output, logger=False, enable_progress_bar=False)
        (results,) = engine.test(model, datamodule=datamodule, verbose=False)
        rows.append({"options": ", ".join(f"{k}={v}" for k, v in chosen.items()) or "as trained", **results})
        DataFrame(rows).to_csv(output / "map-options.csv", index=False)
    return DataFrame(rows)


def _remembered(
    reconstruct: Callable[..., torch.Tensor], known: dict[bytes, torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Reconstruct only images that are not known yet."""

    def keys(images: torch.Tensor) -> Iterator[bytes]:
        for image in images:
            yield sha256(image.cpu().numpy().tobytes()).digest()

    def remembered(images: torch.Tensor) -> torch.Tensor:
        of_images = list(keys(images))
        new = [number for number, key in enumerate(of_images) if key not in known]
        if new:
            known.update(zip([of_images[number] for number in new], reconstruct(images[new]).cpu(), strict=True))
        return torch.stack([known[key] for key in of_images]).to(images.device)

    return remembered
