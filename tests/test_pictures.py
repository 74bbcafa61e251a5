import json
import multiprocessing
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bksdm_utils.core.surgery import build_student
from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.evaluation.folders import (
    Progress,
    _claim,
    complete_images,
    delete_images,
    folder_of,
    image_path,
    read_manifest,
    sample_folder,
)
from bksdm_utils.evaluation.job import Job, main, write_job
from bksdm_utils.evaluation.prompts import Prompt, check_prompts, read_prompts, storybook_prompts, storybook_scene
from bksdm_utils.evaluation.sampling import Sampling, image_seed
from bksdm_utils.files import ROOT, NotAvailable
from bksdm_utils.models.lora import load_lora
from bksdm_utils.models.pipelines import load_pipeline, load_unet, with_unet
from bksdm_utils.models.schedulers import with_scheduler
from bksdm_utils.processes import follow, launch
from bksdm_utils.workbook.live import Gallery

FAST = Sampling(num_inference_steps=4, guidance_scale=2.0)


def run(pipeline, prompts, folder, sampling=FAST):
    return list(sample_folder(pipeline, prompts, folder, sampling))


def bits(folder):
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


@pytest.fixture(scope="module")
def pipeline(pipeline_dir):
    return load_pipeline(pipeline_dir)


def test_a_picture_is_the_same_whatever_the_batch_size_order_and_threads(tmp_path):
    teacher, prompts = load_pipeline(ROOT / "data" / "storybook" / "teacher"), storybook_prompts(11)
    shuffled = random.Random(0).sample(prompts, len(prompts))
    threads = torch.get_num_threads()
    for batch_size, order, workers in ((1, prompts, 2), (3, shuffled, 1), (8, prompts[::-1], 3)):
        torch.set_num_threads(workers)
        run(teacher, order, tmp_path / str(batch_size), Sampling(num_inference_steps=4, batch_size=batch_size))
    torch.set_num_threads(threads)
    assert bits(tmp_path / "1") == bits(tmp_path / "3") == bits(tmp_path / "8")
    assert torch.get_num_threads() == threads
    seen = np.stack([np.asarray(Image.open(path)) for path in (tmp_path / "1" / "images").iterdir()])
    assert len(np.unique(seen.reshape(11, -1), axis=0)) == 11


def test_killed_twenty_times_or_in_two_processes_the_pictures_are_the_same(pipeline_dir, tmp_path):
    job, prompts = Job(teacher=str(pipeline_dir), num_images=500), storybook_prompts(500)
    run(load_pipeline(pipeline_dir), prompts, tmp_path / "unbroken")
    write_job(tmp_path / "killed", job, FAST)
    context, kills = multiprocessing.get_context("forkserver"), 0
    context.set_forkserver_preload(["bksdm_utils.evaluation.job"])
    chance = random.Random(1)
    while kills < 20:
        arguments = ["--config", str(tmp_path / "killed" / "config.json")]
        process = context.Process(target=main, args=(arguments,))
        process.start()
        before = len(read_manifest(tmp_path / "killed"))
        while process.is_alive() and len(read_manifest(tmp_path / "killed")) - before < 8 * (kills % 2):
            time.sleep(0.01)  # every second one has drawn something
        time.sleep(chance.random() * 0.2)
        process.kill()
        process.join()
        kills += 1
    left = 500 - len(complete_images(tmp_path / "killed"))
    assert 0 < left < 500
    assert main(arguments) == 0
    write_job(tmp_path / "two", job, FAST)
    launch(tmp_path / "two", 2, "bksdm_utils.evaluation.job")
    assert list(follow(tmp_path / "two", every=0.2))
    assert len(list((tmp_path / "two").glob("manifest-*.jsonl"))) == 2
    assert bits(tmp_path / "killed") == bits(tmp_path / "unbroken") == bits(tmp_path / "two")


