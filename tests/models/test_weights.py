"""Networks are loaded completely or not at all."""

import random
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DEISMultistepScheduler, EDMEulerScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel

from bksdm_utils.files import ROOT
from bksdm_utils.models.loading import load
from bksdm_utils.models.pipelines import load_pipeline, with_scheduler

PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


@pytest.fixture
def copied(pipeline_dir, tmp_path):
    return shutil.copytree(pipeline_dir, tmp_path / "teacher")


def rewrite(folder, change):
    (file,) = folder.glob("*.safetensors")
    tensors = change(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def prefixed(prefix):
    return lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_of_a_compiled_or_wrapped_network_are_understood(copied, part, prefix):
    before = load(PARTS[part], copied, subfolder=part).state_dict()
    rewrite(copied / part, prefixed(prefix))
    after = load(PARTS[part], copied, subfolder=part).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_text_encoder_loads_with_and_without_its_prefix(copied):
    before = load(CLIPTextModel, copied, subfolder="text_encoder").state_dict()
    for change in (
        lambda tensors: {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()},
        lambda tensors: {name.removeprefix("text_model."): t for name, t in tensors.items()},
        lambda tensors: tensors | {"text_model.embeddings.position_ids": torch.arange(8)[None]},
    ):
        rewrite(copied / "text_encoder", change)
        after = load(CLIPTextModel, copied, subfolder="text_encoder").state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


def damaged(tensors, rng):
    name = rng.choice(sorted(tensors))
    kind, tensor = rng.choice(["renamed", "dropped", "reshaped"]), tensors[name]
    rest = {other: value for other, value in tensors.items() if other != name}
    if kind == "renamed":
        return rest | {f"{name}_{rng.random()}": tensor}, name
    return (rest if kind == "dropped" else rest | {name: torch.zeros(*tensor.shape, 2)}), name


@pytest.mark.parametrize("part", PARTS)
def test_no_network_loads_with_a_tensor_renamed_dropped_or_reshaped(copied, part):
    rng = random.Random(part)
    (file,) = (copied / part).glob("*.safetensors")
    tensors = load_file(file)
    for turn in range(34):
        changed, name = damaged(tensors, rng)
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="another model's, or damaged|could not be loaded") as error:
            load(PARTS[part], copied, subfolder=part)
        assert name.split(".")[-1] in str(error.value) or name in str(error.value)
        if turn % 4 == 0:  # slower
            with pytest.raises(ValueError, match="could not be loaded"):
                load_pipeline(copied)


def test_a_metric_network_with_a_renamed_tensor_is_refused(tmp_path):
    folder = shutil.copytree(ROOT / "data" / "storybook" / "clip", tmp_path / "clip")
    rewrite(folder, lambda tensors: {name.replace("final_layer_norm.weight", "final.weight"): t
                                     for name, t in tensors.items()})  # fmt: skip
    with pytest.raises(ValueError, match="lacks .*final_layer_norm.weight.*has unknown .*final.weight"):
        load(CLIPModel, folder)


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_a_teacher_in_one_variant_only_is_loaded(copied, variant):
    before = load_pipeline(copied).unet.state_dict()
    for file in copied.glob("*/*.safetensors"):
        file.rename(file.with_suffix(f".{variant}.safetensors"))
    after = load_pipeline(copied).unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def saved_with(copied, scheduler):
    shutil.rmtree(copied / "scheduler")
    scheduler.save_pretrained(copied / "scheduler")
    index = (copied / "model_index.json").read_text()
    (copied / "model_index.json").write_text(index.replace("PNDMScheduler", type(scheduler).__name__))
    return copied


def test_a_noise_schedule_without_betas_is_refused(copied):
    with pytest.raises(ValueError, match="EDMEulerScheduler.*no EDM, no flow matching"):
        load_pipeline(saved_with(copied, EDMEulerScheduler()))


def test_another_scheduler_keeps_the_noise_schedule_or_is_refused(copied):
    zero_snr = load_pipeline(saved_with(copied, DDIMScheduler(rescale_betas_zero_snr=True, beta_end=0.013)))
    for name in ("dpm++", "euler", "ddim", "lcm"):
        scheduler = with_scheduler(zero_snr, name).scheduler
        assert scheduler.config.rescale_betas_zero_snr and scheduler.config.beta_end == 0.013
    with pytest.raises(ValueError, match="pndm, which has no rescale_betas_zero_snr"):
        with_scheduler(zero_snr, "pndm")


def test_a_solvers_own_names_do_not_reach_another_one(copied):
    deis = load_pipeline(saved_with(copied, DEISMultistepScheduler()))
    assert with_scheduler(deis, "dpm++").scheduler.config.algorithm_type == "dpmsolver++"


def test_an_inpainting_unet_is_refused_before_anything_is_encoded(copied, teacher):
    config = dict(teacher.config) | {"in_channels": 9}
    shutil.rmtree(copied / "unet")
    UNet2DConditionModel.from_config(config).save_pretrained(copied / "unet")
    with pytest.raises(ValueError, match="takes 9 channels, its autoencoder makes 4.*inpainting"):
        load_pipeline(copied)
