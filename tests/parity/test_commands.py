"""docs/coming-from-bk-sdm.md: every command is parsed into its parameter class, every flag of the original has a row.

Commands and rows are read from the page, so that page and tests cannot differ.
"""

import json
import re
import shlex
from collections import Counter

import numpy as np
import pytest
from click.testing import CliRunner
from diffusers import UNet2DConditionModel
from PIL import Image

from bksdm_utils.config.base import parse
from bksdm_utils.config.dreambooth import DreamBoothTraining
from bksdm_utils.config.evaluation import CocoEvaluation, SampleFolder
from bksdm_utils.config.training import KDTraining
from bksdm_utils.core.surgery import build_student
from bksdm_utils.data.downloads import DOWNLOADS, GROUPS
from bksdm_utils.files import ROOT
from bksdm_utils.workbook import cli, headless
from bksdm_utils.workbook.run import fill

PAGE = (ROOT / "docs" / "coming-from-bk-sdm.md").read_text(encoding="utf-8")
SCRIPTS = [
    "eval_scores",
    "finetune_full",
    "finetune_lora",
    "generate_after_full_ft",
    "generate_after_lora_ft",
    "generate_with_trained_unet",
    "get_laion_data",
    "get_mscoco_files",
    "kd_train",
    "kd_train_2m",
    "kd_train_toy",
    "kd_train_toy_ddp",
    "kd_train_v2-base-im512",
    "kd_train_v2-im768",
]
# The flags of each program of the original, and the class that has their counterparts.
FLAGS = {
    "dreambooth_finetune": (DreamBoothTraining, """adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32
        center_crop checkpointing_steps class_data_dir class_prompt enable_xformers_memory_efficient_attention
        gradient_accumulation_steps gradient_checkpointing hub_model_id hub_token instance_data_dir instance_prompt
        learning_rate local_rank logging_dir lora_alpha lora_bias lora_dropout lora_r lora_text_encoder_alpha
        lora_text_encoder_bias lora_text_encoder_dropout lora_text_encoder_r lr_num_cycles lr_power lr_scheduler
        lr_warmup_steps max_grad_norm max_train_steps mixed_precision num_class_images num_train_epochs
        num_validation_images output_dir pretrained_model_name_or_path prior_generation_precision prior_loss_weight
        push_to_hub report_to resolution resume_from_checkpoint revision sample_batch_size scale_lr seed tokenizer_name
        train_batch_size train_text_encoder unet_path use_8bit_adam use_lora validation_prompt validation_steps
        with_prior_preservation"""),
    "eval_clip_score": (CocoEvaluation, "data_list img_dir save_txt"),
    "generate": (SampleFolder, """batch_sz data_list img_resz img_sz model_id num_images num_inference_steps save_dir
        seed unet_path"""),
    "generate_single_prompt": (SampleFolder, """img_sz is_lora_checkpoint lora_weight_path model_id num_images
        num_inference_steps save_dir seed use_dpm_solver val_prompt"""),
    "kd_train_text_to_image": (KDTraining, """adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 cache_dir
        center_crop checkpointing_steps checkpoints_total_limit dataloader_num_workers dataset_config_name
        enable_xformers_memory_efficient_attention gradient_accumulation_steps gradient_checkpointing lambda_kd_feat
        lambda_kd_output lambda_sd learning_rate local_rank logging_dir lr_scheduler lr_warmup_steps max_grad_norm
        max_train_samples max_train_steps mixed_precision non_ema_revision num_train_epochs num_valid_images output_dir
        pretrained_model_name_or_path random_flip report_to resolution resume_from_checkpoint revision scale_lr seed
        train_batch_size train_data_dir unet_config_name unet_config_path use_8bit_adam use_copy_weight_from_teacher
        use_ema valid_prompt valid_steps"""),
}  # fmt: skip


def section(title):
    """The part of the page below the heading that names something."""
    (part,) = [part for part in re.split(r"^#{2,3} ", PAGE, flags=re.M) if re.search(title, part.splitlines()[0])]
    return part


