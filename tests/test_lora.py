"""Residuals as LoRA files: written for bare diffusers and kohya's readers, and read back."""

from __future__ import annotations

import json
import math
import time
from random import Random

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
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
    residuals.token_embeddings = {"text_encoder": torch.nn.Parameter(torch.zeros(1, 32))}
    with pytest.raises(ValueError, match="a LoRA file has no place for it"):
        export_lora(residuals, tmp_path / "cat.safetensors")
    assert not list(tmp_path.iterdir())


def kind_of(base):
    if hasattr(base, "text_encoder_2"):
        return "sdxl"
    return "sd2" if base.unet.config.use_linear_projection else "sd1"


# Which family a file belongs to


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("kind", "prediction", "version"),
    [
        ("sd1", "epsilon", "sd_v1"),
        ("sd2", "epsilon", "sd_v2"),
        ("sd2", "v_prediction", "sd_v2_v"),
        ("sdxl", "epsilon", "sdxl_base_v1-0"),
    ],
)
def test_other_tools_file_it_under_the_right_family(unets, tmp_path, format, kind, prediction, version):
    """As A1111 tells them apart: "sdxl_" at the beginning, else `ss_v2` is "True", else Stable Diffusion 1."""
    residuals = make_residuals(unets[kind])
    residuals.metadata["prediction_type"] = prediction
    export_lora(residuals, tmp_path / "cat.safetensors", format)
    with safe_open(tmp_path / "cat.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == version
    assert metadata["ss_v2"] == str(kind == "sd2")
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
    *(f"input_blocks_{number}_1" for number in (4, 5, 7, 8)),
    "middle_block_1",
    *(f"output_blocks_{number}_1" for number in range(6)),
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
        expected = sample(sdxl, PROMPT)
    sdxl.load_lora_weights(str(path))  # diffusers reads them in the same way
    torch.testing.assert_close(sample(sdxl, PROMPT), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_the_original_blocks(unets, kind, tmp_path):
    """input_blocks: three for each block, the last of them halves the size; the very first one is conv_in."""
    residuals, path = make_residuals(unets[kind]), tmp_path / "comfy.safetensors"
    export_lora(residuals, path, "kohya")

    def rename(tensors, metadata):
        for key in list(tensors):
            head, rest = key.removeprefix("lora_unet_").split(".", 1)
            part, number, _, layer = head.replace("mid_block", "mid_block_0").split("_", 1)[1].split("_")[:4]
            index = 3 * int(number) + int(layer)
            place = {"d": f"input_blocks.{index + 1}.1", "m": "middle_block.1", "u": f"output_blocks.{index}.1"}
            tensors[f"diffusion_model.{place[head[0]]}.proj_out.{rest}"] = tensors.pop(key)

    again = import_lora(rewritten(path, rename), unets[kind])
    assert all(torch.equal(again.delta(name), residuals.delta(name)) for name in residuals.A)


BESIDE = {
    "dora_scale": torch.ones(64, 1),
    "lora_mid.weight": torch.ones(6, 6, 1, 1),
    "hada_w1_a": torch.ones(64, 2),
    "lokr_w1": torch.ones(2, 2),
    "oft_blocks": torch.ones(2, 2, 2),
    "bias": torch.ones(64),
    "diff_b": torch.ones(64),
    "scale": torch.tensor(0.5),
    "lora_up.bias": torch.ones(64),
    "lora_up.weight_scale": torch.ones(1),
    "alpha_2": torch.ones(1),
    "lora_up.weight\n": torch.ones(64, 6, 1, 1),
}


@pytest.mark.parametrize("name", [*BESIDE, "lora_magnitude_vector.weight", "lora_B.bias", "base_layer.weight"])
@pytest.mark.parametrize("only_proj_out", [False, True])
def test_a_tensor_that_changes_what_the_factors_mean_is_refused(unets, tmp_path, name, only_proj_out):
    path = tmp_path / "cat.safetensors"
    export_lora(make_residuals(unets["sd1"]), path, "kohya" if name in BESIDE else "diffusers")
    head = MID_KOHYA if name in BESIDE else f"unet.{MID}"
    beside = BESIDE.get(name, torch.ones(64))
    rewritten(path, lambda tensors, metadata: tensors.update({f"{head}.{name}": beside}))
    with pytest.raises(ValueError, match=r"is no plain LoRA: '.*proj_out.* another meaning than A B"):
        import_lora(path, unets["sd1"], only_proj_out=only_proj_out)


def test_two_loras_in_one_file_are_refused(unets, tmp_path):
    path = tmp_path / "cat.safetensors"
    export_lora(make_residuals(unets["sd1"]), path)

    def second(tensors, metadata):
        tensors[f"unet.{MID}.lora_A.other.weight"] = tensors[f"unet.{MID}.lora_A.weight"] * 2

    with pytest.raises(ValueError, match=f"holds more than one LoRA for '{MID}'"):
        import_lora(rewritten(path, second), unets["sd1"])


def quantized(tensors):
    tensors[f"{MID_KOHYA}.lora_up.weight"] = tensors[f"{MID_KOHYA}.lora_up.weight"].mul(100).to(torch.int8)


def packed(tensors):
    tensors[f"{MID_KOHYA}.lora_up.weight"] = torch.zeros(64, 6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


def broadcast(tensors):
    tensors[f"{MID_KOHYA}.lora_up.weight"] = tensors[f"{MID_KOHYA}.lora_up.weight"][:, :1]


def other_ranks(tensors):
    tensors[f"{MID_KOHYA}.lora_up.weight"] = tensors[f"{MID_KOHYA}.lora_up.weight"][:, :4]


def no_rank(tensors):
    for factor, shape in (("up", (64, 0, 1, 1)), ("down", (0, 64, 1, 1))):
        tensors[f"{MID_KOHYA}.lora_{factor}.weight"] = torch.zeros(shape)


def wide_kernel(tensors):
    tensors[f"{MID_KOHYA}.lora_down.weight"] = torch.zeros(6, 64, 3, 3)


def no_matrix(tensors):
    tensors[f"{MID_KOHYA}.lora_down.weight"] = torch.tensor(0.5)


def flipped(tensors):
    """One bit of an exponent: 0.06 becomes 2e37."""
    down = tensors[f"{MID_KOHYA}.lora_down.weight"]
    down.view(torch.int32).flatten()[down.abs().argmax()] ^= 1 << 30


def infinite(tensors):
    tensors[f"{MID_KOHYA}.lora_down.weight"][0, 0] = math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantized, r"no plain LoRA: 'lora_unet_mid.*\(int8\)"),
        pytest.param(
            packed,
            r"as float4_e2m1fn_x2, which cannot be read here: save it as fp16",
            marks=pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="newer than this torch"),
        ),
        (broadcast, r"has factors \(64, 1, 1, 1\) and \(6, 64, 1, 1\) for 'mid_block"),
        (other_ranks, r"has factors \(64, 4, 1, 1\) and \(6, 64, 1, 1\)"),
        (no_rank, r"has factors \(64, 0, 1, 1\) and \(0, 64, 1, 1\)"),
        (wide_kernel, r"has factors \(64, 6, 1, 1\) and \(6, 64, 3, 3\)"),
        (no_matrix, r"has factors \(64, 6, 1, 1\) and \(\)"),
        (flipped, r"would change weights of 'mid_block.* by up to .e\+3\d, where the weights are about 1"),
        (infinite, "holds NaN or infinity"),
    ],
)
def test_factors_that_cannot_be_meant_are_refused(unets, tmp_path, change, message):
    path = tmp_path / "cat.safetensors"
    export_lora(make_residuals(unets["sd1"]), path, "kohya")
    with pytest.raises(ValueError, match=message):
        import_lora(rewritten(path, lambda tensors, metadata: change(tensors)), unets["sd1"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_above_the_width_is_the_same_product(kind, tmp_path):
    base = tiny_pipeline(kind)
    _, state = lora_by_peft(base, ["proj_out"], {MID: 80})  # of width 64
    theirs = sample(base, PROMPT)
    type(base).save_lora_weights(tmp_path, unet_lora_layers=state)
    fresh = tiny_pipeline(kind)
    residuals = import_lora(tmp_path / "pytorch_lora_weights.safetensors", fresh)
    assert residuals.ranks[MID] == 64
    with residuals.attached(fresh):
        ours = sample(fresh, PROMPT)
    assert (theirs - sample(fresh, PROMPT)).abs().max() > 0.1
    # By hand, because diffusers before 0.40 scales a file of mixed rank without alphas wrongly (#14409).
    for name in (name for name in state if name.endswith(".lora_A.weight")):
        weight = fresh.unet.get_submodule(name.removesuffix(".lora_A.weight")).weight
        product = state[name.replace("lora_A", "lora_B")].flatten(1) @ state[name].flatten(1)
        weight.data += product.reshape(weight.shape)
    torch.testing.assert_close(ours, sample(fresh, PROMPT), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_in_few_bits(unets, tmp_path, dtype):
    residuals, path = make_residuals(unets["sd1"]), tmp_path / "cat.safetensors"
    export_lora(residuals, path, "kohya")

    def narrow(tensors, metadata):
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.ndim}

    again = import_lora(rewritten(path, narrow), unets["sd1"])
    for name in residuals.A:
        assert torch.equal(again.A[name], residuals.A[name].to(dtype).float())


# Alphas


@pytest.mark.parametrize("value", [0.0, -4.0, 1e9, [1.0, 2.0], b"4"])
def test_an_alpha_that_is_no_positive_number_is_refused(unets, tmp_path, value):
    path = tmp_path / "cat.safetensors"
    export_lora(make_residuals(unets["sd1"]), path, "kohya")
    alpha = torch.frombuffer(bytearray(value * 3), dtype=torch.uint8) if isinstance(value, bytes) else value
    rewritten(path, lambda tensors, metadata: tensors.update({f"{MID_KOHYA}.alpha": torch.as_tensor(alpha)}))
    with pytest.raises(ValueError, match=f"has the alpha .* for '{MID}', where a positive number belongs"):
        import_lora(path, unets["sd1"])


def with_config(path, config):
    """The diffusers file with other entries beside its tensors."""

    def change(tensors, metadata):
        metadata["lora_adapter_metadata"] = config if isinstance(config, str) else json.dumps(config)

    return rewritten(path, change)


ALPHA = f"has the alpha .* for '{MID}', where a positive number belongs"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"unet.lora_alpha": "8"}, "has the alpha '8' for"),
        ({"unet.lora_alpha": None}, "has the alpha 'None' for"),
        ({"unet.lora_alpha": math.nan}, "has the alpha 'nan' for"),
        ({"unet.lora_alpha": True}, "has the alpha 'True' for"),
        ({"unet.lora_alpha": 10**400}, "has the alpha '1000"),
        ({"unet.alpha_pattern": {MID: -1}}, ALPHA),
        ({"unet.alpha_pattern": {MID: {}}}, ALPHA),
        ({"unet.alpha_pattern": [MID]}, "has an alpha_pattern that is no table"),
        ({"unet.use_dora": True}, "asks for use_dora: that is no plain LoRA"),
        ({"unet.lora_bias": True}, "asks for lora_bias"),
        ({"unet.init_lora_weights": "pissa_niter_4"}, "factors belong to a base that it had changed"),
        ("{", "cannot be read: it should be PEFT's configuration, a JSON object"),
        ("[]", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"unet.lora_alpha": ' + "9" * 5000 + "}", "cannot be read|has the alpha"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(unets, tmp_path, config, message):
    path = tmp_path / "cat.safetensors"
    export_lora(make_residuals(unets["sd1"]), path)
    with pytest.raises(ValueError, match=message):
        import_lora(with_config(path, config), unets["sd1"])


def test_a_file_never_brings_a_regular_expression(unets, tmp_path):
    path = tmp_path / "cat.safetensors"
    export_lora(make_residuals(unets["sd1"]), path)
    start = time.perf_counter()
    for pattern in ("(([a-z0-9_.])+)+X", "([a-z0-9_.]*)*X", "mid|up", "up_blocks.[12].*", "(?i)mid", ".*.*.*X", "\\d+"):
        with pytest.raises(ValueError, match="has the regular expression .* a file does not get to run one"):
            import_lora(with_config(path, {"unet.alpha_pattern": {pattern: 3}}), unets["sd1"])
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        (MID, [MID]),
        ("attentions.0.proj_out", ["down_blocks.0.attentions.0.proj_out", MID]),
        (f"^{MID}", [MID]),
        ("^attentions.0.proj_out", []),
        (MID.replace(".", "\\."), [MID]),
        ("mid_block.*", [MID]),
        ("mid_block.*.proj_out$", [MID]),
        ("block.attentions.0.proj_out", []),
        ("proj_in", []),
    ],
)
def test_names_in_a_configuration_mean_what_they_mean_to_peft(unets, tmp_path, pattern, hits):
    residuals, path = make_residuals(unets["sd1"]), tmp_path / "cat.safetensors"
    export_lora(residuals, path)
    config = {"unet.lora_alpha": 6, "unet.alpha_pattern": {pattern: 60}}
    again = import_lora(with_config(path, config), unets["sd1"])
    for name in ("down_blocks.0.attentions.0.proj_out", MID, "up_blocks.1.attentions.1.proj_out"):
        ratio = (again.delta(name).norm() / residuals.delta(name).norm()).item() * residuals.ranks[name]
        assert ratio == pytest.approx(60 if name in hits else 6, rel=1e-3), name
        assert (get_pattern_key([pattern], name) == pattern) == (name in hits), "as PEFT itself takes it"


