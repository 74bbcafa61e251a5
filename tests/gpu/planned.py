"""Training steps of real size on the stub GPU, whose allocator counts what the memory planner foretells.

Weights are memory that nothing was written to, and kernels do nothing: a step of Stable Diffusion takes two seconds.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from gpu.cases import Place, case
from PIL import Image

from bksdm_utils.config.dreambooth import DreamBoothTraining
from bksdm_utils.config.plan_files import find_plan
from bksdm_utils.config.training import KDTraining
from bksdm_utils.core.copying import empty_unet
from bksdm_utils.core.families import text_encoder_names
from bksdm_utils.core.plans import RemovalPlan, Stage, student_config
from bksdm_utils.costs.counting import empty_text_encoder, empty_vae
from bksdm_utils.costs.planner import Memory, distillation_memory
from bksdm_utils.dreambooth import job as dreambooth_job
from bksdm_utils.dreambooth.planning import dreambooth_memory
from bksdm_utils.models.configs import teacher_config
from bksdm_utils.models.pipelines import with_unet
from bksdm_utils.training import job as kd_job
from bksdm_utils.training.trainer import Trainer

# Plans that are no named variant: one stage whole and no mid block; an SDXL student of shallow attentions.
FREE = RemovalPlan("free", (Stage((0, 1), (0, 1, 2)), Stage((0,), (0, 2)), Stage((0,), (0, 2))), mid=False)
FREE_XL = RemovalPlan("free_xl", (Stage((0,), (0, 2)), Stage((0,), (0, 2), 1), Stage((0,), (0, 2), 3)), mid=True)
CHECKPOINTING, XL = {"gradient_checkpointing": True}, {"preset": "sdxl-base", "batch_size": 2}
KD = {  # parameters of notebook 03; where they say nothing else: SD-v1.4, bk_base, micro-batch 8
    "kd_bk_base": {},
    "kd_bk_base_checkpointing": CHECKPOINTING,
    "kd_bk_base_1": {"batch_size": 1},
    "kd_bk_base_64": {"batch_size": 64},
    "kd_bk_base_64_checkpointing": {"batch_size": 64, **CHECKPOINTING},
    "kd_bk_small": {"variant": "bk_small"},
    "kd_bk_tiny_64": {"variant": "bk_tiny", "batch_size": 64},
    "kd_bk_tiny_checkpointing": {"variant": "bk_tiny", **CHECKPOINTING},
    "kd_full_norms": {"low_precision_norms": False},
    "kd_fp32": {"mixed_precision": "no"},
    "kd_fp32_checkpointing": {"mixed_precision": "no", **CHECKPOINTING},
    "kd_fp16": {"mixed_precision": "fp16"},
    "kd_ema_on_the_cpu": {"ema_device": "cpu"},
    "kd_no_ema_one_micro_batch": {"ema_decay": 0.0, "gradient_accumulation_steps": 1},
    "kd_task_loss_alone": {"lambda_kd_output": 0.0, "lambda_kd_feat": 0.0},
    "kd_sd2_base": {"preset": "sd-v2.1-base"},
    "kd_sd2": {"preset": "sd-v2.1", "batch_size": 4},
    "kd_free_plan": {"variant": FREE},
    "kd_free_plan_xl": {"variant": FREE_XL, **XL},
    "kd_free_plan_xl_checkpointing": {"variant": FREE_XL, **XL, **CHECKPOINTING},
    "kd_koala_self_attention": {"variant": "koala_700m", "kd": "self_attention", **XL},
    "kd_bk_sdxl_base": {"variant": "bk_sdxl_base", **XL},
    "kd_storybook": {"preset": "storybook", "variant": "bk_small", "batch_size": 16},
    "kd_storybook_64": {"preset": "storybook", "variant": "bk_tiny", "batch_size": 64},
}
NO_TEXT_NO_PRIOR = {"train_text_encoder": False, "prior_loss_weight": 0.0}
DREAMBOOTH = {  # parameters of notebook 05; where they say nothing else: SD-v1.4, micro-batch 1 of subject and class
    "dreambooth_full": {"methods": "full"},
    "dreambooth_full_4": {"methods": "full", "batch_size": 4},
    "dreambooth_full_checkpointing": {"methods": "full", "batch_size": 4, **CHECKPOINTING},
    "dreambooth_full_unet_alone": {"methods": "full", "batch_size": 2, **NO_TEXT_NO_PRIOR},
    "dreambooth_full_fp32_ema": {"methods": "full", "mixed_precision": "no", "ema_decay": 0.99},
    "dreambooth_full_sd2": {"methods": "full", "preset": "sd-v2.1"},
    "dreambooth_lora": {"methods": "lora"},
    "dreambooth_lora_4": {"methods": "lora", "batch_size": 4},
    "dreambooth_lora_checkpointing": {"methods": "lora", "batch_size": 4, **CHECKPOINTING},
    "dreambooth_lora_unet_alone": {"methods": "lora", "batch_size": 2, **NO_TEXT_NO_PRIOR},
    "dreambooth_lora_student": {"methods": "lora", "models": "student", "gradient_accumulation_steps": 2},
    "dreambooth_lora_storybook": {"methods": "lora", "preset": "storybook"},
}
SCHEDULE = DDPMScheduler(steps_offset=1, clip_sample=False)


def planned(name: str, folder: Path) -> Memory:
    """What the planner says of a case."""
    if name in KD:
        return distillation_memory(kd_parameters(name, folder))
    config = dreambooth_parameters(name)
    return dreambooth_memory(config, [config.batch_size])[config.batch_size]


def kd_parameters(name: str, folder: Path) -> KDTraining:
    """A case's parameters; its plan is written to a file where it has no name."""
    chosen = {"preset": "sd-v1.4", "variant": "bk_base", "batch_size": 8, "gradient_checkpointing": False,
              "compiled": False, "max_train_steps": 2, "checkpoint_steps": 0, **KD[name]}  # fmt: skip
    if isinstance(plan := chosen["variant"], RemovalPlan):
        chosen["variant"] = str(folder / "plan.json")
        Path(chosen["variant"]).write_text(plan.to_json())
    return KDTraining.filled(**chosen)


