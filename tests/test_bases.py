"""Loading bases: from folders, from several repositories in order, frozen, offline, and refused in one sentence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import socket
from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

from persres_lite import Concept, localized, personalize
from persres_lite.bases import BASES, load_base, settings_of
from tests.tiny import KINDS, tiny_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny pipelines saved in diffusers' layout, by kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) / "model" for kind in KINDS}
    for kind, folder in folders.items():
        tiny_pipeline(kind).save_pretrained(folder)
    return folders


def modules(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def fingerprint(pipeline) -> str:
    """A hash of every number of every model in the pipeline."""
    digest = hashlib.sha256()
    for name, part in sorted(modules(pipeline).items()):
        for key, tensor in sorted(part.state_dict().items()):
            digest.update(f"{name}.{key}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_loaded_frozen_and_in_eval_mode(folders, kind):
    base = load_base(folders[kind], device="cpu")
    assert set(modules(base)) >= {"unet", "vae", "text_encoder"}
    for part in modules(base).values():
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert fingerprint(base) == fingerprint(tiny_pipeline(kind)), "the very numbers that were saved"


def test_it_is_the_plain_pipeline_of_diffusers(folders):
    assert type(load_base(str(folders["sd1"]))) is diffusers.StableDiffusionPipeline
    assert type(load_base(folders["sdxl"])) is diffusers.StableDiffusionXLPipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precisions(folders, dtype):
    base = load_base(folders["sd1"], device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in base.unet.parameters()} == {dtype}


def test_xl_decodes_in_fp32_when_it_is_in_fp16(folders):
    """The autoencoder of XL overflows in fp16 (diffusers #4325)."""
    base = load_base(folders["sdxl"], device="cpu", dtype=torch.float16)
    seen = []
    base.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    image = base("a cat", height=64, width=64, num_inference_steps=1).images[0]
    assert seen == [torch.float32] and image.size == (64, 64)


def test_the_device_is_what_was_asked_for(folders):
    assert load_base(folders["sd1"], device=torch.device("cpu")).device.type == "cpu"
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
    load_base(folders["sd1"])
    load_base(folders["sd1"], safety_checker=True)
    load_base(folders["sdxl"])
    left_out = {"safety_checker": None, "requires_safety_checker": False}
    assert asked == [left_out, {}, {}], "XL never had one, and its pipeline warns of arguments that it does not know"


# ---------------------------------------------------------------------------------------------- frozen, measured


@pytest.mark.parametrize("kind", KINDS)
def test_no_parameter_changes_in_training_and_sampling(folders, kind):
    base = load_base(folders[kind], device="cpu")
    before = fingerprint(base)
    concept = Concept("red", "cat", images=[Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")])
    residuals = personalize(base, concept, steps=2, batch_size=2, rank=2, progress=False)
    assert fingerprint(base) == before
    assert any(delta.abs().max() > 0 for delta in map(residuals.delta, residuals.ranks)), "training did something"
    with residuals.attached(base):
        base("a sks cat", height=64, width=64, num_inference_steps=2, output_type="latent")
    with localized(base, residuals, concept):
        base("a sks cat", height=64, width=64, num_inference_steps=2, output_type="latent")
    assert fingerprint(base) == before
    for part in modules(base).values():
        assert not part.training and not any(parameter.requires_grad for parameter in part.parameters())


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
    monkeypatch.setenv("PERSRES_BASE", str(folders["sd2"]))
    assert load_base().scheduler.config.prediction_type == "v_prediction"
    assert type(load_base(folders["sdxl"])) is diffusers.StableDiffusionXLPipeline, "what is asked for goes first"
    monkeypatch.setenv("PERSRES_BASE", "no-such-base")
    with pytest.raises(ValueError, match="There is no base 'no-such-base'"):
        load_base()


class Hub:
    """Stands in for the hub: `content` maps (repository, revision) to a folder or to the error that it raises."""

    def __init__(self, monkeypatch, content):
        self.content, self.asked = content, []
        pipeline = diffusers.DiffusionPipeline
        self.config, self.pretrained = pipeline.load_config, pipeline.from_pretrained
        monkeypatch.setattr(pipeline, "load_config", self.load_config)
        monkeypatch.setattr(pipeline, "from_pretrained", self.from_pretrained)

    def find(self, repository, revision):
        found = self.content.get((repository, revision), LocalEntryNotFoundError("no network"))
        if isinstance(found, Exception):
            try:
                raise found
            except type(found):  # as diffusers does: the reason is only in the context
                raise OSError(f"{repository} does not appear to have a file named model_index.json") from None
        return found

    def load_config(self, repository, revision=None, local_files_only=False):
        if Path(repository).is_dir():  # asked by diffusers itself, for what was "downloaded"
            return self.config(repository)
        self.asked.append((repository, revision, local_files_only))
        return self.config(self.find(repository, revision))

    def from_pretrained(self, repository, revision=None, local_files_only=False, **options):
        assert options["use_safetensors"] is True, "pickles are never read"
        return self.pretrained(self.find(repository, revision), **options)


@pytest.mark.parametrize("name", [name for name in BASES if BASES[name].repositories])
def test_repositories_are_tried_in_order_at_their_pinned_revision(folders, monkeypatch, name):
    repositories = BASES[name].repositories
    for index, (repository, revision) in enumerate(repositories):
        hub = Hub(monkeypatch, {(repository, revision): folders["sdxl" if name == "sdxl" else "sd1"]})
        base = load_base(name, device="cpu")
        assert isinstance(base, diffusers.DiffusionPipeline)
        assert [asked[:2] for asked in hub.asked] == list(repositories[: index + 1])
        # Once the network is known to be absent, the rest is looked up in the cache without waiting for it again.
        assert [asked[2] for asked in hub.asked] == [False] + [True] * index
        monkeypatch.undo()


def test_no_network_is_one_sentence_that_names_every_place(monkeypatch):
    Hub(monkeypatch, {})
    with pytest.raises(OSError) as caught:
        load_base("sd-1.5", device="cpu")
    assert str(caught.value) == (
        "The base 'sd-1.5' could not be loaded: "
        "stable-diffusion-v1-5/stable-diffusion-v1-5 (no network, and not in the local cache); "
        "runwayml/stable-diffusion-v1-5 (no network, and not in the local cache). "
        "Connect to the network once, or give the path of a folder that holds it in diffusers' layout, "
        "with safetensors files."
    )


def test_every_revision_is_a_commit():
    for base in BASES.values():
        assert bool(base.folder) != bool(base.repositories)
        for repository, revision in base.repositories:
            assert repository.count("/") == 1 and len(revision) == 40 and int(revision, 16)


def no_index(folder):
    (folder / "model_index.json").unlink()


def transformer(folder):
    parts = {"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(parts))


def unconditional(folder):
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]})
    )


