# SPDX-License-Identifier: Apache-2.0
"""The site of the documentation: it builds without a warning, from what is in the checkout."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .conftest import CONFIGS

ROOT = CONFIGS.parent
PAGES = sorted(path for folder in (".", "docs", "notebooks", "src/**") for path in ROOT.glob(f"{folder}/*.md"))


def test_the_site_builds_with_its_api(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api/intra/index.html").read_text(encoding="utf-8")
    assert 'id="anomalib_intra.intra.lightning_model.InTra"' in page
    assert "configs/one_pass.yaml" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_checkout(path: Path) -> None:
    for target in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_every_page_can_be_reached() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [*(path.name for path in ROOT.glob("docs/*.md")), *(p.parent.name for p in ROOT.glob("src/*/*/README.md"))]
    assert [page for page in pages if page not in nav] == []


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert version
    assert citation["version"] == version[1]
