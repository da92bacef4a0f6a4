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
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from persres_lite.projections import find_proj_outs, plain_layer, unet_of
from persres_lite.residuals import FORMAT, Residuals
from persres_lite.support.files import read_tensors, write_tensors

Format = Literal["diffusers", "kohya"]

PREFIX = "persres_lite."  # of our own entries among the metadata of other tools' files

# The two factors' names as PEFT and diffusers (which may add the adapter's name), older diffusers and kohya spell them.
_FACTORS = re.compile(r"^(?P<module>.+?)\.(?:lora_(?P<peft>[AB])(?:\.\w+)?|lora(?:_|\.)(?P<old>down|up))\.weight$")


def export_lora(residuals: Residuals, path: str | Path, format: Format = "diffusers") -> str:
    """Write residuals as a LoRA for other tools.

    Parameters
    ----------
    residuals
        What to write; V* and macro class are taken from its metadata.
    path
        A ``.safetensors`` file, written whole or not at all.
    format
        "diffusers" for ``pipe.load_lora_weights``, "kohya" for A1111 and ComfyUI (diffusers reads it as well).

    Returns
    -------
    str
        What to tell who gets the file: how to load it, which words to type, and what does not travel.

    Raises
    ------
    ValueError
        If the format is unknown, or V*'s embedding was learned: a LoRA file has no place for it.
    """
    if format not in ("diffusers", "kohya"):
        raise ValueError(f"Unknown format {format!r}: choose 'diffusers' or 'kohya'.")
    if residuals.rows:
        raise ValueError(
            "The token's embedding was learned too (train_token), and a LoRA file has no place for it: "
            "personalize without train_token to export."
        )
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors: other tools go by the ending.")
    tensors: dict[str, Tensor] = {}
    for name, rank in residuals.ranks.items():
        down, up = residuals.B[name].detach(), residuals.A[name].detach()  # (r, m), (m, r)
        if residuals.metadata["structure"].split()[1] == "convolutions":
            down, up = down[..., None, None], up[..., None, None]  # 4-D, as the 1x1 convolution's own weight
        if format == "diffusers":
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        else:
            key = "lora_unet_" + name.replace(".", "_")
            alpha = torch.tensor(float(rank))
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}
    metadata = {PREFIX + name: str(value) for name, value in residuals.metadata.items()}
    metadata |= _peft_metadata(residuals.ranks) if format == "diffusers" else _kohya_metadata(residuals.ranks)
    write_tensors(path, tensors, metadata)
    return how_to_use(residuals, path, format)


def how_to_use(residuals: Residuals, path: str | Path, format: Format = "diffusers") -> str:
    """The message that goes with an exported file."""
    words = " ".join(residuals.metadata.get(name, "") for name in ("token", "macro_class")).strip()
    base, path = residuals.metadata.get("base", "the same base"), Path(path)
    if format == "diffusers":
        load = f'Load it with pipe.load_lora_weights("{path}") onto {base}'
    else:
        load = f"Put {path.name} into models/Lora (A1111) or models/loras (ComfyUI) and use it with {base}"
    return (
        f'{load}; type "{words}" in the prompt, for example "a photo of a {words} on the beach".\n'
        "The file is the residual applied everywhere. Localized sampling (LAG) reads attention maps while it samples; "
        "it stays in persres-lite."
    )