def cut_short(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def pickled(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


@pytest.mark.parametrize(
    "damage, error, sentence",
    [
        (no_index, ValueError, r"holds no model_index.json: give the folder of a pipeline that diffusers saved"),
        (transformer, ValueError, r"is a diffusion transformer \(PixArtAlphaPipeline\): its proj_out is the"),
        (unconditional, ValueError, r"is DDPMPipeline, which has no text-conditioned U-Net"),
        (cut_short, OSError, r"could not be loaded: .*model"),
        (pickled, OSError, r"could not be loaded: .*with safetensors files"),
    ],
)
def test_folders_that_are_refused(tmp_path, damage, error, sentence):
    tiny_pipeline("sd1").save_pretrained(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(error, match=sentence):
        load_base(tmp_path / "model")


# ------------------------------------------------------------------------------------------ folders that are broken


def weights(part, change):
    def damage(folder):
        (path,) = (folder / part).glob("*.safetensors")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return damage


def lacking_one(tensors):
    del tensors[sorted(tensors)[5]]


def misshapen(tensors):
    tensors[sorted(tensors)[3]] = torch.zeros(3, 3)


def index(**changes):
    def damage(folder):
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def gone(name):
    return lambda folder: shutil.rmtree(folder / name)


def emptied(name):
    return lambda folder: [path.unlink() for path in (folder / name).iterdir()]


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def all_junk(folder):
    for path in (folder / "tokenizer").iterdir():
        path.write_text("{")


def narrow_encoder(folder):
    """A text encoder from another model."""
    base = tiny_pipeline("sd1")
    config = base.text_encoder.config
    config.hidden_size = 16
    type(base.text_encoder)(config).save_pretrained(folder / "text_encoder")


def small_encoder(folder):
    base = tiny_pipeline("sd1")
    base.text_encoder.resize_token_embeddings(100)
    base.text_encoder.save_pretrained(folder / "text_encoder")


BROKEN = {
    "a tensor of the U-Net": (weights("unet", lacking_one), "its unet lacks 1 tensors, the first 'conv_"),
    "a tensor of the autoencoder": (weights("vae", lacking_one), "its vae lacks 1 tensors"),
    "a tensor of the text encoder": (weights("text_encoder", lacking_one), "its text_encoder lacks 1 tensors"),
    "shapes of the U-Net": (weights("unet", misshapen), "its weights have other shapes than its configuration says"),
    "shapes of the text encoder": (weights("text_encoder", misshapen), "other shapes than its configuration says"),
    "no tokenizer": (gone("tokenizer"), "it has no folder tokenizer"),
    "an empty tokenizer": (emptied("tokenizer"), "its tokenizer has no vocabulary"),
    "a tokenizer of junk": (all_junk, "one of its files is not valid JSON"),
    "no scheduler": (gone("scheduler"), "it has no folder scheduler"),
    "a scheduler of junk": (text("scheduler/scheduler_config.json", "{"), "not a valid JSON file"),
    "no U-Net": (gone("unet"), "it has no folder unet"),
    "no weights": (emptied("vae"), "no file named config.json"),
    "a configuration that is a list": (text("unet/config.json", "[]"), "one of its configurations cannot be read"),
    "an index that is a list": (text("model_index.json", "[]"), "its model_index.json is no table of parts"),
    "an index of junk": (text("model_index.json", "{"), "not a valid JSON file"),
    "an unknown pipeline": (index(_class_name="FooPipeline"), "the class 'FooPipeline', which diffusers lacks"),
    "a pipeline of its own code": (
        index(_class_name=["pipe", "Foo"]),
        r"class \['pipe', 'Foo'\], which diffusers lacks",
    ),
    "an unknown scheduler": (index(scheduler=["diffusers", "FooScheduler"]), "has no class `FooScheduler`"),
    "an unknown library": (index(text_encoder=["foo", "Foo"]), "foo is not one of the libraries"),
    "no mention of a tokenizer": (index(tokenizer=[None, None]), "its model_index.json names no tokenizer"),
    "half of XL": (index(_class_name="StableDiffusionXLPipeline"), "it has no (text_encoder|tokenizer)_2"),
    "a narrower text encoder": (narrow_encoder, "its text encoders give 16 numbers a word, and its U-Net takes 32"),
    "a text encoder of fewer words": (small_encoder, r"its tokenizer counts \d+ words, and its text_encoder knows 100"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_one_sentence_that_names_the_part(folders, tmp_path, what):
    damage, reason = BROKEN[what]
    folder = tmp_path / "model"
    shutil.copytree(folders["sd1"], folder)
    damage(folder)
    with pytest.raises(OSError, match=reason) as caught:
        load_base(folder, device="cpu")
    said = str(caught.value)
    assert said.startswith(f"The base {str(folder)!r} could not be loaded: {folder} (") and "network" not in said
    assert "Copy the folder anew, or give the path of a folder" in said and "\n" not in said


def test_what_is_too_much_in_a_folder_does_no_harm(folders, tmp_path):
    shutil.copytree(folders["sd1"], tmp_path / "model")
    for part in ("unet", "text_encoder"):
        weights(part, lambda tensors: tensors.update(more=torch.zeros(1)))(tmp_path / "model")
    assert fingerprint(load_base(tmp_path / "model", device="cpu")) == fingerprint(tiny_pipeline("sd1"))


@pytest.mark.parametrize("kind", [diffusers.DDIMScheduler, diffusers.PNDMScheduler])
def test_latents_are_not_clipped_because_a_configuration_does_not_speak_of_it(folders, tmp_path, kind):
    """As many fine-tuned models are saved; DDIM's own default is to clip, and latents reach far beyond 1."""
    shutil.copytree(folders["sd1"], tmp_path / "model")
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    text("model/scheduler/scheduler_config.json", json.dumps(config | {"_class_name": kind.__name__}))(tmp_path)
    index(scheduler=["diffusers", kind.__name__])(tmp_path / "model")
    base = load_base(tmp_path / "model", device="cpu")
    assert type(base.scheduler) is kind
    assert diffusers.DDIMScheduler.from_config(base.scheduler.config).config.clip_sample is False


@pytest.mark.parametrize("name", ["toybx", "../no/such/folder", "a/b/c", "/nowhere", "stable diffusion"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"choose one of toybox, sd-1.4, sd-1.5, sd-2.1, sdxl, or give a folder"):
        load_base(name)


def test_a_missing_toybox_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSRES_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="take a whole clone of the project, or make pretrain"):
        load_base("toybox")


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


@pytest.mark.parametrize("kind, relative", [("sd1", "sd-1.4"), ("sd2", "sd-1.4"), ("sdxl", "sdxl")])
def test_the_entry_of_an_unknown_base_follows_from_its_structure(folders, kind, relative):
    base = load_base(folders[kind])
    found = settings_of(base)
    assert found.size == 64 == found.sampling["height"] == found.sampling["width"]
    assert found.sampling["guidance_scale"] == BASES[relative].sampling["guidance_scale"]
    assert found.recipe == BASES[relative].recipe and found.name == str(folders[kind])
    assert base(found.prompts[0], **found.sampling | {"num_inference_steps": 1}).images[0].size == (64, 64)
    assert settings_of(tiny_pipeline(kind)).name == "unnamed"


def test_an_entry_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASES["toybox"].size = 32


def test_a_model_of_ones_own_in_a_folder_named_like_a_shipped_one(folders, tmp_path):
    shutil.copytree(folders["sd1"], tmp_path / "toybox-sd")
    base = load_base(tmp_path / "toybox-sd")
    assert settings_of(base).name == str(tmp_path / "toybox-sd") and settings_of(base).recipe["rank"] == 0.05
    assert settings_of(load_base("toybox")) is BASES["toybox"]
