"""How good the shipped Toybox is: ``python -m data.make.toybox_scores``.

A fixed list of 320 prompts, each with its own seed, 25 steps, guidance 4, judged by `toybox.judge`, whose own accuracy
on fresh renders is measured in the same run. The last 64 name a second color and an accessory, too. Writes
``data/results/toybox.json`` and ``toybox.md``, and the first 64 pictures, unselected, as ``toybox-sheet.png``; puts the
table into the model card. Beside them ``toybox-world.png``: the first 32 scenes of the training set, drawn finely.

With ``--judge`` it says instead what the renderer as judge (`toybox.inverse`) makes of 80 fresh renders, of the same
through the autoencoder (the ceiling of what the model can reach), of the model's pictures for their class words (the
floor: it knows nothing of the toys), and of the concepts' own references. Writes ``renderer-judge.json`` and
``renderer-judge.md``.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from data.make.inverse import read
from data.make.pretraining.dataset import draw_scenes, draw_views, to_float, views_by_index
from data.make.runs import between
from persres_lite.attention import record_attention
from persres_lite.bases import load_base
from persres_lite.masks import median
from persres_lite.support.sheet import sheet
from persres_lite.toybox import concepts
from persres_lite.toybox.judge import PROBES, Judge, labels_of
from persres_lite.toybox.render import SIZE, draw
from persres_lite.toybox.world import (
    ACCESSORIES,
    CLASSES,
    COLORS,
    PATTERNS,
    PLACES,
    STYLES,
    Scene,
    caption,
    random_toy,
    random_view,
    scene_by_index,
    with_article,
)
from persres_lite.training import diffusion_loss

OPTIONS = {"num_inference_steps": 25, "guidance_scale": 4.0, "height": SIZE, "width": SIZE}

GOALS = {
    "class": 0.98,
    "place": 0.98,
    "main color": 0.97,
    "second color": 0.85,
    "pattern": 0.80,
    "accessory": 0.70,
    "both of a pair": 0.85,
    "style": 0.98,
    "pointing": 0.98,
    "median mask, worst block": 0.75,
    "autoencoder PSNR, dB": 31.0,
    "pattern through the autoencoder, of as drawn": 0.95,
}
JUDGE_GOALS = {"class": 0.97, "place": 0.97, "main": 0.97, "identity among 20": 0.90}


def prompts() -> list[dict]:
    """The 320 prompts, each with what it asks for: 128 plain, 43 with a pattern, 43 of pairs, 42 in a style, 64 with a
    second color and an accessory.
    """
    rng = random.Random("toybox-256")
    rows = []
    for index in range(256):
        kind, place = CLASSES[(index + index // 12) % 10], PLACES[(5 * index + index // 12) % 8]
        row: dict[str, Any] = {"class": kind, "place": place}
        # The four sorts are spread over the list, so that its first 64 show all of them.
        sort = ("plain", "pattern", "plain", "pair", "plain", "style")[index % 6]
        if sort == "pair":
            other = rng.choice([c for c in CLASSES if c != kind])
            one, two = rng.sample(list(COLORS), 2)
            row = {"pair": [kind, other], "place": place}
            left, right = f"{with_article(one)} {kind}", f"{with_article(two)} {other}"
            text = f"a photo of {left} on the left and {right} on the right {place}"
        elif sort == "style":
            row["style"] = STYLES[1 + (index // 6) % 3]
            text = f"a photo of {with_article(kind)} {place} {row['style']}"
        else:
            row["main"] = rng.choice(list(COLORS))
            described = row["main"]
            if sort == "pattern":
                row["pattern"] = PATTERNS[1 + (index // 6) % 3]
                described += f" {row['pattern']}"
            text = f"a photo of {with_article(described)} {kind} {place}"
        rows.append({"prompt": text, "seed": index, **row})
    for index in range(256, 320):
        kind, place = CLASSES[(index + index // 10) % 10], PLACES[(3 * index + index // 8) % 8]
        main, second = rng.sample(list(COLORS), 2)
        row = {"class": kind, "place": place, "main": main, "second": second, "accessory": ACCESSORIES[1 + index % 3]}
        text = f"a photo of {with_article(main)} and {second} {kind} with a {row['accessory']} {place}"
        rows.append({"prompt": text, "seed": index, **row})
    return rows


def sample(base, rows: list[dict], batch: int = 16) -> list[Image.Image]:
    """One picture a prompt, each from its own seed, whatever the size of the batch."""
    images = []
    for start in tqdm(range(0, len(rows), batch), desc="sampling"):
        part = rows[start : start + batch]
        generators = [torch.Generator().manual_seed(row["seed"]) for row in part]
        images += base([row["prompt"] for row in part], generator=generators, **OPTIONS).images
    return images


def score_pictures(judge: Judge, rows: list[dict], images: list[Image.Image]) -> dict[str, tuple[float, int]]:
    """Share of pictures that show what their prompt asks for, and of how many."""
    read = judge.read(images)
    asked = {"main color": "main", "second color": "second"}
    asked = {name: asked.get(name, name) for name in list(GOALS)[:8] if name != "both of a pair"}
    scores = {}
    for name, key in asked.items():
        right = [r[key] == row[key] for r, row in zip(read, rows, strict=True) if key in row]
        scores[name] = (float(np.mean(right)), len(right))
    pairs = [r["pair"] == set(row["pair"]) for r, row in zip(read, rows, strict=True) if "pair" in row]
    scores["both of a pair"] = (float(np.mean(pairs)), len(pairs))
    return scores


@torch.no_grad()
def score_clip(data: Path, pictures: list[Image.Image], labels: dict[str, torch.Tensor]) -> dict[str, float]:
    """Zero-shot accuracy of the CLIP-like pair: which of the prompts that name one value each lies nearest.

    A color has a prompt with every class, and its features are their mean.
    """
    clip = CLIPModel.from_pretrained(data / "toybox-clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(data / "toybox-clip")
    processor = CLIPImageProcessor.from_pretrained(data / "toybox-clip")
    prompts = {
        "class": [[f"a photo of {with_article(kind)}"] for kind in CLASSES],
        "place": [[f"a photo {place}"] for place in PLACES],
        "main": [[f"a photo of {with_article(color)} {kind}" for kind in CLASSES] for color in COLORS],
    }
    seen = [
        clip.visual_projection(clip.vision_model(**processor(pictures[i : i + 100], return_tensors="pt")).pooler_output)
        for i in range(0, len(pictures), 100)
    ]
    looks = F.normalize(torch.cat(seen), dim=-1)
    scores = {}
    for name, groups in prompts.items():
        words = []
        for group in groups:
            ids = tokenizer(group, padding="max_length", truncation=True, return_tensors="pt").input_ids
            text = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
            words.append(F.normalize(text, dim=-1).mean(0))
        nearest = (looks @ F.normalize(torch.stack(words), dim=-1).T).argmax(1)
        known = labels[name] >= 0
        scores[f"CLIP pair, zero-shot: {name}"] = (nearest == labels[name])[known].float().mean().item()
    return scores


def score_judge(data: Path, judge: Judge, count: int = 2000, toys: int = 600) -> dict[str, float]:
    """The judge's accuracy on renders that nothing was trained on."""
    scenes = [scene_by_index(i, "judged") for i in range(count)]
    labels = labels_of(scenes)
    pictures = [Image.fromarray(image) for image in draw_scenes(0, count, "judged")[..., :3]]
    read = judge.read(pictures)
    scores = {}
    for name, values in PROBES.items():
        known = [i for i in range(count) if labels[name][i] >= 0]
        scores[name] = float(np.mean([read[i][name] == values[labels[name][i]] for i in known]))
    pairs = [i for i in range(count) if len(scenes[i].toys) == 2]
    scores["both of a pair"] = float(np.mean([read[i]["pair"] == {t.kind for t in scenes[i].toys} for i in pairs]))
    truth = torch.stack([torch.from_numpy(draw(scene).masks.max(0)) for scene in scenes[:300]]).float() / 255
    found = F.interpolate(judge.where(pictures[:300])[:, None], size=truth.shape[-1], mode="bilinear")[:, 0]
    overlap = ((found > 0.5) & (truth > 0.5)).sum((1, 2)) / ((found > 0.5) | (truth > 0.5)).sum((1, 2))
    scores["mask IoU"] = overlap.mean().item()
    views = draw_views(0, toys, "judged-views")
    seen = [judge.identity([Image.fromarray(v) for v in views[:, k, ..., :3]]) for k in range(2)]
    kinds = [views_by_index(i, "judged-views")[0].toys[0].kind for i in range(toys)]
    rng, right = random.Random(0), []
    for i in range(toys):
        others = rng.sample([j for j in range(toys) if j != i and kinds[j] == kinds[i]], 19)
        candidates = seen[1][[i, *others]]
        right.append((candidates @ seen[0][i]).argmax().item() == 0)
    scores["identity among 20"] = float(np.mean(right))
    return scores | score_clip(data, pictures, labels)


