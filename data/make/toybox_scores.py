"""How good a Toybox is: ``python -m data.make.toybox_scores``, or with ``--base data/toybox-next`` the next one.

The base draws 256 scenes from captions that name all there is to see, 64 of two toys and 64 of snow and night, each
from its own noise, in 25 steps with guidance 4. The judge (`toybox.judge`) reads them beside renders of the same
scenes, so that its own blindness counts against nobody. Writes ``data/results/toybox.json`` and ``toybox.md`` (for
another base under its own name), the first 64 pictures, unselected, as ``toybox-sheet.png``, and ``toybox-world.png``:
the first 32 scenes of the training set, drawn finely. Puts the tables into the model card.

With ``--judge`` it says instead what the renderer as judge (`data.make.inverse`) makes of 80 fresh renders, of the same
through the autoencoder (the ceiling of what the model can reach), of the model's pictures for their class words (the
floor: it knows nothing of the toys), and of the concepts' own references: ``renderer-judge.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from data.make.inverse import read
from data.make.pretraining.dataset import ACCESSORIES as LARGER
from data.make.pretraining.dataset import draw_scenes, scenes_of, to_float
from data.make.shared import between, keep, markdown
from persres_lite.attention import record_attention
from persres_lite.bases import load_base
from persres_lite.masks import median
from persres_lite.support.sheet import sheet
from persres_lite.toybox import concepts, world
from persres_lite.toybox.judge import PROBES, Judge, labels_of, summary_of
from persres_lite.toybox.render import SIZE, draw
from persres_lite.toybox.world import Scene, caption, random_view, with_article
from persres_lite.training import diffusion_loss

GOALS = {"class": 0.98, "main": 0.97, "second": 0.95, "place": 0.98, "pair": 0.95}  # of pictures that show it
OF_RENDERS = {"pattern": 0.95, "accessory": 0.90}  # of what the judge reads on renders of the same captions
LIGHT = ("a rocket", "a sks rocket", "a cat", "a blue teapot")
NO_TOY = 0.03  # of a picture's cells; the smallest toy of a render covers more


def is_next(base: Any) -> bool:
    """Whether a base has the schedule that ends in noise; its world then has larger accessories, too."""
    return bool(base.scheduler.config.get("rescale_betas_zero_snr"))


def name_of(base: Any) -> str:
    """What the files of a base's results begin with: "toybox" for the shipped one, else its folder's name."""
    return Path(base.name_or_path).name.removesuffix("-sd")


def world_of(base: Any) -> float:
    """How much larger than usual accessories are in the world that a base has learned."""
    return LARGER if is_next(base) else 1.0


def options_of(base: Any) -> dict[str, Any]:
    """How a base is sampled: on a schedule that ends in noise guidance burns bright parts out, and is rescaled (Lin et
    al., 2023, arXiv 2305.08891).
    """
    options = {"num_inference_steps": 25, "guidance_scale": 4.0, "height": SIZE, "width": SIZE}
    return options | ({"guidance_rescale": 0.7} if is_next(base) else {})


def asked_scenes(count: int = 256, pairs: int = 64) -> list[Scene]:
    """`count` scenes of one toy with a pattern and an accessory, then some of two toys."""
    rng, scenes = random.Random("toybox-asked"), []
    for index in range(count):
        toy = world.random_toy(rng, world.CLASSES[index % 10])
        while toy.pattern == "plain":
            toy = world.random_toy(rng, world.CLASSES[index % 10])
        toy = replace(toy, accessory=world.ACCESSORIES[1 + index % 3])
        scenes.append(random_view(rng, (toy,), world.PLACES[(index + index // 40) % 8]))
    for index in range(pairs):
        two = rng.sample(world.CLASSES, 2)
        scenes.append(random_view(rng, tuple(world.random_toy(rng, kind) for kind in two), world.PLACES[index % 8]))
    return scenes


def full_caption(scene: Scene) -> str:
    """All that there is to see of one toy; of two their main colors and sides."""
    if len(scene.toys) == 2:
        left, right = (f"{with_article(toy.main)} {toy.kind}" for toy in scene.toys)
        return f"a photo of {left} on the left and {right} on the right {scene.place}"
    toy = scene.toys[0]
    looks = f"{with_article(toy.main)} and {toy.second} {toy.pattern} {toy.kind} with a {toy.accessory}"
    return f"a photo of {looks} {scene.place}"


def sample(base: Any, prompts: list[str], seeds: list[int], batch: int = 16) -> list[Image.Image]:
    """One picture a prompt, each from its own seed, whatever the size of the batch."""
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), batch), desc="sampling"):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        images += base(prompts[start : start + batch], generator=generators, **options_of(base)).images
    return images


def as_images(pictures: np.ndarray) -> list[Image.Image]:
    """Pictures (n, size, size, 3 or 4) for the judge, without their masks."""
    return [Image.fromarray(picture[..., :3]) for picture in pictures]


def shown(judge: Judge, images: list[Image.Image], scenes: list[Scene]) -> pd.Series:
    """Share of the pictures in which the judge reads what the scenes have, by attribute, where they settle it."""
    rows, labels = judge.read(images), labels_of(scenes)
    right = pd.DataFrame(
        {n: [row[n] == values[i] for row, i in zip(rows, labels[n], strict=True)] for n, values in PROBES.items()}
    )
    right = right.where(pd.DataFrame({name: labels[name] >= 0 for name in PROBES}))
    two = [len(scene.toys) == 2 for scene in scenes]
    kinds = [{toy.kind for toy in scene.toys} for scene in scenes]
    right["pair"] = pd.Series([row["pair"] == both for row, both in zip(rows, kinds, strict=True)]).where(two)
    return right.astype(float).mean()


def frechet(one: torch.Tensor, other: torch.Tensor) -> float:
    """Frechet distance of two sets of features (n, d), each taken for a normal distribution (Heusel et al., 2017)."""
    first, second = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (one.double(), other.double()))
    root = torch.linalg.svdvals(first @ second.T).sum()  # the trace of the root of the product of both covariances
    apart = (one.double().mean(0) - other.double().mean(0)).square().sum()
    return float(apart + first.square().sum() + second.square().sum() - 2 * root)


@torch.no_grad()
def features(judge: Judge, images: list[Image.Image]) -> torch.Tensor:
    """The identity encoder's maps after every stage, averaged over each half of the picture, (n, 1184)."""
    pixels = to_float(np.stack([np.asarray(image) for image in images]))
    return summary_of(judge.encoder(pixels, output_hidden_states=True).hidden_states)


