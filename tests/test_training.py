"""personalize(): what learns, what does not, and that the same training comes out however often it is interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    AutoencoderTiny,
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.func import functional_call

from persres_lite import training
from persres_lite.bases import encode_images, encode_prompt, load_base
from persres_lite.concepts import Concept
from persres_lite.localize import localized
from persres_lite.residuals import Residuals
from persres_lite.training import Diverged, TrainingSet, diffusion_loss, personalize, training_set
from tests.helpers import FAST, NO_CHECKER, img2img, make_concept, refiner, with_unet
from tests.tiny import sample, tiny_pipeline


def digest(base):
    """One hash of every parameter and buffer of a pipeline."""
    total = hashlib.sha256()
    for name, part in sorted(base.components.items()):
        if isinstance(part, torch.nn.Module):
            for key, tensor in part.state_dict().items():
                total.update(f"{name} {key}".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def same(a, b):
    """Bit for bit."""
    left, right = a.named_parameters(), b.named_parameters()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def concept():
    return make_concept()


# What learns


def test_only_the_factors_learn(pipeline, concept):
    before = digest(pipeline)
    hooks = sum(len(m._forward_hooks) for m in pipeline.unet.modules())
    residuals = personalize(pipeline, concept, **FAST)
    start = Residuals(pipeline.unet, rank=0.05)
    assert digest(pipeline) == before
    assert sum(len(m._forward_hooks) for m in pipeline.unet.modules()) == hooks
    assert all(p.grad is None and not p.requires_grad for p in pipeline.unet.parameters())
    for name, parameter in residuals.named_parameters().items():
        assert parameter.dtype == torch.float32 and not torch.equal(parameter, start.named_parameters()[name]), name
    assert len(residuals.losses) == 3 and all(0 < loss < 10 for loss in residuals.losses)
    wanted = {"token": "sks", "macro_class": "cat", "base": "unnamed", "rank": "0.05"}
    assert wanted.items() <= residuals.metadata.items()


def test_a_base_that_is_not_frozen_gets_no_gradients_and_its_switches_back(sd1, concept):
    sd1.unet.train().requires_grad_(True)
    before = digest(sd1)
    personalize(sd1, concept, **FAST | {"steps": 1}, gradient_checkpointing=True)
    assert digest(sd1) == before
    assert sd1.unet.training and not sd1.unet.is_gradient_checkpointing
    assert all(p.requires_grad and p.grad is None for p in sd1.unet.parameters())


def test_training_on_one_batch_lowers_its_loss(sd1, concept):
    residuals = personalize(sd1, concept, steps=12, batch_size=2, lr=2e-2, rank=0.25, progress=False)
    mean, _ = encode_images(sd1, concept.images)
    noise = torch.randn(mean[0].shape, generator=torch.Generator().manual_seed(5))
    scheduler = DDPMScheduler.from_config(sd1.scheduler.config)
    batch = scheduler, mean[0], encode_prompt(sd1, concept.training_prompt, 64), noise, torch.tensor([900, 500, 100])
    with torch.no_grad():
        before = diffusion_loss(sd1.unet, *batch)
        with residuals.attached(sd1):
            after = diffusion_loss(sd1.unet, *batch)
    assert after < 0.95 * before


def test_the_recipe_comes_from_the_registry(sd1, concept, monkeypatch):
    recipe = {"steps": 3, "batch_size": 1, "lr": 1e-3, "rank": 2}
    known = training.settings_of(sd1)
    assert known.recipe == {"steps": 150, "batch_size": 4, "lr": 1e-3, "rank": 0.05}  # the paper's
    monkeypatch.setattr(training, "settings_of", lambda base: replace(known, recipe=recipe))
    default = personalize(sd1, concept, progress=False)
    assert len(default.losses) == 3 and set(default.ranks.values()) == {2}
    assert same(default, personalize(sd1, concept, **recipe, progress=False))
    assert len(personalize(sd1, concept, steps=1, progress=False).losses) == 1


# What is computed


def test_gradients_equal_those_through_merged_weights(pipeline, concept):
    """The slow way, W' = W + A B for every layer, without any hook."""
    unet = pipeline.unet
    residuals = Residuals(unet, rank=0.25, init="random")
    condition = encode_prompt(pipeline, concept.training_prompt, 64)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
    timesteps = torch.tensor([300, 700])
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    with residuals.attached(pipeline):
        diffusion_loss(unet, scheduler, latents, condition, noise, timesteps).backward()
    fast = {name: p.grad.clone() for name, p in residuals.named_parameters().items()}

    merged = {}
    for name in residuals.A:
        weight = unet.get_submodule(name).weight
        merged[f"{name}.weight"] = weight + (residuals.A[name] @ residuals.B[name]).view_as(weight)
    alphas = scheduler.alphas_cumprod[timesteps].view(2, 1, 1, 1)
    arguments = {
        "encoder_hidden_states": condition["encoder_hidden_states"].repeat(2, 1, 1),
        "added_cond_kwargs": {k: v.repeat(2, 1) for k, v in condition.get("added_cond_kwargs", {}).items()} or None,
    }
    noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    predicted = functional_call(unet, merged, (noisy, timesteps), arguments).sample
    v = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    target = v if pipeline.scheduler.config.prediction_type == "v_prediction" else noise
    for p in residuals.parameters():
        p.grad = None
    (predicted - target).pow(2).mean().backward()
    for name, p in residuals.named_parameters().items():
        torch.testing.assert_close(fast[name], p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max()) + 1e-8)


