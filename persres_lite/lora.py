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
from fnmatch import fnmatchcase
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
        if residuals.metadata["structure"].split()[1] == "convolutions":
            down, up = down[..., None, None], up[..., None, None]  # 4-D, as the 1x1 convolution's own weight
        if format == "diffusers":
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        else:
            key = "lora_unet_" + name.replace(".", "_")
            alpha = torch.tensor(float(rank))
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}
    metadata = {PREFIX + name: str(value) for name, value in residuals.metadata.items()} | _labels(residuals, path.stem)
    metadata |= _peft_metadata(residuals.ranks) if format == "diffusers" else _kohya_metadata(residuals.ranks)
    write_tensors(path, tensors, metadata)
    return how_to_use(residuals, path, format)


def how_to_use(residuals: Residuals, path: str | Path, format: Format = "diffusers") -> str:
    """The message that goes with an exported file."""
    words = _words(residuals)
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
        If it is damaged or no plain LoRA (DoRA, a bias), changes other layers too, was made for another base, or is
        PEFT's own and the adapter_config.json with its alphas is not beside it.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") == FORMAT:
        raise ValueError(f"{path} holds residuals already: load it with Residuals.load.")
    modules = find_proj_outs(unet_of(base))
    factors, others = _sorted_out(path, tensors, _spellings(unet_of(base), modules))
    config = _peft_config(Path(path), tensors, metadata)
    if not factors:
        where = f"its {len(others)} tensors belong elsewhere" if others else "it is empty"
        raise ValueError(f"{path} holds no LoRA on this base's output projections: {where}.")
    if others and not only_proj_out:
        raise ValueError(
            f"{path} holds {len(others)} tensors that belong elsewhere, the first {others[0]!r}, and would be another "
            "LoRA without them: pass only_proj_out=True (--only-proj-out) to take the output projections alone."
        )
    missing = [name for name in modules if not {"A", "B"} <= factors.get(name, {}).keys()]
    if missing:
        raise ValueError(f"{path} lacks the factors of {len(missing)} output projections, the first {missing[0]!r}.")
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
        alpha = pair["alpha"].item() if "alpha" in pair else _peft_alpha(path, config, name, rank)
        if not (isinstance(alpha, (int, float)) and 0 < alpha < 1e6):  # tools disagree on what zero means
            raise ValueError(f"{path} has the alpha {str(alpha)[:80]!r} for {name!r}, where a positive number belongs.")
        A, B = A.flatten(1).float() * (alpha / rank), B.flatten(1).float()
        if rank > width:
            A, B = A @ B, torch.eye(width)
        refuse_absurd(path, name, A, B)
        factors[name] = {"A": A, "B": B}
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


def _spellings(unet: Any, names: dict[str, Any]) -> dict[str, str]:
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
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """A, B (the paper's letters) and alpha by module, and the names that belong to none of the modules.

    Whatever else stands below a projection changes what its factors mean (DoRA's magnitudes, a bias, LoCon's middle
    factor, the factors of LoHa and LoKr) and is refused, also where the rest of a file is left out.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, tensor in tensors.items():
        head = next((head for head in spellings if key.startswith(head)), None)
        if head is None:
            others.append(key)
            continue
        module, what = spellings[head], key.removeprefix(head)
        found = _FACTOR.fullmatch(what)
        letter = "B" if found and (found["peft"] == "A" or found["old"] == "down") else "A"
        letter = "alpha" if what == ".alpha" and tensor.numel() == 1 else letter
        known = letter == "alpha" or found and tensor.is_floating_point()
        if not known or letter in factors.setdefault(module, {}):
            raise ValueError(
                f"{path} is no plain LoRA: {key!r} ({str(tensor.dtype).removeprefix('torch.')}) gives the factors of "
                f"{module!r} another meaning than A B, so they cannot be taken without it."
            )
        factors[module][letter] = tensor
    return factors, others


def _words(residuals: Residuals) -> str:
    """V* and the class, as they are typed in a prompt."""
    return " ".join(residuals.metadata.get(name, "") for name in ("token", "macro_class")).strip()


def _labels(residuals: Residuals, title: str) -> dict[str, str]:
    """Where other tools look for the family of a file and for its words.

    A1111 and sd-scripts read the ``ss_`` entries (without them a file is filed under Stable Diffusion 1, and A1111
    offers the words of ``ss_tag_frequency``); ComfyUI's nodes, InvokeAI and the hubs read ModelSpec's.
    """
    second = residuals.metadata["structure"].split()[1] != "convolutions"
    xl = second and not any(name.startswith("down_blocks.0.") for name in residuals.ranks)
    v = residuals.metadata.get("prediction_type") == "v_prediction" and not xl
    version = ("sdxl_base_v1-0" if xl else "sd_v2" if second else "sd_v1") + "_v" * v
    family = "xl-v1-base" if xl else ("v2-768-v" if v else "v2-512") if second else "v1"
    labels = {
        "ss_base_model_version": version,
        "ss_v2": str(second and not xl),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-{family}/lora",
        "modelspec.title": title,
    }
    if words := _words(residuals):
        labels["modelspec.trigger_phrase"] = words
        labels["ss_tag_frequency"] = json.dumps({f"1_{words}": {words: 1}})
    return labels


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
    text = metadata.get("lora_adapter_metadata", "{}")
    if any(key.startswith("base_model.model.") for key in tensors):
        if not path.with_name("adapter_config.json").is_file():
            raise ValueError(
                f"{path} is PEFT's, with its alphas in a second file: put its adapter_config.json beside it."
            )
        text = path.with_name("adapter_config.json").read_text("utf-8")
    try:
        config = {key.removeprefix("unet."): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"The configuration of {path} cannot be read: it should be PEFT's, a JSON object.") from None
    for name in ("use_dora", "lora_bias"):
        if config.get(name):
            raise ValueError(f"{path} asks for {name}: that is no plain LoRA, and its factors mean more than A B.")
    return config


def _peft_alpha(path: str | Path, config: dict[str, Any], name: str, rank: int) -> Any:
    """The alpha of one module; a file that says nothing means alpha = r, so that the product is not scaled.

    PEFT takes the keys of alpha_pattern for regular expressions, which can be made to run for years. Here one is a
    name: the whole one after "^", else any end of it, in which ".*" may stand for anything.
    """
    alpha = config.get("lora_alpha", 8 if config else rank)  # 8 is PEFT's default
    for key, value in reversed(dict(config.get("alpha_pattern") or {}).items()):  # of several the first counts
        pattern = key.removeprefix("^").removesuffix("$").replace("\\.", ".").replace(".*", "*")
        if not re.fullmatch(r"[\w.*]*", pattern):
            raise ValueError(
                f"{path} has the regular expression {key[:80]!r} in its alpha_pattern, and a file does not get to run "
                "one: save it with the names of the modules."
            )
        if fnmatchcase(name, pattern) or not key.startswith("^") and fnmatchcase(name, f"*.{pattern}"):
            alpha = value
    return alpha * rank**0.5 if config.get("use_rslora") else alpha
