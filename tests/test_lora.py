"""Residuals as LoRA files: written for bare diffusers and kohya's readers, and read back."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from persres_lite.lora import export_lora, import_lora
from persres_lite.residuals import Residuals
from persres_lite.training import personalize
from tests.helpers import make_concept
from tests.tiny import KINDS, sample, tiny_pipeline, tiny_unet

FORMATS = ("diffusers", "kohya")
PROMPT = "a photo of a sks cat on the beach"


def make_residuals(base, rank=0.1, strength=0.3):
    """Mixed ranks (3 and 6 here), strong enough to change a picture."""
    residuals = Residuals(base, rank=rank, init="random", seed=1)
    for A in residuals.A.values():
        A.data *= strength
    residuals.metadata |= {"base": "tiny", "token": "sks", "macro_class": "cat"}
    return residuals


@pytest.fixture(scope="module")
def unets():
    """One U-Net of each kind, for what only reads it."""
    torch.manual_seed(0)
    return {kind: tiny_unet(kind) for kind in KINDS}


@pytest.mark.parametrize("format", FORMATS)
def test_bare_diffusers_draws_the_same_picture(pipeline, format, tmp_path):
    residuals = make_residuals(pipeline)
    assert len(set(residuals.ranks.values())) > 1
    with residuals.attached(pipeline):
        ours = sample(pipeline, PROMPT)
    original = sample(pipeline, PROMPT)
    path = tmp_path / "cat.safetensors"
    export_lora(residuals, path, format)
    pipeline.load_lora_weights(str(path))  # nothing of this package is in the way
    theirs = sample(pipeline, PROMPT)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert (theirs - original).abs().max() > 0.02


@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back(pipeline, format, tmp_path):
    residuals = make_residuals(pipeline)
    export_lora(residuals, tmp_path / "cat.safetensors", format)
    again = import_lora(tmp_path / "cat.safetensors", pipeline)
    for name, parameter in residuals.named_parameters().items():
        assert torch.equal(parameter, again.named_parameters()[name]), name
    kept = {"token": "sks", "macro_class": "cat", "base": "tiny", "rank": "0.1"}
    assert kept.items() <= again.metadata.items()
    again.save(tmp_path / "native.safetensors")
    assert Residuals.load(tmp_path / "native.safetensors", pipeline).ranks == residuals.ranks


def test_the_shapes_and_names_are_those_of_the_two_formats(pipeline, tmp_path):
    residuals = make_residuals(pipeline)
    export_lora(residuals, tmp_path / "diffusers.safetensors")
    export_lora(residuals, tmp_path / "kohya.safetensors", "kohya")
    diffusers, kohya = load_file(tmp_path / "diffusers.safetensors"), load_file(tmp_path / "kohya.safetensors")
    assert all("lora" in key for key in diffusers)  # any other key makes the file invalid
    name, rank = next(iter(residuals.ranks.items()))
    convolution = pipeline.unet.get_submodule(name).weight.ndim == 4
    down = diffusers[f"unet.{name}.lora_A.weight"]
    assert down.shape == ((rank, 32, 1, 1) if convolution else (rank, 32))
    assert torch.equal(down.flatten(1), residuals.B[name])
    theirs = convert_state_dict_to_kohya(dict(diffusers))
    assert theirs.keys() == kohya.keys()
    for key, tensor in theirs.items():
        assert torch.equal(tensor.float(), kohya[key]), key
    alphas = {key for key in kohya if key.endswith(".alpha")}
    assert len(alphas) == len(residuals.ranks)


def lora_by_peft(base, targets, ranks=None, alpha=None, **options):
    """A LoRA that PEFT itself made, with random factors, as (config, state dict)."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        init_lora_weights=False,
        rank_pattern=ranks or {},
        alpha_pattern=alpha or {},
        **options,
    )
    torch.manual_seed(3)
    base.unet.add_adapter(config)
    return config, get_peft_model_state_dict(base.unet)


