"""What several tests need: residuals, concepts and pipelines to try them on, and what stands on a model."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from PIL import Image

from persres_lite.concepts import Concept
from persres_lite.residuals import Residuals
from tests.tiny import ATTENTION_GAIN, TEXT_WIDTH, tiny_pipeline

NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


PICTURE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")


FAST = {"steps": 3, "batch_size": 1, "lr": 1e-2, "progress": False}


def digest(base) -> str:
    """One hash of every parameter and buffer of a pipeline."""
    total = hashlib.sha256()
    for name, part in sorted(base.components.items()):
        for key, tensor in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
            total.update(f"{name} {key}".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def hooks_of(module: torch.nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


def random_residuals(base, rank=0.25, seed=1) -> Residuals:
    return Residuals(base, rank=rank, init="random", seed=seed)


def page_one(residuals: Residuals) -> tuple[list, list]:
    """The same A and B as `persres_lite.method` has them: what everything else is held against."""
    return list(residuals.A.values()), list(residuals.B.values())


def call_arguments(kind: str, batch: int = 2) -> dict:
    """Inputs of one U-Net call, seeded."""
    generator = torch.Generator().manual_seed(0)
    text = 64 if kind == "sdxl" else 32
    arguments = {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 77, text, generator=generator),
    }
    if kind == "sdxl":
        added = {"text_embeds": torch.randn(batch, 32, generator=generator), "time_ids": torch.ones(batch, 6)}
        arguments["added_cond_kwargs"] = added
    return arguments


def make_concept(pictures=3, size=64, masks=False, **words):
    """Smooth random pictures, with a centered square as object."""
    rng = np.random.default_rng(0)
    blocks = (rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(pictures))
    images = [Image.fromarray(block).resize((size, size)) for block in blocks]
    square = Image.new("L", (size, size))
    square.paste(255, (size // 4, size // 4, 3 * size // 4, 3 * size // 4))
    words = {"macro_class": "cat", "token": "sks"} | words
    return Concept("test", images=images, masks=[square] * pictures if masks else None, **words)


def parts_of(base):
    return {name: part for name, part in base.components.items() if part is not None}


def with_unet(base, **changes):
    """The parts of a pipeline, with a random U-Net of another configuration."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(base.unet.config, **changes).eval().requires_grad_(False)
    for name, parameter in unet.named_parameters():
        if ".attn2.to_q." in name or ".attn2.to_k." in name:
            parameter.mul_(ATTENTION_GAIN)
    return {name: part for name, part in base.components.items() if part is not None} | {"unet": unet}


def img2img():
    return StableDiffusionImg2ImgPipeline(**parts_of(tiny_pipeline("sd1")), **NO_CHECKER), {"image": PICTURE}


def refiner():
    """XL's second model: the second text encoder alone, and a score for looks among what the U-Net is told."""
    parts = with_unet(
        tiny_pipeline("sdxl"),
        cross_attention_dim=TEXT_WIDTH,
        projection_class_embeddings_input_dim=5 * 8 + TEXT_WIDTH,
    ) | {"text_encoder": None, "tokenizer": None}
    pipeline = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)
    return pipeline, {"image": PICTURE, "strength": 0.9}


def exif_of(fields, big=True) -> bytes:
    """EXIF with fields (tag, type, count, four bytes), as a careless program would write it."""
    mark = ">" if big else "<"
    body = (b"MM" if big else b"II") + struct.pack(f"{mark}HIH", 42, 8, len(fields))
    for tag, kind, count, value in fields:
        body += struct.pack(f"{mark}HHI", tag, kind, count) + value
    return b"Exif\0\0" + body + struct.pack(f"{mark}I", 0)


# Linear light as (X, Y, Z) under the profiles' white (D50): columns for red, green and blue.
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def icc(columns=P3, space=b"RGB ") -> bytes:
    """A profile as phones write it: three primaries, and the curve of sRGB."""

    def numbers(*values):
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    curve = b"para\0\0\0\0\0\3\0\0" + numbers(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    text = b"desc\0\0\0\0" + struct.pack(">I", 3) + b"P3\0" + bytes(78)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0free\0", b"wtpt": b"XYZ \0\0\0\0" + numbers(0.9642, 1, 0.8249)}
    if space == b"GRAY":
        tags[b"kTRC"] = b"curv\0\0\0\0" + struct.pack(">IH", 1, 256)  # a plain ramp: linear light
    else:
        for letter, column in zip(b"rgb", columns.T, strict=True):
            tags[bytes([letter]) + b"XYZ"] = b"XYZ \0\0\0\0" + numbers(*column)
            tags[bytes([letter]) + b"TRC"] = curve
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = bytes(4) + bytes(4) + struct.pack(">I", 0x04000000) + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    header += bytes(28) + numbers(0.9642, 1, 0.8249) + bytes(48)
    return struct.pack(">I", len(header + table + data)) + (header + table + data)[4:]
