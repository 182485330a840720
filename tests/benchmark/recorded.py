# SPDX-License-Identifier: Apache-2.0
"""A model for processes that tests start; nothing here imports the tests' settings, which are for one thread."""

import os
import time
from pathlib import Path
from typing import Any

from anomalib_intra.yardsticks import Yardstick


class Recorded(Yardstick):
    """Leaves a file for each training, named after the seed, the process and the process that started it.

    Args:
        image_size (tuple[int, int]): Height and width.
        folder (str): Folder of the files.
        waits (int | None): A seed with which the first training never ends.
    """

    def __init__(
        self, image_size: tuple[int, int] = (64, 64), folder: str = "", waits: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(image_size, **kwargs)
        self.folder, self.waits = Path(folder), waits

    def on_fit_start(self) -> None:
        super().on_fit_start()
        seed = int(os.environ["PL_GLOBAL_SEED"])
        is_first = not list(self.folder.glob(f"{seed}-*"))
        (self.folder / f"{seed}-{os.getpid()}-{os.getppid()}").touch()
        if is_first and seed == self.waits:
            time.sleep(120)