def without_a_toy(judge: Judge, images: list[Image.Image]) -> int:
    """In how many pictures the judge finds next to no toy."""
    return int(((judge.where(images) > 0.5).float().mean((1, 2)) < NO_TOY).sum())


def dark_and_light(base: Any, judge: Judge, subjects: tuple[str, ...] = LIGHT, noises: int = 8) -> int:
    """In how many pictures of snow and night the judge reads another place: sand, or day."""
    asked = [(s, place, k) for s in subjects for place in ("in the snow", "at night") for k in range(noises)]
    images = sample(base, [f"a photo of {s} {place}" for s, place, _ in asked], [k for _, _, k in asked])
    return sum(row["place"] != place for row, (_, place, _) in zip(judge.read(images), asked, strict=True))


@torch.no_grad()
def through_autoencoder(base: Any, pictures: np.ndarray) -> np.ndarray:
    """(n, size, size, 3) uint8, encoded and decoded."""
    decoded = torch.cat([base.vae.decode(base.vae.encode(x).latents).sample for x in to_float(pictures).split(50)])
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def score_judge(judge: Judge, larger: float, count: int = 1000, toys: int = 600) -> dict[str, float]:
    """The judge's accuracy on renders that nothing was trained on."""
    scenes, drawn = scenes_of("judged", 0, count), draw_scenes("judged", 0, count, larger)
    scores = dict(shown(judge, as_images(drawn), scenes))
    truth = torch.from_numpy(drawn[:300, ..., 3]) > 127
    found = judge.where(as_images(drawn[:300]))[:, None]
    found = F.interpolate(found, size=truth.shape[-1], mode="bilinear")[:, 0] > 0.5
    scores["mask IoU"] = ((found & truth).sum((1, 2)) / (found | truth).sum((1, 2))).mean().item()
    seen = judge.identity(as_images(draw_scenes("judged-views", 0, 2 * toys, larger))).unflatten(0, (toys, 2))
    kinds = [scene.toys[0].kind for scene in scenes_of("judged-views", 0, 2 * toys)[::2]]
    rng, right = random.Random(0), []
    for i in range(toys):
        others = rng.sample([j for j in range(toys) if j != i and kinds[j] == kinds[i]], 19)
        right.append((seen[[i, *others], 1] @ seen[i, 0]).argmax().item() == 0)
    scores["identity among 20"] = float(np.mean(right))
    return scores


