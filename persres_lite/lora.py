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
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from persres_lite.residuals import (
    FORMAT,
    Residuals,
    find_proj_outs,
    plain_layer,
    refuse_absurd,
    refuse_compiled,
    refuse_other_weights,
    unet_of,
)
from persres_lite.support.files import read_tensors, write_tensors

Format = Literal["diffusers", "kohya"]

PREFIX = "persres_lite."  # of our own entries among the metadata of other tools' files

# The two factors' names as PEFT and diffusers (which may add the adapter's name), older diffusers and kohya spell them.
_FACTOR = re.compile(r"\.(?:lora_(?P<peft>[AB])(?:\.\w+)?|lora[_.](?P<old>down|up))\.weight")


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
        If the format is unknown, or V*'s embedding was learned: a LoRA file has no place for it.
    """
    if format not in ("diffusers", "kohya"):
        raise ValueError(f"Unknown format {format!r}: choose 'diffusers' or 'kohya'.")
    if residuals.token_embeddings:
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
    metadata |= _family(residuals)
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
        With the ranks of the file, except that a rank above the width becomes the width: the product is the same.
        Token and macro class where our own export wrote them.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged or no LoRA, changes other layers too, lacks a projection of this base, has factors of another
        width or kind than this base, holds what gives its factors another meaning than A B (DoRA, a bias, an alpha
        that is no positive number), or is PEFT's own and the adapter_config.json with its alphas is not beside it.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") == FORMAT:
        raise ValueError(f"{path} holds residuals already: load it with Residuals.load.")
    modules = find_proj_outs(unet_of(base))
    factors, alphas, others = _sorted_out(path, tensors, _spellings(unet_of(base), modules))
    config = _peft_config(Path(path), tensors, metadata)
    if not factors:
        where = f"its {len(others)} tensors belong elsewhere" if others else "it is empty"
        raise ValueError(f"{path} holds no LoRA on this base's output projections: {where}.")
    if others and not only_proj_out:
        raise ValueError(
            f"{path} holds {len(others)} tensors that belong elsewhere, the first {others[0]!r}, and would be another "
            "LoRA without them: pass only_proj_out=True (--only-proj-out) to take the output projections alone."
        )
    missing = [name for name in modules if set(factors.get(name, ())) != {"A", "B"}]
    if missing:
        raise ValueError(f"{path} lacks the factors of {len(missing)} output projections, the first {missing[0]!r}.")
    if alphas and config:
        raise ValueError(f"{path} states its alphas twice, as tensors and as metadata: delete one of the two.")
    for name, pair in factors.items():
        A, B = pair["A"], pair["B"]
        width, *kernel = plain_layer(modules[name]).weight.shape[1:]  # m, and 1 x 1 for a convolution
        rank = B.shape[0] if B.ndim else 0
        if not rank or A.shape != (width, rank, *kernel) or B.shape != (rank, width, *kernel):
            raise ValueError(
                f"{path} has factors {tuple(A.shape)} and {tuple(B.shape)} for {name!r}, whose weight is "
                f"{(width, width, *kernel)} here: it is damaged, or made for another base (SD 1.x and 2.x files do not "
                "cross-load)."
            )
        alpha = alphas.get(name) or _peft_alpha(path, config, name, rank)
        A, B = A.flatten(1).float() * (alpha / rank), B.flatten(1).float()
        if rank > width:
            A, B = A @ B, torch.eye(width)
        refuse_absurd(path, name, A, B)
        pair |= {"A": A, "B": B}
    residuals = Residuals(base, rank={name: pair["B"].shape[0] for name, pair in factors.items()})
    for name, pair in factors.items():
        residuals.A[name].data.copy_(pair["A"])
        residuals.B[name].data.copy_(pair["B"])
    ours = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    refuse_other_weights(f"The residuals of {path}", ours, unet_of(base))
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
    refuse_compiled(base)
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


def _spellings(unet: Any, names: Iterable[str]) -> dict[str, str]:
    """How files spell each projection: diffusers, PEFT, kohya, and by the block numbers of the original model."""
    spelled: dict[str, str] = {}
    each = getattr(getattr(unet, "config", None), "layers_per_block", None)
    for name in names:
        flat = name.replace(".", "_")
        spelled |= {name: name, f"unet.{name}": name, f"base_model.model.{name}": name, f"lora_unet_{flat}": name}
        place = re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.proj_out", name)
        if name == "mid_block.attentions.0.proj_out":
            original = "middle_block.1.proj_out"
        elif place and isinstance(each, int):  # a list, for blocks of different depths, has no such numbers
            number = int(place[2]) * (each + 1) + int(place[3])  # a block ends in one more layer, of another size
            original = f"input_blocks.{number + 1}" if place[1] == "down" else f"output_blocks.{number}"
            original += ".1.proj_out"
        else:
            continue
        spelled |= {f"diffusion_model.{original}": name, "lora_unet_" + original.replace(".", "_"): name}
    return spelled


def _sorted_out(
    path: str | Path, tensors: dict[str, Tensor], spellings: dict[str, str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float], list[str]]:
    """Factors by module and paper's letter, alphas by module, and the names that belong to none of the modules.

    Whatever else stands below a projection changes what its factors mean (DoRA's magnitudes, a bias, LoCon's middle
    factor, the factors of LoHa and LoKr) and is refused, also where the rest of a file is left out.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    others = []
    for key, tensor in tensors.items():
        head = next((head for head in spellings if key.startswith(head)), None)
        if head is None:
            others.append(key)
            continue
        module, what = spellings[head], key.removeprefix(head)
        found = _FACTOR.fullmatch(what)
        letter = "B" if found and (found["peft"] == "A" or found["old"] == "down") else "A"  # of the paper
        if what == ".alpha":
            twin = module in alphas
            alphas[module] = _alpha(path, module, tensor.item() if tensor.numel() == 1 else None)
        elif found and tensor.is_floating_point():
            twin = letter in factors.setdefault(module, {})
            factors[module][letter] = tensor
        else:
            raise ValueError(
                f"{path} is no plain LoRA: {key!r} ({str(tensor.dtype).removeprefix('torch.')}) gives the factors of "
                f"{module!r} another meaning than A B, so they cannot be taken without it."
            )
        if twin:
            raise ValueError(f"{path} holds more than one LoRA for {module!r}: split it into files of one each.")
    return factors, alphas, others