def dreambooth_parameters(name: str) -> DreamBoothTraining:
    """A case's parameters for its one method."""
    config = DreamBoothTraining.filled(**{"preset": "sd-v1.4", "max_train_steps": 2, **DREAMBOOTH[name]})
    return config.for_method(*config.methods)


def empty_pipeline(config: KDTraining | DreamBoothTraining, dtype: torch.dtype):
    """The teacher's pipeline on the GPU, without tokenizers."""
    unet = teacher_config(config)
    parts = {name: empty_text_encoder(teacher_config(config, name)) for name in text_encoder_names(unet)}
    for encoder in parts.values():
        encoder.config._attn_implementation = "sdpa"
    parts |= {"unet": empty_unet(unet), "vae": empty_vae(teacher_config(config, "vae"))}
    parts = {name: on_gpu(part, dtype) for name, part in parts.items()}
    if "text_encoder_2" in parts:
        return StableDiffusionXLPipeline(**parts, tokenizer=None, tokenizer_2=None, scheduler=SCHEDULE)
    return StableDiffusionPipeline(**parts, tokenizer=None, scheduler=SCHEDULE, safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)  # fmt: skip


def on_gpu(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model of the meta device in the GPU's memory."""
    return torch.nn.Module.to(model, dtype).to_empty(device="cuda").to(memory_format=torch.channels_last)


def empty_data(config: KDTraining) -> SimpleNamespace:
    """As much of a data set as batches need."""
    side, encoders = config.resolution // 8, len(text_encoder_names(teacher_config(config)))
    tokens = teacher_config(config, "text_encoder")["max_position_embeddings"]

    def batch(rng):
        ids = torch.zeros(len(rng.positions), encoders, tokens, dtype=torch.long)
        return torch.zeros(len(rng.positions), 4, side, side), ids if encoders > 1 else ids[:, 0]

    return SimpleNamespace(batch=batch, num_examples=1000, key="none")


def peak(trainer: Trainer, loss_function, batches) -> int:
    """The most bytes that torch's allocator counted in two optimizer steps."""
    for _ in trainer.steps(loss_function, batches):
        pass
    return torch.cuda.max_memory_allocated()


def kd_peak(place: Place, name: str) -> int:
    """The peak of a distillation as `training.job` does it."""
    config = kd_parameters(name, place.folder)
    replaced = {
        "load_pipeline": lambda *_: empty_pipeline(config, torch.float32),
        "load_data": lambda *_: empty_data(config),
        "build_student": lambda teacher, plan, **_: on_gpu(empty_unet(student_config(teacher.config, plan))),
    }
    with patch.multiple(kd_job, **replaced):
        job = kd_job.prepare(config, place.folder / "run", "cuda", None)
    job.begin(False)
    return peak(job.trainer, job.losses, job.batches(config))


def dreambooth_peak(place: Place, name: str) -> int:
    """The peak of DreamBooth as `dreambooth.job` does it, beside the models that notebook 05 has loaded."""
    config = dreambooth_parameters(name)
    pipeline, unet = empty_pipeline(config, torch.float16), teacher_config(config)
    if "student" in config.models:
        student = on_gpu(empty_unet(student_config(unet, find_plan(config.variant, unet))), torch.float16)
        pipeline = pipeline if "teacher" in config.models else with_unet(pipeline, student)
    image, tokens = Image.new("RGB", (64, 64)), pipeline.text_encoder.config.max_position_embeddings
    subject = SimpleNamespace(captions=lambda _: ["a dog"], images=[image])
    replaced = {
        "token_ids": lambda _, captions: torch.zeros(len(captions), tokens, dtype=torch.long),
        "model_hash": lambda _: "none",
    }
    with patch.multiple(dreambooth_job, **replaced):
        run = dreambooth_job.prepare(pipeline, subject, config, place.folder, [("a dog", image)])
    return peak(run.trainer, run.losses, run.batches)


for name in (*KD, *DREAMBOOTH):
    case(f"memory_{name}", name, memory_gb=1000, values=False)(kd_peak if name in KD else dreambooth_peak)
