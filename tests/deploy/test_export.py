"""Exports, loaded by new processes that cannot import this package (notebook 06)."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from bksdm_utils.config.deploy import DemoAndExport
from bksdm_utils.core.plans import RemovalPlan, Stage
from bksdm_utils.core.surgery import build_student
from bksdm_utils.deploy.export import EXPORTERS, NotExpressible, export, sample_elsewhere, upload
from bksdm_utils.deploy.formats import save_diffusers, student_card
from bksdm_utils.deploy.graphs import check_core_ml, parts, save_core_ml, save_onnx
from bksdm_utils.deploy.single_file import ldm_unet, ldm_vae, save_single_file, with_mid_block
from bksdm_utils.models.pipelines import load_pipeline, own_copy, with_scheduler, with_unet

CARD = ModelCard("---\nmodel_name: bk_small\n---\n# A student")
THREADS = torch.get_num_threads()
HEAD = """
import sys
sys.modules["bksdm_utils"] = None  # importing it raises
import numpy as np, torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    options = dict(num_inference_steps=4, guidance_scale=2.0, output_type="np")
    return pipe("a big red cat at night", generator=generator, **options).images[0]
"""


@pytest.fixture(scope="module")
def students(pipeline_dir):
    """Pipelines of narrow students, by variant."""
    base = load_pipeline(pipeline_dir)
    torch.manual_seed(0)
    for part in (base.unet, base.vae, base.text_encoder):  # norms of ones and zeros would hide a mistake
        for parameter in part.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    return {name: with_unet(base, build_student(base.unet, name).eval()) for name in ("bk_base", "bk_small", "bk_tiny")}


def sampled(pipeline, guidance_scale=2.0):
    for parameter in pipeline.unet.parameters():  # the memory layout of a loaded network: others round otherwise
        parameter.data = torch.empty(parameter.shape).copy_(parameter.data)
    torch.set_num_threads(1)
    generator, options = torch.Generator().manual_seed(3), {"num_inference_steps": 4, "guidance_scale": guidance_scale}
    image = pipeline("a big red cat at night", generator=generator, output_type="np", **options).images[0]
    torch.set_num_threads(THREADS)
    return image


def elsewhere(program, folder):
    done = subprocess.run([sys.executable, "-c", HEAD + program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_diffusers_folder_samples_the_same_elsewhere_bit_for_bit(students, tmp_path):
    for name, student in students.items():
        save_diffusers(student, tmp_path / name, CARD)
    elsewhere("for n in ('bk_base', 'bk_small', 'bk_tiny'):\n"
              "    np.save(n, sample(StableDiffusionPipeline.from_pretrained(n)))", tmp_path)  # fmt: skip
    for name, student in students.items():
        theirs = np.load(tmp_path / f"{name}.npy")
        ours = sampled(student)
        assert np.array_equal((theirs * 255).round(), (ours * 255).round()) and np.abs(theirs - ours).max() < 1e-6
        plain = UNet2DConditionModel.from_pretrained(tmp_path / name / "unet").state_dict()
        assert all(torch.equal(t, plain[key]) for key, t in student.unet.state_dict().items())
    names = set(load_file(tmp_path / "bk_tiny" / "text_encoder" / "model.safetensors"))
    assert all(name.startswith("text_model.") for name in names)  # transformers 4 wants it so
    vocabulary = json.loads((tmp_path / "bk_tiny" / "tokenizer" / "vocab.json").read_text())
    assert vocabulary == students["bk_tiny"].tokenizer.get_vocab()
    assert (tmp_path / "bk_tiny" / "tokenizer" / "merges.txt").read_text().startswith("#version")


@pytest.mark.slow
def test_single_files_sample_the_same_elsewhere(students, tmp_path):
    for name, student in students.items():
        remark = save_single_file(student, tmp_path / name, "model")
        assert ("changes nothing" in remark) == (name != "bk_base") and "ViT-L/14" in remark
    elsewhere("for n in ('bk_base', 'bk_small', 'bk_tiny'):\n"
              "    pipe = StableDiffusionPipeline.from_single_file(f'{n}/model.safetensors', config=f'{n}/config',\n"
              "                                                    local_files_only=True, safety_checker=None)\n"
              "    np.save(n, sample(pipe))", tmp_path)  # fmt: skip
    for name, student in students.items():
        assert np.abs(np.load(tmp_path / f"{name}.npy") - sampled(student)).max() < 1e-4
        whole = with_mid_block(student.unet)
        tensors = load_file(tmp_path / name / "model.safetensors")
        in_file = [k for k in tensors if k.startswith("model.diffusion_model.")]
        assert len(in_file) == len(whole.state_dict())
        described = yaml.safe_load((tmp_path / name / "model.yaml").read_text())["model"]["params"]
        network = described["unet_config"]["params"]
        stages, layers = len(network["channel_mult"]), network["num_res_blocks"]
        blocks = {k.split(".")[3] for k in in_file if ".input_blocks." in k}
        assert len(blocks) == stages * (layers + 1)  # as the original counts: first convolution, layers, downsamplers
        assert network["channel_mult"][-1] * network["model_channels"] == student.unet.config.block_out_channels[-1]


def test_single_file_has_the_names_of_stable_diffusion(pipeline_dir):
    """The teacher has SD-v1's topology, so its file must have the names that the published checkpoint has."""
    teacher = load_pipeline(pipeline_dir)
    unet, vae = ldm_unet(teacher.unet), ldm_vae(teacher.vae)
    for name in ("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", "input_blocks.3.0.op.weight",
                 "input_blocks.4.0.skip_connection.weight", "input_blocks.11.0.out_layers.3.bias",
                 "middle_block.1.proj_in.weight", "output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight",
                 "output_blocks.11.1.norm.weight", "time_embed.2.bias", "out.2.weight"):  # fmt: skip
        assert name in unet, name
    for name in ("encoder.down.0.downsample.conv.weight", "encoder.mid.block_1.norm1.weight", "quant_conv.weight",
                 "decoder.mid.attn_1.proj_out.weight", "decoder.mid.attn_1.norm.bias",
                 "decoder.up.3.upsample.conv.bias", "decoder.up.0.block.1.conv2.weight",
                 "encoder.down.1.block.0.nin_shortcut.weight", "encoder.norm_out.weight",
                 "decoder.conv_in.weight"):  # fmt: skip
        assert name in vae, name
    assert vae["decoder.mid.attn_1.q.weight"].ndim == 4
    assert len(unet) == len(teacher.unet.state_dict()) and len(vae) == len(teacher.vae.state_dict())


