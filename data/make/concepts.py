"""Draw the shipped concepts again: ``python -m data.make.concepts`` writes ``data/concepts/``."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from PIL import Image

from persres_lite.toybox.concepts import all_shipped, photograph
from persres_lite.toybox.world import Toy, with_article


def write(name: str, toy: Toy, place: str | None, folder: Path) -> None:
    """Write one concept's folder: pictures, masks and ``concept.json``; whole or not at all."""
    new = folder / f"{name}.new"
    shutil.rmtree(new, ignore_errors=True)
    (new / "masks").mkdir(parents=True)
    for index, picture in enumerate(photograph(name, toy, place)):
        Image.fromarray(picture.image).save(new / f"{index}.png", optimize=True)
        Image.fromarray(picture.masks[0]).save(new / "masks" / f"{index}.png", optimize=True)
    paint = f"{toy.main} and {toy.second}" + (f" {toy.pattern}" if toy.pattern != "plain" else "")
    where = f"always {place}" if place else "in four different places"
    wears = f" with a {toy.accessory}" if toy.accessory else ""
    card = {
        "name": name,
        "macro_class": toy.kind,
        "token": "sks",
        "description": f"{with_article(f'{paint} {toy.kind}')}{wears}, {where}",
        "biased_place": place,
        "source": "drawn by persres_lite.toybox.concepts",
        "license": "MIT",
    }
    (new / "concept.json").write_text(json.dumps(card, indent=2) + "\n")
    shutil.rmtree(folder / name, ignore_errors=True)
    os.replace(new, folder / name)


def main() -> None:
    """Write every concept."""
    folder = Path("data/concepts")
    folder.mkdir(parents=True, exist_ok=True)
    for name, (toy, place) in all_shipped().items():
        write(name, toy, place, folder)
        print(name)


if __name__ == "__main__":
    main()
