import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from bksdm_utils.core.surgery import build_student
from bksdm_utils.data.rendering import SUBJECTS, render, render_subject
from bksdm_utils.data.scenes import COLOURS, OBJECTS, PLACES, Scene, Thing, sample_scene
from bksdm_utils.dreambooth.job import STORYBOOK, DreamBooth, Moments, Recipe, prepare
from bksdm_utils.dreambooth.model import DreamBoothModel, Lora
from bksdm_utils.dreambooth.scores import subject_scores, table
from bksdm_utils.dreambooth.subjects import (
    check_words,
    class_prompts,
    dreambooth_subjects,
    dreambooth_templates,
    load_subject,
)
from bksdm_utils.evaluation.folders import image_path, sample_folder
from bksdm_utils.evaluation.networks import MetricClip, dino
from bksdm_utils.evaluation.prompts import storybook_prompts
from bksdm_utils.evaluation.sampling import image_seed, Sampling, generate
from bksdm_utils.files import ROOT
from bksdm_utils.models.hashes import model_hash
from bksdm_utils.models.lora import load_lora
from bksdm_utils.models.pipelines import load_pipeline, with_unet
from bksdm_utils.training.rng import BatchRng

FAST = {"num_inference_steps": 4, "guidance_scale": 2.0}
SMALL = Recipe("tabby", "z", 4, 2, (("full", 1e-3), ("lora", 1e-2)), lora=Lora(4, 6, text_rank=2, text_alpha=3))


@pytest.fixture(scope="module")
def pipeline(pipeline_dir):
    return load_pipeline(pipeline_dir)


@pytest.fixture
def subject():
    return load_subject("tabby")


@pytest.fixture
def class_images(pipeline, subject):
    prompts = class_prompts(subject, 3)
    return [(p.text, render(sample_scene(i), i)) for i, p in enumerate(prompts)]


def lesson(pipeline, subject, folder, method="lora", recipe=SMALL, **changes):
    return prepare(pipeline, subject, recipe, method, folder, **changes)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_equals_a_plain_computation(pipeline, subject, class_images, prediction_type):
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    instance = Moments.of(pipeline, subject.real, subject.captions("z"), 64)
    prior = Moments.of(pipeline, [p for _, p in class_images], [c for c, _ in class_images], 64)
    model = DreamBoothModel(pipeline, "full", True)
    draw = BatchRng(7, 5, range(2), 2, 5)
    ours = DreamBooth(schedule, instance, prior, prior_weight=0.5).losses(model, draw)
    generators, expected = BatchRng(7, 5, range(2), 2, 5).generators, {}
    chosen = {"loss_instance": (instance, BatchRng(7, 5, range(2), 2, 5).indices),
              "loss_prior": (prior, BatchRng(7, 5, range(2), 2, 3).indices)}  # fmt: skip
    for name, (moments, indices) in chosen.items():
        errors = []
        shape = moments.mean.shape[1:]
        drawn = [[torch.randn(shape, generator=g) for g in generators] for _ in range(2)]
        times = [torch.randint(1000, (1,), generator=g) for g in generators]
        for k, i in enumerate(indices):
            x = moments.mean[i] + moments.std[i] * drawn[0][k]
            alpha = schedule.alphas_cumprod[times[k]].item()
            noisy = alpha**0.5 * x + (1 - alpha) ** 0.5 * drawn[1][k]
            v = alpha**0.5 * drawn[1][k] - (1 - alpha) ** 0.5 * x
            told = pipeline.text_encoder(moments.token_ids[i][None])[0]
            said = pipeline.unet(noisy[None], times[k], encoder_hidden_states=told).sample[0]
            errors.append(F.mse_loss(said, v if prediction_type == "v_prediction" else drawn[1][k]))
        expected[name] = sum(errors) / len(errors)
    for name, value in expected.items():
        assert ours[name].item() == pytest.approx(value.item(), rel=1e-5)
    assert ours["loss"].item() == pytest.approx(
        (expected["loss_instance"] + 0.5 * expected["loss_prior"]).item(), rel=1e-5
    )
    alone = DreamBooth(schedule, instance, None).losses(model, BatchRng(7, 5, range(2), 2, 5))
    assert set(alone) == {"loss", "loss_instance"} and alone["loss"].item() == pytest.approx(
        ours["loss_instance"].item()
    )


