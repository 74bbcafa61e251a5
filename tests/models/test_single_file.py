"""Teachers in one file: loaded completely, with the schedule they were made for, or refused by name."""

import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from bksdm_utils.core.surgery import build_student
from bksdm_utils.deploy.single_file import save_single_file
from bksdm_utils.files import ROOT
from bksdm_utils.models.configs import model_config
from bksdm_utils.models.pipelines import load_pipeline, with_unet

TEACHER = ROOT / "data" / "storybook" / "teacher"


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(TEACHER)


@pytest.fixture(scope="module")
def exported(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single") / "file"
    save_single_file(pipeline, folder, "model")
    return folder / "model.safetensors"


def states(pipeline):
    return [
        tensor for part in ("unet", "vae", "text_encoder") for tensor in getattr(pipeline, part).state_dict().values()
    ]


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_teacher_in_one_file_is_the_teacher(pipeline, exported, tmp_path, suffix):
    shutil.copytree(exported.parent / "config", tmp_path / "config")
    file = tmp_path / f"teacher{suffix}"
    torch.save({"state_dict": load_file(exported)}, file) if suffix == ".ckpt" else shutil.copy(exported, file)
    loaded = load_pipeline(file)
    assert all(torch.equal(one, other) for one, other in zip(states(loaded), states(pipeline), strict=True))
    assert model_config(file)["block_out_channels"] == list(pipeline.unet.config.block_out_channels)
    assert loaded.tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()


@pytest.mark.parametrize("part", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
@pytest.mark.parametrize("kind", ["renamed", "dropped", "reshaped"])
def test_a_file_with_a_damaged_tensor_is_refused(exported, tmp_path, part, kind):
    shutil.copytree(exported.parent / "config", tmp_path / "config")
    tensors, rng = load_file(exported), random.Random(part + kind)
    name = rng.choice(sorted(name for name in tensors if name.startswith(part)))
    tensor = tensors.pop(name)
    if kind != "dropped":
        tensors |= {f"{part}nowhere": tensor} if kind == "renamed" else {name: torch.cat([tensor, tensor])}
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(
        ValueError, match="the checkpoint .* could not be loaded .*(lacks|expected shape).*original layout"
    ):
        load_pipeline(tmp_path / "damaged.safetensors")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x80\x04K\x01."])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_of_something_else_is_refused(tmp_path, content, suffix):
    (tmp_path / f"file{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match="the checkpoint .* could not be loaded"):
        load_pipeline(tmp_path / f"file{suffix}")


@pytest.mark.parametrize("zero_snr", [False, True])
def test_marks_of_v_prediction_are_written_and_read(pipeline, tmp_path, zero_snr):
    schedule = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    teacher = with_unet(pipeline, pipeline.unet)
    teacher.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **schedule)
    save_single_file(teacher, tmp_path / "v", "model")
    names = load_file(tmp_path / "v" / "model.safetensors").keys()
    assert ("v_pred" in names) and ("ztsnr" in names) == zero_snr
    pipeline.scheduler.save_pretrained(tmp_path / "v" / "config" / "scheduler")  # as of any other checkpoint
    loaded = load_pipeline(tmp_path / "v" / "model.safetensors").scheduler
    assert loaded.config.prediction_type == "v_prediction"
    assert torch.equal(loaded.alphas_cumprod, teacher.scheduler.alphas_cumprod)


def test_a_teacher_that_predicts_noise_is_not_marked(exported):
    assert not {"v_pred", "ztsnr"} & load_file(exported).keys()


COMMIT = "0" * 40
CACHED = """
from bksdm_utils.models.pipelines import load_pipeline, load_unet
pipeline = load_pipeline({teacher!r})
for name in ("nota-ai/whole", "nota-ai/unet-alone"):
    print(name, load_unet(name, pipeline).num_parameters())
load_unet("nota-ai/nowhere", pipeline)
"""


@pytest.mark.slow
def test_a_student_of_the_hub_is_found_in_a_pipeline_or_alone(pipeline, tmp_path):
    student = build_student(pipeline.unet, "bk_tiny")
    for name, inside in (("whole", "unet"), ("unet-alone", "")):
        repository = tmp_path / f"models--nota-ai--{name}"
        student.save_pretrained(repository / "snapshots" / COMMIT / inside)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", CACHED.format(teacher=str(TEACHER))], env=environment, cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.split() == ["nota-ai/whole", str(student.num_parameters()),
                                   "nota-ai/unet-alone", str(student.num_parameters())]  # fmt: skip
    assert "NotAvailable: the U-Net 'nota-ai/nowhere' could not be loaded" in done.stderr
    assert isinstance(student, UNet2DConditionModel)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_named_with_the_login(monkeypatch, status):
    from types import SimpleNamespace

    from bksdm_utils.files import NotAvailable
    from bksdm_utils.models import loading

    class Refused(OSError):
        response = SimpleNamespace(status_code=status)

    def refuse(*_, **__):
        try:
            raise Refused("no")
        except Refused as error:
            raise OSError("not a local folder") from error

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", refuse)
    with pytest.raises(NotAvailable, match="accept the model's terms on its page, then hf auth login"):
        loading.load(UNet2DConditionModel, "someone/gated")
