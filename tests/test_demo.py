"""The demo: what it refuses, that a picture is a function of its request alone, and the page under load."""

import io
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count

import httpx
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from bksdm_utils.core.surgery import build_student
from bksdm_utils.costs.counting import count as count_costs
from bksdm_utils.data.images import to_pixels
from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.deploy.demo import _remarks, app, launch, main
from bksdm_utils.deploy.playground import (
    Limits,
    Request,
    _member,
    check,
    check_upload,
    cut_off,
    evaluations,
    generate_request,
    macs,
    open_upload,
)
from bksdm_utils.files import ROOT
from bksdm_utils.models.pipelines import load_pipeline, with_unet
from bksdm_utils.models.schedulers import with_scheduler

LIMITS = Limits(steps=2000, waiting=5)
QUICK = Request("a big red cat at night", steps=4, guidance=2.0)


@pytest.fixture(scope="module")
def pipeline(pipeline_dir):
    return load_pipeline(pipeline_dir)


@pytest.fixture(scope="module")
def models(pipeline):
    return {"teacher": pipeline, "bk_tiny": with_unet(pipeline, build_student(pipeline.unet, "bk_tiny"))}


def a_picture(size=(64, 64), mode="RGB"):
    picture = Image.new("RGB", size, "skyblue")
    ImageDraw.Draw(picture).ellipse((0, 0, size[0] // 2, size[1] // 2), fill="red")
    return picture.convert(mode)


def as_file(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# --- without a page ---------------------------------------------------------------------------------------------------

NUMBERS = (float("nan"), float("inf"), -float("inf"), -1, 10**400, None, "5", True)
REFUSED = [
    ({"prompt": "x" * 10_000}, "the prompt has 10,000 characters: expected at most 1,000"),
    ({"negative_prompt": "x" * 1001}, "the negative prompt has 1,001 characters"),
    ({"prompt": None}, "expected text"), ({"prompt": "half an emoji \ud83d"}, "half a character"),
    *(({name: value}, f"^{name} is .*: expected a") for name in ("seed", "steps", "guidance", "pictures", "strength")
      for value in NUMBERS),
    *(({"size": value}, "^size is .*: expected a whole number") for value in NUMBERS if value is not None),
    ({"steps": 3}, "steps is 3: expected a whole number from 4 to 50"), ({"steps": 51}, "from 4 to 50"),
    ({"steps": 4.0}, "whole number"), ({"pictures": 0}, "from 1 to 4"), ({"pictures": 5}, "from 1 to 4"),
    ({"guidance": 31}, "from 0 to 30"), ({"strength": 1.01}, "from 0 to 1"),
    ({"size": 60}, "multiple of 8"), ({"size": 136}, "from 8 to 128"), ({"size": 0}, "from 8"),
    ({"picture": a_picture(), "strength": 0.1, "steps": 4}, "leaves none to draw: expected a strength of 0.25"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_a_bad_request_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        check(replace(QUICK, **changes), Limits(size=128))


@pytest.mark.parametrize("prompt", ["", "🏠🌳 a house", "بيت أحمر كبير", "a big red house " * 20, "\n\t\x00 <b>&"])
def test_unusual_prompts_are_drawn(models, prompt):
    request = replace(QUICK, prompt=prompt, negative_prompt=prompt[::-1])
    check(request, Limits())
    for pipeline in models.values():
        assert generate_request(pipeline, request)[0][0].size == (64, 64)


def test_it_is_said_what_the_text_encoder_does_not_read(pipeline):
    assert cut_off(pipeline, "") == cut_off(pipeline, QUICK.prompt) == ""
    lost = cut_off(pipeline, "a big red house " * 5)  # 20 tokens, of which two are the text's begin and end
    assert lost.split() == ["red", "house"]
    said = _remarks(pipeline, replace(QUICK, prompt="a big red house " * 5, negative_prompt="<b> " * 30))
    assert "reads 18 tokens. The end of the prompt was cut off: <i>red house" in said
    assert "the negative prompt" in said and "<b>" not in said


def test_a_file_that_is_no_usable_picture_is_refused(tmp_path):
    whole = as_file(a_picture((640, 640)), "PNG").getvalue()
    bomb = as_file(Image.new("1", (20_000, 20_000)), "PNG")
    script = as_file(a_picture(), "EPS")
    for file in (io.BytesIO(b"no picture"), io.BytesIO(), io.BytesIO(whole[:20]), bomb, script, tmp_path / "none"):
        with pytest.raises(ValueError, match="no picture that can be read: expected PNG, JPEG"):
            open_upload(file)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        part = as_file(Image.effect_noise((640, 640), 50).convert("RGB"), kind).getvalue()
        with pytest.raises(ValueError, match="damaged or ends early|no picture"):
            check_upload(open_upload(io.BytesIO(part[: len(part) // 2])), Limits())


def test_a_large_picture_is_refused_before_it_is_decoded():
    opened = open_upload(as_file(Image.new("1", (6000, 6000))))
    opened.load = lambda: pytest.fail("decoded")
    with pytest.raises(ValueError, match="6,000 x 6,000 pixels: expected at most 25 megapixels"):
        check_upload(opened, Limits())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "I;16", "F"])
def test_pictures_of_every_mode_and_size_are_drawn_from(pipeline, mode):
    for size in ((1, 1), (3, 2000), (100, 60)):
        picture = Image.new(mode, size) if mode == "I;16" else a_picture(size, mode)
        request = replace(QUICK, picture=picture)
        check(request, Limits())
        assert generate_request(pipeline, request)[0][0].size == (64, 64)


def test_a_turned_picture_is_set_upright(pipeline):
    upright = a_picture()
    exif = Image.Exif()
    exif[274] = 6  # the camera was held a quarter turn to the left
    turned = open_upload(as_file(upright.transpose(Image.Transpose.ROTATE_90), exif=exif))
    pictures = [generate_request(pipeline, replace(QUICK, picture=start))[0] for start in (upright, turned)]
    assert same(*pictures)


def test_pictures_depend_on_the_request_alone(models):
    requests = [QUICK, replace(QUICK, seed=1), replace(QUICK, prompt="a fish"), replace(QUICK, pictures=3),
                replace(QUICK, negative_prompt="red"), replace(QUICK, size=32), replace(QUICK, picture=a_picture()),
                replace(QUICK, picture=a_picture(), strength=1.0)]  # fmt: skip
    for pipeline in models.values():
        before = torch.random.get_rng_state()
        alone = [generate_request(pipeline, request)[0] for request in requests]
        assert torch.equal(before, torch.random.get_rng_state())
        with ThreadPoolExecutor(2) as pool:  # two at once, backwards, with the same pipeline
            together = list(pool.map(lambda request, p=pipeline: generate_request(p, request)[0], requests[::-1]))[::-1]
        assert all(same(*pair) for pair in zip(alone, together, strict=True))
        assert len({picture.tobytes() for pictures in alone for picture in pictures}) >= len(requests)
        apart = np.asarray(alone[3][0]).astype(int) - np.asarray(alone[0][0])  # the first of three, and the only one
        assert np.abs(apart).max() <= 1


def test_steps_are_counted_and_weights_shared(pipeline):
    for scheduler in (None, "dpm++", "ddim"):
        for request in (QUICK, replace(QUICK, picture=a_picture()), replace(QUICK, picture=a_picture(), strength=1)):
            reached, changed = [], with_scheduler(pipeline, scheduler)
            generate_request(changed, request, step=lambda *at, told=reached: told.append(at))
            expected = evaluations(changed, request)
            assert reached == [(i + 1, expected) for i in range(expected)]
    member = _member(pipeline, replace(QUICK, picture=a_picture()))
    assert member.unet is pipeline.unet and member.vae is pipeline.vae
    once = count_costs(pipeline.unet.config).macs
    assert macs(pipeline, replace(QUICK, steps=25, pictures=3)) == once * 26 * 3 * 2
    assert macs(pipeline, replace(QUICK, guidance=1.0, picture=a_picture(), strength=0.5)) == once * 2


def test_limits_suit_the_model_and_let_somebody_draw(pipeline):
    assert Limits().for_model(pipeline).size == 128 and Limits(size=24).for_model(pipeline).size == 24
    for wrong in ({"steps": 3}, {"waiting": 0}, {"size": 0}, {"pictures": 0}):
        with pytest.raises(ValueError, match="lets nobody draw"):
            Limits(**wrong)


def test_the_stronger_the_less_is_left_of_a_picture():
    teacher, start = load_pipeline(ROOT / "data" / "storybook" / "teacher"), render(sample_scene(3), 3)
    request = Request("a small blue cat in the snow", guidance=2.0, steps=20, picture=start)
    drawings = [generate_request(teacher, replace(request, strength=strength))[0][0] for strength in (0.05, 0.5, 1.0)]
    far = [np.abs(np.asarray(drawing, float) - np.asarray(start, float)).mean() for drawing in drawings]
    assert 2 * far[0] < far[1] < far[2], far


def test_image_to_image_keeps_what_strength_leaves(pipeline):
    """With a U-Net that finds the very noise that was added, the picture comes back as the VAE alone gives it."""
    request, pixels = replace(QUICK, picture=a_picture(), steps=10), to_pixels(a_picture(), 64)
    member = _member(pipeline, request)
    clean = member.vae.encode(pixels[None]).latent_dist.mean.detach() * member.vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    member.scheduler.set_timesteps(10)
    times, member.scheduler._begin_index = member.scheduler.timesteps[4:], 4
    latents = member.scheduler.add_noise(clean, noise, times[:1])
    for time_ in times:
        latents = member.scheduler.step(noise, time_, latents).prev_sample
    assert torch.allclose(latents, clean, atol=0.1)


def test_the_command_says_what_is_missing(capsys, monkeypatch, tmp_path):
    assert main(["--teacher", str(tmp_path)]) == 1
    assert "no model_index.json" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[demo\]'"):
        app({"teacher": None})


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
    return {"prompt": QUICK.prompt, "negative_prompt": "", "seed": 0, "steps": 4, "guidance": 2, "pictures": 1,
            "size": 64, "api_name": "/text_to_image"} | changes  # fmt: skip


def shown(answer):
    """The pictures of both models in an answer."""
    return [Image.open(item["image"]).convert("RGB") for gallery in answer[1::2] for item in gallery]


def expected(models, request):
    return [picture for pipeline in models.values() for picture in generate_request(pipeline, request)[0]]


def test_the_page_draws_with_both_models_and_is_for_this_machine_only(page, models):
    assert page.local_url.startswith("http://127.0.0.1:") and page.share_url is None
    with socket.socket() as other:  # answers only where all addresses are listened on
        assert other.connect_ex(("127.0.0.2", page.server_port)) != 0
    answer = client(page).predict(**sent(pictures=2, prompt="a fish " * 20))
    assert same(shown(answer), expected(models, replace(QUICK, pictures=2, prompt="a fish " * 20)))
    assert "cut off" in answer[0] and answer[2].endswith("G MACs") and answer[2] != answer[4]


def test_no_two_answers_share_a_file(page):
    import gradio_client

    visitor = gradio_client.Client(page.local_url, verbose=False, download_files=False)
    paths = [item["image"]["path"] for _ in range(2) for gallery in visitor.predict(**sent())[1::2] for item in gallery]
    assert len(set(paths)) == 4


def test_the_page_draws_from_a_picture(page, models, tmp_path):
    import gradio_client

    a_picture((50, 30), "RGBA").save(tmp_path / "start.png")
    (tmp_path / "text.png").write_text("no picture")
    named = sent(api_name="/image_to_image", strength=0.5)
    elsewhere = {"path": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}}
    answer = client(page).predict(**named, picture=gradio_client.handle_file(tmp_path / "start.png"))
    assert same(shown(answer), expected(models, replace(QUICK, picture=a_picture((50, 30), "RGBA"), strength=0.5)))
    for start, said in ((gradio_client.handle_file(tmp_path / "text.png"), "no picture that can be read"),
                        (None, "no picture to start from"), (elsewhere, "is an address: expected a file")):  # fmt: skip
        with pytest.raises(Exception, match=said):
            client(page).predict(**named, picture=start)


def test_the_page_says_what_it_refuses(page):
    visitor = client(page)
    for changes, said in (({"steps": 2001}, "steps is 2001: expected a whole number from 4 to 2,000"),
                          ({"size": 4096}, "size is 4096: expected a whole number from 8 to 128"),
                          ({"prompt": "x" * 10_000}, "10,000 characters"), ({"pictures": 1.5}, "pictures is 1.5"),
                          ({"seed": "x"}, "seed is x"), ({"seed": None}, "seed is None")):  # fmt: skip
        with pytest.raises(Exception, match=said):
            visitor.predict(**sent(**changes))


def test_of_fifty_requests_at_once_the_queue_takes_its_share(page, models):
    visitors = [client(page) for _ in range(5)]

    def one(number):
        try:
            return number, visitors[number % 5].predict(**sent(seed=number, steps=20))
        except Exception as error:  # the client has several classes for it
            return number, error

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(one, range(50)))
    refused = [str(answer) for _, answer in answers if isinstance(answer, Exception)]
    drawn = [(number, answer) for number, answer in answers if not isinstance(answer, Exception)]
    assert len(drawn) > LIMITS.waiting and refused
    assert all("ueue is full" in said for said in refused), set(refused)
    for number, answer in drawn:
        assert same(shown(answer), expected(models, replace(QUICK, seed=number, steps=20)))


def until(condition, seconds=10.0):
    ending = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ending
        time.sleep(0.05)


def test_a_stopped_request_frees_the_worker(page, monkeypatch):
    steps = watched(monkeypatch)
    job = client(page).submit(**sent(steps=2000))
    until(lambda: next(steps) > 3)
    job.cancel()
    assert_free(page, steps)


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
