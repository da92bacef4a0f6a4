"""What a run needs is estimated before it starts, near to what runs take, and training fits itself to the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from persres_lite import cost, personalize, training
from persres_lite.course import start as notebook
from persres_lite.support import notices
from tests.helpers import make_concept
from tests.tiny import tiny_pipeline

T4 = 14.5
"""GiB that a T4 has free before anything is loaded."""

MEASURE = """
import json
import sys
import torch
from diffusers import DDPMScheduler
from persres_lite import Residuals
from persres_lite.cost import GIB, memory
from data.make.bench_runs import random_unet, reset_peak, resident_peak
from persres_lite.support.checkpoint import State
from persres_lite.training import TrainingSet, _ready, _step

batch, checkpointing, config = json.loads(sys.argv[1])
size = config["sample_size"]
unet = random_unet(torch.device("cpu"), cross_attention_dim=64, **config)
residuals = Residuals(unet, rank=0.05)
learned = residuals.named_parameters()
scaler = torch.amp.GradScaler("cpu", enabled=False)
generator = torch.Generator().manual_seed(0)
state = State(learned, torch.optim.Adam(learned.values()), generator, scaler, [])
data = TrainingSet(torch.randn(2, batch, 4, size, size), None, None)
text = {"encoder_hidden_states": torch.randn(1, 77, 64)}
with _ready(unet, checkpointing), residuals.attached(unet):
    _step(unet, DDPMScheduler(), data, text, state, 1, None)  # what libraries set up once is none of a step's memory
    before = reset_peak()
    _step(unet, DDPMScheduler(), data, text, state, batch, None)
need = memory(unet.config, {}, 0, size=8 * size, bytes=4, batch=batch, checkpointing=checkpointing)
print((resident_peak() - before) / GIB, need.training)
"""


SD = {"block_out_channels": (64, 128, 256, 256), "sample_size": 32}
WIDE = {"block_out_channels": (128, 256, 512, 512), "sample_size": 32}
LARGE = {"block_out_channels": (64, 128, 256, 256), "sample_size": 48}
XL = {
    "block_out_channels": (64, 128, 256),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "sample_size": 32,
}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is forgotten on Linux only")
@pytest.mark.parametrize(
    "batch, checkpointing, config", [(4, False, SD), (6, True, SD), (3, True, LARGE), (4, True, WIDE), (12, True, XL)]
)
def test_the_estimate_is_near_what_a_training_step_takes(batch, checkpointing, config):
    """What is freed goes back to the system at once, so that the peak is what is alive.

    By itself glibc raises its threshold for that to the size of what was freed last, and keeps the rest in a heap with
    holes between the blocks' inputs: a checkpointed step then has twice its memory, of which half is unused.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([batch, checkpointing, config])],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured, estimated = map(float, done.stdout.split())
    assert measured > 0.1, "too little to be told from what else a process does"
    assert 1 / 1.5 < estimated / measured < 1.5


def saved_bytes(pipeline, **options) -> int:
    """What a training step keeps for its backward pass, weights aside."""
    found: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in pipeline.unet.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        personalize(pipeline, make_concept(), steps=1, progress=False, **options)
    return sum(found.values())


def test_less_at_once_and_checkpointing_need_less():
    sizes = {"size": 512, "bytes": 2}
    for base in ("sd-1.4", "sd-2.1", "sdxl"):
        one, four = (cost.memory_of(base, batch=batch, **sizes).training for batch in (1, 4))
        small = cost.memory_of(base, batch=4, checkpointing=True, **sizes).training
        assert four == pytest.approx(4 * one) and small < four / 2


@pytest.mark.parametrize("base", ["sd-1.4", "sd-2.1", "sdxl"])
def test_the_known_configurations_are_whole(base):
    """The number of blocks that learn is the one of the library's own U-Net of that configuration."""
    unet, _, parameters = cost.KNOWN[base]
    blocks = [kind for kind, *_ in cost._blocks(unet, 64 * 64)]
    assert blocks.count("attention") == {"sd-1.4": 16, "sd-2.1": 16, "sdxl": 11}[base]
    assert parameters > 1e9


