"""Find broken links in the project's Markdown and notebooks without a network."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

LINK = re.compile(r"(?<!\\)\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|(?:href|src)=[\"']([^\"']+)[\"']")
"""The end of a link or picture in Markdown, or HTML's: a picture inside a link has both its own and the link's."""

FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2", re.MULTILINE | re.DOTALL)


def broken(root: Path, address: str) -> list[str]:
    """Every broken link as one sentence, in the order of the files.

    Checked are relative links to files, anchors (headings and ``<a id=…>``), and links to the project's own public
    address, which must name a file that exists here. Other addresses are left alone.

    Parameters
    ----------
    root : path
        The project's folder: its ``*.md`` files, those of ``notebooks/`` and below ``data/``, and the notebooks are
        read.
    address : str
        The public address, from `notebooks.tools.notebooks.public_address`.
    """
    patterns = ("*.md", "notebooks/*.md", "data/**/*.md", "notebooks/*.ipynb")
    return [
        f"{path.relative_to(root)}: {target} {reason}"
        for pattern in patterns
        for path in sorted(root.glob(pattern))
        for target in targets(text_of(path))
        if (reason := _reason(root, path, target, address))
    ]


def text_of(path: Path) -> str:
    """The Markdown of a file: of a notebook, that of its Markdown cells."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    notebook = nbformat.read(path, as_version=4)
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def targets(text: str) -> list[str]:
    """The targets of all links and pictures in a Markdown text, code left out."""
    text = re.sub(r"`[^`\n]*`", "`", FENCED.sub("", text))
    return [match[1] or match[2] for match in LINK.finditer(text)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub and Jupyter give to a text: ids written out, and headings in both spellings."""
    found = set(re.findall(r"<a\s+(?:id|name)=[\"']([^\"']+)[\"']", text))
    counts: Counter[str] = Counter()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", FENCED.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found |= {f"{slug}-{counts[slug]}" if counts[slug] else slug, plain.replace(" ", "-")}
        counts[slug] += 1
    return found


def _reason(root: Path, path: Path, target: str, address: str) -> str | None:
    parts = urlsplit(target)
    if parts.scheme:
        homes = (address, address.replace("https://github.com", "https://colab.research.google.com/github"))
        own = re.match(rf"(?:{'|'.join(map(re.escape, homes))})/(?:blob|tree|raw)/[^/]+/([^#]+)", target)
        return "is not a file of this project" if own and not (root / unquote(own[1])).exists() else None
    file = path.parent / unquote(parts.path) if parts.path else path
    if not file.exists():
        return "does not exist"
    if parts.fragment and file.suffix in (".md", ".ipynb") and unquote(parts.fragment) not in anchors(text_of(file)):
        return "has no such anchor"
    return None