@torch.no_grad()
def score_attention(base, count: int = 256) -> dict[str, float]:
    """What the class word's maps are worth, on fresh renders of one toy.

    They are noised to the middle of the run and seen by the U-Net once, with class and place as prompt.

    Returns
    -------
    dict
        "pointing": how often the map averaged over blocks has its maximum inside the true mask. "median mask, <block>":
        share of the toy inside the block's median mask; the same of a centered disc of half the picture's area.
    """
    scenes = [s for s in (scene_by_index(i, "pointing") for i in range(3 * count)) if len(s.toys) == 1][:count]
    scheduler = base.scheduler
    scheduler.set_timesteps(OPTIONS["num_inference_steps"])
    t = scheduler.timesteps[len(scheduler.timesteps) // 2]
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {}
    for scene in tqdm(scenes, desc="attention"):
        picture, word = draw(scene), scene.toys[0].kind
        z = base.vae.encode(to_float(picture.image[None])).latents
        noisy = scheduler.add_noise(z, torch.randn(z.shape, generator=generator), t[None])
        prompt = f"a photo of a {word} {scene.place}"
        context, _ = base.encode_prompt(prompt, "cpu", 1, False)
        with record_attention(base, prompt, [word]) as record:
            base.unet(noisy, t, context)
        truth = torch.from_numpy(picture.masks[0]).float() / 255
        across = torch.linspace(-1, 1, len(truth))
        far = across[:, None].square() + across.square()
        masks = {"centered disc": far <= far.quantile(0.5)}
        for block in record.blocks:
            mask = median(record.map(word, block=block)[None].float())
            masks[block] = F.interpolate(mask[None].float(), size=len(truth))[0, 0] > 0.5
        for name, mask in masks.items():
            found.setdefault(f"median mask, {name}", []).append(((truth * mask).sum() / truth.sum()).item())
        where = F.interpolate(record.map(word)[None, None].float(), size=len(truth), mode="bilinear")[0, 0]
        found.setdefault("pointing", []).append(truth.ravel()[int(where.argmax())].item() > 0.5)
    return {name: float(np.mean(values)) for name, values in found.items()}


@torch.no_grad()
def through_autoencoder(base, pictures: np.ndarray) -> np.ndarray:
    """(n, size, size, 3) uint8, encoded and decoded."""
    decoded = torch.cat([base.vae.decode(base.vae.encode(x).latents).sample for x in to_float(pictures).split(50)])
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def score_autoencoder(base, count: int = 500) -> float:
    """PSNR in dB over fresh renders, of pixels in [0, 1]."""
    pictures = draw_scenes(0, count, "judged")[..., :3]
    error = (through_autoencoder(base, pictures).astype(float) - pictures) / 255
    return float(-10 * np.log10(np.square(error).mean()))


def score_patterns(base, judge: Judge, count: int = 1000) -> dict[str, float]:
    """How often the judge reads a pattern on fresh renders that have one, as drawn and through the autoencoder: the
    second bounds what the U-Net can reach.
    """
    scenes = [scene_by_index(i, "judged") for i in range(count)]
    patterned = [i for i, s in enumerate(scenes) if len(s.toys) == 1 and s.toys[0].pattern != "plain"]
    drawn = draw_scenes(0, count, "judged")[patterned][..., :3]
    scores = {}
    for name, pictures in (("as drawn", drawn), ("through the autoencoder", through_autoencoder(base, drawn))):
        read = judge.read([Image.fromarray(picture) for picture in pictures])
        right = [row["pattern"] == scenes[i].toys[0].pattern for row, i in zip(read, patterned, strict=True)]
        scores[f"pattern where there is one, {name}"] = float(np.mean(right))
    return scores


@torch.no_grad()
def score_loss(base, count: int = 384, batch: int = 48) -> dict[str, float]:
    """The diffusion loss on pictures that the U-Net has learned from, and on fresh renders.

    Were the second higher, the U-Net would have learned its pictures by heart and needed more of them.
    """
    losses = {}
    for name, which in (("training pictures", "train"), ("fresh renders", "judged")):
        pictures = to_float(draw_scenes(0, count, which)[..., :3])
        rng, generator = random.Random(0), torch.Generator().manual_seed(0)
        texts = [caption(scene_by_index(i, which), rng) for i in range(count)]
        found = []
        for start in range(0, count, batch):
            z = base.vae.encode(pictures[start : start + batch]).latents
            noise = torch.randn(z.shape, generator=generator)
            spread = torch.arange(len(z)) + torch.rand(len(z), generator=generator)
            text = base.encode_prompt(texts[start : start + batch], "cpu", 1, False)[0]
            condition, t = {"encoder_hidden_states": text}, (spread * 1000 / len(z)).long()
            found.append(diffusion_loss(base.unet, base.scheduler, z, condition, noise, t).item())
        losses[name] = float(np.mean(found))
    return losses


def judged_scenes() -> list[Scene]:
    """Eighty views of eighty toys: every class in every place once, every other one in a style."""
    rng = random.Random("renderer-judge")
    scenes = []
    for index in range(len(CLASSES) * len(PLACES)):
        kind, place = CLASSES[index % len(CLASSES)], PLACES[index // len(CLASSES)]
        style = STYLES[1 + index // 2 % 3] if (index + index // len(CLASSES)) % 2 else None
        scenes.append(random_view(rng, (random_toy(rng, kind),), place, style))
    return scenes


def read_all(images: list[Image.Image], scenes: list[Scene], label: str) -> list[dict]:
    """What the renderer as judge says of pictures that should show these scenes: each one's rank, which parts are read
    as the toy has them, and the error that is left.
    """
    rows = []
    for image, scene in tqdm(list(zip(images, scenes, strict=True)), desc=label):
        toy = scene.toys[0]
        found = read(image, toy, scene.place, scene.style)
        parts = {
            part: getattr(found, part) == getattr(toy, part) for part in ("main", "second", "pattern", "accessory")
        }
        rows.append({"kind": toy.kind, "style": scene.style, "rank": found.rank, **parts, "error": found.error})
    return rows


def judge_by_renderer(data: Path, base) -> dict[str, list[dict]]:
    """Readings by what was read: renders, the same through the autoencoder, the model's pictures, and concepts."""
    scenes = judged_scenes()
    drawn = [draw(scene).image for scene in scenes]
    through = through_autoencoder(base, np.stack(drawn))
    asked = [f"a photo of {with_article(s.toys[0].kind)} {s.place}" + f" {s.style or ''}".rstrip() for s in scenes]
    made = sample(base, [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(asked)])
    rows = {
        "fresh renders": read_all([Image.fromarray(image) for image in drawn], scenes, "renders"),
        "the same through the autoencoder": read_all([Image.fromarray(image) for image in through], scenes, "decoded"),
        "the model's pictures for the class word": read_all(made, scenes, "class word"),
    }
    for name, (toy, place) in concepts.all_shipped().items():
        images: list = [Image.open(data / "concepts" / name / f"{index}.png") for index in range(concepts.PICTURES)]
        rows[f"references of {name}"] = read_all(images, concepts.views(name, toy, place), name)
    return rows


def judge_table(rows: dict[str, list[dict]]) -> list[str]:
    """One line for each kind of picture, and for the first two also one for each style."""
    groups = {}
    for name, found in rows.items():
        groups[name] = found
        if name.startswith("the same") or name.startswith("fresh"):
            for style in STYLES:
                groups[f"{name}, {style or 'in no style'}"] = [row for row in found if row["style"] == style]
    table = ["| pictures | count | own paint first | mean rank of 12 | main | second | pattern | accessory | error |"]
    table += ["|---" * 9 + "|"]
    for name, found in groups.items():
        first = np.mean([row["rank"] == 1 for row in found])
        parts = [np.mean([row[part] for row in found]) for part in ("main", "second", "pattern", "accessory")]
        values = [f"{value:.2f}" for value in (first, np.mean([row["rank"] for row in found]), *parts)]
        error = np.mean([row["error"] for row in found])
        table.append(f"| {name} | {len(found)} | {' | '.join(values)} | {error:.3f} |")
    return table


def _rows(images: list[Image.Image], columns: int = 8) -> list[list[Image.Image]]:
    return [images[start : start + columns] for start in range(0, len(images), columns)]


def seconds_of(base, repeats: int = 3) -> float:
    """Median seconds of four pictures in 25 guided steps."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        base(["a photo of a cat on the beach"] * 4, **OPTIONS)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--judge", action="store_true", help="only the renderer as judge")
    args = parser.parse_args()
    results = args.data / "results"
    results.mkdir(parents=True, exist_ok=True)
    base = load_base(str(args.data / "toybox-sd"))
    if args.judge:
        found = judge_by_renderer(args.data, base)
        head = ["Made by `python -m data.make.toybox_scores --judge`.", ""]
        (results / "renderer-judge.json").write_text(json.dumps(found, indent=1) + "\n")
        (results / "renderer-judge.md").write_text("\n".join([*head, *judge_table(found), ""]))
        print("\n".join(judge_table(found)))
        return
    judge = Judge(args.data)
    rows = prompts()
    images = sample(base, rows)
    sheet(_rows(images[:64])).save(results / "toybox-sheet.png", optimize=True)
    world = [Image.fromarray(draw(scene_by_index(i), supersample=4).image) for i in range(32)]
    sheet(_rows(world)).save(results / "toybox-world.png", optimize=True)
    judged = score_judge(args.data, judge)
    patterns = score_patterns(base, judge)
    drawn, through = patterns.values()
    attention = score_attention(base)
    blocks = [share for name, share in attention.items() if "mask" in name and "disc" not in name]
    scores = score_pictures(judge, rows, images)
    scores["pointing"] = (attention["pointing"], 256)
    scores["median mask, worst block"] = (min(blocks), 256)
    scores["autoencoder PSNR, dB"] = (score_autoencoder(base), 500)
    scores["pattern through the autoencoder, of as drawn"] = (through / drawn, 1000)
    table = ["| what the prompt asks for | pictures | shown | goal |", "|---|---|---|---|"]
    table += [f"| {name} | {scores[name][1]} | {scores[name][0]:.2f} | {goal:.2f} |" for name, goal in GOALS.items()]
    table += ["", "| share of the toy inside the class word's median mask | |", "|---|---|"]
    table += [f"| {name.split(', ')[1]} | {value:.2f} |" for name, value in attention.items() if "mask" in name]
    table += ["", "| the judge, on fresh renders | accuracy | goal |", "|---|---|---|"]
    table += [
        f"| {name} | {value:.3f} | {JUDGE_GOALS.get(name, '')} |" for name, value in {**judged, **patterns}.items()
    ]
    loss = score_loss(base)
    table += [
        "",
        f"Diffusion loss: {', '.join(f'{value:.3f} on {name}' for name, value in loss.items())} (384 of each).",
    ]
    table += ["", f"Four pictures of 25 guided steps: {seconds_of(base):.1f} s."]
    (results / "toybox.md").write_text("\n".join(["Made by `python -m data.make.toybox_scores`.", "", *table, ""]))
    card = args.data / "toybox-sd" / "README.md"
    card.write_text(between(card.read_text(), "scores", "\n".join(table)))
    kept = {"pictures": scores, "judge": judged | patterns, "attention": attention, "loss": loss, "prompts": rows}
    (results / "toybox.json").write_text(json.dumps(kept, indent=1) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
