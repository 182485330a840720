# SPDX-License-Identifier: Apache-2.0
"""The console script ``anomalib-intra``: anomalib's own command line, with this package made known first."""

import anomalib.data
import anomalib.models
from anomalib.cli.cli import main as anomalib_main

import anomalib_intra


def main() -> None:
    """Hand all arguments over to anomalib's command line.

    Short names of models and datamodules are then understood in any order, and ``benchmark``, which accepts no class
    from outside anomalib, finds those of this package.
    """
    anomalib.models.ALLOWED_MODULES.add(anomalib_intra.__name__)
    for datamodule in (anomalib_intra.MVTec, anomalib_intra.TextureDemo):
        setattr(anomalib.data, datamodule.__name__, datamodule)
    anomalib_main()
