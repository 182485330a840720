# SPDX-License-Identifier: Apache-2.0
"""The pages of the site that have no file in ``docs/``, and links that hold both in the checkout and on the site."""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src/anomalib_intra"

#: Files of the checkout that are pages, too.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    **{
        path.relative_to(ROOT).as_posix(): f"models/{path.parent.name}.md"
        for path in sorted(PACKAGE.glob("*/README.md"))
    },
}
SOURCES = {page: source for source, page in PAGES.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of READMEs, and one of the docstrings of each wing."""
    for page, source in SOURCES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for wing in sorted(PACKAGE.iterdir()):
        modules = [wing] if wing.suffix == ".py" else sorted(wing.rglob("*.py"))
        names = [".".join(module.relative_to(PACKAGE.parent).with_suffix("").parts) for module in modules]
        # Faces hand on what has its place in another module; the console script is for the shell.
        blocks = [f"::: {name}" for name in names if not name.endswith(("__init__", ".cli"))]
        if blocks:
            content = "\n\n".join([f"# {wing.stem}", *blocks])
            files.append(File.generated(config, f"api/{wing.stem}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to the page of what they name; where the site has none, only the words stay."""
    del config
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")

    def on_site(link: re.Match[str]) -> str:
        words, path, anchor = link.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        target = PAGES.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(target) is None:
            return words
        return f"[{words}]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{anchor})"

    return re.sub(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*|)\)", on_site, markdown)


class Docstrings(griffe.Extension):
    """Lets griffe read an ``Example:`` as code (it knows ``Examples:`` alone) and Sphinx's roles as names."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite a docstring."""
        del kwargs
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r":[a-z]+:`(~?)([\w.]+)`", _name, text)


def _name(role: re.Match[str]) -> str:
    is_short, path = role.groups()
    words = path.split(".")[-1] if is_short else path
    # A link where the site describes what is named, which it does not for constants.
    return f'<autoref identifier="{path}" optional><code>{words}</code></autoref>'
