"""Shared fixtures: a Stable Diffusion of SD-v1's shape, narrow and with random weights."""

import os

import bksdm_utils  # noqa: F401  before torch, whose threads it tells how to wait

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from bksdm_utils.config.shared import Teacher
from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.models.configs import teacher_config
from bksdm_utils.storybook.networks import SCHEDULE, new_tokenizer
from bksdm_utils.training.latents import LatentDataset

SD_V1, SD_V2, SDXL = (teacher_config(Teacher(preset=name)) for name in ("sd-v1.4", "sd-v2.1", "sdxl-base"))
NARROW = SD_V1 | {
    "sample_size": 8, "block_out_channels": [8, 16, 32, 32], "cross_attention_dim": 16, "attention_head_dim": 2,
    "norm_num_groups": 4,
}  # fmt: skip
NARROW_XL = SDXL | {
    "sample_size": 8, "block_out_channels": [8, 16, 32], "cross_attention_dim": 32, "attention_head_dim": [1, 2, 4],
    "norm_num_groups": 4, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 6 * 8,
}  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest test first, so that no process waits for it at the end."""
    items.sort(key=lambda item: "test_golden" not in item.nodeid)


@pytest.fixture
def teacher() -> UNet2DConditionModel:
    """A narrow SD-v1-shaped U-Net with random weights."""
    torch.manual_seed(1)
    return UNet2DConditionModel.from_config(NARROW).eval()


@pytest.fixture
def teacher_xl() -> UNet2DConditionModel:
    """A narrow SDXL-shaped U-Net with random weights: three stages, attentions of depth 2 and 10."""
    torch.manual_seed(1)
    return UNet2DConditionModel.from_config(NARROW_XL).eval()


def narrow_parts():
    """VAE (factor 8 as in SD-v1), tokenizer and the config of a text encoder, all narrow."""
    torch.manual_seed(1)
    tokenizer = new_tokenizer([sample_scene(i).caption for i in range(50)])
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=len(tokenizer),
        max_position_embeddings=20, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, projection_dim=16,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[4, 8, 8, 8], layers_per_block=1, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    return vae, tokenizer, text


@pytest.fixture(scope="session")
def pipeline_dir(tmp_path_factory):
    """A whole narrow Stable Diffusion, saved in diffusers format."""
    vae, tokenizer, text = narrow_parts()
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=UNet2DConditionModel.from_config(NARROW),
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("teacher")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline_xl_dir(tmp_path_factory):
    """A whole narrow SDXL, two text encoders and all, saved in diffusers format."""
    vae, tokenizer, text = narrow_parts()
    pipeline = StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=UNet2DConditionModel.from_config(NARROW_XL),
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("teacher_xl")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def narrow(tmp_path, pipeline_dir):
    """Parameters of a narrow SD-v1 teacher and eight images."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,a cat {i}\n" for i in range(8)))
    return {
        "preset": "sd-v1.4", "variant": "bk_small", "teacher": str(pipeline_dir), "train_data_dir": str(folder),
        "cache_dir": str(tmp_path / "cache"), "resolution": 64, "batch_size": 4, "gradient_accumulation_steps": 1,
        "max_train_steps": 6, "validation_steps": 2, "checkpoint_steps": 2,
    }  # fmt: skip


@contextmanager
def disk_full_beyond(size):
    """Within the block no file can grow beyond `size` bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class MemoryData(LatentDataset):
    """Latents that were never on a disk: mean and standard deviation (N, F, 4, h, w), one caption for each."""

    def __init__(self, mean, std, token_ids, empty_ids):
        self.mean, self.std, self.token_ids, self.empty_ids = mean, std, token_ids, empty_ids
        self.captions, self.shape, self._sides = ["x"] * len(mean), mean.shape[2:], mean.shape[1]
        self._num_captions, self._first_caption = torch.ones(len(mean), dtype=torch.long), torch.arange(len(mean))

    def moments(self, indices, sides):
        return self.mean[indices, sides], self.std[indices, sides]
