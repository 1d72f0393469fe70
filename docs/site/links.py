"""Pages of the site that lie elsewhere in the checkout, and links between all of them.

In the checkout a link names a file; on the site the README is the first page, and the guides of the
training steps stand beside those of docs/.
"""

from __future__ import annotations

import posixpath
import re

DOCS = "docs/"
# Files of the checkout that are pages too, and where on the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "training/step1_supervised_finetuning/README.md": "steps/sft.md",
    "training/step2_reward_model_finetuning/README.md": "steps/reward.md",
    "training/step2_dpo_finetuning/README.md": "steps/dpo.md",
    "training/step3_rlhf_finetuning/README.md": "steps/ppo.md",
}
SOURCES = {page: source for source, page in ELSEWHERE.items()}
LINK = re.compile(r"(?<=\]\()(?!#)([^)\s#]+)(?=[#)])")


class NoPageError(ValueError):
    """A page links to a file that the site does not have."""


def page_of(source: str) -> str | None:
    """Where a file of the checkout stands on the site, relative to its root; None: nowhere."""
    if source.startswith(DOCS):
        return source.removeprefix(DOCS)
    return ELSEWHERE.get(source)


def source_of(page: str) -> str:
    """Which file of the checkout a page of the site is."""
    return SOURCES.get(page, DOCS + page)


def on_site(text: str, page: str) -> str:
    """Turn the links of a page from files of the checkout to pages of the site.

    Args:
        text: Markdown, as it stands in the checkout.
        page: the page's own place on the site.

    Raises:
        NoPageError: a link to a file that is no page, nor lies in docs/.
    """
    source = source_of(page)

    def turned(link: re.Match[str]) -> str:
        if "://" in link[0]:
            return link[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[0]))
        target = page_of(file)
        if target is None:
            raise NoPageError(f"{source} links to {file}, which is no page: see {__name__}")
        return posixpath.relpath(target, posixpath.dirname(page) or ".")

    return LINK.sub(turned, text)
