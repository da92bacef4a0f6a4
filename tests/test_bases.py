"""Loading bases: from folders, from several repositories in order, frozen, offline, and refused in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import socket

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from persres_lite.bases import BASES, load_base, settings_of, source_of
from persres_lite.support import weights as weights_of_bases
from tests.helpers import digest, with_unet
from tests.tiny import sample, tiny_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny pipelines saved in diffusers' layout, by kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) / "model" for kind in ("sd1", "sdxl")}
    for kind, folder in folders.items():
        tiny_pipeline(kind).save_pretrained(folder)
    return folders


def modules(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


# ------------------------------------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_folder_is_loaded_frozen_and_in_eval_mode(folders, kind):
    base = load_base(folders[kind], device="cpu")
    assert settings_of(base).name == str(folders[kind])
    assert set(modules(base)) >= {"unet", "vae", "text_encoder"}
    for part in modules(base).values():
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert digest(base) == digest(tiny_pipeline(kind)), "the very numbers that were saved"


def test_half_precision(folders):
    base = load_base(str(folders["sd1"]), device="cpu", dtype=torch.bfloat16)
    assert type(base) is diffusers.StableDiffusionPipeline, "the plain pipeline of diffusers"
    assert {parameter.dtype for parameter in base.unet.parameters()} == {torch.bfloat16}


def test_xl_decodes_in_fp32_when_it_is_in_fp16(folders):
    """The autoencoder of XL overflows in fp16 (diffusers #4325)."""
    base = load_base(folders["sdxl"], device="cpu", dtype=torch.float16)
    seen = []
    base.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    image = base("a cat", height=64, width=64, num_inference_steps=1).images[0]
    assert seen == [torch.float32] and image.size == (64, 64)


def test_the_device_is_what_was_asked_for(folders):
    for kind, present in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if present:
            assert load_base(folders["sd1"], device=kind).device.type == kind
        else:
            with pytest.raises(ValueError, match=f"has no {kind} device: choose device='cpu'"):
                load_base(folders["sd1"], device=kind)


def test_the_safety_checker_is_left_out_unless_asked_for(folders, monkeypatch):
    load, asked = diffusers.DiffusionPipeline.from_pretrained, []

    def listen(source, **options):
        asked.append({key: options[key] for key in options if "safety" in key})
        return load(source, **options)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", listen)
    load_base(folders["sd1"], safety_checker=True)
    load_base(folders["sdxl"])  # XL never had one, and its pipeline warns of arguments that it does not know
    load_base(folders["sd1"])
    assert asked == [{}, {}, {"safety_checker": None, "requires_safety_checker": False}]


# ------------------------------------------------------------------------------------- names, places, the network


def test_toybox_needs_no_network(monkeypatch):
    def no_network(*arguments, **keywords):
        raise AssertionError("the network was asked")

    monkeypatch.delenv("PERSRES_BASE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    base = load_base()
    assert settings_of(base) is BASES["toybox"]
    assert base.unet.config.sample_size * base.vae_scale_factor == BASES["toybox"].size


def test_the_environment_variable_is_the_switch(folders, monkeypatch):
    monkeypatch.setenv("PERSRES_BASE", str(folders["sdxl"]))
    assert type(load_base()) is diffusers.StableDiffusionXLPipeline
    assert type(load_base(folders["sd1"])) is diffusers.StableDiffusionPipeline, "what is asked for goes first"
    monkeypatch.setenv("PERSRES_BASE", "no-such-base")
    with pytest.raises(ValueError, match="no-such-base"):
        load_base()


@pytest.mark.parametrize("name", [name for name in BASES if BASES[name].repository])
def test_a_repository_is_asked_for_by_commit_and_without_a_network_said_to_be_missing(monkeypatch, name):
    repository, revision = BASES[name].repository
    assert repository.count("/") == 1 and len(revision) == 40 and int(revision, 16)
    asked = []
    monkeypatch.setattr(weights_of_bases, "on_hub", lambda *pair: asked.append(pair) or ({}, "no network"))
    with pytest.raises(OSError, match=f"'{name}' .*{repository} .no network, and not in .*Connect to the") as caught:
        load_base(name, device="cpu")
    assert asked == [(repository, revision)] and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ bases as people have them


def test_a_folder_that_holds_half_precision_alone(folders, tmp_path):
    tiny_pipeline("sd1").save_pretrained(tmp_path / "model", variant="fp16")
    assert digest(load_base(tmp_path / "model", device="cpu")) == digest(tiny_pipeline("sd1"))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_all_weights_in_one_file(tmp_path, monkeypatch, kind):
    """As other tools share them; diffusers reads it, with a configuration that it may have to fetch."""
    base, path = tiny_pipeline(kind), tmp_path / "anything.safetensors"
    names = ["model.diffusion_model.input_blocks.0.0.weight"] + ["conditioner.embedders.1.x"] * (kind == "sdxl")
    save_file({name: torch.zeros(1) for name in names}, path)
    reader, asked = type(base), []
    monkeypatch.setattr(reader, "from_single_file", lambda source, **options: asked.append((source, options)) or base)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_base("~/anything.safetensors", device="cpu") is base
    ((source, options),) = asked
    assert source == str(path) and list(options.values()) == [torch.float32], "whatever diffusers calls it"
    assert settings_of(base).name == str(path) and settings_of(base).size == 64, "a later command finds it by its name"


def test_a_u_net_of_several_depths_in_one_level(folders, tmp_path):
    """SSD-1B's: XL, with layers left out here and there."""
    depths = {"transformer_layers_per_block": [1, [2], [1]]}
    depths["reverse_transformer_layers_per_block"] = [[2, 1], [1, 2], 1]
    parts = with_unet(tiny_pipeline("sdxl"), **depths)
    diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False).save_pretrained(tmp_path)
    base = load_base(tmp_path, device="cpu")
    assert settings_of(base).size == 64 and settings_of(base).recipe == BASES["sdxl"].recipe
    assert sample(base, steps=1).isfinite().all()


def weights(part, change):
    def damage(folder):
        (path,) = (folder / part).glob("*.safetensors")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return damage


def lacking_one(tensors):
    del tensors[sorted(tensors)[5]]


def index(**changes):
    def damage(folder):
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def gone(name):
    return lambda folder: shutil.rmtree(folder / name)


def cut_short(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(path, 1000)


FLUX = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"], "unet": [None, None]}
REFUSED = {
    "no index": (lambda folder: (folder / "model_index.json").unlink(), ValueError, "no base: give a folder with"),
    "a diffusion transformer": (index(**FLUX), ValueError, r"\(FluxPipeline\) has no U-Net that takes a text"),
    "a file that was cut off": (cut_short, OSError, "unet|safetensors"),
    "a tensor of the U-Net": (weights("unet", lacking_one), OSError, "its unet lacks 1 tensors, the first 'conv_"),
    "a tensor of the text encoder": (weights("text_encoder", lacking_one), OSError, "its text_encoder lacks 1 tensors"),
    "no tokenizer": (gone("tokenizer"), OSError, r"its text_encoder knows 600 words, and its tokenizer \d:?"),
    "no U-Net": (gone("unet"), OSError, "no file named config.json"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_base_or_broken_is_one_sentence(folders, tmp_path, what):
    damage, error, reason = REFUSED[what]
    shutil.copytree(folders["sd1"], tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(error, match=reason) as caught:
        load_base(tmp_path / "model", device="cpu")
    said = str(caught.value)
    assert str(tmp_path / "model") in said and "\n" not in said and "network" not in said
    assert error is ValueError or "Copy the folder anew, or give the path of a folder" in said


def test_a_file_without_a_u_net_is_no_base(tmp_path):
    save_file({"double_blocks.0.weight": torch.zeros(1)}, tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match="flux.safetensors holds no U-Net"):
        load_base(tmp_path / "flux.safetensors", device="cpu")


def test_latents_are_not_clipped_because_a_configuration_does_not_speak_of_it(folders, tmp_path):
    """As many fine-tuned models are saved; DDIM's own default is to clip, and latents reach far beyond 1."""
    shutil.copytree(folders["sd1"], tmp_path / "model")
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    written = json.dumps(config | {"_class_name": "PNDMScheduler"})
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text(written)
    index(scheduler=["diffusers", "PNDMScheduler"])(tmp_path / "model")
    base = load_base(tmp_path / "model", device="cpu")
    assert diffusers.DDIMScheduler.from_config(base.scheduler.config).config.clip_sample is False


@pytest.mark.parametrize(
    "name, wanted", [("sd1.4", "did you mean 'sd-1.4'"), ("../no/folder", "choose one of toybox, sd-1.4, .* a folder")]
)
def test_an_unknown_name_lists_the_known_ones_and_the_one_that_was_meant(name, wanted):
    with pytest.raises(ValueError, match=wanted):
        source_of(name)


# ------------------------------------------------------------------------------------------------ what follows


def test_entries_of_known_bases():
    for name, base in BASES.items():
        assert settings_of(name) is base and base.name == name
        assert set(base.sampling) == {"num_inference_steps", "guidance_scale", "height", "width"}
        assert set(base.recipe) == {"steps", "batch_size", "lr", "rank"}
        assert base.sampling["height"] == base.sampling["width"] == base.size
        assert base.classes and base.places and base.images_per_prompt >= 1
        for prompt in base.prompts:
            assert any(f" {thing} " in prompt for thing in base.classes), prompt
            assert any(prompt.endswith(place) for place in base.places), prompt
    for name in ("sd-1.4", "sd-1.5", "sd-2.1", "sdxl"):
        assert settings_of(name).recipe == {"steps": 150, "batch_size": 4, "lr": 1e-3, "rank": 0.05}, "the paper's"
    assert settings_of("CompVis/stable-diffusion-v1-4") is BASES["sd-1.4"]
    with pytest.raises(ValueError, match=r"Nothing is known of 'some/model' before it is loaded"):
        settings_of("some/model")


@pytest.mark.parametrize("kind, relative", [("sd2", "sd-1.4"), ("sdxl", "sdxl")])
def test_the_entry_of_an_unknown_base_follows_from_its_structure(tmp_path, kind, relative):
    """Also of a model of one's own in a folder that is named like a shipped one."""
    base = tiny_pipeline(kind)
    assert settings_of(base).name == "unnamed"
    base.register_to_config(_name_or_path=str(tmp_path / "toybox-sd"))
    found = settings_of(base)
    assert found.size == 64 == found.sampling["height"] == found.sampling["width"]
    assert found.sampling["guidance_scale"] == BASES[relative].sampling["guidance_scale"]
    assert found.recipe == BASES[relative].recipe and found.name == str(tmp_path / "toybox-sd")
    assert base(found.prompts[0], **found.sampling | {"num_inference_steps": 1}).images[0].size == (64, 64)


def test_a_schedule_down_to_no_signal_is_drawn_with_its_guidance_turned_down(sdxl):
    """Everybody who draws with `settings_of(base).sampling` gets it, and the call takes it."""
    assert "guidance_rescale" not in settings_of(sdxl).sampling and "guidance_rescale" not in BASES["toybox"].sampling
    sdxl.scheduler = diffusers.DDIMScheduler.from_config(
        sdxl.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    options = settings_of(sdxl).sampling | {"num_inference_steps": 2}
    assert options["guidance_rescale"] == 0.7
    drawn, plain = (
        sdxl("a cat", generator=torch.Generator().manual_seed(0), output_type="latent", **chosen).images
        for chosen in (options, options | {"guidance_rescale": 0.0})
    )
    assert drawn.isfinite().all() and not torch.allclose(drawn, plain)