def commands(text):
    """The commands in the shell blocks of a text, each as a list of arguments of `bksdm`."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    lines = [shlex.split(line) for line in blocks.splitlines() if line.strip()]
    return [
        line[1 + (line.index("bksdm_utils") if line[0] == "accelerate" else line.index("bksdm")) :] for line in lines
    ]


COMMANDS = commands(PAGE)
RUNS = [command for command in COMMANDS if command[0] == "run" and "output_dir" in command]  # sweeps have none
SLOW = {"outputs/toy_bk_base", "outputs/eval_small"}  # the others are nightly


def folder_of(command):
    return command[command.index("output_dir") + 1]


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Runs a command line up to its job; returns the configurations that the jobs would get."""
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run_jobs", lambda jobs: seen.extend(
        fill(headless.find_notebook(job.notebook.name)[1], job.parameters) for job in jobs))  # fmt: skip
    monkeypatch.setattr("bksdm_utils.workbook.jobs.run_job", lambda config, folder: seen.append(config))
    monkeypatch.setattr(
        "bksdm_utils.data.downloads.download", lambda names: seen.extend((DOWNLOADS | GROUPS)[n] for n in names)
    )
    monkeypatch.setattr("bksdm_utils.deploy.demo.serve", seen.append)
    monkeypatch.setattr("bksdm_utils.costs.planner.report", lambda config, tflops: seen.append(config) or "")

    def build(command):
        result = CliRunner().invoke(cli.main, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        built, seen[:] = list(seen), []
        return built

    return build


def test_every_command_of_the_page_is_one_of_ours(built):
    names = Counter()
    for command in COMMANDS:
        if "--config" in command:
            built([*command[:1], "outputs/kd_bk_small", "-p", "preset", "sd-v1.4"])  # which writes it
        assert built(command), command
        names[command[0]] += 1
    assert set(names) == {"run", "train", "sample", "download", "memory", "demo"} and names["run"] >= 15


THEIRS = {  # what the original's script says: the folder of our command -> values
    "outputs/toy_bk_base": {"batch_size": 2, "gradient_accumulation_steps": 4, "max_train_steps": 20,
                            "checkpoint_steps": 5, "validation_steps": 5},
    "outputs/toy_ddp_bk_tiny": {"global_batch_size": 2 * 2 * 4, "num_processes": 2, "max_train_steps": 20},
    "outputs/kd_bk_small": {"global_batch_size": 256, "batch_size": 64, "max_train_steps": 400_000,
                            "checkpoint_steps": 5000, "checkpoints_kept": 0, "validation_steps": 500,
                            "teacher": "CompVis/stable-diffusion-v1-4", "train_data_dir":
                            "data/laion_aes/preprocessed_212k", "gradient_checkpointing": True, "random_crops": 0},
    "outputs/kd_bk_small_2m": {"train_data_dir": "data/laion_aes/preprocessed_2256k", "global_batch_size": 256},
    "outputs/v2-base_kd_bk_small": {"batch_size": 32, "gradient_accumulation_steps": 4, "resolution": 512},
    "outputs/v2_kd_bk_small": {"batch_size": 32, "gradient_accumulation_steps": 4, "resolution": 768},
}  # fmt: skip
KD = {"learning_rate": 5e-5, "lr_schedule": "constant", "lr_warmup_steps": 0, "max_grad_norm": 1.0, "lambda_sd": 1.0,
      "lambda_kd_output": 1.0, "lambda_kd_feat": 1.0, "copy_weights": True, "flip": True, "mixed_precision": "fp16",
      "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 1e-2, "seed": 1234}  # fmt: skip
DREAMBOOTH = {"prior_loss_weight": 1.0, "batch_size": 1, "gradient_accumulation_steps": 1, "lr_schedule": "constant",
              "lr_warmup_steps": 0, "num_class_images": 200, "train_text_encoder": True, "lora_rank": 16,
              "lora_alpha": 27.0, "lora_text_rank": 16, "lora_text_alpha": 17.0, "max_train_steps": 800, "seed": 1234,
              "identifier": "sks11df", "subject": "dog2", "lora_targets": ("to_q", "to_v"), "validation_steps": 100,
              "lora_text_targets": ("q_proj", "v_proj"), "gradient_checkpointing": True}  # fmt: skip


def test_the_commands_say_what_the_originals_scripts_say(built):
    configs = {folder_of(command): built(command)[0] for command in RUNS}
    for folder, values in THEIRS.items():
        expected = {**KD, **values}
        assert {name: getattr(configs[folder], name) for name in expected} == expected, folder
    for method, rate in (("full", 1e-6), ("lora", 1e-4)):
        config = configs[f"outputs/ft_{method}_dog2"]
        assert {name: getattr(config, name) for name in DREAMBOOTH} == DREAMBOOTH
        assert config.for_method(method).learning_rate == rate and config.methods == (method,)
    assert configs["outputs/kd_bk_tiny"].published_tiny and configs["outputs/eval_small"].protocol == "paper"
    (drawn,) = built(next(command for command in COMMANDS if "outputs/bk-sdm-small" in command))
    assert (drawn.num_inference_steps, drawn.batch_size, drawn.image_format) == (25, 1, "jpeg")


def test_every_script_has_a_command():
    for script in SCRIPTS:
        assert commands(section(rf"\b{re.escape(script)}\.sh")), script


@pytest.mark.parametrize("program", FLAGS)
def test_every_flag_has_a_row_that_names_a_parameter_or_a_reason(program):
    kind, names = FLAGS[program]
    rows = dict(re.findall(r"^\| `--(\w+)` \| (.*?) \|$", section(rf"^{program}\.py"), re.M))
    assert set(rows) == set(names.split())
    for flag, text in rows.items():
        named = re.match(r"`(\w+)`", text)
        reason = text.startswith("none: ") and len(text) > 20
        assert reason or (named and named[1] in kind.model_fields), (flag, text)


# --- run, with a narrow teacher


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, pipeline_dir):
    """What replaces weights and data: parameters for each notebook."""
    root = tmp_path_factory.mktemp("tiny")
    (root / "images").mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 255, (64, 70, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "images" / f"{i}.png")
    (root / "subject").mkdir()
    for i in range(3):
        (root / "subject" / f"{i}.png").write_bytes((root / "images" / f"{i}.png").read_bytes())
    table = "file_name,text\n" + "".join(f"{i}.png,a cat {i}\n" for i in range(4))
    (root / "images" / "metadata.csv").write_text(table)
    (root / "captions.csv").write_text("id,text\n" + "".join(f"{i},a cat number {i}\n" for i in range(22)))
    teacher = UNet2DConditionModel.from_pretrained(pipeline_dir, subfolder="unet")
    for variant in ("bk_base", "bk_small"):
        build_student(teacher, variant).save_pretrained(root / variant)
    common = {"teacher": pipeline_dir, "num_inference_steps": 4, "num_images": 2}
    train = {"train_data_dir": root / "images", "cache_dir": root / "cache", "resolution": 64, "batch_size": 2}
    return {
        "01": common | {"latency_repeats": 2, "greedy_steps": 1},
        "02": common,
        "03": common | train | {"max_train_steps": 2, "gradient_accumulation_steps": 2, "num_validation_images": 2,
                                "ablation_steps": 0},
        "04": common | {"num_images": 22, "prompts": root / "captions.csv", "real": root / "images",
                        "protocol": "storybook", "students": root / "bk_small", "images_dir": root / "sampled"},
        "05": common | {"max_train_steps": 2, "subject": root / "subject", "class_word": "fish", "num_images": 1,
                        "num_class_images": 2, "student": root / "bk_base", "clip": "data/storybook/clip",
                        "validation_steps": 1, "images_dir": root / "sampled", "resolution": 64},
        "06": common | train | {"student": root / "bk_small", "lcm_steps": 1, "few_steps": "2", "formats": "diffusers",
                                "clip": "data/storybook/clip"},
    }  # fmt: skip


@pytest.mark.parametrize("command", [
    pytest.param(command, id=folder_of(command),
                 marks=pytest.mark.slow if folder_of(command) in SLOW else pytest.mark.nightly)
    for command in RUNS])  # fmt: skip
def test_a_command_runs_to_its_result(command, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))  # whoever has weights and data uses none here
    small = [part for name, value in tiny[command[1]].items() for part in ("-p", name, str(value))]
    result = CliRunner().invoke(cli.main, [*command, *small, "-p", "output_dir", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output[-3000:]
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    given = dict(zip(command[command.index("-p") + 1 :: 3], command[command.index("-p") + 2 :: 3], strict=True))
    fields = headless.find_notebook(command[1])[1].model_fields
    kept = set(given) - set(tiny[command[1]]) - {"output_dir"}
    assert "preset" in kept  # what the page says beside weights, data and sizes is what ran
    for name in kept:
        value = parse(given[name], fields[name])
        assert written["config"][name] == (list(value) if isinstance(value, tuple) else value), name


def test_one_prompt_is_sampled_several_times(pipeline_dir, tmp_path):
    command = ["sample", str(tmp_path), "-p", "teacher", str(pipeline_dir), "-p", "prompt", "a cat, at night"]
    result = CliRunner().invoke(cli.main, [*command, "-p", "num_images", "2", "-p", "num_inference_steps", "4"])
    assert result.exit_code == 0, result.output
    images = [np.asarray(Image.open(tmp_path / "images" / f"{i}.png")) for i in (0, 1)]
    assert not np.array_equal(*images)
    with pytest.raises(ValueError, match="prompt and prompts are given"):
        SampleFolder(prompt="a", prompts="b.csv")