def test_what_is_trained_is_what_was_asked_for(pipeline_dir):
    def trained(method, text, lora=None):
        pipeline = load_pipeline(pipeline_dir)
        linears = [m for m in pipeline.unet.named_modules() if m[0].endswith(("to_q", "to_v"))]
        texts = [m for m in pipeline.text_encoder.named_modules() if m[0].endswith(("q_proj", "v_proj"))]
        counts = [sum(p.numel() for p in part.parameters()) for part in (pipeline.unet, pipeline.text_encoder)]
        model = DreamBoothModel(pipeline, method, text, lora)
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        return model.num_trained, names, linears, texts, counts

    number, _, _, _, counts = trained("full", True)
    assert number == sum(counts)
    assert trained("full", False)[0] == counts[0]
    number, names, linears, texts, _ = trained("lora", True, Lora(3, 5, text_rank=2))
    size = {id: rank * (m.in_features + m.out_features) for rank, ms in ((3, linears), (2, texts)) for id, m in ms}
    assert number == sum(size.values()) and len(names) == 2 * len(size)
    assert all(".lora_" in name for name in names)
    assert not any("text_encoder" in name for name in trained("lora", False)[1])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_plain_diffusers_draws_the_same(pipeline_dir, subject, tmp_path, method):
    taught = lesson(load_pipeline(pipeline_dir), subject, tmp_path / "run", method)
    assert len(list(taught.steps())) == 4
    prompts = ["a z cat at night", "a z cat on the sea"]
    ours = generate(taught.pipeline, prompts, **FAST)
    assert taught.save(tmp_path / "saved") > 1000
    load = {"full": f"pipe = StableDiffusionPipeline.from_pretrained({str(tmp_path / 'saved')!r})",
            "lora": f"pipe = StableDiffusionPipeline.from_pretrained({str(pipeline_dir)!r})\n"
                    f"pipe.load_lora_weights({str(tmp_path / 'saved')!r})"}[method]  # fmt: skip
    program = (
        "import sys, torch, numpy as np\nfrom diffusers import StableDiffusionPipeline\n"
        f"{load}\n"
        "assert not any(m.startswith('bksdm') for m in sys.modules)\n"
        f"seeds = {[image_seed(0, 0), image_seed(0, 1)]}\n"
        "generators = [torch.Generator().manual_seed(s) for s in seeds]\n"
        f"drawn = pipe({prompts!r}, generator=generators, num_inference_steps=4, guidance_scale=2.0).images\n"
        f"np.save({str(tmp_path / 'drawn.npy')!r}, np.stack([np.asarray(p) for p in drawn]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "drawn.npy").astype(int)
    mine = np.stack([np.asarray(p) for p in ours]).astype(int)
    assert np.abs(theirs - mine).max() <= 1
    before = np.stack([np.asarray(p) for p in generate(load_pipeline(pipeline_dir), prompts, **FAST)]).astype(int)
    assert np.abs(before - mine).max() > 3
    if method == "lora":
        base = load_pipeline(pipeline_dir)
        key = model_hash(base)
        merged = load_lora(base, tmp_path / "saved", ("unet", "text_encoder"))
        assert model_hash(base) == key  # it stays as it was
        merged_drawn = np.stack([np.asarray(p) for p in generate(merged, prompts, **FAST)]).astype(int)
        assert np.abs(merged_drawn - mine).max() <= 1
        merged.save_pretrained(tmp_path / "merged")
        again = generate(load_pipeline(tmp_path / "merged"), prompts, **FAST)
        assert all(np.array_equal(a, b) for a, b in zip(again, merged_drawn, strict=True))


def test_a_lora_of_another_model_is_refused(pipeline_dir, subject, tmp_path):
    """Diffusers would load either in silence: missing layers are passed over, moved ones get another's adapters."""

    def student():
        base = load_pipeline(pipeline_dir)
        return with_unet(base, build_student(base.unet, "bk_small"))

    for name, base, other in (("teacher", lambda: load_pipeline(pipeline_dir), student),
                              ("student", student, lambda: load_pipeline(pipeline_dir))):  # fmt: skip
        lesson(base(), subject, tmp_path / name).save(tmp_path / name / "saved")
        with pytest.raises(ValueError, match="another architecture"):
            load_lora(other(), tmp_path / name / "saved")
    file = tmp_path / "teacher" / "saved" / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file)  # as others write it, who do not name the base
    with pytest.raises(ValueError, match="trained on another model: .* tensors"):
        load_lora(student(), tmp_path / "teacher" / "saved")


