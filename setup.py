# SPDX-License-Identifier: Apache-2.0
"""Puts the configs, which lie beside ``src``, into the wheel; all else is in ``pyproject.toml``."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Builds the package with ``configs/`` inside; an editable install looks into the checkout instead."""

    def run(self) -> None:
        """Build, then copy the configs."""
        super().run()
        if not self.editable_mode:
            self.copy_tree("configs", str(Path(self.build_lib, "anomalib_intra", "configs")))


setup(cmdclass={"build_py": BuildWithConfigs})