@torch.no_grad()
def score_attention(base: Any, count: int = 256) -> dict[str, float]:
    """What the class word's maps are worth, on fresh renders of one toy, noised to the middle of the run and seen by
    the U-Net once, with class and place as prompt.

    Returns
    -------
    dict
        "pointing": how often the map averaged over blocks has its maximum inside the true mask. By block: share of the
        toy inside its median mask; the same of a centered disc of half the picture's area.
    """
    scenes = [s for s in scenes_of("pointing", 0, 3 * count) if len(s.toys) == 1][:count]
    base.scheduler.set_timesteps(25)
    t, generator, found = base.scheduler.timesteps[12], torch.Generator().manual_seed(0), []
    for scene in tqdm(scenes, desc="attention"):
        picture, word = draw(scene, accessories=world_of(base)), scene.toys[0].kind
        z = base.vae.encode(to_float(picture.image[None])).latents
        noisy = base.scheduler.add_noise(z, torch.randn(z.shape, generator=generator), t[None])
        prompt = f"a photo of a {word} {scene.place}"
        with record_attention(base, prompt, [word]) as record:
            base.unet(noisy, t, base.encode_prompt(prompt, "cpu", 1, False)[0])
        truth = torch.from_numpy(picture.masks[0]).float() / 255
        across = torch.linspace(-1, 1, len(truth))
        far = across[:, None].square() + across.square()
        masks = {block: median(record.map(word, block=block)[None].float())[None].float() for block in record.blocks}
        masks = {block: F.interpolate(mask, size=len(truth))[0, 0] > 0.5 for block, mask in masks.items()}
        masks["centered disc"] = far <= far.quantile(0.5)
        where = F.interpolate(record.map(word)[None, None].float(), size=len(truth), mode="bilinear")[0, 0]
        inside = {name: ((truth * mask).sum() / truth.sum()).item() for name, mask in masks.items()}
        found.append({"pointing": truth.ravel()[int(where.argmax())].item() > 0.5, **inside})
    return dict(pd.DataFrame(found).astype(float).mean())


@torch.no_grad()
def score_loss(base: Any, count: int = 384, batch: int = 48) -> dict[str, float]:
    """The diffusion loss on pictures that the U-Net has learned from, and on fresh renders.

    Were the second higher, the U-Net would have learned its pictures by heart and needed more of them.
    """
    losses = {}
    for name, which in (("training pictures", "train"), ("fresh renders", "judged")):
        pictures = to_float(draw_scenes(which, 0, count, world_of(base))[..., :3])
        rng, generator, found = random.Random(0), torch.Generator().manual_seed(0), []
        texts = [caption(scene, rng) for scene in scenes_of(which, 0, count)]
        for start in range(0, count, batch):
            z = base.vae.encode(pictures[start : start + batch]).latents
            noise = torch.randn(z.shape, generator=generator)
            spread = torch.arange(len(z)) + torch.rand(len(z), generator=generator)
            text = base.encode_prompt(texts[start : start + batch], "cpu", 1, False)[0]
            condition, t = {"encoder_hidden_states": text}, (spread * 1000 / len(z)).long()
            found.append(diffusion_loss(base.unet, base.scheduler, z, condition, noise, t).item())
        losses[name] = float(np.mean(found))
    return losses