def test_both_kinds_of_target_are_met(pipeline):
    assert {tiny_pipeline(k).scheduler.config.prediction_type for k in ("sd1", "sd2")} == {"epsilon", "v_prediction"}
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    latents, noise, t = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 3.0), torch.tensor([500])
    alpha = scheduler.alphas_cumprod[500]
    v = scheduler.config.prediction_type == "v_prediction"
    right = alpha.sqrt() * 3 - (1 - alpha).sqrt() * 1 if v else torch.tensor(3.0)

    class Answer(torch.nn.Module):
        dtype = torch.float32

        def forward(self, noisy, timesteps, encoder_hidden_states, return_dict):
            assert encoder_hidden_states.shape == (1, 2, 3)
            return (right.expand(1, 4, 2, 2),)

    condition = {"encoder_hidden_states": torch.zeros(1, 2, 3)}
    assert diffusion_loss(Answer(), scheduler, latents, condition, noise, t) < 1e-10


def test_xl_is_told_sizes_and_both_texts(sdxl, concept):
    condition = encode_prompt(sdxl, concept.training_prompt, 64)
    embeds, _, pooled, _ = sdxl.encode_prompt(concept.training_prompt, do_classifier_free_guidance=False)
    assert torch.equal(condition["encoder_hidden_states"], embeds) and embeds.shape[-1] == 64
    assert torch.equal(condition["added_cond_kwargs"]["text_embeds"], pooled)
    assert condition["added_cond_kwargs"]["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]


def test_latents_are_the_autoencoders_and_mirrored(sd1, concept):
    mean, std = encode_images(sd1, concept.images)
    pixels = torch.from_numpy(np.asarray(concept.images[1]).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    for flip, picture in enumerate((pixels, pixels.flip(-1))):
        found = sd1.vae.encode(picture).latent_dist
        torch.testing.assert_close(mean[flip, 1], found.mean[0] * 0.18215, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std[flip, 1], found.std[0] * 0.18215, rtol=1e-4, atol=1e-5)


def test_latents_of_an_autoencoder_without_a_distribution(sd1, concept):
    torch.manual_seed(0)
    sd1.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        scaling_factor=0.5,
    )
    mean, std = encode_images(sd1, concept.images)
    pixels = torch.from_numpy(np.asarray(concept.images[0]).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    assert std is None
    torch.testing.assert_close(mean[0, 0], sd1.vae.encode(pixels).latents[0].detach() * 0.5, rtol=1e-4, atol=1e-5)


def test_an_autoencoder_that_overflows_in_fp16_encodes_in_fp32(sdxl, concept):
    sdxl.vae.register_to_config(force_upcast=True)
    exact, _ = encode_images(sdxl, concept.images)
    sdxl.vae.half()
    seen = []
    encode = sdxl.vae.encode
    sdxl.vae.encode = lambda pixels: seen.append(pixels.dtype) or encode(pixels)
    halved, _ = encode_images(sdxl, concept.images)
    assert set(seen) == {torch.float32} and sdxl.vae.dtype == torch.float16
    torch.testing.assert_close(halved, exact, rtol=0.02, atol=0.02)


def test_pictures_and_text_are_encoded_once(sdxl, concept, monkeypatch):
    calls = {"vae": 0, "text_encoder": 0, "text_encoder_2": 0}
    encode = sdxl.vae.encode

    def counted(pixels):
        calls["vae"] += len(pixels)
        return encode(pixels)

    monkeypatch.setattr(sdxl.vae, "encode", counted)
    for name in ("text_encoder", "text_encoder_2"):
        getattr(sdxl, name).register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    personalize(sdxl, concept, **FAST)
    assert calls == {"vae": 6, "text_encoder": 1, "text_encoder_2": 1}  # three pictures, two ways round


def test_no_graph_below_the_first_residual(sd1, concept):
    seen = {}
    modules = {"conv_in": sd1.unet.conv_in, "first block": sd1.unet.down_blocks[0].attentions[0].transformer_blocks[0]}
    modules["after"] = sd1.unet.down_blocks[0].attentions[0]
    for name, module in modules.items():
        module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: _tensor(out).requires_grad}))
    personalize(sd1, concept, **FAST | {"steps": 1})
    assert seen == {"conv_in": False, "first block": False, "after": True}