@pytest.mark.parametrize(("kind", "options"), [("sd1", {}), ("sdxl", {"use_rslora": True})])
def test_a_lora_that_diffusers_wrote_is_imported_with_its_alphas(tmp_path, kind, options):
    pipeline = tiny_pipeline(kind)
    ranks, alpha = {"mid_block.attentions.0.proj_out": 2}, {"mid_block.attentions.0.proj_out": 5, "up_blocks.1.*": 3}
    config, state = lora_by_peft(pipeline, ["proj_out"], ranks, alpha, **options)
    theirs = sample(pipeline, PROMPT)
    metadata = {key: value for key, value in config.to_dict().items() if not isinstance(value, set)}
    type(pipeline).save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=metadata | {"target_modules": ["proj_out"]}
    )
    fresh = tiny_pipeline(kind)
    residuals = import_lora(tmp_path / "pytorch_lora_weights.safetensors", fresh)
    assert residuals.ranks["mid_block.attentions.0.proj_out"] == 2
    original = sample(fresh, PROMPT)
    with residuals.attached(fresh):
        torch.testing.assert_close(sample(fresh, PROMPT), theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - original).abs().max() > 0.02


def test_pefts_own_file_needs_its_config_beside_it(sd1, tmp_path):
    config, state = lora_by_peft(sd1, ["proj_out"])
    theirs = sample(sd1, PROMPT, steps=1)
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model.{key}": tensor.contiguous() for key, tensor in state.items()}, path)
    fresh = tiny_pipeline("sd1")
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        import_lora(path, fresh)
    config.save_pretrained(tmp_path)
    with import_lora(path, fresh).attached(fresh):
        torch.testing.assert_close(sample(fresh, PROMPT, steps=1), theirs, rtol=1e-4, atol=1e-4)


def test_kohyas_alphas_scale(sd1, tmp_path):
    residuals = make_residuals(sd1)
    path = tmp_path / "kohya.safetensors"
    export_lora(residuals, path, "kohya")
    tensors = load_file(path)
    tensors["lora_unet_mid_block_attentions_0_proj_out.alpha"] /= 4
    save_file(tensors, path)
    again = import_lora(path, sd1)
    for name in residuals.A:
        factor = 0.25 if name.startswith("mid") else 1.0
        torch.testing.assert_close(again.delta(name), residuals.delta(name) * factor)