def table_of(frame: pd.DataFrame, head: str) -> list[str]:
    """A table in Markdown with the index first; empty where a value is missing."""
    rows = [
        [name, *("" if np.isnan(x) else f"{x:.5g}" if x > 10 else f"{x:.3f}" for x in row)]
        for name, *row in frame.itertuples()
    ]
    return [*markdown([head, *frame.columns], rows).splitlines(), ""]


def score(base: Any, judge: Judge, scenes: list[Scene]) -> tuple[pd.DataFrame, list[Image.Image]]:
    """The base's pictures of scenes beside renders of them, drawn and through the autoencoder, with their goals."""
    drawn = np.stack([draw(scene, accessories=world_of(base)).image for scene in scenes])
    decoded = through_autoencoder(base, drawn)
    images = sample(base, [full_caption(scene) for scene in scenes], list(range(len(scenes))))
    kinds = {"renders": as_images(drawn), "through the autoencoder": as_images(decoded), "the model's": images}
    frame = pd.DataFrame({kind: shown(judge, some, scenes) for kind, some in kinds.items()})
    frame = frame.loc[["class", "main", "second", "pattern", "accessory", "place", "pair"]]
    frame["goal"] = pd.Series(GOALS | {name: share * frame["renders"][name] for name, share in OF_RENDERS.items()})
    single = [i for i, scene in enumerate(scenes) if len(scene.toys) == 1]
    one = {kind: [some[i] for i in single] for kind, some in kinds.items()}
    looks = {kind: features(judge, some) for kind, some in one.items()}
    frame.loc["without a toy"] = [*(without_a_toy(judge, some) for some in one.values()), 0]
    frame.loc["Frechet distance"] = [*(frechet(look, looks["renders"]) for look in looks.values()), np.nan]
    wrong = ((decoded.astype(float) - drawn) / 255) ** 2
    frame.loc["PSNR, dB"] = [np.nan, -10 * np.log10(wrong.mean()), np.nan, 31]
    return frame, images


def all_scores(base: Any, judge: Judge, results: Path) -> tuple[dict, list[str]]:
    """Everything but the renderer as judge: numbers by kind, and their tables."""
    scenes = asked_scenes()
    frame, images = score(base, judge, scenes)
    attention = score_attention(base)
    blocks = [share for name, share in attention.items() if name.endswith("proj_out")]
    frame.loc["snow and night: another place, of 64"] = [np.nan, np.nan, dark_and_light(base, judge), 0]
    frame.loc["median mask, worst block"] = [np.nan, np.nan, min(blocks), 0.70]
    known, loss = score_judge(judge, world_of(base)), score_loss(base)
    start = time.perf_counter()
    base(["a photo of a cat on the beach"] * 4, **options_of(base))
    took = time.perf_counter() - start
    sheet([images[row : row + 8] for row in range(0, 64, 8)]).save(
        results / f"{name_of(base)}-sheet.png", optimize=True
    )
    drawn = [draw(scene, SIZE, 4, world_of(base)).image for scene in scenes_of("train", 0, 32)]
    rows = [as_images(np.stack(drawn[row : row + 8])) for row in range(0, 32, 8)]
    sheet(rows).save(results / f"{name_of(base)}-world.png", optimize=True)
    table = table_of(frame, f"{len(scenes)} captions that name all there is to see")
    table += table_of(pd.DataFrame({"": attention}), "share of the toy inside the class word's median mask")
    table += table_of(pd.DataFrame({"accuracy": known}), "the judge, on fresh renders")
    said = ", ".join(f"{value:.3f} on {name}" for name, value in loss.items())
    table += [f"Diffusion loss: {said} (384 of each). Four pictures of 25 guided steps: {took:.1f} s."]
    kept = {"pictures": json.loads(frame.to_json()), "judge": known, "attention": attention, "loss": loss}
    return kept | {"prompts": [full_caption(scene) for scene in scenes]}, table