def test_what_is_left_is_shared_evenly(pipeline_dir, tmp_path):
    job, prompts = Job(teacher=str(pipeline_dir), num_images=48), storybook_prompts(48)
    run(load_pipeline(pipeline_dir), prompts, tmp_path)
    before = bits(tmp_path)
    lost = prompts[::2]  # all of one process's share, if all prompts were shared
    for prompt in lost:
        image_path(tmp_path, prompt.id).unlink()
    (tmp_path / "manifest-0.jsonl").rename(tmp_path / "manifest-9.jsonl")
    write_job(tmp_path, job, FAST)
    launch(tmp_path, 2, "bksdm_utils.evaluation.job")
    assert list(follow(tmp_path, every=0.2))
    assert bits(tmp_path) == before
    for rank in range(2):
        lines = (tmp_path / f"manifest-{rank}.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == [prompt.id for prompt in lost[rank::2]]


def test_a_folder_that_another_run_fills_is_waited_for(pipeline, tmp_path, capsys):
    script = "import sys, time; from pathlib import Path; from bksdm_utils.engine import alone\n"
    script += "with alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(2)"
    other = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    assert run(pipeline, storybook_prompts(1), tmp_path)[-1].done == 1 and other.wait() == 0
    assert capsys.readouterr().out.count(f"another run writes to {tmp_path}: waiting for it") == 1


def test_the_gallery_says_how_long_it_still_takes(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    gallery = Gallery()
    for now[0], done in ((0, 200), (60, 260), (120, 1000)):  # 200 were there, so a minute drew 60
        gallery.update("teacher", Progress(done, 1000))
    assert capsys.readouterr().out.splitlines() == [
        "teacher: 260 of 1,000 pictures, 12 min left", "teacher: 1,000 of 1,000 pictures"]  # fmt: skip


def test_every_caption_is_found_again_in_the_manifest(pipeline, tmp_path):
    texts = ["a cat\u2028in the snow", "a cat\x85dog", "two\nlines\r\n", "plain"]  # each may end a line somewhere
    prompts = [Prompt(str(i), text) for i, text in enumerate(texts)]
    run(pipeline, prompts, tmp_path)
    assert [drawn.text for drawn in complete_images(tmp_path).values()] == texts
    assert len(run(pipeline, prompts, tmp_path)) == 1


def test_a_mistake_claims_no_folder(pipeline, tmp_path):
    with pytest.raises(ValueError, match="as PNDM needs"):
        run(pipeline, storybook_prompts(1), tmp_path / "new", Sampling(num_inference_steps=3))
    assert not (tmp_path / "new").exists()
    _claim(tmp_path / "new", {"model": "one", "image_format": "png"}, main=True)
    assert run(pipeline, storybook_prompts(1), tmp_path / "new")[-1].done == 1  # it held no picture of the other
    _claim(tmp_path / "other", {"model": "one"}, main=False)  # may come before the main process
    assert (tmp_path / "other" / "images").is_dir()


def test_only_the_pictures_asked_for_are_forgotten(pipeline, tmp_path, monkeypatch):
    prompts = storybook_prompts(4)
    delete_images(tmp_path / "nothing", prompts)
    run(pipeline, prompts, tmp_path)
    delete_images(tmp_path, prompts[:2])
    assert (
        set(complete_images(tmp_path)) == {p.id for p in prompts[2:]} == {drawn.id for drawn in read_manifest(tmp_path)}
    )
    monkeypatch.setattr("bksdm_utils.processes.running", lambda folder: True)
    with pytest.raises(ValueError, match="is being filled"):
        delete_images(tmp_path, prompts)


def test_a_folder_that_was_never_filled_is_named(tmp_path):
    with pytest.raises(ValueError, match="no sampling.json"):
        complete_images(tmp_path / "tpyo")
    one, other = (folder_of(tmp_path, "a", "b", Sampling(guidance_scale=g)) for g in (4, 4.0))
    assert one == other and not one.exists()


def test_the_manifest_says_what_each_picture_is(pipeline, tmp_path):
    prompts = storybook_prompts(5)
    steps = run(pipeline, prompts, tmp_path)
    assert [p.done for p in steps] == [0, 5] and steps[-1].total == 5
    assert [prompt for prompt, _ in steps[-1].newest] == prompts
    drawn = read_manifest(tmp_path)
    assert [(d.id, d.text, d.seed) for d in drawn] == [(p.id, p.text, image_seed(0, p.id)) for p in prompts]
    shared = json.loads((tmp_path / "sampling.json").read_text())
    assert shared["num_inference_steps"] == 4 and len(shared["model"]) == 16 and "batch_size" not in shared
    assert storybook_scene(prompts[3]) == sample_scene(3, "test")


def test_only_what_is_missing_or_damaged_is_drawn_again(pipeline, tmp_path):
    prompts = storybook_prompts(12)
    run(pipeline, prompts, tmp_path)
    before = bits(tmp_path)
    image_path(tmp_path, prompts[3].id).unlink()
    cut = image_path(tmp_path, prompts[7].id)
    cut.write_bytes(cut.read_bytes()[:100])
    with (tmp_path / "manifest-0.jsonl").open("a") as file:
        file.write('{"id": "test-9", "te')  # torn by a kill
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "images").iterdir() if p != cut}
    steps = run(pipeline, prompts, tmp_path)
    assert [len(step.newest) for step in steps] == [0, 2] and bits(tmp_path) == before
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "images").iterdir()}.items()
    assert [len(step.newest) for step in run(pipeline, storybook_prompts(13), tmp_path)] == [0, 1]