# What other tools show


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("kind", "prediction", "version", "architecture"),
    [
        ("sd1", "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        ("sd2", "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        ("sd2", "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_family_and_words_stand_where_other_tools_look(
    unets, tmp_path, format, kind, prediction, version, architecture
):
    """A1111 tells families by "sdxl_" at the beginning, else by `ss_v2`, and offers the tags; others read ModelSpec."""
    residuals = make_residuals(unets[kind])
    residuals.metadata["prediction_type"] = prediction
    export_lora(residuals, tmp_path / "our-cat.safetensors", format)
    with safe_open(tmp_path / "our-cat.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == version and metadata["ss_v2"] == str(kind == "sd2")
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.trigger_phrase"] == "sks cat"
    assert metadata["ss_output_name"] == metadata["modelspec.title"] == "our-cat"
    assert [list(tags) for tags in json.loads(metadata["ss_tag_frequency"]).values()] == [["sks cat"]]
    if format == "kohya":
        assert metadata["ss_network_module"] == "networks.lora"
        assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == str(max(residuals.ranks.values()))


def test_what_a_base_predicts_is_kept_from_training_to_export(tmp_path):
    """Of SD 2.1 there is one that predicts noise and one that predicts v."""
    base, path = tiny_pipeline("sd2"), tmp_path / "cat.safetensors"
    residuals = personalize(base, make_concept(1), steps=1, batch_size=1, progress=False)
    residuals.save(path)
    export_lora(Residuals.load(path, base), path)
    assert import_lora(path, base).metadata["prediction_type"] == "v_prediction"
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sd_v2_v"


# Files of others


def rewritten(path, change):
    """The same file after `change(tensors, metadata)`."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


MID = "mid_block.attentions.0.proj_out"
MID_KOHYA = "lora_unet_" + MID.replace(".", "_")
#: The names of the original model's blocks, in which kohya's scripts save XL, in the order of the forward pass.
SGM = [
    *(f"input_blocks_{number}_1" for number in (3, 5)),
    "middle_block_1",
    *(f"output_blocks_{number}_1" for number in range(4)),
]


def test_kohyas_own_names_of_xl(sdxl, tmp_path):
    residuals = make_residuals(sdxl)
    path = tmp_path / "kohya.safetensors"
    export_lora(residuals, path, "kohya")
    kohya = [f"lora_unet_{block}_proj_out" for block in SGM]
    ours = dict(zip(("lora_unet_" + name.replace(".", "_") for name in residuals.A), kohya, strict=True))

    def rename(tensors, metadata):
        for key in list(tensors):
            head, rest = key.split(".", 1)
            tensors[f"{ours[head]}.{rest}"] = tensors.pop(key)

    again = import_lora(rewritten(path, rename), sdxl)
    for name in residuals.A:
        assert torch.equal(again.delta(name), residuals.delta(name)), name
    with again.attached(sdxl):
        expected = sample(sdxl, PROMPT, steps=1)
    sdxl.load_lora_weights(str(path))  # diffusers reads them in the same way
    torch.testing.assert_close(sample(sdxl, PROMPT, steps=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_factors_in_few_bits(unets, tmp_path, dtype):
    residuals, path = make_residuals(unets["sd1"]), tmp_path / "cat.safetensors"
    export_lora(residuals, path, "kohya")

    def narrow(tensors, metadata):
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.ndim}

    again = import_lora(rewritten(path, narrow), unets["sd1"])
    for name in residuals.A:
        assert torch.equal(again.A[name], residuals.A[name].to(dtype).float())


# What is refused


INSIDE = f"unet.{MID}.lora_"


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        (f"{MID_KOHYA}.dora_scale", torch.ones(64, 1), "no plain LoRA"),
        (f"{INSIDE}magnitude_vector", torch.ones(64), "no plain LoRA"),
        (f"{INSIDE}B.bias", torch.ones(64), "no plain LoRA"),
        (f"{INSIDE}A.weight", torch.ones(6, 64, 3, 3), "made for another base"),
        (f"{INSIDE}A.weight", torch.full((6, 64, 1, 1), math.inf), "holds NaN or infinity"),
        (f"{INSIDE}B.weight", None, f"no LoRA on 1 of the 7 output projections, the first '{MID}'"),
        ("text_encoder.lora_B.weight", torch.ones(2), r"belong elsewhere.*--only-proj-out"),
    ],
)
def test_a_tensor_that_cannot_be_meant_is_refused(unets, tmp_path, name, tensor, named):
    path = tmp_path / "cat.safetensors"
    export_lora(make_residuals(unets["sd1"]), path)

    def change(tensors, metadata):
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    with pytest.raises(ValueError, match=named):
        import_lora(rewritten(path, change), unets["sd1"])


def test_files_of_another_kind_are_refused(unets, tmp_path):
    residuals, path = make_residuals(unets["sd1"]), tmp_path / "cat.safetensors"
    export_lora(residuals, path)
    with pytest.raises(ValueError, match="made for a U-Net with 7 convolutions"):
        import_lora(path, unets["sd2"])
    with pytest.raises(ValueError, match=r"SD 1\.x and 2\.x files do not cross-load"):
        import_lora(rewritten(path, lambda tensors, metadata: metadata.clear()), unets["sd2"])
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        import_lora(path, unets["sd1"])


def test_what_cannot_be_exported_is_refused_and_leaves_no_file(sd1, tmp_path):
    residuals = make_residuals(sd1)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        export_lora(residuals, tmp_path / "cat.bin")
    residuals.token_embeddings = {"text_encoder": torch.nn.Parameter(torch.zeros(1, 32))}
    with pytest.raises(ValueError, match="without train_token"):
        export_lora(residuals, tmp_path / "cat.safetensors")
    assert not list(tmp_path.iterdir())