def test_alphas_that_are_stated_twice_or_left_to_pefts_default(unets, tmp_path):
    residuals, path = make_residuals(unets["sd1"]), tmp_path / "cat.safetensors"
    export_lora(residuals, path)
    again = import_lora(with_config(path, {"unet.r": 6}), unets["sd1"])
    ratio = again.delta(MID).norm() / residuals.delta(MID).norm()
    assert ratio.item() == pytest.approx(LoraConfig().lora_alpha / 6, rel=1e-3)
    rewritten(path, lambda tensors, metadata: tensors.update({f"unet.{MID}.alpha": torch.tensor(3.0)}))
    with pytest.raises(ValueError, match="states its alphas twice"):
        import_lora(path, unets["sd1"])


# Whatever a file holds


def test_no_damage_gives_anything_but_one_sentence(unets, tmp_path):
    """Bits, names, shapes, kinds and metadata changed at random: read, or refused as a ValueError."""
    base, random = tiny_pipeline("sd1"), Random(0)
    residuals = make_residuals(base)
    for format in FORMATS:
        export_lora(residuals, tmp_path / f"{format}.safetensors", format)
    residuals.losses = [0.5, 0.25]
    residuals.token_embeddings = {"text_encoder": torch.nn.Parameter(torch.randn(1, 32))}
    residuals.save(tmp_path / "native.safetensors")
    words = ["", "nan", "-1", "1e999", "{", "[]", "null", '{"a":' * 3000, "9" * 5000, "\u0000", "é"]
    kinds = [torch.float16, torch.float8_e4m3fn, torch.float64, torch.int8, torch.bool, torch.complex64, torch.uint8]
    for number in range(300):
        name = random.choice(["native", *FORMATS])
        path = tmp_path / "damaged.safetensors"
        if number % 2:
            content = bytearray((tmp_path / f"{name}.safetensors").read_bytes())
            for _ in range(random.choice((1, 1, 3, 30))):
                reach = random.choice((8, 200, 4000, len(content)))
                content[random.randrange(reach)] = random.randrange(256)
            path.write_bytes(content[: random.choice((len(content), len(content), random.randrange(len(content))))])
        else:
            tensors = load_file(tmp_path / f"{name}.safetensors")
            with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
                metadata = file.metadata()
            key, other = random.choice(list(tensors)), random.choice(list(metadata))
            tensor = tensors[key]
            change = random.randrange(6)
            if change == 0:
                metadata[other] = random.choice(words)
            elif change == 1:
                del metadata[other]
            elif change == 2:
                tensors[key] = tensor.to(random.choice(kinds))
            elif change == 3:
                tensors[key] = random.choice(
                    [tensor[None], tensor[None][:0], tensor.flatten()[:1], tensor.flatten(), tensor * 1e20]
                )
            elif change == 4:
                tensors[random.choice((key[:-1], key + "x", key.split(".")[0], "."))] = tensors.pop(key)
            else:
                del tensors[key]
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
        try:
            (Residuals.load if name == "native" else import_lora)(path, base)
        except ValueError as error:
            assert str(path) in str(error) and str(error).endswith("."), error
