"""Residuals as LoRA files: written for bare diffusers and kohya's readers, and read back."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from persres_lite.lora import export_lora, import_lora
from persres_lite.residuals import Residuals
from tests.tiny import sample, tiny_pipeline

FORMATS = ("diffusers", "kohya")
PROMPT = "a photo of a sks cat on the beach"


def make_residuals(base, rank=0.1, strength=0.3):
    """Mixed ranks (3 and 6 here), strong enough to change a picture."""
    residuals = Residuals(base, rank=rank, init="random", seed=1)
    for A in residuals.A.values():
        A.data *= strength
    residuals.metadata |= {"base": "tiny", "token": "sks", "macro_class": "cat"}
    return residuals


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
    assert (theirs - original).abs().max() > 0.1


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


def test_words_rule_and_alphas_are_in_the_metadata(sd1, tmp_path):
    residuals = make_residuals(sd1)
    for format in FORMATS:
        path = tmp_path / f"{format}.safetensors"
        export_lora(residuals, path, format)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        wanted = {"persres_lite.token": "sks", "persres_lite.macro_class": "cat", "persres_lite.rank": "0.1"}
        assert wanted.items() <= metadata.items()
        if format == "diffusers":
            config = json.loads(metadata["lora_adapter_metadata"])
            assert config["unet.alpha_pattern"] == config["unet.rank_pattern"] == residuals.ranks
            assert LoraConfig(**{key.removeprefix("unet."): value for key, value in config.items()})


def test_the_message_names_the_words_and_what_stays(sd1, tmp_path):
    for format, hint in (("diffusers", "load_lora_weights"), ("kohya", "ComfyUI")):
        message = export_lora(make_residuals(sd1), tmp_path / "cat.safetensors", format)
        assert 'type "sks cat"' in message and "(LAG)" in message and hint in message and "tiny" in message


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


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_a_lora_that_diffusers_wrote_is_imported_with_its_alphas(pipeline, tmp_path, options):
    ranks, alpha = {"mid_block.attentions.0.proj_out": 2}, {"mid_block.attentions.0.proj_out": 5, "up_blocks.1.*": 3}
    config, state = lora_by_peft(pipeline, ["proj_out"], ranks, alpha, **options)
    theirs = sample(pipeline, PROMPT)
    metadata = {key: value for key, value in config.to_dict().items() if not isinstance(value, set)}
    type(pipeline).save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=metadata | {"target_modules": ["proj_out"]}
    )
    fresh = tiny_pipeline(kind_of(pipeline))
    residuals = import_lora(tmp_path / "pytorch_lora_weights.safetensors", fresh)
    assert residuals.ranks["mid_block.attentions.0.proj_out"] == 2
    original = sample(fresh, PROMPT)
    with residuals.attached(fresh):
        torch.testing.assert_close(sample(fresh, PROMPT), theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - original).abs().max() > 0.1


def test_pefts_own_file_needs_its_config_beside_it(sd1, tmp_path):
    config, state = lora_by_peft(sd1, ["proj_out"])
    theirs = sample(sd1, PROMPT)
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model.{key}": tensor.contiguous() for key, tensor in state.items()}, path)
    fresh = tiny_pipeline("sd1")
    with pytest.raises(ValueError, match=r"put its adapter_config\.json beside it"):
        import_lora(path, fresh)
    config.save_pretrained(tmp_path)
    with import_lora(path, fresh).attached(fresh):
        torch.testing.assert_close(sample(fresh, PROMPT), theirs, rtol=1e-4, atol=1e-4)


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


def test_a_lora_on_other_layers_is_refused_unless_only_its_part_is_asked_for(sd1, tmp_path):
    _, state = lora_by_peft(sd1, ["proj_out", "to_q"])
    type(sd1).save_lora_weights(tmp_path, unet_lora_layers=state)
    path, fresh = tmp_path / "pytorch_lora_weights.safetensors", tiny_pipeline("sd1")
    with pytest.raises(ValueError, match=r"64 tensors that belong elsewhere.*only_proj_out=True"):
        import_lora(path, fresh)
    assert set(import_lora(path, fresh, only_proj_out=True).ranks.values()) == {4}


def test_files_that_do_not_fit_are_refused(sd1, tmp_path):
    residuals = make_residuals(sd1)
    path = tmp_path / "cat.safetensors"
    export_lora(residuals, path)
    with pytest.raises(ValueError, match=r"another base \(SD 1\.x and 2\.x files do not cross-load\)"):
        import_lora(path, tiny_pipeline("sd2"))
    with pytest.raises(ValueError, match="belong elsewhere"):
        import_lora(path, tiny_pipeline("sdxl"))
    tensors = load_file(path)
    del tensors["unet.mid_block.attentions.0.proj_out.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"lacks the factors of 1 output projections, the first 'mid_block"):
        import_lora(path, sd1)
    save_file({"something": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no LoRA on this base's output projections"):
        import_lora(path, sd1)
    residuals.save(path)
    with pytest.raises(ValueError, match=r"load it with Residuals\.load"):
        import_lora(path, sd1)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        import_lora(path, sd1)
    with pytest.raises(FileNotFoundError):
        import_lora(tmp_path / "nowhere.safetensors", sd1)


def test_what_cannot_be_exported_is_refused_and_leaves_no_file(sd1, tmp_path):
    residuals = make_residuals(sd1)
    with pytest.raises(ValueError, match="Unknown format 'ckpt'"):
        export_lora(residuals, tmp_path / "cat.safetensors", "ckpt")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        export_lora(residuals, tmp_path / "cat.bin")
    residuals.rows = {"text_encoder": torch.nn.Parameter(torch.zeros(1, 32))}
    with pytest.raises(ValueError, match="a LoRA file has no place for it"):
        export_lora(residuals, tmp_path / "cat.safetensors")
    assert not list(tmp_path.iterdir())


def kind_of(base):
    if hasattr(base, "text_encoder_2"):
        return "sdxl"
    return "sd2" if base.unet.config.use_linear_projection else "sd1"
