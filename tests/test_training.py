"""personalize(): what learns, what does not, and that the same training comes out however often it is interrupted."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from PIL import Image

from persres_lite import training
from persres_lite.bases import encode_images, encode_prompt
from persres_lite.localize import localized
from persres_lite.residuals import Residuals
from persres_lite.support import checkpoint, notices
from persres_lite.training import (
    Diverged,
    TrainingSet,
    attended,
    diffusion_loss,
    personalize,
    samples_every,
    training_scheduler,
    training_set,
)
from tests.helpers import FAST, digest, hooks_of, make_concept, random_residuals, refiner, with_unet
from tests.tiny import sample, tiny_pipeline


def same(a, b):
    """Bit for bit."""
    left, right = a.named_parameters(), b.named_parameters()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def concept():
    return make_concept()


@pytest.fixture(scope="module")
def base():
    """A tiny pipeline for what leaves it as it is."""
    return tiny_pipeline("sd1")


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


def test_a_base_that_is_not_frozen_is_and_gets_no_gradients(sd1, concept):
    sd1.unet.train().requires_grad_(True)
    before = digest(sd1)
    personalize(sd1, concept, **FAST | {"steps": 1})
    assert digest(sd1) == before and not sd1.unet.training
    assert all(p.grad is None and not p.requires_grad for p in sd1.unet.parameters())


def test_training_on_one_batch_lowers_its_loss(base, concept):
    residuals = personalize(base, concept, steps=12, batch_size=2, lr=2e-2, rank=0.25, progress=False)
    mean, _ = encode_images(base, concept.images)
    noise = torch.randn(mean[0].shape, generator=torch.Generator().manual_seed(5))
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    batch = scheduler, mean[0], encode_prompt(base, concept.training_prompt, 64), noise, torch.tensor([900, 500, 100])
    with torch.no_grad():
        before = diffusion_loss(base.unet, *batch)
        with residuals.attached(base):
            after = diffusion_loss(base.unet, *batch)
    assert after < 0.95 * before


def test_the_recipe_comes_from_the_registry(base, concept, monkeypatch):
    recipe = {"steps": 3, "batch_size": 1, "lr": 1e-3, "rank": 2}
    known = training.settings_of(base)
    assert known.recipe == {"steps": 150, "batch_size": 4, "lr": 1e-3, "rank": 0.05}  # the paper's
    monkeypatch.setattr(training, "settings_of", lambda base: replace(known, recipe=recipe))
    default = personalize(base, concept, progress=False)
    assert len(default.losses) == 3 and set(default.ranks.values()) == {2}
    assert same(default, personalize(base, concept, **recipe, progress=False))
    assert len(personalize(base, concept, steps=1, progress=False).losses) == 1


# What is computed


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


def test_interrupted_in_the_middle_of_an_update_it_resumes_to_the_same_tensors(base, concept, tmp_path, monkeypatch):
    whole = personalize(base, concept, **FAST)
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
        personalize(base, concept, **FAST, checkpoint=path)
    assert same(whole, personalize(base, concept, **FAST, checkpoint=path))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs to fork")
def test_killed_it_resumes_to_the_same_tensors(base, concept, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 2)
    path, four, steps = tmp_path / "state.safetensors", FAST | {"steps": 4}, []
    child = os.fork()
    if child == 0:
        try:
            kill = {3: signal.SIGKILL}
            personalize(
                base, concept, **four, checkpoint=path, on_step=lambda step, *_: os.kill(os.getpid(), kill.get(step, 0))
            )
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    resumed = personalize(base, concept, **four, checkpoint=path, on_step=lambda step, *_: steps.append(step))
    assert steps == [3, 4]  # the third was lost, the first two were not
    assert same(resumed, personalize(base, concept, **four))


def test_a_checkpoint_of_other_pictures_or_no_checkpoint_is_refused(base, concept, tmp_path):
    path = tmp_path / "state.safetensors"
    personalize(base, concept, **FAST | {"steps": 1}, checkpoint=path)
    with pytest.raises(ValueError, match="pictures"):
        personalize(base, make_concept(pictures=2), **FAST | {"steps": 1}, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        personalize(base, concept, **FAST, checkpoint=path)
    Residuals(base.unet).save(path)
    with pytest.raises(ValueError, match="no checkpoint of a training"):
        personalize(base, concept, **FAST, checkpoint=path)


def test_a_checkpoint_of_another_training_is_refused(base, concept, tmp_path):
    one, path = FAST | {"steps": 1}, tmp_path / "state.safetensors"
    personalize(base, concept, **one, checkpoint=path)
    for change in ({"lr": 1e-3}, {"seed": 3}, {"train_token": True}, {"loss": "outside"}):
        with pytest.raises(ValueError, match=f"{min(change)} = "):
            personalize(base, concept, **one | change, checkpoint=path)


def test_one_that_is_done_goes_on_and_one_of_other_weights_is_refused(base, concept, tmp_path):
    path, two = tmp_path / "state.safetensors", FAST | {"steps": 2}
    personalize(base, concept, **FAST | {"steps": 1}, checkpoint=path)
    assert same(personalize(base, concept, **two, checkpoint=path), personalize(base, concept, **two))
    with pytest.raises(ValueError, match="fingerprint = "):
        personalize(tiny_pipeline("sd1", seed=1), concept, **FAST, checkpoint=path)


# When it goes wrong


def test_a_loss_that_is_not_finite_stops_it_with_the_last_good_state(base, concept, tmp_path, monkeypatch):
    whole = personalize(base, concept, **FAST | {"steps": 2})
    path = tmp_path / "state.safetensors"
    loss, count = training.diffusion_loss, []

    def broken(*arguments):
        count.append(1)
        return loss(*arguments) * (float("nan") if len(count) == 3 else 1)

    monkeypatch.setattr(training, "diffusion_loss", broken)
    with pytest.raises(Diverged, match=r"not finite at step 3: try a rate below 0\.01") as caught:
        personalize(base, concept, **FAST, checkpoint=path)
    assert same(caught.value.residuals, whole) and len(caught.value.residuals.losses) == 2
    assert same(personalize(base, concept, **FAST | {"steps": 2}, checkpoint=path), whole)


def test_a_rate_that_is_far_too_high_is_said_at_the_end_and_nothing_is_lost(base, concept):
    with pytest.warns(notices.Notice, match="try a lower rate"):
        residuals = personalize(base, concept, **FAST | {"lr": 200.0})
    assert len(residuals.losses) == 3 and all(p.isfinite().all() for p in residuals.parameters())


def test_a_gradient_that_is_not_finite_does_not_reach_the_factors(base, concept, monkeypatch):
    loss = training.diffusion_loss

    def steep(*arguments):
        value = loss(*arguments)
        value.register_hook(lambda gradient: gradient * float("inf"))
        return value

    monkeypatch.setattr(training, "diffusion_loss", steep)
    with pytest.raises(Diverged, match="gradient is not finite at step 1") as caught:
        personalize(base, concept, **FAST)
    assert same(caught.value.residuals, Residuals(base.unet))


@pytest.mark.parametrize("changes", [{"in_channels": 9}, {"time_cond_proj_dim": 8}, None])
def test_models_that_ask_for_more_than_pictures_and_words_are_refused(sd1, concept, changes):
    """For inpainting, distilled, and XL's refiner."""
    if changes:
        sd1.register_modules(unet=with_unet(sd1, **changes)["unet"])
    with pytest.raises(ValueError, match="personalize the text-to-image model"):
        personalize(sd1 if changes else refiner()[0], concept, **FAST)