def test_two_models_or_settings_are_never_mixed(pipeline, tmp_path):
    prompts = storybook_prompts(2)
    run(pipeline, prompts, tmp_path)
    with pytest.raises(ValueError, match="num_inference_steps 4, now 5"):
        run(pipeline, prompts, tmp_path, Sampling(num_inference_steps=5, guidance_scale=2.0))
    with pytest.raises(ValueError, match="holds pictures of model"):
        run(with_unet(pipeline, build_student(pipeline.unet, "bk_tiny")), prompts, tmp_path)
    with pytest.raises(ValueError, match="other prompts under old ids"):
        run(pipeline, [Prompt("test-0", "something else")], tmp_path)
    foreign = tmp_path / "foreign"
    (foreign / "images").mkdir(parents=True)
    (foreign / "images" / "a.png").touch()
    with pytest.raises(ValueError, match="no sampling.json says whose"):
        run(pipeline, prompts, foreign)
    assert len(bits(tmp_path)) == 2


@pytest.mark.parametrize(
    ("ids", "fault"),
    [(["a", "A"], "an id twice"), (["../a"], "cannot name a file"), (["a/b"], "cannot name a file"),
     (["a\\b"], "cannot name a file"), ([""], "cannot name a file"), ([".a"], "cannot name a file"),
     (["ж" * 80], "cannot name a file")],
)  # fmt: skip
def test_ids_that_cannot_name_files_are_refused(ids, fault):
    with pytest.raises(ValueError, match=fault):
        check_prompts([Prompt(id, "a cat") for id in ids])


def test_prompts_are_read_as_coco_and_others_write_them(tmp_path):
    coco = tmp_path / "metadata.csv"
    coco.write_text('file_name,text\nCOCO_val2014_000000000042.jpg,"a dog, and ""a cat"""\nb.c.jpg,two\n')
    assert read_prompts(coco) == [Prompt("COCO_val2014_000000000042", 'a dog, and "a cat"'), Prompt("b.c", "two")]
    plain = tmp_path / "plain.csv"
    plain.write_text("prompt\nköttbullar 🍝\nשלום\n", encoding="utf-8-sig")
    assert read_prompts(plain, 1) == [Prompt("0", "köttbullar 🍝")]