def test_original_layout_refuses_what_it_cannot_hold(pipeline_dir, tmp_path):
    base = load_pipeline(pipeline_dir)
    plan = RemovalPlan("uneven", (Stage((0, 1), (0, 1, 2)), *[Stage((0,), (0, 2))] * 3))
    uneven = with_unet(base, build_student(base.unet, plan))
    with pytest.raises(ValueError, match=r"as many layers in every stage"):
        save_single_file(uneven, tmp_path / "uneven", "model")
    assert not list(tmp_path.iterdir())


ONNX = """
import runpy, sys
sys.modules["bksdm_utils"] = None  # importing it raises
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def sampled_by_onnx(folder, guidance):
    options = ["--seed", "3", "--steps", "4", "--guidance", str(guidance), "--output", "cat.png"]
    command = [sys.executable, "-c", ONNX, str(folder / "sample.py"), "a big red cat at night", *options]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.asarray(Image.open(folder.parent / "cat.png")).astype(float)


@pytest.mark.slow
def test_onnx_samples_the_same_image_elsewhere(students, tmp_path):
    pytest.importorskip("onnxruntime")
    students["bk_small"].vae.enable_slicing()  # as on a GPU
    save_onnx(students["bk_small"], tmp_path / "onnx")
    theirs = sampled_by_onnx(tmp_path / "onnx", 2)
    assert np.abs(theirs - sampled(students["bk_small"]) * 255).mean() < 1
    assert np.abs(sampled_by_onnx(tmp_path / "onnx", 0) - sampled(students["bk_small"], 0) * 255).mean() < 1
    # Another schedule may have timesteps that are no whole numbers.
    euler = with_scheduler(students["bk_small"], "euler")
    euler.scheduler.save_pretrained(tmp_path / "onnx" / "scheduler")
    assert np.abs(sampled_by_onnx(tmp_path / "onnx", 2) - sampled(euler) * 255).mean() < 1
    assert np.abs(theirs - sampled(students["bk_tiny"]) * 255).mean() > 1  # the image depends on the model
    assert "bksdm_utils" not in (tmp_path / "onnx" / "sample.py").read_text()


@pytest.mark.slow
def test_core_ml_packages_hold_the_weights(students, tmp_path):
    pytest.importorskip("coremltools")
    save_core_ml(students["bk_small"], tmp_path / "core_ml")
    counts = check_core_ml(students["bk_small"], tmp_path / "core_ml")
    assert counts["unet"] == len(list(students["bk_small"].unet.parameters())) and counts["vae_decoder"] > 30
    changed = build_student(load_pipeline_unet(students), "bk_small", copy=False)
    with pytest.raises(ValueError, match="lacks or changes"):
        check_core_ml(with_unet(students["bk_small"], changed), tmp_path / "core_ml")
    mixed_up = copy.deepcopy(students["bk_small"].unet)
    attention = mixed_up.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.to_q, attention.to_k = attention.to_k, attention.to_q
    with pytest.raises(ValueError, match="changes 2 weights, such as .*to_[kq]"):
        check_core_ml(with_unet(students["bk_small"], mixed_up), tmp_path / "core_ml")
    larger = copy.deepcopy(students["bk_small"].unet)
    larger.register_to_config(sample_size=16)
    with pytest.raises(ValueError, match="has inputs and outputs .*: expected .*16, 16"):
        check_core_ml(with_unet(students["bk_small"], larger), tmp_path / "core_ml")


def load_pipeline_unet(students):
    return UNet2DConditionModel.from_config({**students["bk_base"].unet.config, "layers_per_block": 2})


def test_exports_leave_the_pipeline_as_it_is(students):
    teacher = students["bk_base"]
    half = with_unet(teacher, copy.deepcopy(teacher.unet).to(torch.bfloat16))
    half.text_encoder, half.vae = (copy.deepcopy(p).to(torch.bfloat16) for p in (teacher.text_encoder, teacher.vae))
    networks = parts(half)
    assert {p.dtype for network, _, _ in networks.values() for p in network.parameters()} == {torch.float32}
    assert {part.dtype for part in (half.unet, half.text_encoder, half.vae)} == {torch.bfloat16}


def test_sdxl_is_no_graph_yet_but_a_diffusers_folder(pipeline_xl_dir, tmp_path):
    large = load_pipeline(pipeline_xl_dir)
    for save in (save_onnx, save_core_ml):
        with pytest.raises(ValueError, match="not for a StableDiffusionXLPipeline"):
            save(large, tmp_path / "no")
    save_diffusers(large, tmp_path / "xl", CARD)
    for number in ("", "_2"):
        assert (tmp_path / "xl" / f"tokenizer{number}" / "merges.txt").is_file()
        names = load_file(tmp_path / "xl" / f"text_encoder{number}" / "model.safetensors")
        assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
    again = load_pipeline(tmp_path / "xl").text_encoder_2.state_dict()
    assert all(torch.equal(t, again[name]) for name, t in large.text_encoder_2.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["xl"]


def test_nothing_is_overwritten_or_left_incomplete(students, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "new.part").mkdir()
    (tmp_path / "new.part" / "thesis.txt").write_text("precious too")
    with pytest.raises(ValueError, match="exists already"):
        save_diffusers(students["bk_tiny"], tmp_path / "mine", CARD)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be written"):
        save_diffusers(students["bk_tiny"], tmp_path / "file" / "below", CARD)
    monkeypatch.setattr("bksdm_utils.models.saving.save_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_diffusers(students["bk_tiny"], tmp_path / "new", CARD)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine", "new.part"]
    assert (tmp_path / "new.part" / "thesis.txt").exists()

    def locked(self, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", locked)  # root may write anywhere, so no real folder would do
    with pytest.raises(ValueError, match="cannot be written .Permission denied.: name a folder of your own"):
        save_diffusers(students["bk_tiny"], tmp_path / "locked", CARD)


def test_missing_packages_are_named(students, tmp_path, monkeypatch):
    for module, save in (("onnx", save_onnx), ("coremltools", save_core_ml)):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=r"pip install -e '\.\[export\]'"):
            save(students["bk_tiny"], tmp_path / module)
    assert not list(tmp_path.iterdir())


def test_student_card_reads_the_result_of_notebook_03(students, tmp_path):
    config = DemoAndExport.filled(licence="mit", device="cpu")
    unknown = student_card(config, "bk_small", students["bk_small"], tmp_path / "unet_ema")
    assert unknown.data.base_model == "data/storybook/teacher" and unknown.data.library_name == "diffusers"
    text, parameters = unknown.content, students["bk_small"].unet.num_parameters()
    assert "| optimizer steps | not recorded |" in text and "Protocol: not recorded; images: not recorded" in text
    assert "| not recorded | |" in text and f"{parameters:,}" in text
    trained = {"teacher": "t", "train_data_dir": None, "preset": "storybook", "num_images": 64}
    result = {"notebook": "03_kd_training", "config": trained, "metrics": {"steps": 9, "after": {"clip_score": 0.8}}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    card = student_card(config, "bk_small", students["bk_small"], tmp_path / "unet_ema")
    assert (card.data.base_model, card.data.license, card.data.model_name) == ("t", "mit", "bk_small")
    assert "| optimizer steps | 9 |" in card.text and "| clip_score | 0.800 |\n\n## Terms and limits" in card.text
    assert "Protocol: storybook, notebook 03; images: 64" in card.text
    with_lora = student_card(config.but(lora="x"), "bk_small", students["bk_small"], tmp_path / "unet_ema")
    assert (
        "steps | not recorded" in with_lora.text
        and "# bk_small, distilled from storybook with a LoRA" in with_lora.text
    )


def test_formats_of_the_notebook_are_the_exporters():
    (kind, _) = get_args(DemoAndExport.model_fields["formats"].annotation)
    assert set(get_args(kind)) == set(EXPORTERS)


def test_export_replaces_its_own_folders_and_skips_what_a_format_cannot_hold(students, tmp_path, capsys, monkeypatch):
    first, second = (export(students["bk_tiny"], tmp_path, "diffusers", CARD) for _ in range(2))
    assert first == second > 0.1 and "MB; loaded by" in capsys.readouterr().out
    (tmp_path / "single_file").mkdir()
    (tmp_path / "single_file" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        export(students["bk_tiny"], tmp_path, "single_file", CARD)

    def refuse(*_):
        raise NotExpressible("too large")

    monkeypatch.setitem(EXPORTERS, "onnx", refuse)
    assert export(students["bk_tiny"], tmp_path, "onnx", CARD) is None
    assert "onnx is left out: too large" in capsys.readouterr().out


@pytest.mark.slow
def test_errors_of_other_processes_are_returned(students, tmp_path):
    config = DemoAndExport.filled(num_inference_steps=4)
    save_diffusers(students["bk_tiny"], tmp_path / "diffusers", CARD)
    (tmp_path / "single_file").mkdir()
    images = sample_elsewhere(tmp_path, ["diffusers", "single_file", "core_ml"], config, "bk_tiny")
    assert images["diffusers"].size == (64, 64) and "Error" in images["single_file"] and "core_ml" not in images


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_saved_as_full(students, tmp_path, dtype):
    own = own_copy(students["bk_tiny"], ("unet", "vae", "text_encoder")).to(dtype)
    save_diffusers(own, tmp_path / "half", CARD)
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "half")  # the line of the model card
    for name in ("unet", "vae", "text_encoder"):
        saved, loaded = getattr(own, name), getattr(again, name)
        assert saved.dtype == dtype and loaded.dtype == torch.float32
        assert all(torch.equal(t.float(), loaded.state_dict()[key].float()) for key, t in saved.state_dict().items())
    assert again("a big red cat", num_inference_steps=4, output_type="np").images.shape == (1, 64, 64, 3)


def test_nothing_is_uploaded_without_push_to_hub(tmp_path, capsys, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 20_000)
    calls = []
    monkeypatch.setattr("bksdm_utils.deploy.export.HfApi", lambda: type("Api", (), {
        "create_repo": lambda self, *a, **k: calls.append(("create", a, k)),
        "upload_folder": lambda self, **k: calls.append(("upload", k)),
        "repo_info": lambda self, name: type("Info", (), {"private": name == "me/student"}),
    })())  # fmt: skip
    upload(tmp_path, "me/student")
    assert not calls and "nothing was uploaded" in capsys.readouterr().out
    with pytest.raises(ValueError, match="repo_id is None"):
        upload(tmp_path, None, push_to_hub=True)
    upload(tmp_path, "me/student", push_to_hub=True)
    assert [call[0] for call in calls] == ["create", "upload"] and calls[0][2]["private"]
    assert "model.safetensors  0.02 MB" in (out := capsys.readouterr().out) and "me/student is private" in out
    upload(tmp_path, "me/known", push_to_hub=True)
    assert "me/known is public: everybody can see" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("preset", "licence", "restricted"),
    [("storybook", "mit", False), ("sd-v1.4", "creativeml-openrail-m", True), ("sd-v2.1-base", "openrail++", True)],
)
def test_a_card_passes_the_teachers_terms_on(preset, licence, restricted, students, tmp_path):
    config = DemoAndExport.filled(preset=preset, device="cpu")
    card = student_card(config, "bk_small", students["bk_small"], tmp_path)
    assert card.data.license == licence and ("attachment A" in card.text) == restricted
    assert "no safety checker" in card.text
    other = student_card(config.but(teacher="me/teacher"), "bk_small", students["bk_small"], tmp_path)
    assert other.data.license == "other" and "| licence | not recorded |" in other.text
