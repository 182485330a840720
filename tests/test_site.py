# SPDX-License-Identifier: Apache-2.0
"""The site of the documentation: it builds without a warning, from what is in the checkout."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .conftest import CONFIGS

ROOT = CONFIGS.parent
PAGES = sorted(
    path
    for folder in (".", "docs/**", "notebooks", "src/**")
    for kind in ("md", "ipynb")
    for path in ROOT.glob(f"{folder}/*.{kind}")
)
#: Other files that name pages: docstrings and comments, configs, tests.
FILES = sorted(
    path
    for folder in ("src", "configs", "tests", "docs")
    for kind in ("py", "yaml", "html")
    for path in ROOT.glob(f"{folder}/**/*.{kind}")
)


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


def text_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def anchors(page: Path) -> set[str]:
    """What a heading is called in links, on the site and on GitHub."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_checkout_and_to_headings(path: Path) -> None:
    for target, heading in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)#?([^)\s]*)\)", text_of(path)):
        page = path.parent / target if target else path
        assert page.exists(), target
        assert not heading or heading in anchors(page), f"{target}#{heading}"


def test_pages_that_docstrings_and_configs_name_exist() -> None:
    names = {name for path in FILES for name in re.findall(r"\bdocs/[\w/.-]+\.md", path.read_text(encoding="utf-8"))}
    assert names
    assert [name for name in sorted(names) if not (ROOT / name).is_file()] == []


def test_every_page_can_be_reached() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    pages += [f"models/{path.parent.name}.md" for path in ROOT.glob("src/*/*/README.md")]
    assert [page for page in pages if f" {page}\n" not in nav] == []


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert version
    assert citation["version"] == version[1]
