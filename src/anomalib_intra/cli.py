# SPDX-License-Identifier: Apache-2.0
"""The console script ``anomalib-intra``: anomalib's own command line with this package made known first.

It adds the few commands that anomalib has no place for.
"""

import sys

import anomalib.data
import anomalib.models
from anomalib.cli.cli import main as anomalib_main
from anomalib.data import AnomalibDataModule
from jsonargparse import auto_cli

import anomalib_intra
from anomalib_intra.yardsticks import yardsticks


def main() -> None:
    """Run one of our own commands, or hand all arguments over to anomalib's command line.

    Short names of models and datamodules are understood in any order, and ``benchmark``, which accepts no class from
    outside anomalib, finds those of this package.
    """
    anomalib.models.ALLOWED_MODULES.add(anomalib_intra.__name__)
    for datamodule in (anomalib_intra.MVTec, anomalib_intra.TextureDemo):
        setattr(anomalib.data, datamodule.__name__, datamodule)
    own = {"yardsticks": _print_yardsticks}
    if len(sys.argv) > 1 and sys.argv[1] in own:
        auto_cli(own[sys.argv[1]], as_positional=False, args=sys.argv[2:], prog=f"anomalib-intra {sys.argv[1]}")
    else:
        anomalib_main()


def _print_yardsticks(data: AnomalibDataModule, image_size: tuple[int, int] = (256, 256)) -> None:
    """Print what a flat and the mean-image reconstruction score.

    Args:
        data: Datamodule to train and test on.
        image_size: Height and width to which images are resized.
    """
    print(yardsticks(data, image_size).round(4).to_string())