def test_an_argument_that_there_is_not(base, concept):
    with pytest.raises(TypeError, match="no argument 'step'"):
        personalize(base, concept, step=3)
    with pytest.raises(KeyError, match="mask"):
        personalize(base, concept, loss="mask")


# The forward process


@pytest.mark.parametrize("kind", [EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
def test_another_process_is_refused(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} .* put the model's own scheduler back"):
        training_scheduler(SimpleNamespace(scheduler=kind()))


@pytest.mark.parametrize(
    "kind",
    [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler],
)
def test_whatever_samples_the_noise_of_training_is_the_same(base, kind):
    """Also where a class has the noise of Stable Diffusion by default and therefore does not list it."""
    expected = DDPMScheduler.from_config(base.scheduler.config).alphas_cumprod
    options = {} if kind is LCMScheduler else base.scheduler.config
    made = SimpleNamespace(scheduler=kind.from_config(options))
    torch.testing.assert_close(training_scheduler(made).alphas_cumprod, expected, atol=1e-5, rtol=0)


# What the loss looks at


def one_batch(base, weights=None, frozen=None, seed=0):
    scheduler = training_scheduler(base)
    generator = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    text = encode_prompt(base, "a photo of a cat", 64)
    return diffusion_loss(base.unet, scheduler, latents, text, noise, torch.tensor([10, 600]), weights, frozen)


def square():
    weights = torch.zeros(2, 1, 8, 8)
    weights[:, :, 2:6, 2:6] = 1
    return weights


def test_inside_and_outside_are_what_the_equation_says(base):
    """M (target - prediction)^2 + (1 - M) (frozen - prediction)^2; the masked loss is its first part by itself."""
    residuals = random_residuals(base)
    with torch.no_grad(), residuals.attached(base):
        everywhere, inside = one_batch(base), one_batch(base, square())
        assert torch.equal(one_batch(base, torch.ones(2, 1, 8, 8), residuals.muted), everywhere)
        both = one_batch(base, square(), residuals.muted)
        outside = one_batch(base, torch.zeros(2, 1, 8, 8), residuals.muted)  # (frozen - prediction)^2 everywhere
        rest = one_batch(base, 1 - square())
        assert torch.allclose(everywhere, 0.25 * inside + 0.75 * rest)
        assert 0.25 * inside < both < 0.25 * inside + outside and outside > 0


def test_masks_of_ones_train_as_the_paper_does_and_masks_belong_to_their_pictures(base, monkeypatch):
    ones = replace(make_concept(), masks=[Image.new("L", (64, 64), 255)] * 3)
    paper, outside = personalize(base, ones, **FAST), personalize(base, ones, **FAST, loss="outside")
    assert outside.losses == pytest.approx(paper.losses, rel=1e-6)
    concept = make_concept(masks=True)
    concept.masks[0] = Image.new("L", (64, 64))
    concept.masks[0].paste(255, (0, 0, 16, 64))  # the left quarter
    weights = training_set(base, concept, masks=True).weights
    assert weights.shape == (2, 3, 1, 8, 8) and weights[0, 0, 0].mean(0).tolist() == [1.0] * 2 + [0.0] * 6
    assert torch.equal(weights[1, 0], weights[0, 0].flip(-1))  # mirrored with its picture
    ways = [personalize(base, concept, **FAST | {"steps": 1}, loss=loss) for loss in ("paper", "masked", "outside")]
    assert not any(same(one, other) for one, other in zip(ways, ways[1:], strict=False))


def test_without_masks_the_frozen_models_attention_makes_them(pipeline, concept, tmp_path):
    before, path = digest(pipeline), tmp_path / "state.safetensors"
    masks = attended(pipeline, concept, training_set(pipeline, concept))
    assert masks.shape == (2, 3, 1, 8, 8) and set(masks.unique().tolist()) == {0, 1}
    whole = personalize(pipeline, concept, **FAST | {"steps": 2}, loss="outside")
    personalize(pipeline, concept, **FAST | {"steps": 1}, loss="outside", checkpoint=path)
    assert same(whole, personalize(pipeline, concept, **FAST | {"steps": 2}, loss="outside", checkpoint=path))
    assert digest(pipeline) == before and hooks_of(pipeline.unet) == 0


# Options


def test_on_step_samples_and_bar(base, concept, capsys, monkeypatch):
    known = training.settings_of(base)
    quick = replace(known, steps=2)
    monkeypatch.setattr(training, "settings_of", lambda base: quick)
    calls, draw = [], samples_every(2, base, concept)

    def watch(*step):
        calls.append(step[:2])
        draw(*step)

    residuals = personalize(base, concept, **FAST | {"progress": True}, on_step=watch)
    assert calls == [(i + 1, loss) for i, loss in enumerate(residuals.losses)]
    assert sorted(residuals.samples) == [2] and residuals.samples[2].size == (64, 64)
    shown = capsys.readouterr().err
    assert "personalize sks cat" in shown and f"loss={residuals.losses[-1]:.3f}" in shown
    assert base._progress_bar_config == {"disable": True}
    assert same(residuals, personalize(base, concept, **FAST))  # looking changes nothing


@pytest.mark.parametrize("failures", [1, 3])
def test_where_memory_runs_out_the_same_step_is_taken_in_smaller_pieces(sd1, concept, monkeypatch, failures):
    options = {"steps": 2, "batch_size": 4, "lr": 1e-3, "progress": False}
    whole, step, seen = personalize(sd1, concept, **options), training.step, []

    def tight(unet, *arguments, at_once, **more):
        seen.append((at_once, unet.is_gradient_checkpointing))
        if len(seen) <= failures:
            step(unet, *arguments, at_once=at_once, **more)  # also what it had begun is undone
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return step(unet, *arguments, at_once=at_once, **more)

    monkeypatch.setattr(training, "step", tight)
    with pytest.warns(notices.Notice, match="smaller pieces"):
        parts = personalize(sd1, concept, **options)
    ways = [(4, False), (2, False), (1, False), (1, True)]
    assert seen == [*ways[: failures + 1], ways[failures]], "and the next step begins where this one fitted"
    assert parts.losses == pytest.approx(whole.losses, rel=1e-3)
    for name, value in whole.named_parameters().items():
        assert (parts.named_parameters()[name] - value).abs().mean() < 0.05 * value.abs().mean(), name


def test_memory_that_does_not_suffice_for_one_picture_is_one_sentence(base, concept, monkeypatch):
    def fail(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(training, "step", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="half precision, or close what else") as caught:
        personalize(base, concept, steps=1, progress=False)
    assert str(caught.value).count("out of memory)") == 1


@pytest.mark.parametrize("loss", ["paper", "masked", "outside"])
def test_parts_of_a_step_add_up_to_the_whole(base, loss, monkeypatch):
    concept, step = make_concept(masks=True), training.step
    whole = personalize(base, concept, **FAST | {"steps": 1, "batch_size": 5}, loss=loss)
    monkeypatch.setattr(training, "step", lambda *a, at_once, **more: step(*a, at_once=2, **more))
    parts = personalize(base, concept, **FAST | {"steps": 1, "batch_size": 5}, loss=loss)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


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


@pytest.mark.parametrize(("kind", "token"), [("sd1", "zwx"), ("sdxl", "sks")])  # three pieces, one piece
def test_the_tokens_embedding_learns_on_request(kind, token, tmp_path):
    pipeline, concept = tiny_pipeline(kind), make_concept(token=token)
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


def test_a_prompt_without_the_token_is_embedded_as_before(base):
    residuals = personalize(base, make_concept(), **FAST | {"steps": 1}, train_token=True)
    before = encode_prompt(base, "a photo of a cat", 64)["encoder_hidden_states"]
    with residuals.attached(base):
        assert torch.equal(before, encode_prompt(base, "a photo of a cat", 64)["encoder_hidden_states"])
        assert not torch.equal(before, encode_prompt(base, "a photo of a sks cat", 64)["encoder_hidden_states"])


# What surrounds the call


def test_an_offloaded_base_is_refused(sd1, concept):
    cpu_offload_with_hook(sd1.unet, execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded .* load the base without offloading"):
        personalize(sd1, concept, steps=1, progress=False)


def test_words_beyond_the_limit_are_refused_before_training(base, monkeypatch):
    monkeypatch.setattr(training, "step", lambda *_, **__: pytest.fail("trained"))
    long = make_concept(macro_class="very " * 80 + "cat")
    with pytest.raises(ValueError, match="is cut off at 77, before the end of"):
        personalize(base, long, steps=1, progress=False)


def test_a_checkpoint_that_can_no_longer_be_written_does_not_end_the_training(base, concept, tmp_path, monkeypatch):
    write, count = checkpoint.write_tensors, []

    def full(*arguments):
        count.append(1)
        if len(count) > 1:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.warns(UserWarning, match="No space left .* The training goes on"):
        residuals = personalize(base, concept, steps=2, batch_size=1, checkpoint=tmp_path / "s", progress=False)
    assert len(residuals.losses) == 2