def test_only_file_names_lose_their_suffix(tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("id,text\n1.5,one\n1.7,two\nx.jpg,three\n")
    assert [prompt.id for prompt in read_prompts(file)] == ["1.5", "1.7", "x.jpg"]
    file.write_text("file_name,text\na.JPEG,one\n1.5,two\nb.c.webp,three\n")
    assert [prompt.id for prompt in read_prompts(file)] == ["a", "1.5", "b.c"]


def test_rows_without_a_text_are_set_aside_and_counted(tmp_path, capsys):
    file = tmp_path / "prompts.csv"
    file.write_text("id,text\na,one\nb,\nc,  \nd,four\n,\n")
    assert [prompt.id for prompt in read_prompts(file, 2)] == ["a", "d"]
    assert "prompts.csv: 2 rows without a text set aside, such as row 2" in capsys.readouterr().out
    read_prompts(file)
    assert "3 rows without a text set aside" in capsys.readouterr().out
    file.write_text("id,text\na,one\nb,two\n../c,\n../d,four\n")
    assert [prompt.id for prompt in read_prompts(file, 2)] == ["a", "b"]  # what comes after them is no matter
    assert capsys.readouterr().out == ""
    file.write_text('text\none\n""\nthree\n')
    assert [prompt.id for prompt in read_prompts(file)] == ["0", "2"]  # a row's number stays its own


def test_bad_prompt_files_are_explained(tmp_path):
    file = tmp_path / "prompts.csv"
    with pytest.raises(ValueError, match="coco_captions") as mistyped:
        read_prompts(file)
    assert not isinstance(mistyped.value, NotAvailable)
    for content, fault in (("", "has the columns"), ("text\n", "no prompts"), ("a,b\n1,2\n", "expected one of text"),
                           ("text,id\n,a\n", "no prompts"), ("text,id\nx,a\ny,a\n", "an id twice"),
                           ("text,id\nx,a/\n", "cannot name a file"), ("text,file_name\nx,a/\n", "cannot name"),
                           ("text,id\nx,a\ny,\n", "prompts.csv, row 2: id is empty"),
                           ("text,file_name\nx,.jpg\n", "row 1: file_name is empty"),
                           ("text,id\nx,../../etc\n", "cannot name a file")):  # fmt: skip
        file.write_text(content)
        with pytest.raises(ValueError, match=fault):
            read_prompts(file)
    file.write_bytes(b"text\n\xff\xfe\xfa\n")
    with pytest.raises(ValueError, match="UTF-8"):
        read_prompts(file)


def test_a_job_takes_other_unets_schedulers_and_loras(pipeline, pipeline_dir, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model_state_dict

    student = build_student(pipeline.unet, "bk_tiny")
    student.save_pretrained(tmp_path / "student")
    assert load_unet(tmp_path / "student", pipeline).state_dict().keys() == student.state_dict().keys()
    assert len(load_unet(pipeline_dir, pipeline).state_dict()) == len(pipeline.unet.state_dict())
    run(with_unet(pipeline, student), storybook_prompts(2), tmp_path / "memory")
    told = ["-p", "teacher", str(pipeline_dir), "-p", "num_images", "2", "-p", "num_inference_steps", "4",
            "-p", "guidance_scale", "2.0"]  # fmt: skip
    assert main([str(tmp_path / "command"), *told, "-p", "unet", str(tmp_path / "student")]) == 0
    assert bits(tmp_path / "command") == bits(tmp_path / "memory")
    different = set()
    for scheduler in ("pndm", "dpm++", "euler", "ddim"):
        told_so = [*told, "-p", "scheduler", scheduler, "-p", "image_format", "jpeg"]
        assert main([str(tmp_path / scheduler), *told_so]) == 0
        different.add(bits(tmp_path / scheduler)["test-0.jpg"])
    assert len(different) == 4
    tuned = load_pipeline(pipeline_dir)
    tuned.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    tuned.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(tuned.unet))
    assert main([str(tmp_path / "with_lora"), *told, "-p", "lora", str(tmp_path / "lora")]) == 0
    assert main([str(tmp_path / "without"), *told]) == 0
    assert bits(tmp_path / "with_lora")["test-0.png"] != bits(tmp_path / "without")["test-0.png"]
    assert main([str(tmp_path / "wide"), *told, "-p", "size", "32"]) == 0
    assert Image.open(image_path(tmp_path / "wide", "test-0")).size == (32, 32)
    fused = load_lora(load_pipeline(pipeline_dir), tmp_path / "lora")
    changed = fused.unet.state_dict()["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    assert not torch.equal(changed, pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight)
    assert main([str(tmp_path / "x"), "-p", "tacher", "y"]) == 1
    assert "unknown parameter tacher" in capsys.readouterr().out


def test_models_that_do_not_fit_are_explained(pipeline, pipeline_dir, teacher, tmp_path):
    config = dict(teacher.config) | {"cross_attention_dim": 24}
    type(teacher).from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="belongs to another teacher"):
        load_unet(tmp_path / "other", pipeline)
    with pytest.raises(ValueError, match="no U-Net could be loaded"):
        load_unet(tmp_path, pipeline)
    with pytest.raises(ValueError, match="could not be loaded"):
        load_lora(load_pipeline(pipeline_dir), tmp_path / "other")
    save_file({"unet.nowhere.lora_A.weight": torch.ones(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="could not be loaded|changes no weight"):
        load_lora(load_pipeline(pipeline_dir), tmp_path)
    with pytest.raises(ValueError, match="unknown scheduler 'heun'"):
        with_scheduler(pipeline, "heun")
    for wrong in (
        {"num_inference_steps": 0},
        {"size": 60},
        {"scheduler": "heun"},
        {"image_format": "gif"},
        {"batch_size": 0},
    ):
        with pytest.raises(ValueError, match="expected"):
            Sampling(**wrong)
    with pytest.raises(ValueError, match="4 or more, as PNDM needs"):
        run(pipeline, storybook_prompts(1), tmp_path / "few", Sampling(num_inference_steps=3))
