"""Notebooks 01 to 06 on an own teacher, plan and images, as papermill runs them."""

import json

import numpy as np
import papermill
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from bksdm_utils.config.dreambooth import DreamBoothTraining
from bksdm_utils.config.plan_files import read_plan
from bksdm_utils.core.plans import RemovalPlan, Stage
from bksdm_utils.core.surgery import build_student
from bksdm_utils.dreambooth.job import DreamBoothModel
from bksdm_utils.models.pipelines import load_pipeline, with_unet
from bksdm_utils.workbook.headless import plan_jobs, run_jobs
from bksdm_utils.workbook.parameters import find_notebook

pytestmark = pytest.mark.slow


@pytest.fixture
def images(tmp_path):
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    rows = ["file_name,text"]
    for i, (size, mode) in enumerate([((600, 300), "RGB"), ((37, 90), "L"), ((64, 64), "P"), ((100, 80), "RGBA")]):
        noise = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).convert(mode).save(folder / f"{i}.png")
        rows.append(f"{i}.png,picture number {i}")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    (folder / "metadata.csv").write_text("\n".join([*rows, "broken.jpg,cut off", "0.png,"]) + "\n")
    return folder


@pytest.fixture(autouse=True)
def no_downloads(tmp_path, monkeypatch):
    """Whoever has fetched weights or data finds none of them here."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))


def run_notebook(number, folder, **parameters):
    folder.mkdir(exist_ok=True)
    notebook = str(find_notebook(number)[0])
    papermill.execute_notebook(
        notebook,
        str(folder / f"{number}.ipynb"),
        {**parameters, "output_dir": str(folder)},
        progress_bar=False,
        kernel_name="python3",
    )
    return json.loads((folder / "result.json").read_text())


def test_own_teacher_and_pictures_end_in_a_plain_student_twice_the_same(tmp_path, pipeline_dir, images):
    parameters = {
        "preset": "sd-v1.4", "variant": "bk_tiny", "teacher": str(pipeline_dir), "train_data_dir": str(images),
        "resolution": 64, "batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 3, "num_images": 2,
        "num_inference_steps": 4, "ablation_steps": 1,
    }  # fmt: skip
    first, again = (run_notebook("03", tmp_path / name, **parameters) for name in ("a", "b"))
    assert first["metrics"]["loss_last"] == again["metrics"]["loss_last"]
    assert {name for name, _ in first["metrics"]["skipped"]} == {"broken.jpg", "0.png"}
    assert first["metrics"]["num_train_images"] == 4
    for kind in ("unet", "unet_ema"):
        one, other = (UNet2DConditionModel.from_pretrained(tmp_path / name / kind) for name in ("a", "b"))
        assert one.config.block_out_channels == [8, 16, 32] and one.config.layers_per_block == 1
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_an_own_plan_of_an_own_sdxl_is_healed_by_self_attention(tmp_path, pipeline_xl_dir, images):
    plan = RemovalPlan("mine", (Stage((0, 1), (0, 1, 2)), Stage((0,), (0, 2), 1), Stage((0,), (0, 2), 3)), mid=False)
    (tmp_path / "mine.json").write_text(plan.to_json())
    own = {"preset": "sdxl-base", "variant": str(tmp_path / "mine.json"), "teacher": str(pipeline_xl_dir)}
    result = run_notebook(
        "03", tmp_path / "run", **own, kd="self_attention", train_data_dir=str(images), resolution=64, batch_size=2,
        gradient_accumulation_steps=1, max_train_steps=2, num_images=2, num_inference_steps=4, ablation_steps=0,
    )  # fmt: skip
    assert result["variant"] == "mine"
    student = UNet2DConditionModel.from_pretrained(tmp_path / "run" / "unet_ema")
    assert student.config.layers_per_block == [2, 1, 1] and student.config.transformer_layers_per_block == [1, 1, 3]
    copied = run_notebook("02", tmp_path / "copy", **own, num_images=2, num_inference_steps=4)
    assert copied["metrics"]["distance_to_teacher"]["teacher"] == 0 and copied["metrics"]["random"] == 0
    fates = (tmp_path / "copy" / "weight_map.csv").read_text().splitlines()
    assert fates[0] == "student,teacher,what" and len(fates) > 500


def test_an_own_teacher_is_scanned(tmp_path, pipeline_dir):
    own = {"preset": "sd-v1.4", "teacher": str(pipeline_dir), "num_images": 2, "num_inference_steps": 4}
    result = run_notebook("01", tmp_path / "scan", **own, greedy_steps=2, latency_repeats=2)
    scan = result["metrics"]["scan"]
    assert len(scan["one unit"]) == 15 and len(scan["greedily several"]) == 2
    assert all(m["distance"] >= 0 and 0 < m["parameters"] <= 1 for group in scan.values() for m in group.values())
    assert read_plan((tmp_path / "scan" / "greedy_2.json").read_text()).name == "greedy_2"


@pytest.mark.parametrize("number", ["01", "02"])
def test_without_weights_architecture_and_map_still_run(number, tmp_path):
    result = run_notebook(number, tmp_path / "offline", preset="sdxl-base")
    assert result["variant"] == "koala_700m"
    text = (tmp_path / "offline" / f"{number}.ipynb").read_text()
    assert "No weights: " in text


def test_an_own_student_is_evaluated_on_own_captions_and_pictures(tmp_path, pipeline_dir, images):
    teacher = UNet2DConditionModel.from_pretrained(pipeline_dir, subfolder="unet")
    build_student(teacher, "bk_tiny").save_pretrained(tmp_path / "student")
    rows = [f"{i},a picture of number {i}" for i in range(22)]
    (tmp_path / "captions.csv").write_text("\n".join(["id,text", *rows]))
    result = run_notebook(
        "04", tmp_path / "scored", preset="sd-v1.4", teacher=str(pipeline_dir), variant="bk_tiny", guidances="2",
        students=str(tmp_path / "student"), prompts=str(tmp_path / "captions.csv"), real=str(images),
        protocol="storybook", num_inference_steps=4, scheduler="euler", untrained=True, num_guidance_images=20,
        images_dir=str(tmp_path / "images"), image_format="jpeg",
    )  # fmt: skip
    metrics = result["metrics"]
    (name,) = metrics["students"]  # a student that was named is called by its folder, not by the variant
    assert name.endswith("/student") and metrics["students"][name] == str(tmp_path / "student")
    assert set(metrics["scores"]) == {"teacher", name, "copied", "random"} and metrics["num_images"] == 22
    assert {about["scored"] for about in metrics["images"].values()} == {22}
    assert "key" in (tmp_path / "scored" / "scores.csv").read_text().splitlines()[0].split(",")
    assert set(metrics["scores"][name]) == {"fid", "kid", "inception_score", "clip_score", "distance to teacher"}
    assert len(list((tmp_path / "images").glob("*/images/*.jpg"))) == 4 * 22 + 20
    assert metrics["scores"][name]["fid"] == metrics["scores"]["copied"]["fid"]  # one and the same network
    assert (tmp_path / "scored" / "failures.png").exists()


def test_without_weights_or_captions_the_evaluation_says_what_is_missing(tmp_path):
    result = run_notebook("04", tmp_path / "offline", preset="sd-v2.1")
    assert result["metrics"]["scores"] == {} and result["metrics"]["num_images"] == 0
    assert "download coco_captions" in (tmp_path / "offline" / "04.ipynb").read_text()


def test_an_own_model_learns_an_own_subject(tmp_path, pipeline_dir, images):
    (images / "metadata.csv").unlink()
    teacher = UNet2DConditionModel.from_pretrained(pipeline_dir, subfolder="unet")
    build_student(teacher, "bk_base").save_pretrained(tmp_path / "student")
    own = {"preset": "sd-v1.4", "teacher": str(pipeline_dir), "variant": "bk_base", "subject": str(images),
           "student": str(tmp_path / "student"), "class_word": "fish", "identifier": "x", "num_class_images": 2,
           "max_train_steps": 3, "num_images": 1, "num_inference_steps": 4, "drift_steps": 0,
           "lora_targets": "to_q, to_v", "clip": "data/storybook/clip",
           "images_dir": str(tmp_path / "drawn")}  # fmt: skip
    whole = run_notebook("05", tmp_path / "whole", **own)["metrics"]
    assert set(whole["costs"]) == {f"{who}, {how}" for who in ("teacher", "bk_base") for how in ("full", "lora")}
    assert set(whole["scores"]["bk_base, lora"]) == {"clip_i", "clip_t"} and whole["num_images"] == 25
    text = (tmp_path / "whole" / "05.ipynb").read_text()
    assert "set aside broken.jpg" in text and "facebook/dino" in text  # DINO's weights are not here, and it says so
    part = own | {"models": "student", "methods": "lora", "checkpoint_steps": 1, "resume": True}
    run_notebook("05", tmp_path / "part", **part | {"max_train_steps": 2})  # a constant rate knows no end
    again = run_notebook("05", tmp_path / "part", **part)["metrics"]
    assert again["scores"]["bk_base, lora"] == whole["scores"]["bk_base, lora"]
    assert len((tmp_path / "part" / "bk_base-lora" / "log.csv").read_text().splitlines()) == 1 + 3
    once_more = run_notebook("05", tmp_path / "part", **part)["metrics"]  # nothing is left to learn
    assert once_more["scores"] == again["scores"] and once_more["costs"]["bk_base, lora"]["loss"] > 0
    assert [point["step"] for point in once_more["along"]["bk_base, lora"]] == [0, 1, 3]  # 1 was seen by the first part
    drifted = [run_notebook("05", tmp_path / "drift", **part | {"drift_steps": 4})["metrics"] for _ in range(2)]
    last = "full, no prior, 4 steps"
    assert drifted[0]["drift"][last] == drifted[1]["drift"][last]  # the second time it had been learned before
    assert not list((tmp_path / "part").glob("*-full")) and again["costs"]["bk_base, lora"]["peak GB"] > 0
    with pytest.raises(papermill.PapermillExecutionError, match="unet_emma"):
        run_notebook("05", tmp_path / "mistyped", **own | {"student": str(tmp_path / "unet_emma")})


def test_without_weights_or_subject_dreambooth_says_what_is_missing(tmp_path):
    result = run_notebook("05", tmp_path / "offline", preset="sd-v1.4", dataset_dir=str(tmp_path))
    assert result["metrics"]["scores"] == {}
    assert "download dreambooth" in (tmp_path / "offline" / "05.ipynb").read_text()


def test_an_own_student_is_played_with_and_exported(tmp_path, pipeline_dir, images):
    teacher = UNet2DConditionModel.from_pretrained(pipeline_dir, subfolder="unet")
    build_student(teacher, "bk_tiny").save_pretrained(tmp_path / "student")
    own = {"preset": "sd-v1.4", "teacher": str(pipeline_dir), "variant": "bk_tiny", "prompt": "a fish",
           "student": str(tmp_path / "student"), "train_data_dir": str(images), "resolution": 64, "batch_size": 2,
           "num_inference_steps": 4, "lcm_steps": 2, "few_steps": "1,4", "num_images": 2,
           "image": str(images / "1.png"), "clip": "data/storybook/clip",
           "formats": "diffusers,single_file"}  # fmt: skip
    metrics = run_notebook("06", tmp_path / "played", **own)["metrics"]
    assert load_pipeline(tmp_path / "played" / "few_step").scheduler.config._class_name == "LCMScheduler"
    assert load_pipeline(tmp_path / "played" / "few_step").scheduler.config._class_name == "LCMScheduler"
    assert set(metrics["megabytes"]) == {"diffusers", "single_file"} and metrics["difference"]["diffusers"] == 0
    assert {"bk_tiny, DPM-Solver++, 1 steps", "bk_tiny, few-step, 4 steps"} <= set(metrics["few_steps"])
    card = (tmp_path / "played" / "exports" / "diffusers" / "README.md").read_text()
    assert "bk_tiny" in card and "| optimizer steps | not recorded |" in card
    for name in ("playground", "image_to_image", "few_steps", "exports"):
        assert (tmp_path / "played" / f"{name}.png").exists()
    with_lora = own | {"lora": a_lora(tmp_path / "lora", pipeline_dir, tmp_path / "student"), "lcm_steps": 0,
                       "formats": "diffusers"}  # fmt: skip
    assert run_notebook("06", tmp_path / "played", **with_lora)["metrics"]["difference"]["diffusers"] == 0
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "played" / "exports" / "diffusers" / "unet")
    before = UNet2DConditionModel.from_pretrained(tmp_path / "student").state_dict()
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.endswith(("to_q.weight", "to_v.weight")) for name in changed)
    (tmp_path / "mine" / "exports" / "diffusers").mkdir(parents=True)
    (tmp_path / "mine" / "exports" / "diffusers" / "thesis.txt").write_text("precious")
    with pytest.raises(papermill.PapermillExecutionError, match="exists already"):
        run_notebook("06", tmp_path / "mine", **with_lora)
    assert (tmp_path / "mine" / "exports" / "diffusers" / "thesis.txt").exists()


def a_lora(folder, pipeline_dir, student):
    pipeline = load_pipeline(pipeline_dir)
    config = DreamBoothTraining.filled(methods="lora", train_text_encoder=False, lora_targets="to_q,to_v")
    model = DreamBoothModel(with_unet(pipeline, UNet2DConditionModel.from_pretrained(student)), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save(pipeline, folder)
    return str(folder)


def test_without_weights_there_is_nothing_to_play_with_and_it_says_so(tmp_path):
    result = run_notebook("06", tmp_path / "offline", preset="sd-v2.1")
    assert result["metrics"]["megabytes"] == {} and result["metrics"]["few_steps"] == {}
    assert "No weights: " in (tmp_path / "offline" / "06.ipynb").read_text()


def test_students_are_scored_without_their_teacher(tmp_path):
    job = {"with_teacher": False, "untrained": True, "num_images": 20, "num_inference_steps": 4, "scheduler": "dpm++",
           "guidances": "", "images_dir": str(tmp_path / "images"), "output_dir": str(tmp_path / "run")}  # fmt: skip
    assert run_jobs(plan_jobs(["04"], job)) == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert set(metrics["scores"]) == {"copied", "random"} and "distance to teacher" not in metrics["scores"]["copied"]
    assert metrics["sampled"]["copied"]["images"] == 20 and set(metrics["unets"]) == {"copied", "random"}
    assert run_jobs(plan_jobs(["04"], {**job, "batch_size": 4})) == 0
    again = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert again["sampled"]["copied"]["images"] == 0 and again["scores"] == metrics["scores"]