def _tensor(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def test_a_training_set_is_what_personalize_draws_from(sd1, concept):
    mean, std = encode_images(sd1, concept.images)
    data = training_set(sd1, concept)
    assert torch.equal(data.mean, mean) and torch.equal(data.std, std) and data.weights is None
    with pytest.raises(ValueError, match="has none"):
        training_set(sd1, replace(concept, masks=None), masks=True)


def test_every_picture_is_drawn_equally_often():
    data = TrainingSet(torch.arange(6.0).view(2, 3, 1, 1, 1), None, None)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([data.draw(6, generator)[0].flatten() for _ in range(40)])
    assert all(row.remainder(3).long().bincount().tolist() == [2, 2, 2] for row in drawn)
    assert 0.4 < (drawn >= 3).float().mean() < 0.6  # half of them mirrored


# Seeds and interruptions


def test_the_same_seed_gives_the_same_bits(pipeline, concept):
    first = personalize(pipeline, concept, **FAST)
    torch.manual_seed(77)  # the global generator has no say
    assert same(first, personalize(pipeline, concept, **FAST))
    assert not same(first, personalize(pipeline, concept, **FAST | {"steps": 1}, seed=1))


def test_interrupted_between_steps_it_resumes_to_the_same_tensors(pipeline, concept, tmp_path):
    whole = personalize(pipeline, concept, **FAST)
    path = tmp_path / "state.safetensors"

    def interrupt(step, loss, residuals):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        personalize(pipeline, concept, **FAST, checkpoint=path, on_step=interrupt)
    steps = []
    resumed = personalize(pipeline, concept, **FAST, checkpoint=path, on_step=lambda step, *_: steps.append(step))
    assert steps == [3] and same(whole, resumed) and resumed.losses == whole.losses


def test_interrupted_in_the_middle_of_an_update_it_resumes_to_the_same_tensors(sd1, concept, tmp_path, monkeypatch):
    whole = personalize(sd1, concept, **FAST)
    step = torch.optim.Adam.step
    count = []

    def half_done(self, *arguments, **options):
        count.append(1)
        result = step(self, *arguments, **options)
        if len(count) == 2:
            raise KeyboardInterrupt  # A and B have moved, the loss is not yet among the losses
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", half_done)
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        personalize(sd1, concept, **FAST, checkpoint=path)
    assert same(whole, personalize(sd1, concept, **FAST, checkpoint=path))


KILLED = """
import os, signal, sys
from persres_lite import training
from tests.helpers import FAST, make_concept
from tests.tiny import tiny_pipeline
training.CHECKPOINT_EVERY = 2
def kill(step, loss, residuals):
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
training.personalize(tiny_pipeline("sd1"), make_concept(), **FAST | {"steps": 4}, checkpoint=sys.argv[1], on_step=kill)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_it_resumes_to_the_same_tensors(sd1, concept, tmp_path):
    path = tmp_path / "state.safetensors"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number of threads rounds otherwise
    command = [sys.executable, "-c", KILLED, str(path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=os.environ | threads, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    steps = []
    four = FAST | {"steps": 4}
    resumed = personalize(sd1, concept, **four, checkpoint=path, on_step=lambda step, *_: steps.append(step))
    assert steps == [3, 4]  # the third was lost, the first two were not
    assert same(resumed, personalize(sd1, concept, **four))


def test_a_finished_training_goes_on_with_more_steps(sd1, concept, tmp_path):
    path = tmp_path / "state.safetensors"
    personalize(sd1, concept, **FAST, checkpoint=path)
    longer = FAST | {"steps": 5}
    assert same(personalize(sd1, concept, **longer, checkpoint=path), personalize(sd1, concept, **longer))
    with pytest.raises(ValueError, match="already has 5 steps"):
        personalize(sd1, concept, **FAST, checkpoint=path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lr": 1e-3}, "lr = 0.01, not 0.001"),
        ({"seed": 3}, "seed = 0, not 3"),
        ({"init": "random"}, "init = 'lora', not 'random'"),
        ({"rank": 3}, "rank = 0.05, not 3"),
        ({"train_token": True}, "train_token = False, not True"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(sd1, concept, tmp_path, change, sentence):
    path = tmp_path / "state.safetensors"
    personalize(sd1, concept, **FAST | {"steps": 1}, checkpoint=path)
    with pytest.raises(ValueError, match=sentence):
        personalize(sd1, concept, **FAST | {"steps": 1} | change, checkpoint=path)


def test_a_checkpoint_of_other_pictures_or_no_checkpoint_is_refused(sd1, concept, tmp_path):
    path = tmp_path / "state.safetensors"
    personalize(sd1, concept, **FAST | {"steps": 1}, checkpoint=path)
    with pytest.raises(ValueError, match="pictures"):
        personalize(sd1, make_concept(pictures=2), **FAST | {"steps": 1}, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        personalize(sd1, concept, **FAST, checkpoint=path)
    Residuals(sd1.unet).save(path)
    with pytest.raises(ValueError, match="no checkpoint of a training"):
        personalize(sd1, concept, **FAST, checkpoint=path)


# When it goes wrong


def test_a_loss_that_is_not_finite_stops_it_with_the_last_good_state(sd1, concept, tmp_path, monkeypatch):
    whole = personalize(sd1, concept, **FAST | {"steps": 2})
    path = tmp_path / "state.safetensors"
    loss, count = training.diffusion_loss, []

    def broken(*arguments):
        count.append(1)
        return loss(*arguments) * (float("nan") if len(count) == 3 else 1)

    monkeypatch.setattr(training, "diffusion_loss", broken)
    sentence = r"loss became nan at step 3: try a rate below 0\.01.*state\.safetensors"
    with pytest.raises(Diverged, match=sentence) as caught:
        personalize(sd1, concept, **FAST, checkpoint=path)
    assert same(caught.value.residuals, whole) and len(caught.value.residuals.losses) == 2
    assert same(personalize(sd1, concept, **FAST | {"steps": 2}, checkpoint=path), whole)


def test_a_rate_that_is_far_too_high_diverges_with_finite_tensors(sd1, concept):
    with pytest.raises(Diverged) as caught:
        personalize(sd1, concept, **FAST | {"lr": 1e25})
    assert all(p.isfinite().all() for p in caught.value.residuals.parameters())


def test_a_gradient_that_is_not_finite_does_not_reach_the_factors(sd1, concept, monkeypatch):
    loss = training.diffusion_loss

    def steep(*arguments):
        value = loss(*arguments)
        value.register_hook(lambda gradient: gradient * float("inf"))
        return value

    monkeypatch.setattr(training, "diffusion_loss", steep)
    with pytest.raises(Diverged, match="gradient became infinite or NaN at step 1") as caught:
        personalize(sd1, concept, **FAST)
    assert same(caught.value.residuals, Residuals(sd1.unet))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"lr": -1.0}, "lr must be a positive number"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"sample_every": 0}, "sample_every must be at least 1"),
        ({"mixed_precision": "fp8"}, "choose 'fp16', 'bf16' or None"),
        ({"masked_loss": True}, "masked_loss needs masks"),
        ({"rank": 0}, "Rank 0 does not fit"),
        ({"init": "zero"}, "Unknown init"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(sd1, concept, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        personalize(sd1, concept, **FAST | arguments)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"in_channels": 9}, "takes 9 channels and gives 4, where latents have 4, as in models for inpainting"),
        ({"in_channels": 8}, "takes 8 channels and gives 4"),
        ({"out_channels": 8}, "takes 4 channels and gives 8"),
        ({"time_cond_proj_dim": 8}, "asks for more .time_cond_proj_dim is 8., as distilled or conditioned models do"),
        ({"num_class_embeds": 10}, "asks for more .num_class_embeds is 10."),
        ({"class_embed_type": "timestep"}, "asks for more .class_embed_type is 'timestep'."),
        ({"addition_embed_type": "text"}, "asks for more .addition_embed_type is 'text'."),
    ],
)
def test_models_that_ask_for_more_than_pictures_and_words_are_refused(sd1, concept, changes, reason):
    sd1.register_modules(unet=with_unet(sd1, **changes)["unet"])
    with pytest.raises(ValueError, match=f"cannot learn from pictures and words alone, since its U-Net {reason}.*"):
        personalize(sd1, concept, **FAST)


def test_xls_refiner_and_editing_pipelines_are_refused(concept):
    with pytest.raises(ValueError, match="than two sizes and a corner, as XL's refiner is: personalize the text-to-im"):
        personalize(refiner()[0], concept, **FAST)
    parts = with_unet(tiny_pipeline("sd1"), in_channels=8)
    editing = StableDiffusionInstructPix2PixPipeline(**parts, **NO_CHECKER)
    with pytest.raises(ValueError, match="takes 8 channels .* as in models for inpainting and editing"):
        personalize(editing, concept, **FAST)


def test_a_pipeline_that_starts_from_pictures_trains_but_cannot_sample_along_the_way(concept):
    """The models are those of text to image: the same residuals come out."""
    base, (other, _) = tiny_pipeline("sd1"), img2img()
    assert same(personalize(base, concept, **FAST), personalize(other, concept, **FAST))
    with pytest.raises(ValueError, match="sample_every draws from words alone, and StableDiffusionImg2ImgPipeline"):
        personalize(other, concept, sample_every=1, **FAST)


# The forward process


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        EDMDPMSolverMultistepScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        CogVideoXDDIMScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_another_process_is_refused(sdxl, concept, scheduler):
    sdxl.scheduler = scheduler
    with pytest.raises(ValueError, match=f"{type(scheduler).__name__} stands for another process than DDPM's noise"):
        personalize(sdxl, concept, **FAST)


@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        LCMScheduler,
        PNDMScheduler,
        TCDScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_whatever_samples_the_noise_of_training_is_the_same(sd1, kind):
    """Also where a class has the noise of Stable Diffusion by default and therefore does not list it."""
    expected = DDPMScheduler.from_config(sd1.scheduler.config).alphas_cumprod
    options = {} if kind in (LCMScheduler, TCDScheduler) else sd1.scheduler.config
    sd1.scheduler = kind.from_config(options)
    torch.testing.assert_close(training._training_scheduler(sd1).alphas_cumprod, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes", [{"beta_schedule": "linear"}, {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}]
)
def test_other_noise_than_the_one_that_the_model_came_with_is_refused(sd1, concept, tmp_path, changes):
    sd1.save_pretrained(tmp_path)
    base = load_base(tmp_path, device="cpu")
    base.scheduler = EulerDiscreteScheduler.from_config(base.scheduler.config)
    personalize(base, concept, **FAST)
    base.scheduler = DDIMScheduler.from_config(base.scheduler.config, **changes)
    with pytest.raises(
        ValueError, match="DDIMScheduler, has other noise or another target than the DDIMScheduler that"
    ):
        personalize(base, concept, **FAST)
    base.save_pretrained(tmp_path / "own")  # meant so: then it is the model's
    personalize(load_base(tmp_path / "own", device="cpu"), concept, **FAST)


def test_the_loss_names_a_target_that_it_does_not_know(sd1):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.add_noise = lambda latents, noise, timesteps: latents
    latents, condition = torch.zeros(1, 4, 16, 16), encode_prompt(sd1, "a cat", 64)
    with pytest.raises(ValueError, match="target None is not one of DDPM's .epsilon, v_pred.*: take another"):
        diffusion_loss(sd1.unet, scheduler, latents, condition, latents, torch.tensor([3]))


def test_a_concept_without_pictures_is_refused(sd1):
    with pytest.raises(ValueError, match="no pictures"):
        personalize(sd1, Concept("empty", "cat"), **FAST)


# Options


def test_on_step_samples_and_bar(sd1, concept, capsys, monkeypatch):
    known = training.settings_of(sd1)
    quick = replace(known, steps=2)
    monkeypatch.setattr(training, "settings_of", lambda base: quick)
    calls = []
    residuals = personalize(
        sd1,
        concept,
        **FAST | {"progress": True},
        sample_every=2,
        on_step=lambda step, loss, residuals: calls.append((step, loss, len(residuals.losses))),
    )
    assert calls == [(i + 1, loss, i + 1) for i, loss in enumerate(residuals.losses)]
    assert sorted(residuals.samples) == [2] and residuals.samples[2].size == (64, 64)
    shown = capsys.readouterr().err
    assert "personalize sks cat" in shown and f"loss={residuals.losses[-1]:.3f}" in shown
    assert sd1._progress_bar_config == {"disable": True}
    assert same(residuals, personalize(sd1, concept, **FAST))  # looking changes nothing


def test_masked_loss_counts_only_the_object(sd1):
    scheduler = DDPMScheduler.from_config(sd1.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
    weights = torch.zeros(2, 1, 16, 16)
    weights[:, :, 4:12, 4:12] = 1
    arguments = (encode_prompt(sd1, "a cat", 64), noise, torch.tensor([10, 600]))
    with torch.no_grad():
        found = diffusion_loss(sd1.unet, scheduler, latents, *arguments, weights)
        noisy = scheduler.add_noise(latents, noise, arguments[2])
        text = arguments[0]["encoder_hidden_states"].repeat(2, 1, 1)
        wrong = (sd1.unet(noisy, arguments[2], text).sample - noise)[:, :, 4:12, 4:12]
    torch.testing.assert_close(found, wrong.square().mean(), rtol=1e-4, atol=1e-6)


def test_masked_loss_takes_the_concepts_masks(sd1, monkeypatch):
    concept = make_concept(masks=True)
    concept.masks[0] = Image.new("L", (64, 64))
    concept.masks[0].paste(255, (0, 0, 16, 64))  # the left quarter
    seen = []
    prepare = training._prepare
    monkeypatch.setattr(training, "_prepare", lambda *a: seen.append(prepare(*a)) or seen[-1])
    masked = personalize(sd1, concept, **FAST, masked_loss=True)
    weights = seen[0][0].weights
    assert weights.shape == (2, 3, 1, 16, 16)
    assert weights[0, 0, 0].mean(0).tolist() == [1.0] * 4 + [0.0] * 12
    assert torch.equal(weights[1, 0], weights[0, 0].flip(-1))  # mirrored with its picture
    assert not same(masked, personalize(sd1, concept, **FAST))


def test_gradient_checkpointing_gives_the_same_gradients_from_fewer_saved_tensors(pipeline, concept):
    def run(**options):
        saved = []
        pack = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t)
        with pack:
            residuals = personalize(pipeline, concept, **FAST | {"steps": 1, "lr": 1e-4}, init="random", **options)
        return residuals, sum(saved)

    plain, much = run()
    checkpointed, little = run(gradient_checkpointing=True)
    assert little < 0.8 * much
    for name, parameter in plain.named_parameters().items():
        torch.testing.assert_close(parameter, checkpointed.named_parameters()[name], rtol=0, atol=1e-5)
    assert not pipeline.unet.is_gradient_checkpointing


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_keeps_what_learns_in_fp32(sd1, concept, precision):
    two = FAST | {"steps": 2}
    exact = personalize(sd1, concept, **two)
    mixed = personalize(sd1, concept, **two, mixed_precision=precision)
    assert all(p.dtype == torch.float32 for p in mixed.parameters()) and not same(exact, mixed)
    assert mixed.losses == pytest.approx(exact.losses, rel=0.05)
    assert sd1.unet.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision(sd1, concept, dtype, tmp_path):
    two = FAST | {"steps": 2}
    exact = personalize(sd1, concept, **two)
    sd1.to(dtype)
    before = digest(sd1)
    path = tmp_path / "state.safetensors"
    personalize(sd1, concept, **two | {"steps": 1}, checkpoint=path)
    halved = personalize(sd1, concept, **two, checkpoint=path)  # the scale of the loss is resumed, too
    assert all(p.dtype == torch.float32 for p in halved.parameters())
    assert halved.losses == pytest.approx(exact.losses, rel=0.1)
    assert digest(sd1) == before
    assert same(halved, personalize(sd1, concept, **two))


@pytest.mark.parametrize("token", ["sks", "zwx"])  # one piece, three pieces
def test_the_tokens_embedding_learns_on_request(pipeline, token, tmp_path):
    concept = make_concept(token=token)
    before = digest(pipeline)
    residuals = personalize(pipeline, concept, **FAST | {"steps": 2}, train_token=True)
    assert digest(pipeline) == before
    encoders = {"text_encoder", "text_encoder_2"} if hasattr(pipeline, "text_encoder_2") else {"text_encoder"}
    assert set(residuals.token_embeddings) == encoders
    for encoder, rows in residuals.token_embeddings.items():
        tokenizer = pipeline.tokenizer if encoder == "text_encoder" else pipeline.tokenizer_2
        pieces = tokenizer(token, add_special_tokens=False).input_ids
        assert len(pieces) == {"sks": 1, "zwx": 3}[token]
        frozen = getattr(pipeline, encoder).get_input_embeddings().weight[pieces]
        assert rows.shape == frozen.shape and not torch.isclose(rows, frozen, atol=1e-3).all()

    path = residuals.save(tmp_path / "with-token.safetensors")
    loaded = Residuals.load(path, pipeline)
    assert same(loaded, residuals)
    prompt = f"a photo of a {concept}"
    plain = sample(pipeline, prompt, steps=1)
    with residuals.attached(pipeline):
        learned = sample(pipeline, prompt, steps=1)
    with loaded.attached(pipeline):
        assert torch.equal(learned, sample(pipeline, prompt, steps=1))
    loaded.token_embeddings = {}
    with loaded.attached(pipeline):
        assert not torch.equal(learned, sample(pipeline, prompt, steps=1))  # the rows do matter
    assert torch.equal(plain, sample(pipeline, prompt, steps=1))
    with localized(pipeline, residuals, concept, fixed_mask=torch.ones(8, 8)):  # with LAG, too
        torch.testing.assert_close(learned, sample(pipeline, prompt, steps=1), rtol=1e-5, atol=1e-5)


def test_a_prompt_without_the_token_is_embedded_as_before(sd1):
    residuals = personalize(sd1, make_concept(), **FAST | {"steps": 1}, train_token=True)
    before = encode_prompt(sd1, "a photo of a cat", 64)["encoder_hidden_states"]
    with residuals.attached(sd1):
        assert torch.equal(before, encode_prompt(sd1, "a photo of a cat", 64)["encoder_hidden_states"])
        assert not torch.equal(before, encode_prompt(sd1, "a photo of a sks cat", 64)["encoder_hidden_states"])


# ------------------------------------------------------------------------------------------ what surrounds the call


@contextmanager
def ambient(what):
    """A switch of torch that somebody has turned elsewhere."""
    if what == "no gradients":
        torch.set_grad_enabled(False)
    elif what == "fp16":
        torch.set_default_dtype(torch.float16)
    try:
        with torch.inference_mode() if what == "inference" else nullcontext():
            yield
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("what", ["no gradients", "fp16", "inference"])
def test_switches_of_torch_change_nothing(sd1, concept, what):
    usual = personalize(sd1, concept, steps=2, batch_size=2, train_token=True, progress=False)
    with ambient(what):
        before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled()
        odd = personalize(sd1, concept, steps=2, batch_size=2, train_token=True, progress=False)
        assert before == (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled())
    assert odd.losses == usual.losses
    assert all(torch.equal(a, b) for a, b in zip(odd.parameters(), usual.parameters(), strict=True))


@pytest.mark.parametrize("whole", [True, False])
def test_an_offloaded_base_is_refused(sd1, concept, whole):
    if whole:
        cpu_offload_with_hook(sd1.unet, execution_device="cpu")
    else:
        cpu_offload(sd1.unet, execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded .* load the base without offloading"):
        personalize(sd1, concept, steps=1, progress=False)


def test_a_compiled_base_is_refused(sd1, concept):
    sd1.unet.compile(backend="eager")
    with pytest.raises(ValueError, match="was compiled"):
        personalize(sd1, concept, steps=1, progress=False)


def test_words_beyond_the_limit_are_refused_before_training(sd1, monkeypatch):
    monkeypatch.setattr(training, "_step", lambda *_: pytest.fail("trained"))
    long = make_concept(macro_class="very " * 80 + "cat")
    with pytest.raises(ValueError, match="is cut off at 77, before the end of"):
        personalize(sd1, long, steps=1, progress=False)


@pytest.mark.parametrize(
    ("asked", "advised"),
    [
        ({}, "try gradient_checkpointing=True, or try at_once=1, or close"),
        ({"gradient_checkpointing": True}, "): try at_once=1, or close"),
        ({"gradient_checkpointing": True, "at_once": 1}, "): close"),
    ],
)
def test_too_little_memory_is_said_in_python_too(sd1, concept, monkeypatch, asked, advised):
    def fail(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(training, "_step", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=re.escape(advised)) as caught:
        personalize(sd1, concept, steps=1, progress=False, **asked)
    assert str(caught.value).count("out of memory)") == 1  # the context inside has nothing to add


def test_a_checkpoint_that_can_no_longer_be_written_does_not_end_the_training(sd1, concept, tmp_path, monkeypatch):
    write, count = training.write_checkpoint, []

    def full(*arguments):
        count.append(1)
        if len(count) > 1:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(training, "write_checkpoint", full)
    with pytest.warns(UserWarning, match="No space left .* The training goes on"):
        residuals = personalize(sd1, concept, steps=2, batch_size=1, checkpoint=tmp_path / "s", progress=False)
    assert len(residuals.losses) == 2


@pytest.mark.parametrize("damage", ["settings", "generator", "scaler", "json"])
def test_a_damaged_checkpoint_is_one_sentence(sd1, concept, tmp_path, damage):
    path = tmp_path / "state.safetensors"
    arguments = {"steps": 1, "batch_size": 1, "checkpoint": path, "progress": False}
    personalize(sd1, concept, **arguments)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    if damage == "generator":
        tensors["generator"] = tensors["generator"][:9]
    else:
        rest = json.loads(metadata["persres_lite_checkpoint"])
        rest.pop(damage, None)
        metadata["persres_lite_checkpoint"] = "[" if damage == "json" else json.dumps(rest)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="damaged"):
        personalize(sd1, concept, **arguments)