def _family(residuals: Residuals) -> dict[str, str]:
    """What A1111 and sd-scripts tell families apart by; a file without it is filed under Stable Diffusion 1."""
    second = residuals.metadata["structure"].split()[1] != "convolutions"
    xl = second and not any(name.startswith("down_blocks.0.") for name in residuals.ranks)
    version = "sdxl_base_v1-0" if xl else "sd_v2" if second else "sd_v1"
    if residuals.metadata.get("prediction_type") == "v_prediction" and not xl:
        version += "_v"
    return {"ss_base_model_version": version, "ss_v2": str(second and not xl)}


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
    if any(key.startswith("base_model.model.") for key in tensors):
        source = path.with_name("adapter_config.json")
        if not source.is_file():
            raise ValueError(
                f"{path} is PEFT's, with its alphas in a second file: put its adapter_config.json beside it."
            )
        where, text = str(source), source.read_bytes()
    else:
        where, text = f"The metadata of {path}", metadata.get("lora_adapter_metadata", "{}").encode()
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{where} cannot be read: it should be PEFT's configuration, a JSON object.")
    config = {key.removeprefix("unet."): value for key, value in config.items()}
    start = config.get("init_lora_weights")
    variants = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "alora_invocation_tokens")
    for name in (*variants, "velora_config", "monteclora_config", "arrow_config", "kasa_config"):
        if config.get(name):
            raise ValueError(f"{where} asks for {name}: that is no plain LoRA, and its factors mean more than A B.")
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        raise ValueError(f"{where} says init_lora_weights={start!r}: its factors belong to a base that it had changed.")
    return config


def _peft_alpha(path: str | Path, config: dict[str, Any], name: str, rank: int) -> float:
    """The alpha of one module; a file that says nothing means alpha = r, so that the product is not scaled."""
    alpha = config.get("lora_alpha", 8 if config else rank)  # 8 is PEFT's default
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{path} has an alpha_pattern that is no table of names and numbers.")
    alpha = next((value for pattern, value in patterns.items() if _names(path, pattern, name)), alpha)
    alpha = _alpha(path, name, alpha)
    return alpha * rank**0.5 if config.get("use_rslora") else alpha


def _names(path: str | Path, pattern: str, name: str) -> bool:
    """Whether a key of alpha_pattern means this module.

    PEFT takes the key for a regular expression, which can be made to run for years. Here it is a name: the whole one
    after "^", else any end of it; one ".*" may stand for anything.
    """
    plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    head, star, tail = plain.partition(".*")
    if not re.fullmatch(r"[\w.]*", head + tail):
        raise ValueError(
            f"{path} has the regular expression {pattern[:80]!r} in its alpha_pattern, and a file does not get to run "
            "one: save it with the names of the modules."
        )
    parts = name.split(".")
    ends = [name] if pattern.startswith("^") else [".".join(parts[start:]) for start in range(len(parts))]
    if not star:
        return head in ends
    return any(e.startswith(head) and e.endswith(tail) and len(e) >= len(head + tail) for e in ends)


def _alpha(path: str | Path, name: str, value: Any) -> float:
    """The tools disagree on what an alpha of zero means, and none says what else one could mean that is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
        raise ValueError(f"{path} has the alpha {str(value)[:80]!r} for {name!r}, where a positive number belongs.")
    return float(value)