def read_all(label: str, images: list[Image.Image], scenes: list[Scene], larger: float = 1.0) -> list[dict]:
    """What the renderer as judge says of pictures that should show these scenes: each one's rank, which parts are read
    as the toy has them, and the error that is left.
    """
    rows = []
    for image, scene in tqdm(list(zip(images, scenes, strict=True)), desc=label):
        toy = scene.toys[0]
        found = read(image, toy, scene.place, scene.style, larger)
        row = {
            part: getattr(found.toy, part) == getattr(toy, part) for part in ("main", "second", "pattern", "accessory")
        }
        row |= {"kind": toy.kind, "style": scene.style or "in no style", "rank": found.rank, "error": found.error}
        rows.append({"pictures": label, **row})
    return rows


def judge_by_renderer(data: Path, base: Any) -> list[dict]:
    """Readings of renders, of the same through the autoencoder, of the model's pictures, and of concepts."""
    larger = world_of(base)
    scenes = [replace(scene, style=world.STYLES[i // 2 % 4]) for i, scene in enumerate(asked_scenes(80, 0))]
    drawn = np.stack([draw(scene, accessories=larger).image for scene in scenes])
    asked = [f"a photo of {with_article(s.toys[0].kind)} {s.place} {s.style or ''}".rstrip() for s in scenes]
    rows = read_all("fresh renders", as_images(drawn), scenes, larger)
    rows += read_all("through the autoencoder", as_images(through_autoencoder(base, drawn)), scenes, larger)
    rows += read_all("the model's for the class word", sample(base, asked, list(range(len(asked)))), scenes, larger)
    for name, (toy, place) in concepts.all_shipped().items():
        images: list = [Image.open(data / "concepts" / name / f"{index}.png") for index in range(concepts.PICTURES)]
        rows += read_all(f"references of {name}", images, concepts.views(name, toy, place))
    return rows


def judge_table(rows: list[dict]) -> list[str]:
    """One line for each kind of picture, and for renders one for each style, too."""
    frame = pd.DataFrame(rows)
    frame["own paint first"] = frame["rank"] == 1
    styled = frame[~frame["pictures"].str.startswith(("the model", "references"))]
    styled = styled.assign(pictures=styled["pictures"] + ", " + styled["style"])
    groups = pd.concat([frame, styled]).groupby("pictures", sort=False)
    table = groups[["own paint first", "rank", "main", "second", "pattern", "accessory", "error"]].mean()
    table.insert(0, "count", groups.size().astype(float))
    return table_of(table, "pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("data/toybox-sd"))
    parser.add_argument("--results", type=Path, default=Path("data/results"))
    parser.add_argument("--judge", action="store_true", help="only the renderer as judge")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base(str(args.base))
    place = args.results / name_of(base)
    command = f"python -m data.make.toybox_scores --base {args.base}" + " --judge" * args.judge
    if args.judge:
        kept: Any = judge_by_renderer(args.base.parent, base)
        table, place = judge_table(kept), args.results / name_of(base).replace("toybox", "renderer-judge")
    else:
        data = args.base if (args.base / "toybox-dino").exists() else args.base.parent  # where its judges are
        kept, table = all_scores(base, Judge(data), args.results)
        card = args.base / "README.md"
        if card.exists():
            card.write_text(between(card.read_text(), "scores", "\n".join(table)))
    keep(place, kept, "\n".join([f"Made by `{command}`.", "", *table, ""]))
    print("\n".join(table))


if __name__ == "__main__":
    main()
