"""Find broken links in the project's Markdown and notebooks without a network."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

_LINK = re.compile(
    r"(?<!\\)\[(?:[^\[\]]|\[[^\]]*\]\([^)]*\))*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|(?:href|src)=[\"']([^\"']+)[\"']"
)


def broken(root: Path, address: str) -> list[str]:
    """Every broken link as one sentence, in the order of the files.

    Checked are relative links to files, anchors (headings and ``<a id=…>``), and links to the project's own public
    address, which must name a file that exists here. Other addresses are only checked for their form.

    Parameters
    ----------
    root : path
        The project's folder: its ``*.md`` files, those of ``notebooks/`` and below ``data/``, and the notebooks are
        read.
    address : str
        The public address, from `notebooks.tools.notebooks.public_address`.
    """
    problems = []
    files = [
        *sorted(root.glob("*.md")),
        *sorted(root.glob("notebooks/*.md")),
        *sorted(root.glob("data/**/*.md")),
        *sorted(root.glob("notebooks/*.ipynb")),
    ]
    for path in files:
        for target in targets(text_of(path)):
            reason = _reason(root, path, target, address)
            if reason:
                problems.append(f"{path.relative_to(root)}: {target} {reason}")
    return problems


def text_of(path: Path) -> str:
    """The Markdown of a file: of a notebook, that of its Markdown cells."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    notebook = nbformat.read(path, as_version=4)
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def targets(text: str) -> list[str]:
    """The targets of all links and pictures in a Markdown text, code left out."""
    text = re.sub(r"^( *)(```|~~~).*?^\1\2", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "`", text)
    found = []
    for match in _LINK.finditer(text):
        inner = re.search(r"!\[[^\]]*\]\(\s*([^)\s]+)", match.group(0)) if match.group(0).startswith("[![") else None
        found += [inner.group(1)] if inner else []
        found.append(match.group(1) or match.group(2))
    return found


def anchors(text: str) -> set[str]:
    """The anchors that GitHub and Jupyter give to a text: ids written out, and headings in both spellings."""
    found = set(re.findall(r"<a\s+(?:id|name)=[\"']([^\"']+)[\"']", text))
    counts: dict[str, int] = {}
    for heading in re.findall(
        r"^#{1,6}\s+(.+?)\s*#*$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    ):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = counts.get(slug, 0)
        counts[slug] = number + 1
        found |= {slug if number == 0 else f"{slug}-{number}", plain.replace(" ", "-")}
    return found


def _reason(root: Path, path: Path, target: str, address: str) -> str | None:
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        own = re.match(
            rf"(?:{re.escape(address)}|https://colab\.research\.google\.com/github/{re.escape(address.removeprefix('https://github.com/'))})/(?:blob|tree|raw)/[^/]+/(.+)",
            target,
        )
        if own and not (root / unquote(own.group(1).split("#")[0])).exists():
            return "is not a file of this project"
        return None if parts.netloc else "is not an address"
    if parts.scheme in ("mailto", "attachment", "data"):
        return None
    file = path if not parts.path else (path.parent / unquote(parts.path))
    if not file.exists():
        return "does not exist"
    if parts.fragment and file.suffix in (".md", ".ipynb") and unquote(parts.fragment) not in anchors(text_of(file)):
        return "has no such anchor"
    return None
