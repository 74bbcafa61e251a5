"""The demo: refusals, images as a function of their request, and the page under load (notebook 06)."""

import io
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import httpx
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from bksdm_utils.config.deploy import Demo
from bksdm_utils.core.surgery import build_student
from bksdm_utils.costs.counting import count as count_costs
from bksdm_utils.data.images import to_pixels
from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.deploy.demo import _remarks, app, launch, load_models
from bksdm_utils.deploy.playground import (
    Request,
    by_strength,
    generate_request,
    open_upload,
    own_pipeline,
    side_by_side,
)
from bksdm_utils.files import ROOT
from bksdm_utils.models.pipelines import load_pipeline, with_scheduler, with_unet

LIMITS = Demo(max_steps=2000, max_waiting=5, max_size=128)
QUICK = Request(prompt="a big red cat at night", steps=4, guidance=2.0)


@pytest.fixture(scope="module")
def pipeline(pipeline_dir):
    return load_pipeline(pipeline_dir)


@pytest.fixture(scope="module")
def models(pipeline):
    return {"teacher": pipeline, "bk_tiny": with_unet(pipeline, build_student(pipeline.unet, "bk_tiny"))}


def an_image(size=(64, 64), mode="RGB"):
    image = Image.new("RGB", size, "skyblue")
    ImageDraw.Draw(image).ellipse((0, 0, size[0] // 2, size[1] // 2), fill="red")
    return image.convert(mode)


def as_file(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# --- without a page ---------------------------------------------------------------------------------------------------

NUMBERS = (float("nan"), float("inf"), -float("inf"), -1, None, "many", True)
REFUSED = [
    ({"prompt": None}, "prompt is None: expected text"), ({"prompt": "half an emoji \ud83d"}, "surrogates not allowed"),
    *(({name: value}, f"^{name} is .*: expected a") for name in ("seed", "steps", "guidance", "images", "strength")
      for value in NUMBERS),
    *(({"size": value}, "^size is .*: expected a whole number") for value in NUMBERS if value is not None),
    ({"seed": 10**400}, "^seed is"), ({"steps": 3}, "4 or more"), ({"steps": 4.5}, "whole number"),
    ({"images": 0}, "1 or more"), ({"guidance": 31}, "30 or less"), ({"strength": 1.01}, "1 or less"),
    ({"size": 60}, "multiple of 8"), ({"size": 0}, "8 or more"),
    ({"image": an_image(), "strength": 0.1, "steps": 4}, "leaves none: expected 0.25"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_a_bad_request_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        QUICK.but(**changes)


@pytest.mark.parametrize("prompt", ["", "🏠🌳 a house", "بيت أحمر كبير", "a big red house " * 20, "\n\t\x00 <b>&"])
def test_unusual_prompts_are_sampled(models, prompt):
    request = QUICK.but(prompt=prompt, negative_prompt=prompt[::-1])
    for pipeline in models.values():
        assert generate_request(pipeline, request)[0][0].size == (64, 64)


def test_remarks_name_what_the_text_encoder_does_not_read(pipeline):
    assert _remarks(pipeline, QUICK) == []
    prompt = "a big red house " * 5  # 20 tokens, beside the text's begin and end
    first, second = _remarks(pipeline, QUICK.but(prompt=prompt, negative_prompt="<b> " * 30))
    assert "reads 18 tokens. The end of the prompt was cut off: <i>red house" in first
    assert "the negative prompt" in second and "<b>" not in second


def test_unusable_files_are_refused(tmp_path):
    whole = as_file(an_image((640, 640)), "PNG").getvalue()
    bomb = as_file(Image.new("1", (20_000, 20_000)), "PNG")
    script = as_file(an_image(), "EPS")
    for file in (io.BytesIO(b"no image"), io.BytesIO(), io.BytesIO(whole[:20]), bomb, script, tmp_path / "none"):
        with pytest.raises(ValueError, match="no whole image: expected PNG, JPEG"):
            open_upload(file)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        part = as_file(Image.effect_noise((640, 640), 50).convert("RGB"), kind).getvalue()
        with pytest.raises(ValueError, match="no whole image"):
            open_upload(io.BytesIO(part[: len(part) // 2]))


def test_a_large_image_is_refused_before_it_is_decoded(monkeypatch):
    file = as_file(Image.new("1", (6000, 6000)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="6,000 x 6,000 pixels: expected at most 25 megapixels"):
        open_upload(file)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "I;16", "F"])
def test_images_of_every_mode_and_size_are_taken(pipeline, mode):
    for size in ((1, 1), (3, 2000), (100, 60)):
        image = Image.new(mode, size) if mode == "I;16" else an_image(size, mode)
        assert generate_request(pipeline, QUICK.but(image=image))[0][0].size == (64, 64)


def test_a_turned_image_is_set_upright(pipeline):
    upright = an_image()
    exif = Image.Exif()
    exif[274] = 6  # the camera was held a quarter turn to the left
    turned = open_upload(as_file(upright.transpose(Image.Transpose.ROTATE_90), exif=exif))
    images = [generate_request(pipeline, QUICK.but(image=start))[0] for start in (upright, turned)]
    assert same(*images)


@pytest.mark.slow
def test_images_are_a_function_of_the_request(models):
    requests = [QUICK, QUICK.but(seed=1), QUICK.but(prompt="a fish"), QUICK.but(images=3),
                QUICK.but(negative_prompt="red"), QUICK.but(size=32), QUICK.but(image=an_image()),
                QUICK.but(image=an_image(), strength=1.0)]  # fmt: skip
    for pipeline in models.values():
        before = torch.random.get_rng_state()
        single = [generate_request(pipeline, request)[0] for request in requests]
        assert torch.equal(before, torch.random.get_rng_state())
        with ThreadPoolExecutor(2) as pool:  # two at once, backwards, with the same pipeline
            together = list(pool.map(lambda request, p=pipeline: generate_request(p, request)[0], requests[::-1]))[::-1]
        assert all(same(*pair) for pair in zip(single, together, strict=True))
        assert len({image.tobytes() for images in single for image in images}) >= len(requests)
        distance = np.asarray(single[3][0]).astype(int) - np.asarray(single[0][0])  # first of three, only one
        assert np.abs(distance).max() <= 1


def test_steps_are_counted_and_weights_shared(pipeline):
    once, start = count_costs(pipeline.unet.config).macs / 1e9, {"image": an_image()}
    requests = ((QUICK.but(steps=6, images=3), 7, 3 * 2), (QUICK.but(**start, strength=1.0), 4, 2),
                (QUICK.but(**start, strength=0.5, guidance=1.0), 2, 1))  # fmt: skip
    for scheduler in (None, "dpm++", "ddim"):
        for request, steps, passes in requests:
            reached, changed = [], with_scheduler(pipeline, scheduler)
            _, cost = generate_request(changed, request, step=lambda *at, reached=reached: reached.append(at))
            steps -= steps == 7 and scheduler is not None  # PNDM takes one more
            assert reached == [(i + 1, steps) for i in range(steps)]
            assert cost.endswith(f" s, {once * steps * passes:,.3g} G MACs")
    member = own_pipeline(pipeline, QUICK.but(**start))
    assert member.unet is pipeline.unet and member.vae is pipeline.vae


@pytest.mark.slow
def test_rows_of_the_notebook_name_their_cost(models):
    rows = side_by_side(models, QUICK.but(images=2))
    assert [name.split("\n")[0] for name in rows] == list(models) and all("G MACs" in name for name in rows)
    assert all(len(images) == 2 for images in rows.values())
    rows = by_strength(models, QUICK.but(image=an_image()), (0.5, 1.0))
    assert list(rows) == ["start", *models] and all(len(images) == 2 for images in rows.values())


@pytest.mark.slow
def test_more_strength_changes_an_image_more():
    teacher, start = load_pipeline(ROOT / "data" / "storybook" / "teacher"), render(sample_scene(3), 3)
    request = Request(prompt="a small blue cat in the snow", guidance=2.0, steps=20, image=start)
    drawings = [generate_request(teacher, request.but(strength=strength))[0][0] for strength in (0.05, 0.5, 1.0)]
    far = [np.abs(np.asarray(drawing, float) - np.asarray(start, float)).mean() for drawing in drawings]
    assert 2 * far[0] < far[1] < far[2], far


def test_image_to_image_keeps_what_strength_leaves(pipeline):
    """With a U-Net that finds the very noise that was added, the image comes back as the VAE alone gives it."""
    request, pixels = QUICK.but(image=an_image(), steps=10), to_pixels(an_image(), 64)
    member = own_pipeline(pipeline, request)
    clean = member.vae.encode(pixels[None]).latent_dist.mean.detach() * member.vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    member.scheduler.set_timesteps(10)
    times, member.scheduler._begin_index = member.scheduler.timesteps[4:], 4
    latents = member.scheduler.add_noise(clean, noise, times[:1])
    for time_ in times:
        latents = member.scheduler.step(noise, time_, latents).prev_sample
    assert torch.allclose(latents, clean, atol=0.1)


def test_missing_models_and_packages_are_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="could not be loaded"):
        load_models(str(tmp_path), [])
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[demo\]'"):
        app({"teacher": None})


def test_students_are_named_by_their_run(pipeline_dir, pipeline, tmp_path):
    for folder in ("runs/bk_tiny/unet_ema", "mine"):
        build_student(pipeline.unet, "bk_tiny").save_pretrained(tmp_path / folder)
    students = [str(tmp_path / folder) for folder in ("runs/bk_tiny/unet_ema", "mine", "mine")]
    assert list(load_models(str(pipeline_dir), students)) == ["teacher", "bk_tiny", "mine", students[2]]


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(models):
    pytest.importorskip("gradio")
    page = launch(models, LIMITS, wait=False)
    yield page
    page.close()


def client(page):
    import gradio_client

    return gradio_client.Client(page.local_url, verbose=False)


def sent(**changes):
    """What a program sends for QUICK."""
    return {"prompt": QUICK.prompt, "negative_prompt": "", "seed": 0, "steps": 4, "guidance": 2, "images": 1,
            "size": 64, "api_name": "/text_to_image"} | changes  # fmt: skip


def shown(answer):
    """The images of both models in an answer."""
    return [Image.open(item["image"]).convert("RGB") for gallery in answer[1:] for item in gallery]


def expected(models, request):
    return [image for pipeline in models.values() for image in generate_request(pipeline, request)[0]]


@pytest.mark.slow
def test_page_samples_with_both_models_for_this_machine_only(page, models):
    assert page.local_url.startswith("http://127.0.0.1:") and page.share_url is None
    with socket.socket() as other:  # answers only where all addresses are listened on
        assert other.connect_ex(("127.0.0.2", page.server_port)) != 0
    answer = client(page).predict(**sent(images=2, prompt="a fish " * 20))
    assert same(shown(answer), expected(models, QUICK.but(images=2, prompt="a fish " * 20)))
    teacher, student, remark = answer[0].split("<br>")
    assert "cut off" in remark and teacher.endswith("G MACs") and student.endswith("G MACs")


@pytest.mark.slow
def test_no_two_answers_share_a_file(page):
    import gradio_client

    visitor = gradio_client.Client(page.local_url, verbose=False, download_files=False)
    paths = [item["image"]["path"] for _ in range(2) for gallery in visitor.predict(**sent())[1:] for item in gallery]
    assert len(set(paths)) == 4


@pytest.mark.slow
def test_page_takes_an_image(page, models, tmp_path):
    import gradio_client

    an_image((50, 30), "RGBA").save(tmp_path / "start.png")
    (tmp_path / "text.png").write_text("no image")
    named = sent(api_name="/image_to_image", strength=0.5)
    elsewhere = {"path": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}}
    an_image().save(tmp_path / "script.eps")
    answer = client(page).predict(**named, image=gradio_client.handle_file(tmp_path / "start.png"))
    assert same(shown(answer), expected(models, QUICK.but(image=an_image((50, 30), "RGBA"), strength=0.5)))
    for start, said in ((gradio_client.handle_file(tmp_path / "text.png"), "cannot identify image"),
                        (gradio_client.handle_file(tmp_path / "script.eps"), "no whole image"),
                        (None, "no image to start from"), (elsewhere, "failed validation")):  # fmt: skip
        with pytest.raises(Exception, match=said):
            client(page).predict(**named, image=start)


def test_page_names_what_it_refuses(page):
    visitor = client(page)
    for changes, said in (({"steps": 2001}, "2001 is greater than maximum value 2000"),
                          ({"size": 4096}, "4096 is greater than maximum value 128"), ({"size": 60}, "multiple of 8"),
                          ({"images": 5}, "5 is greater than maximum value 4"),
                          ({"prompt": "x" * 10_000}, "prompt has 10,000 characters: expected at most 1,000"),
                          ({"negative_prompt": "x" * 1001}, "negative_prompt has 1,001 characters"),
                          ({"guidance": 31}, "31 is greater than"), ({"seed": -1}, "-1 is less than minimum value 0"),
                          ({"seed": None}, "seed is None"), ({"prompt": None}, "prompt is None")):  # fmt: skip
        with pytest.raises(Exception, match=said):
            visitor.predict(**sent(**changes))


@pytest.mark.nightly
def test_queue_takes_its_share_of_fifty_requests(page, models):
    visitors = [client(page) for _ in range(5)]

    def one(number):
        try:
            return number, visitors[number % 5].predict(**sent(seed=number, steps=20))
        except Exception as error:  # the client has several classes for it
            return number, error

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(one, range(50)))
    refused = [str(answer) for _, answer in answers if isinstance(answer, Exception)]
    answered = [(number, answer) for number, answer in answers if not isinstance(answer, Exception)]
    assert len(answered) > LIMITS.max_waiting and refused
    assert all("ueue is full" in said for said in refused), set(refused)
    for number, answer in answered:
        assert same(shown(answer), expected(models, QUICK.but(seed=number, steps=20)))


def until(condition, seconds=10.0):
    ending = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ending
        time.sleep(0.05)


@pytest.mark.slow
def test_a_stopped_request_frees_the_worker(page, monkeypatch):
    steps = watched(monkeypatch)
    job = client(page).submit(**sent(steps=2000))
    until(lambda: next(steps) > 3)
    job.cancel()
    assert_free(page, steps)


@pytest.mark.slow
def test_a_visitor_who_leaves_frees_the_worker(page, monkeypatch):
    steps, api = watched(monkeypatch), f"{page.local_url}gradio_api/queue"
    data = [QUICK.prompt, "", 2000, 2, 0, 1, 64]
    names = page.config["dependencies"][0]
    assert names["api_name"] == "text_to_image" and len(names["inputs"]) == len(data)
    httpx.post(f"{api}/join", json={"data": data, "fn_index": names["id"], "session_hash": "left"})
    with httpx.stream("GET", f"{api}/data?session_hash=left") as lines:
        next(line for line in lines.iter_lines() if "process_generating" in line)
    assert_free(page, steps)


def watched(monkeypatch):
    """An iterator that gives how many denoising steps have been taken up to now."""
    taken, whole = count(), generate_request
    last = [0]

    def counting(pipeline, request, step):
        def counted(*at):
            last[0] = next(taken)
            step(*at)

        return whole(pipeline, request, counted)

    monkeypatch.setattr("bksdm_utils.deploy.demo.generate_request", counting)
    return iter(lambda: last[0], None)


def assert_free(page, steps):
    before, started = next(steps), time.monotonic()
    client(page).predict(**sent())
    assert time.monotonic() - started < 8 and next(steps) - before < 500
    assert threading.active_count() < 100