def import_lora(path: str | Path, base: Any, *, only_proj_out: bool = False) -> Residuals:
    """Read a LoRA file of diffusers, PEFT or kohya as residuals; alphas are multiplied into A.

    Parameters
    ----------
    path
        A safetensors file. The format is seen from the names in it.
    base
        The pipeline or U-Net that it was trained for.
    only_proj_out
        Take the part on the output projections and leave the rest out. The result is then not what the file's author
        trained: kohya's LoRAs, for example, change every attention layer as well.

    Returns
    -------
    Residuals
        With the ranks of the file; token and macro class where our own export wrote them.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged or no LoRA, changes other layers too, lacks a projection of this base, has factors of another
        width or kind than this base, or is PEFT's own and the adapter_config.json with its alphas is not beside it.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") == FORMAT:
        raise ValueError(f"{path} holds residuals already: load it with Residuals.load.")
    modules = find_proj_outs(unet_of(base))
    factors, alphas, others = _sorted_out(tensors, modules)
    config = _peft_config(Path(path), tensors, metadata)
    if not factors:
        where = f"its {len(others)} tensors belong elsewhere" if others else "it is empty"
        raise ValueError(f"{path} holds no LoRA on this base's output projections: {where}.")
    if others and not only_proj_out:
        raise ValueError(
            f"{path} holds {len(others)} tensors that belong elsewhere, the first {others[0]!r}, and would be another "
            "LoRA without them: pass only_proj_out=True to take the output projections alone."
        )
    missing = [name for name in modules if set(factors.get(name, ())) != {"A", "B"}]
    if missing:
        raise ValueError(f"{path} lacks the factors of {len(missing)} output projections, the first {missing[0]!r}.")
    residuals = Residuals(base, rank={name: pair["B"].shape[0] for name, pair in factors.items()})
    for name, pair in factors.items():
        weight = plain_layer(modules[name]).weight
        if pair["A"].ndim != weight.ndim or pair["A"].shape[0] != len(weight) or pair["B"].shape[1] != len(weight):
            raise ValueError(
                f"{path} has factors {tuple(pair['A'].shape)} and {tuple(pair['B'].shape)} for {name!r}, whose weight "
                f"is {tuple(weight.shape)} here: it was made for another base (SD 1.x and 2.x files do not cross-load)."
            )
        rank = pair["B"].shape[0]
        alpha = alphas.get(name, _peft_alpha(config, name, rank))
        residuals.A[name].data.copy_(pair["A"].flatten(1) * (alpha / rank))
        residuals.B[name].data.copy_(pair["B"].flatten(1))
    ours = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    residuals.metadata |= {key: ours[key] for key in ("base", "token", "macro_class", "rank") if key in ours}
    return residuals


def adapter_layers(base: Any, adapter: str) -> dict[str, nn.Module]:
    """The last layers (PEFT's lora_B, the paper's A) of one loaded adapter, by the name of their `proj_out`.

    A hook that multiplies what such a layer gives by M makes (1 - M) W x + M W' x of the LoRA.

    Parameters
    ----------
    base : pipeline or Module
        With the adapter loaded (`load_lora_weights`) and active.
    adapter : str
        Its name.

    Returns
    -------
    dict of str to Module

    Raises
    ------
    ValueError
        If the adapter is not loaded, not active, fused, not a plain LoRA (DoRA), or not on any `proj_out`.

    Warns
    -----
    UserWarning
        If it also changes other layers of the U-Net, where it stays in force everywhere.
    """
    unet = unet_of(base)
    loaded: dict[str, list[str]] = {}
    for name, module in unet.named_modules():
        for known in getattr(module, "lora_B", None) or ():
            loaded.setdefault(known, []).append(name)
    if adapter not in loaded:
        raise ValueError(
            f"No LoRA named {adapter!r} is loaded in the U-Net: it has {', '.join(map(repr, loaded)) or 'none'} (one "
            "that was fused and unloaded is a part of the weights and cannot be localized)."
        )
    layers: dict[str, Any] = {name: module for name, module in find_proj_outs(unet).items() if name in loaded[adapter]}
    if not layers:
        raise ValueError(
            f"The LoRA {adapter!r} changes {len(loaded[adapter])} layers but no `proj_out`, so there is nothing to "
            "localize: train it with target_modules=['proj_out']."
        )
    for layer in layers.values():
        if layer.merged:
            raise ValueError(f"The LoRA {adapter!r} is fused into the weights: call `unfuse_lora()` first.")
        if layer.disable_adapters or adapter not in layer.active_adapters:
            raise ValueError(f"The LoRA {adapter!r} is loaded but not active: call `set_adapters({adapter!r})` first.")
        if adapter in getattr(layer, "lora_variant", ()):
            raise ValueError(f"The LoRA {adapter!r} is of a variant (such as DoRA) that does not simply add A B x.")
    others = len(loaded[adapter]) - len(layers)
    if others:
        warnings.warn(
            f"The LoRA {adapter!r} changes {others} other layers too, where it stays in force everywhere: only its "
            f"part on {len(layers)} `proj_out` layers is localized.",
            stacklevel=2,
        )
    return {name: layer.lora_B[adapter] for name, layer in layers.items()}


def _sorted_out(
    tensors: dict[str, Tensor], modules: Any
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float], list[str]]:
    """Factors by module and paper's letter, alphas by module, and the names that belong to none of `modules`."""
    spellings: dict[str, str] = {}
    for name in modules:
        flat = name.replace(".", "_")
        spellings |= {name: name, f"unet.{name}": name, f"base_model.model.{name}": name, f"lora_unet_{flat}": name}
    factors: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    others = []
    for key, tensor in tensors.items():
        found = _FACTORS.match(key)
        module = spellings.get(found["module"] if found else key.removesuffix(".alpha"))
        if module is None:
            others.append(key)
        elif not found:
            alphas[module] = float(tensor)
        else:
            down = found["peft"] == "A" or found["old"] == "down"
            factors.setdefault(module, {})["B" if down else "A"] = tensor.float()
    return factors, alphas, others


def _peft_metadata(ranks: dict[str, int]) -> dict[str, str]:
    """What diffusers' save_lora_weights writes beside the tensors, reduced to what a LoRA of mixed ranks needs."""
    config = {
        "r": next(iter(ranks.values())),
        "lora_alpha": next(iter(ranks.values())),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": list(ranks),
    }
    config = {f"unet.{key}": value for key, value in config.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(config)}


def _kohya_metadata(ranks: dict[str, int]) -> dict[str, str]:
    """What web interfaces show about a file; the alphas themselves are tensors in this format."""
    largest = str(max(ranks.values()))
    return {"ss_network_module": "networks.lora", "ss_network_dim": largest, "ss_network_alpha": largest}


def _peft_config(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """LoraConfig's entries: diffusers keeps them in the metadata, older diffusers nowhere, PEFT in a second file."""
    if not any(key.startswith("base_model.model.") for key in tensors):
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return {key.removeprefix("unet."): value for key, value in config.items()}
    beside = path.with_name("adapter_config.json")
    if not beside.is_file():
        raise ValueError(f"{path} is PEFT's, with its alphas in a second file: put its adapter_config.json beside it.")
    return json.loads(beside.read_text(encoding="utf-8"))


def _peft_alpha(config: dict[str, Any], name: str, rank: int) -> float:
    """The alpha of one module; a file that says nothing means alpha = r, so that the product is not scaled."""
    alpha = config.get("lora_alpha", rank)
    for key, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):  # PEFT's own rule: the end of a name, or a regular expression
            alpha = value
            break
    return alpha * rank**0.5 if config.get("use_rslora") else alpha