def test_a_pipeline_of_half_precision_is_taught_in_full(pipeline_dir, subject, tmp_path):
    half = load_pipeline(pipeline_dir, dtype=torch.bfloat16)
    taught = lesson(half, subject, tmp_path, "full", replace(SMALL, gradient_checkpointing=True))
    assert {p.dtype for p in taught.model.parameters()} == {torch.float32} and half.unet.dtype == torch.bfloat16
    assert all(np.isfinite(step.floats()["loss"]) for step in taught.steps())
    assert len(generate(taught.pipeline, ["a z cat at night"], **FAST)) == 1
    assert taught.trainer.training_bytes()["ema"] == 0 and not list(tmp_path.rglob("*_ema"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_stopped_and_resumed_ends_bit_for_bit_the_same(pipeline, subject, class_images, tmp_path, method):
    options = {"method": method, "class_images": class_images, "checkpoint_steps": 2}
    whole = lesson(pipeline, subject, tmp_path / "whole", **options)
    losses = [float(step.losses["loss"]) for step in whole.steps()]
    broken = lesson(pipeline, subject, tmp_path / "broken", **options)
    for step in broken.steps():
        if step.step == 3:
            break  # the checkpoint is of step 2
    resumed = lesson(pipeline, subject, tmp_path / "broken", **options, resume=True)
    assert resumed.trainer.step == 2
    assert [float(step.losses["loss"]) for step in resumed.steps()] == losses[2:]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert whole.loss.scheduler.config.prediction_type == pipeline.scheduler.config.prediction_type
    checkpoint = sum(p.stat().st_size for p in whole.trainer.checkpoint.rglob("*.safetensors"))
    assert checkpoint < 4 * whole.model.num_trained + 120_000  # of a LoRA the adapters alone
    assert [row["step"] for row in resumed.log.rows] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="other settings"):
        lesson(pipeline, load_subject("koi"), tmp_path / "broken", **options, resume=True)


KILLED = """
import sys, time
from pathlib import Path
from bksdm_utils import dreambooth
from bksdm_utils.dreambooth import Lora, Recipe
from bksdm_utils.sampling import load_pipeline
pipeline, folder, method, recipe = load_pipeline(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], eval(sys.argv[4])
taught = prepare(pipeline, load_subject("tabby"), recipe, method, folder, checkpoint_steps=1)
for step in taught.steps():
    print(step.step, flush=True)
    time.sleep(0.3)
"""


@pytest.mark.parametrize("method", ["full", "lora"])
def test_killed_and_resumed_ends_bit_for_bit_the_same(pipeline_dir, pipeline, subject, tmp_path, method):
    command = [sys.executable, "-c", KILLED, str(pipeline_dir), str(tmp_path / "killed"), method, repr(SMALL)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == "2":
            process.kill()  # SIGKILL, in the middle of what it does
            break
    process.wait()
    resumed = lesson(pipeline, subject, tmp_path / "killed", method, checkpoint_steps=1, resume=True)
    assert 1 <= resumed.trainer.step <= 3
    whole = lesson(pipeline, subject, tmp_path / "whole", method)
    for taught in (whole, resumed):
        for _ in taught.steps():
            pass
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_v_prediction_pipeline_is_taught_v(pipeline, subject, tmp_path):
    other = with_unet(pipeline, pipeline.unet)
    other.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    losses = []
    for name, base in (("epsilon", pipeline), ("v_prediction", other)):
        taught = lesson(base, subject, tmp_path / name)
        assert taught.loss.scheduler.config.prediction_type == name
        losses.append(float(next(iter(taught.steps())).losses["loss"]))
    assert losses[0] != losses[1]  # of the same noise


def test_the_base_stays_as_it_was(pipeline, subject, tmp_path):
    before = {name: t.clone() for name, t in pipeline.unet.state_dict().items()}
    for _ in lesson(pipeline, subject, tmp_path, "full").steps():
        pass
    assert all(torch.equal(t, before[name]) for name, t in pipeline.unet.state_dict().items())


# --- subjects ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    """google/dreambooth's layout, with thirty subjects of random tiny pictures."""
    folder, rng = tmp_path / "dataset", np.random.default_rng(0)
    classes = {"backpack": "backpack", "bear_plushie": "stuffed animal", "cat2": "cat", "dog2": "dog"}
    classes |= {f"thing{i}": "toy" for i in range(26)}
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(3):
            noise = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name / f"{i:02}.jpg")
    rows = "\n".join(f"{name},{word}" for name, word in classes.items())
    (folder / "prompts_and_classes.txt").write_text(f"Classes\n\nsubject_name,class\n{rows}\n\n{PROMPTS}")
    return folder


# The second half of google/dreambooth's prompts_and_classes.txt (CC BY 4.0): {0} is the identifier, {1} the class.
ANYWHERE = """\
'a {0} {1} in the jungle'
'a {0} {1} in the snow'
'a {0} {1} on the beach'
'a {0} {1} on a cobblestone street'
'a {0} {1} on top of pink fabric'
'a {0} {1} on top of a wooden floor'
'a {0} {1} with a city in the background'
'a {0} {1} with a mountain in the background'
'a {0} {1} with a blue house in the background'
'a {0} {1} on top of a purple rug in a forest'
"""
THINGS = """\
'a {0} {1} with a wheat field in the background'
'a {0} {1} with a tree and autumn leaves in the background'
'a {0} {1} with the Eiffel Tower in the background'
'a {0} {1} floating on top of water'
'a {0} {1} floating in an ocean of milk'
'a {0} {1} on top of green grass with sunflowers around it'
'a {0} {1} on top of a mirror'
'a {0} {1} on top of the sidewalk in a crowded street'
'a {0} {1} on top of a dirt road'
'a {0} {1} on top of a white rug'
"""
LIVING = """\
'a {0} {1} wearing a red hat'
'a {0} {1} wearing a santa hat'
'a {0} {1} wearing a rainbow scarf'
'a {0} {1} wearing a black top hat and a monocle'
'a {0} {1} in a chef outfit'
'a {0} {1} in a firefighter outfit'
'a {0} {1} in a police outfit'
'a {0} {1} wearing pink glasses'
'a {0} {1} wearing a yellow shirt'
'a {0} {1} in a purple wizard outfit'
"""
LOOKS = """\
'a red {0} {1}'
'a purple {0} {1}'
'a shiny {0} {1}'
'a wet {0} {1}'
'a cube shaped {0} {1}'
"""


def listed(*prompts):
    """Prompts as that file lists them."""
    return "prompt_list = [\n" + "".join(prompts).replace("'\n", "'.format(unique_token, class_token),\n") + "]\n"


PROMPTS = "Prompts\n\nObject Prompts\n" + listed(ANYWHERE, THINGS, LOOKS)
PROMPTS += "\nLive Subject Prompts\n" + listed(ANYWHERE, LIVING, LOOKS)


def test_prompts_are_the_papers():
    theirs = [tuple(re.findall(r"^'(.*)'\.format", half, re.MULTILINE)) for half in PROMPTS.split("Live Subject")]
    ours = [tuple(t.format("{0} {1}") for t in dreambooth_templates(live)) for live in (False, True)]
    assert ours == theirs and all(len(prompts) == 25 for prompts in theirs)


def test_subjects_are_read_as_google_lays_them_out(dataset):
    assert len(dreambooth_subjects(dataset)) == 30
    bear = load_subject("bear_plushie", dataset=dataset)
    assert bear.word == "stuffed animal" and len(bear.pictures) == 3 and len(bear.templates) == 25
    assert bear.prompts("sks", 4)[0].text == "a sks stuffed animal in the jungle" and len(bear.prompts("sks", 4)) == 100
    assert bear.plain_texts(1)[-1] == "a cube shaped stuffed animal"
    assert bear.captions("sks")[0] == "a sks stuffed animal" and bear.class_prompts == ("a stuffed animal",)
    assert load_subject("dog2", dataset=dataset).templates == dreambooth_templates(True)
    assert load_subject("backpack", dataset=dataset).templates == dreambooth_templates(False)
    assert load_subject(str(dataset / "backpack"), "hamster", live=True).templates == dreambooth_templates(True)
    with pytest.raises(ValueError, match="downloads dreambooth"):
        load_subject("dog99", dataset=dataset)
    with pytest.raises(ValueError, match="downloads dreambooth"):
        dreambooth_subjects(dataset / "cat2")


def test_broken_pictures_are_set_aside_and_empty_folders_refused(tmp_path):
    for i in range(4):
        render_subject("tabby", "by day", i).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff cut off")
    with pytest.raises(ValueError, match="class_word"):
        load_subject(str(tmp_path))
    mine = load_subject(str(tmp_path), "cat")
    assert len(mine.pictures) == 4 and [name for name, _ in mine.skipped] == ["broken.jpg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no readable picture.*it is empty"):
        load_subject(str(tmp_path / "empty"), "cat")
    (tmp_path / "empty" / "photo.heic").write_bytes(b"of another kind")
    with pytest.raises(ValueError, match="no readable picture.*photo.heic"):
        load_subject(str(tmp_path / "empty"), "cat")


def test_storybooks_characters_are_new_to_the_teacher():
    for name, (word, _) in SUBJECTS.items():
        subject = load_subject(name)
        assert len(subject.pictures) == 5 and subject.word == word in OBJECTS
        plain = [render(Scene((Thing("big", c, word),), "by day"), 0)
                 for c in COLOURS]  # fmt: skip
        drawn = np.asarray(render_subject(name, "by day", 0)).astype(int)
        assert min(np.abs(np.asarray(p).astype(int) - drawn).mean() for p in plain) > 1
    words = [p.text for p in class_prompts(load_subject("tabby"), 100)]
    assert all(" cat " in text for text in words) and len(set(words)) == 96


@pytest.mark.parametrize(
    ("identifier", "word", "fault"),
    [(" ", "cat", "identifier is empty"), ("cat", "cat", "have cat already"), ("Cat", "cat", "already"),
     ("red", "cat", "have red already"), ("big z", "cat", "have big already"), ("xqzvwjkypxqzvw", "cat", "splits"),
     ("z", "hippopotamuses and rhinoceroses", "text encoder reads 18")],
)  # fmt: skip
def test_identifiers_and_classes_that_cannot_work_are_explained(pipeline, subject, identifier, word, fault):
    with pytest.raises(ValueError, match=fault):
        check_words(pipeline, identifier, replace(subject, word=word))


def test_words_of_several_tokens_are_pointed_out(pipeline, subject, capsys):
    check_words(pipeline, "sks", subject)
    assert "identifier 'sks' is 3 tokens" in capsys.readouterr().out
    check_words(pipeline, "z", replace(subject, word="dog"))
    assert "class 'dog' is 3 tokens" in capsys.readouterr().out
    check_words(pipeline, "z", subject)
    assert capsys.readouterr().out == ""
    check_words(pipeline, "z", replace(subject, templates=dreambooth_templates(True)))
    assert "the ends of 6 prompts are cut off, such as 'a z cat" in capsys.readouterr().out


def test_settings_that_cannot_work_are_explained(pipeline_dir, pipeline_xl_dir, pipeline, subject, tmp_path):
    for wrong in ({"rank": 0}, {"alpha": -1}, {"targets": ()}):
        with pytest.raises(ValueError, match="lora"):
            Lora(**wrong)
    for targets in (("query",), ("to_q", "to_w"), ("o_q",)):  # PEFT takes those that it finds
        with pytest.raises(ValueError, match="no layer of the UNet2DConditionModel is called"):
            DreamBoothModel(load_pipeline(pipeline_dir), "lora", lora=Lora(targets=targets))
    for wrong in ({"prior_loss_weight": -1}, {"num_class_images": -1}, {"num_class_images": 0}):
        with pytest.raises(ValueError, match="num_class_images"):
            SMALL.with_parameters(**wrong)
    with pytest.raises(ValueError, match="unknown method 'both'"):
        DreamBoothModel(pipeline, "both")
    with pytest.raises(ValueError, match="expected SD-v1 or SD-v2"):
        DreamBoothModel(load_pipeline(pipeline_xl_dir), "full")
    taught = lesson(
        load_pipeline(pipeline_dir), subject, tmp_path, recipe=SMALL.with_parameters(train_text_encoder=False)
    )
    for _ in taught.steps():
        pass
    taught.save(tmp_path / "unet_only")
    with pytest.raises(ValueError, match="nothing for text_encoder"):
        load_lora(load_pipeline(pipeline_dir), tmp_path / "unet_only", ("unet", "text_encoder"))
    assert SMALL.with_parameters(learning_rate=0.5, batch_size=None).learning_rates == (("full", 0.5), ("lora", 0.5))
    assert STORYBOOK.identifier == "z" and Recipe().lora == Lora(16, 27, ("to_q", "to_v"), 16, 17, ("q_proj", "v_proj"))


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_know_the_subject_from_its_class():
    judge, subject = MetricClip(ROOT / "data" / "storybook" / "clip"), load_subject("tabby")
    texts = [f"a cat {place}" for place in PLACES]
    same = [render_subject("tabby", place, 100 + i) for i, place in enumerate(PLACES)]
    other = [render(Scene((Thing("big", "green", "cat"),), place), i)
             for i, place in enumerate(PLACES)]  # fmt: skip
    right, wrong = (subject_scores(judge, None, p, subject.real, texts) for p in (same, other))
    assert right["clip_i"].value > wrong["clip_i"].value + 0.2 and set(right) == {"clip_i", "clip_t"}
    cosine = (judge.images(same)[:, None] * judge.images(subject.real)[None]).sum(-1)
    assert right["clip_i"].value == pytest.approx(cosine.mean().item(), abs=1e-5)


def test_dino_is_loaded_from_files_of_its_format(tmp_path):
    with pytest.raises(ValueError, match="hf download facebook/dino-vits16"):
        dino()
    config = ViTConfig(hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=1536)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    network, judge = dino(place=str(tmp_path)), MetricClip(ROOT / "data" / "storybook" / "clip")
    subject = load_subject("koi")
    assert network(subject.real).shape == (5, 384)
    found = subject_scores(judge, network, subject.real, subject.real, ["a fish"] * 5)
    assert 0.2 < found["dino"].value <= 1


def test_thirty_subjects_and_twenty_five_prompts_are_drawn_resumed_and_scored(dataset, pipeline, tmp_path):
    judge, tables = MetricClip(ROOT / "data" / "storybook" / "clip"), []
    fast = Sampling(num_inference_steps=4, guidance_scale=1.0)
    next(
        iter(
            sample_folder(
                pipeline,
                load_subject("cat2", dataset=dataset).prompts("z", 1)[:9],
                tmp_path / "pictures" / "cat2",
                fast,
                model="base",
            )
        )
    )  # claimed, and stopped before a picture
    for turn in range(3):  # the second time a part is lost, the third time everything is there
        rows, lost = [], {"backpack": 7, "thing3": 1} if turn == 1 else {}
        for name in dreambooth_subjects(dataset):
            subject, folder = load_subject(name, dataset=dataset), tmp_path / "pictures" / name
            prompts = subject.prompts("z", 1)
            for prompt in prompts[: lost.get(name, 0)]:
                image_path(folder, prompt.id).unlink()
            steps = list(sample_folder(pipeline, prompts, folder, fast, model="base"))
            assert sum(len(step.newest) for step in steps) == (25 if turn == 0 else lost.get(name, 0))
            drawn = [Image.open(image_path(folder, p.id)) for p in prompts]
            scores = subject_scores(judge, None, drawn, subject.real, subject.plain_texts(1))
            rows.append({"subject": name, **{score: list(s) for score, s in scores.items()}})
        tables.append(table(rows))
    scored = tables[0]
    assert scored.equals(tables[1]) and scored.equals(tables[2])
    assert list(scored["subject"]) == [*dreambooth_subjects(dataset), "mean"] and len(scored) == 31
    for score in ("clip_i", "clip_t"):
        assert [float(text.split()[0]) for text in scored[score][:30]] == pytest.approx(
            [row[score][0] for row in rows], abs=0.006
        )
        mean = np.mean([row[score][0] for row in rows])
        assert float(table[score].iloc[-1].split()[0]) == pytest.approx(mean, abs=0.006)


def test_prompts_of_the_grid_are_the_samplers(subject):
    ids = [prompt.id for prompt in subject.prompts("z", 3)]
    assert len(set(ids)) == len(ids) == 24 and storybook_prompts(1)[0].id not in ids