def test_the_number_of_parameters_is_the_librarys():
    unet, vae, parameters = cost.KNOWN["sd-1.4"]
    with torch.device("meta"):
        first = UNet2DConditionModel(cross_attention_dim=768)
        second = AutoencoderKL(
            block_out_channels=vae["block_out_channels"],
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
    assert list(first.config.block_out_channels) == list(unet["block_out_channels"])
    assert tuple(first.config.down_block_types) == unet["down_block_types"]
    text = 123_060_480
    assert sum(p.numel() for model in (first, second) for p in model.parameters()) + text == parameters


def test_what_fits_a_t4_by_itself():
    as_it_is = {"at_once": 4, "gradient_checkpointing": False}
    assert cost.fitting("sd-1.4", 4, T4) == cost.fitting("sd-2.1", 4, T4) == as_it_is
    small = {"at_once": 1, "gradient_checkpointing": True}
    assert cost.fitting("sdxl", 4, T4) == small
    assert cost.memory_of("sdxl", batch=1, checkpointing=True).to_train < T4
    assert cost.memory_of("sdxl", decoded=4).to_sample > T4 > cost.memory_of("sdxl").to_sample
    assert cost.fitting("sdxl", 4, 79.0) == cost.fitting("sdxl", 4, None) == as_it_is
    assert cost.fitting("some/one", 4, 1.0) == as_it_is, "nothing is known of it"


def test_a_folder_and_a_loaded_base_say_the_same(tmp_path):
    pipeline = tiny_pipeline("sdxl")
    pipeline.save_pretrained(tmp_path)
    options = {"size": 64, "bytes": 4, "scale_factor": 4}
    assert cost.memory_of(tmp_path, **options) == cost.memory_of(pipeline, **options)
    (tmp_path / "unet" / "config.json").write_text("[]")
    assert cost.memory_of(tmp_path) is None, "who loads it says what is wrong"


@pytest.fixture
def t4(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(T4 * cost.GIB), int(T4 * cost.GIB)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)


def test_it_is_said_before_a_run(t4, monkeypatch, capsys):
    monkeypatch.setattr(notebook, "describe", lambda base: base)
    notebook.start("sdxl")
    said = capsys.readouterr().out
    assert "to train with gradient checkpointing and 1 picture at a time of 4; 14.5 GiB are free." in said
    assert "may not fit" not in said
    assert "to train as it is" in cost.on_gpu("sd-1.4")
    assert cost.on_gpu("toybox") is None and cost.on_gpu("some/one") is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 * cost.GIB, 0))
    assert cost.on_gpu("sdxl").endswith("That may not fit: close what else uses the GPU, or choose a smaller base.")


@pytest.mark.parametrize("masked_loss", [False, True])
def test_parts_of_a_step_add_up_to_the_whole(masked_loss):
    pipeline, concept = tiny_pipeline("sd1"), make_concept(masks=True)
    options = {"steps": 2, "batch_size": 5, "lr": 1e-3, "masked_loss": masked_loss, "progress": False}
    whole = personalize(pipeline, concept, **options)
    for at_once in (1, 2):
        parts = personalize(pipeline, concept, **options, at_once=at_once)
        assert parts.losses == pytest.approx(whole.losses, rel=1e-3)
        for name, value in whole.named_parameters().items():
            change = (parts.named_parameters()[name] - value).abs().mean()
            assert change < 0.05 * value.abs().mean(), name
    assert saved_bytes(pipeline, batch_size=4, at_once=1) < saved_bytes(pipeline, batch_size=4)


def test_training_takes_the_small_way_by_itself_and_only_if_nothing_is_named(monkeypatch):
    pipeline, concept, seen = tiny_pipeline("sd1"), make_concept(), []
    original = training._step

    def step(unet, *arguments):
        seen.append((arguments[-1], unet.is_gradient_checkpointing))
        return original(unet, *arguments)

    monkeypatch.setattr(training, "_step", step)
    monkeypatch.setattr(training, "fitting", lambda *_: {"at_once": 1, "gradient_checkpointing": True})
    monkeypatch.setattr(notices, "_said", set())
    options = {"steps": 1, "batch_size": 4, "progress": False}
    with pytest.warns(notices.Notice, match="taken by single pictures, checkpointed"):
        personalize(pipeline, concept, **options)
    personalize(pipeline, concept, **options, at_once=2)
    personalize(pipeline, concept, **options, gradient_checkpointing=False)
    assert seen == [(1, True), (2, False), (4, False)]
    assert not pipeline.unet.is_gradient_checkpointing
    with pytest.raises(ValueError, match="at_once must be at least 1, not 0"):
        personalize(pipeline, concept, **options, at_once=0)


def test_the_rooms_of_a_gpu(t4, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * cost.GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: cost.GIB)
    assert cost.room() == pytest.approx(T4 + 1), "what torch holds unused is free for it"
