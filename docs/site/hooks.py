"""Hooks of MkDocs: pages from elsewhere in the checkout, the reference, and links between them."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.site import links, reference

ROOT = Path(__file__).resolve().parents[2]
FLAG = re.compile(r"<code>(?=--[\w-]{1,34}</code>)")  # longer ones do not fit a telephone


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    made = reference.pages()
    for source, page in links.ELSEWHERE.items():
        made[page] = (ROOT / source).read_text(encoding="utf-8")
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the checkout to pages of the site."""
    place = page.file.src_uri
    if place.startswith("reference/"):
        return markdown
    try:
        return links.on_site(markdown, place)
    except links.NoPageError as error:
        raise PluginError(str(error)) from error


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mark the flags in a text, which stay in one piece."""
    return FLAG.sub('<code class="flag">', html)
