"""The same residuals as a LoRA that other tools read, and back: diffusers/PEFT, and kohya's format (A1111, ComfyUI).

A low-rank residual on `proj_out` is exactly what those tools call a LoRA with that one target, only the factors are
named the other way round: their down or lora_A (r x m) is the paper's B, their up or lora_B (m x r) the paper's A. What
they add is alpha: the product is multiplied by alpha / r. Here it always equals r and is always written, because ranks
differ from layer to layer, and without alphas mixed ranks were loaded wrongly scaled (diffusers #14409).

Only the plain residual travels: f' = W' x everywhere. LAG needs the attention maps and stays in this package.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from torch import Tensor

from persres_lite.residuals import Residuals, find_proj_outs, plain_layer, refuse_other_base, unet_of
from persres_lite.support.files import read_tensors, write_tensors

Format = Literal["diffusers", "kohya"]

PREFIX = "persres_lite."  # of our own entries among the metadata of other tools' files

# The two factors' names as PEFT and diffusers (which may add the adapter's name), or older diffusers, spell them.
_FACTOR = re.compile(r"(?:unet\.)?(.+)\.lora(?:_([AB])(?:\.\w+)?|\.(down|up))\.weight")


def export_lora(residuals: Residuals, path: str | Path, format: Format = "diffusers") -> str:
    """Write residuals as a LoRA for other tools.

    Parameters
    ----------
    residuals : Residuals
        What to write; V* and macro class are taken from its metadata.
    path : path
        A ``.safetensors`` file, written whole or not at all.
    format : 'diffusers' or 'kohya'
        "diffusers" for ``pipe.load_lora_weights``, "kohya" for A1111 and ComfyUI (diffusers reads it as well).

    Returns
    -------
    str
        What to tell who gets the file: how to load it, which words to type, and what does not travel.

    Raises
    ------
    ValueError
        If V*'s embedding was learned (a LoRA file has no place for it), or the file is not named as one.
    """
    path = Path(path)
    if residuals.token_embeddings:
        raise ValueError(
            "The token's embedding was learned too (train_token), and a LoRA file has no place for it: "
            "personalize without train_token to export."
        )
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors: other tools go by the ending.")
    tensors: dict[str, Tensor] = {}
    for name, rank in residuals.ranks.items():
        down, up = residuals.B[name].detach(), residuals.A[name].detach()  # (r, m), (m, r)
        if "convolutions" in residuals.metadata.get("structure", ""):
            down, up = down[..., None, None], up[..., None, None]  # 4-D, as the 1x1 convolution's own weight
        if format == "diffusers":
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        else:
            key = "lora_unet_" + name.replace(".", "_")
            alpha = torch.tensor(float(rank))
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}
    ours, words = residuals.metadata, " ".join(residuals.metadata.get(each, "") for each in ("token", "macro_class"))
    metadata = {PREFIX + name: str(value) for name, value in ours.items()} | _labels(residuals, path.stem, words)
    metadata |= _ranks_for_peft(residuals.ranks) if format == "diffusers" else _ranks_for_kohya(residuals.ranks)
    write_tensors(path, tensors, metadata)
    where = {
        "diffusers": f'Load it with pipe.load_lora_weights("{path}") onto',
        "kohya": f"Put {path.name} into models/Lora (A1111) or models/loras (ComfyUI) and use it with",
    }[format]
    return (
        f'{where} {ours.get("base", "the same base")}; type "{words}" in the prompt, for example "a photo of a {words} '
        'on the beach".\nThe file is the residual applied everywhere. Localized sampling (LAG) reads attention maps '
        "while it samples; it stays in persres-lite."
    )


def import_lora(path: str | Path, base: Any, *, only_proj_out: bool = False) -> Residuals:
    """Read a LoRA file of diffusers, PEFT or kohya as residuals; alphas are multiplied into A.

    Parameters
    ----------
    path : path
        A safetensors file. The format is seen from the names in it.
    base : pipeline or Module
        The pipeline or U-Net that it was trained for.
    only_proj_out : bool
        Take the part on the output projections and leave the rest out. The result is then not what the file's author
        trained: kohya's LoRAs, for example, change every attention layer as well.

    Returns
    -------
    Residuals
        With the ranks of the file. Token and macro class where our own export wrote them.

    Raises
    ------
    OSError
        If there is no such file, or it is PEFT's own and the adapter_config.json with its alphas is not beside it.
    ValueError
        If it is damaged or no plain LoRA (DoRA, a bias), changes other layers too, or was made for another base.
    """
    stored, metadata = read_tensors(path)
    unet = unet_of(base)
    ours = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    refuse_other_base(f"The residuals of {path}", ours, unet)
    config = _peft_config(Path(path), stored, metadata)
    tensors = {key.replace("base_model.model.", "unet."): tensor for key, tensor in stored.items()}
    tensors, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=unet.config)  # kohya's names
    modules = find_proj_outs(unet)
    factors: dict[tuple[str, str], Tensor] = {}
    others = []
    for key, tensor in tensors.items():
        found = _FACTOR.fullmatch(key)
        if found and found[1] in modules:
            factors[found[1], "B" if found[2] == "A" or found[3] == "down" else "A"] = tensor
        else:
            others.append(key)
    if strange := [key for key in (*stored, *others) if "dora_scale" in key or key in others and ".proj_out." in key]:
        raise ValueError(f"{path} is no plain LoRA: {strange[0]!r} gives its factors another meaning than A B.")
    if missing := [name for name in modules if (name, "A") not in factors or (name, "B") not in factors]:
        raise ValueError(
            f"{path} has no LoRA on {len(missing)} of the {len(modules)} output projections, the first {missing[0]!r}: "
            "it was made for other layers, or for another base."
        )
    if others and not only_proj_out:
        raise ValueError(
            f"{path} holds {len(others)} tensors that belong elsewhere, the first {others[0]!r}, and would be another "
            "LoRA without them: pass only_proj_out=True (--only-proj-out) to take the output projections alone."
        )
    residuals = Residuals(base, rank={name: len(factors[name, "B"]) for name in modules})
    for name, rank in residuals.ranks.items():
        A, B, weight = factors[name, "A"], factors[name, "B"], plain_layer(modules[name]).weight
        if (len(A), B.shape[1:]) != (len(weight), weight.shape[1:]):
            raise ValueError(
                f"{path} has factors {tuple(A.shape)} and {tuple(B.shape)} for {name!r}, whose weight is "
                f"{tuple(weight.shape)} here: it was made for another base (SD 1.x and 2.x files do not cross-load)."
            )
        alpha = (alphas or {}).get(f"unet.{name}.alpha") or _peft_alpha(config, name, rank)
        residuals.A[name].data.copy_(A.flatten(1).float() * (alpha / rank))
        residuals.B[name].data.copy_(B.flatten(1))
    residuals.metadata |= {key: ours[key] for key in ("base", "token", "macro_class", "rank") if key in ours}
    return residuals


def _labels(residuals: Residuals, title: str, words: str) -> dict[str, str]:
    """Where other tools look for the family of a file and for its words.

    A1111 and sd-scripts read the ``ss_`` entries (without them a file is filed under Stable Diffusion 1, and A1111
    offers the words of ``ss_tag_frequency``); ComfyUI's nodes, InvokeAI and the hubs read ModelSpec's.
    """
    second = "convolutions" not in residuals.metadata.get("structure", "")
    xl = second and not any(name.startswith("down_blocks.0.") for name in residuals.ranks)
    v = residuals.metadata.get("prediction_type") == "v_prediction" and not xl
    version = ("sdxl_base_v1-0" if xl else "sd_v2" if second else "sd_v1") + "_v" * v
    family = "xl-v1-base" if xl else ("v2-768-v" if v else "v2-512") if second else "v1"
    return {
        "ss_base_model_version": version,
        "ss_v2": str(second and not xl),
        "ss_output_name": title,
        "ss_tag_frequency": json.dumps({f"1_{words}": {words: 1}}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-{family}/lora",
        "modelspec.title": title,
        "modelspec.trigger_phrase": words,
    }


def _ranks_for_peft(ranks: dict[str, int]) -> dict[str, str]:
    """What diffusers' save_lora_weights writes beside the tensors, reduced to what a LoRA of mixed ranks needs."""
    first = next(iter(ranks.values()))
    config = {"r": first, "lora_alpha": first, "rank_pattern": ranks, "alpha_pattern": ranks}
    config = {f"unet.{key}": value for key, value in (config | {"target_modules": list(ranks)}).items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(config)}


def _ranks_for_kohya(ranks: dict[str, int]) -> dict[str, str]:
    """What web interfaces show about a file; the alphas themselves are tensors in this format."""
    largest = str(max(ranks.values()))
    return {"ss_network_module": "networks.lora", "ss_network_dim": largest, "ss_network_alpha": largest}


def _peft_config(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """LoraConfig's entries: diffusers keeps them in the metadata, older diffusers nowhere, PEFT in a second file."""
    text = metadata.get("lora_adapter_metadata", "{}")
    if any(key.startswith("base_model.model.") for key in tensors):
        text = path.with_name("adapter_config.json").read_text("utf-8")
    return {key.removeprefix("unet."): value for key, value in json.loads(text).items()}


def _peft_alpha(config: dict[str, Any], name: str, rank: int) -> float:
    """The alpha of one module; a file that says nothing means alpha = r, so that the product is not scaled."""
    alpha = config.get("lora_alpha", 8 if config else rank)  # 8 is PEFT's default
    patterns = config.get("alpha_pattern") or {}
    alpha = next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", name)), alpha)  # as PEFT reads it
    return alpha * rank**0.5 if config.get("use_rslora") else alpha
