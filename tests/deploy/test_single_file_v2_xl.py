"""SD-v2 and SDXL, and their students, in one file: read back complete and equal."""

from pathlib import Path

import pytest
import torch
import yaml
from conftest import NARROW_XL, SD_V2, narrow_parts
from diffusers import (
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from bksdm_utils.core.surgery import build_student
from bksdm_utils.deploy.single_file import save_single_file
from bksdm_utils.models.pipelines import load_pipeline, with_unet
from bksdm_utils.storybook.networks import SCHEDULE


def narrow_v2():
    """SD-v2's shape: a linear projection, heads of one width, a text encoder whose 24th layer was left out."""
    vae, tokenizer, text = narrow_parts()
    text.num_hidden_layers = 23
    shape = {"sample_size": 8, "block_out_channels": [8, 16, 32, 32], "cross_attention_dim": 16,
             "attention_head_dim": [1, 2, 4, 4], "norm_num_groups": 4}  # fmt: skip
    unet = UNet2DConditionModel.from_config(SD_V2 | shape)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1, prediction_type="v_prediction"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def narrow_xl():
    """SDXL's shape: two text encoders of different widths, of which the second is OpenCLIP's."""
    vae, tokenizer, text = narrow_parts()
    text.num_hidden_layers = 11  # a file is known as SDXL by its second encoder's tenth layer
    second = CLIPTextConfig.from_dict({**text.to_dict(), "hidden_size": 24, "hidden_act": "gelu"})
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=EulerDiscreteScheduler(**SCHEDULE),
        unet=UNet2DConditionModel.from_config(NARROW_XL | {"cross_attention_dim": 40}),
    )  # fmt: skip


def written(pipeline, variant, folder):
    """A pipeline or its student, and what is read from its file."""
    torch.manual_seed(0)
    model = with_unet(pipeline, build_student(pipeline.unet, variant)) if variant else pipeline
    save_single_file(model, folder / "file", "model")
    return model, load_pipeline(folder / "file" / "model.safetensors"), load_file(folder / "file" / "model.safetensors")


def check_equal(model, loaded, **options):
    for part in ("vae", "text_encoder", "text_encoder_2"):
        if hasattr(model, part):
            before, after = getattr(model, part).state_dict(), getattr(loaded, part).state_dict()
            assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    images = [pipeline("a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np",
                       **options).images for pipeline in (model, loaded)]  # fmt: skip
    assert abs(images[0] - images[1]).max() < 1e-4


@pytest.mark.parametrize("variant", [None, "bk_base", "bk_tiny"])
def test_sd_v2_in_one_file_is_the_same(variant, tmp_path):
    model, loaded, tensors = written(narrow_v2(), variant, tmp_path)
    check_equal(model, loaded)
    start = "cond_stage_model.model."
    assert {
        f"{start}positional_embedding",
        f"{start}ln_final.weight",
        f"{start}token_embedding.weight",
        "v_pred",
    } <= set(tensors)
    assert tensors[f"{start}transformer.resblocks.0.attn.in_proj_weight"].shape == (48, 16)
    assert not tensors[f"{start}transformer.resblocks.23.mlp.c_proj.weight"].any()  # of the layer that is not used
    described = yaml.safe_load(Path(tmp_path, "file", "model.yaml").read_text())["model"]["params"]
    assert described["cond_stage_config"]["params"]["layer"] == "penultimate" and described["parameterization"] == "v"
    assert described["unet_config"]["params"]["num_head_channels"] == 8


@pytest.mark.parametrize("variant", [None, "bk_sdxl_small", "koala_700m"])
def test_sdxl_in_one_file_is_the_same(variant, tmp_path):
    model, loaded, tensors = written(narrow_xl(), variant, tmp_path)
    check_equal(model, loaded, height=64, width=64)
    assert {"model.diffusion_model.label_emb.0.0.weight", "model.diffusion_model.label_emb.0.2.bias",
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
            "conditioner.embedders.1.model.text_projection"} <= set(tensors)  # fmt: skip
    assert not (tmp_path / "file" / "model.yaml").exists()
