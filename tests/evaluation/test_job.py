import pytest
from PIL import Image

from bksdm_utils import processes
from bksdm_utils.config.evaluation import FolderSampling, SampleFolder
from bksdm_utils.core.surgery import build_student
from bksdm_utils.evaluation.folders import read_job_prompts, sample, sample_folder, sample_in_processes
from bksdm_utils.evaluation.prompts import storybook_prompts
from bksdm_utils.files import write_json
from bksdm_utils.models.pipelines import load_pipeline, with_unet


@pytest.fixture
def config(pipeline_dir):
    return SampleFolder(
        teacher=str(pipeline_dir), num_images=2, num_inference_steps=4, guidance_scale=2.0, device="cpu"
    )


def images(folder):
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


def test_the_prompts_are_a_files_or_the_storybooks(config, tmp_path):
    assert read_job_prompts(config) == storybook_prompts(2)
    assert len(read_job_prompts(config.but(num_images=None))) == 100
    (tmp_path / "prompts.csv").write_text("text\none\ntwo\nthree\n")
    assert [p.text for p in read_job_prompts(config.but(prompts=str(tmp_path / "prompts.csv")))] == ["one", "two"]


def test_the_command_samples_another_unet_as_in_memory(config, pipeline_dir, tmp_path, capsys):
    pipeline = load_pipeline(pipeline_dir)
    student = build_student(pipeline.unet, "bk_tiny")
    student.save_pretrained(tmp_path / "student")
    sample(config.but(unet=str(tmp_path / "student")), tmp_path / "command")
    assert capsys.readouterr().out.splitlines() == ["0 of 2 images", "2 of 2 images"]
    list(sample_folder(with_unet(pipeline, student), storybook_prompts(2), tmp_path / "memory",
                       config.part(FolderSampling)))  # fmt: skip
    assert images(tmp_path / "command") == images(tmp_path / "memory")


def test_every_scheduler_gives_its_own_images(config, tmp_path):
    schedulers = ("pndm", "dpm++", "euler", "ddim")
    for scheduler in schedulers:
        sample(config.but(num_images=1, scheduler=scheduler, image_format="jpeg"), tmp_path / scheduler)
    assert len({images(tmp_path / scheduler)["test-0.jpg"] for scheduler in schedulers}) == 4


def test_the_command_takes_a_lora(config, pipeline_dir, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    tuned = load_pipeline(pipeline_dir)
    tuned.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    tuned.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(tuned.unet))
    sample(config.but(lora=str(tmp_path / "lora")), tmp_path / "with")
    sample(config, tmp_path / "without")
    assert images(tmp_path / "with")["test-0.png"] != images(tmp_path / "without")["test-0.png"]


def test_the_size_is_in_pixels(config, tmp_path):
    sample(config.but(num_images=1, size=32), tmp_path)
    assert Image.open(tmp_path / "images" / "test-0.png").size == (32, 32)


def test_processes_with_other_settings_are_not_disturbed(config, tmp_path, monkeypatch):
    write_json(tmp_path / processes.NOTE, {"config": config.but(seed=1).model_dump(mode="json")})
    monkeypatch.setattr(processes, "_launcher", lambda folder: folder)
    with pytest.raises(ValueError, match="other settings"):
        next(sample_in_processes(config, storybook_prompts(2), tmp_path, 2))
    assert not (tmp_path / "config.json").exists()
