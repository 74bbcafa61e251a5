import io
import json
import time
import tracemalloc
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from bksdm_utils.config.presets import PRESETS, find_preset
from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.dreambooth.subjects import load_subject
from bksdm_utils.evaluation.evaluator import Evaluator, by_short_name, distance_to
from bksdm_utils.evaluation.features import FeatureCache, compute, real_images
from bksdm_utils.evaluation.folders import _fixed, complete_images, image_path, read_manifest, sample_folder
from bksdm_utils.evaluation.metrics import Score, Statistics, clip_score, fid
from bksdm_utils.evaluation.networks import MetricClip, Network, dino
from bksdm_utils.evaluation.prompts import Prompt, read_prompts, storybook_prompts
from bksdm_utils.evaluation.protocols import PROTOCOLS, Protocol, as_paper, as_stored
from bksdm_utils.evaluation.sampling import Sampling
from bksdm_utils.files import ROOT, NotAvailable, in_threads, write_json
from bksdm_utils.models.pipelines import load_pipeline
from bksdm_utils.workbook.run import Run


def fill(folder, drawn, image_format="png", model="m"):
    """A folder of pictures as `sample_folder` leaves it: id -> (text, picture)."""
    from bksdm_utils.evaluation.folders import _write_image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    write_json(folder / "sampling.json", {"model": model, "image_format": image_format})
    with (folder / "manifest-0.jsonl").open("a", encoding="utf-8") as manifest:
        for id, (text, picture) in drawn.items():
            sha256 = _write_image(image_path(folder, id), picture)
            manifest.write(json.dumps({"id": id, "text": text, "seed": 0, "sha256": sha256}) + "\n")
    return [Prompt(id, text) for id, (text, _) in drawn.items()]


def renders(count, seed=1000):
    scenes = {f"test-{i}": sample_scene(i, "test") for i in range(count)}
    return {id: (scene.caption, render(scene, seed + i)) for i, (id, scene) in enumerate(scenes.items())}


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory):
    return Evaluator("storybook", cache_dir=tmp_path_factory.mktemp("real"))


def test_real_renders_score_as_real(evaluator, tmp_path):
    drawn = renders(100)
    prompts = fill(tmp_path, drawn)
    found = evaluator.evaluate(tmp_path, prompts)
    assert found.num_images == 100 and found.skipped == [] and "biased" in found.warning
    assert min(found.scores[name].value for name in ("size", "colour", "object", "place", "relation")) > 0.95
    assert found.scores["fid"].value < 5 and abs(found.scores["kid"].value) < 4 * found.scores["kid"].error
    pictures, captions = zip(*((picture, text) for text, picture in drawn.values()), strict=True)
    assert found.scores["clip_score"].value == pytest.approx(clip_score(evaluator.judge, pictures, captions), abs=1e-5)
    assert list(found.clip_scores.values()) == sorted(found.clip_scores.values())
    assert all(score.error > 0 for name, score in found.scores.items() if name in ("fid", "kid", "clip_score"))


def test_scores_are_of_these_pictures_or_computed_anew(evaluator, tmp_path, monkeypatch):
    drawn = renders(41)
    prompts = fill(tmp_path, drawn)
    first = evaluator.evaluate(tmp_path, prompts[:40])
    counted = []
    monkeypatch.setattr(
        "bksdm_utils.evaluation.evaluator.compute", lambda *a, **k: counted.append(a) or compute(*a, **k)
    )
    assert evaluator.evaluate(tmp_path, prompts[:40]) == first and not counted  # read from the file
    looked_at = []
    network = evaluator.features
    counting = Network(*(getattr(network, n) for n in ("name", "key", "dim", "prepare")),
                       lambda pixels: looked_at.append(len(pixels)) or network.forward(pixels))  # fmt: skip
    monkeypatch.setattr(evaluator, "features", counting)
    monkeypatch.setitem(evaluator.judge.__dict__, "pictures", counting)
    more = evaluator.evaluate(tmp_path, prompts)
    assert more.num_images == 41 and sum(looked_at) == 1  # one more picture, one more row
    cat = render(sample_scene(3, "test"), 7)
    fill(tmp_path, {"test-3": (prompts[3].text, cat)})
    changed = evaluator.evaluate(tmp_path, prompts)
    assert changed.key != more.key and changed.scores != more.scores and sum(looked_at) == 2


def test_scores_do_not_depend_on_the_order_of_the_prompts(evaluator, tmp_path):
    prompts = fill(tmp_path, renders(40))
    first = evaluator.evaluate(tmp_path, prompts)
    (tmp_path / "scores-storybook.json").unlink()
    assert evaluator.evaluate(tmp_path, prompts[::-1]) == first
    assert evaluator.fid_by_number(tmp_path, prompts[::-1], (30,)) == evaluator.fid_by_number(tmp_path, prompts, (30,))


def test_scores_of_statistics_and_of_pictures_have_two_keys(evaluator, tmp_path):
    prompts = fill(tmp_path / "drawn", renders(20))
    evaluator.real.save(tmp_path / "real.npz", evaluator.features)
    numbers_only = Evaluator("storybook", tmp_path / "real.npz", cache_dir=tmp_path)
    ours, theirs = (e.evaluate(tmp_path / "drawn", prompts) for e in (evaluator, numbers_only))
    assert ours.key != theirs.key and "kid" in ours.scores and "kid" not in theirs.scores
    assert ours.scores["fid"] == theirs.scores["fid"]


def test_another_version_computes_anew(evaluator, tmp_path, monkeypatch):
    prompts = fill(tmp_path, renders(20))
    before = evaluator.evaluate(tmp_path, prompts).key
    kept = set(tmp_path.glob("rows-*"))
    monkeypatch.setattr("bksdm_utils.evaluation.evaluator.VERSION", 999)
    assert evaluator.evaluate(tmp_path, prompts).key != before
    assert len(set(tmp_path.glob("rows-*")) - kept) == len(kept) == 2


def test_other_captions_under_the_same_ids_are_refused(evaluator, tmp_path):
    prompts = fill(tmp_path, renders(20))
    evaluator.evaluate(tmp_path, prompts)
    other = [*prompts[:7], Prompt(prompts[7].id, "a green dog"), *prompts[8:]]
    with pytest.raises(ValueError, match="test-7 of .*now it is 'a green dog'"):
        evaluator.evaluate(tmp_path, other)
    with pytest.raises(ValueError, match="now it is 'a green dog'"):
        distance_to(tmp_path, tmp_path, other)


def test_missing_and_damaged_pictures_are_set_aside_and_counted(evaluator, tmp_path):
    prompts = fill(tmp_path, renders(30), image_format="jpeg")
    image_path(tmp_path, "test-4").unlink()
    cut = image_path(tmp_path, "test-9")
    cut.write_bytes(cut.read_bytes()[:-200])
    found = evaluator.evaluate(tmp_path, prompts)
    assert found.num_images == 28 and [id for id, _ in found.skipped] == ["test-4", "test-9"]
    assert "draw the folder again" in found.skipped[0][1]
    assert evaluator.evaluate(tmp_path, prompts) == found
    fewer = [prompt for prompt in prompts if prompt.id != "test-9"]  # the same scores, another list
    again = evaluator.evaluate(tmp_path, fewer)
    assert again.key == found.key and [id for id, _ in again.skipped] == ["test-4"]
    with pytest.raises(ValueError, match="scores need 20"):
        evaluator.evaluate(tmp_path, prompts[:15])


def test_a_folder_filled_by_the_sampler_is_scored(evaluator, pipeline_dir, tmp_path):
    prompts = storybook_prompts(24)
    for name in ("one", "other"):
        list(
            sample_folder(
                load_pipeline(pipeline_dir), prompts, tmp_path / name, Sampling(num_inference_steps=4, seed=len(name))
            )
        )
    found = evaluator.evaluate(tmp_path / "one", prompts)
    assert found.scores["clip_score"].value < 0.4 and found.scores["fid"].value > 20
    assert distance_to(tmp_path / "one", tmp_path / "one", prompts) == Score(0, 0)
    assert distance_to(tmp_path / "one", tmp_path / "other", prompts).value > 1
    with pytest.raises(ValueError, match="no picture in common"):
        distance_to(tmp_path / "one", tmp_path / "other", storybook_prompts(25)[24:])


def test_fid_falls_with_the_number_of_pictures(evaluator, tmp_path):
    prompts = fill(tmp_path, renders(120))
    found = evaluator.fid_by_number(tmp_path, prompts, (30, 60, 120))
    assert found[30].value > found[60].value > found[120].value > 0
    whole = evaluator.evaluate(tmp_path, prompts).scores["fid"].value
    assert found[120].value == pytest.approx(whole, rel=1e-6) and found[120].error == 0 < found[30].error


def test_the_papers_view_is_jpeg_bicubic_jpeg():
    picture = render(sample_scene(1), 1, 512)

    def through_files(picture):  # as separate tools did it, by files
        file = io.BytesIO()
        picture.save(file, format="JPEG")  # Pillow's own quality is 75
        return Image.open(io.BytesIO(file.getvalue()))

    expected = through_files(through_files(picture).resize((256, 256)))
    assert np.array_equal(np.asarray(as_paper(picture)), np.asarray(expected))
    assert np.array_equal(np.asarray(as_paper(through_files(picture))), np.asarray(expected))
    assert as_paper(Image.new("L", (640, 480))).size == (256, 256)


def test_real_pictures_come_from_folders_and_zips(tmp_path):
    (tmp_path / "val2014").mkdir()
    for i in range(3):
        render(sample_scene(i), i).save(tmp_path / "val2014" / f"{i}.jpg")
    (tmp_path / "val2014" / "notes.txt").write_text("no picture")
    with zipfile.ZipFile(tmp_path / "val2014.zip", "w") as archive:
        for path in (tmp_path / "val2014").iterdir():
            archive.write(path, f"val2014/{path.name}")
    for place in (tmp_path / "val2014", tmp_path / "val2014.zip"):
        with real_images(place) as found:
            opened = list(in_threads(lambda open_: np.asarray(open_()).shape, list(found.values()) * 20))
        assert len(found) == 3 and set(opened) == {(64, 64, 3)}
    (tmp_path / "empty").mkdir()
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    (tmp_path / "text.zip").write_text("no archive")
    whole = (tmp_path / "val2014.zip").read_bytes()
    (tmp_path / "broken.zip").write_bytes(whole.replace(b"PK\x01\x02", b"PK\x00\x02", 1))
    for place, fault in (("nowhere", "coco_statistics"), ("nowhere.zip", "coco_statistics"),
                         ("empty", "holds no pictures"), ("empty.zip", "holds no pictures"),
                         ("text.zip", "cannot be read"), ("broken.zip", "cannot be read")):  # fmt: skip
        with pytest.raises(ValueError, match=fault), real_images(tmp_path / place):
            pass


def test_an_archive_of_real_pictures_is_opened_once(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "real.zip", "w") as archive:
        for i in range(30):
            file = io.BytesIO()
            render(sample_scene(i), i).save(file, "PNG")
            archive.writestr(f"{i}.png", file.getvalue())
    opened = []

    class Counted(zipfile.ZipFile):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            opened.append(self)

    monkeypatch.setattr(zipfile, "ZipFile", Counted)
    found = Evaluator("storybook", real=tmp_path / "real.zip", cache_dir=tmp_path / "cache")
    assert len(found.real_rows) == 30 and len(opened) == 1 and opened[0].fp is None  # and it is closed


def test_statistics_of_another_network_are_refused(tmp_path):
    clip = MetricClip(ROOT / "data" / "storybook" / "clip").pictures
    size = clip.dim
    np.savez(tmp_path / "small.npz", mu=np.zeros(8), sigma=np.eye(8))
    np.savez(tmp_path / "nameless.npz", mu=np.zeros(size), sigma=np.eye(size))
    Statistics(np.zeros(size), np.eye(size)).save(tmp_path / "other.npz", replace(clip, key="other"))
    for name, fault in (("small", "of another network or layer"), ("nameless", "a network that it does not name"),
                        ("other", "is of another network: expected statistics of clip")):  # fmt: skip
        with pytest.raises(ValueError, match=fault):
            Evaluator("storybook", real=tmp_path / f"{name}.npz", cache_dir=tmp_path)
    Statistics.load(tmp_path / "nameless.npz", clip, nameless=True)  # the paper's published ones say nothing
    (tmp_path / "broken.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="expected an .npz"):
        Evaluator("storybook", real=tmp_path / "broken.npz", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="unknown protocol 'papre'"):
        Evaluator("papre")


@pytest.fixture
def nothing_fetched(monkeypatch, tmp_path):
    """Whoever has fetched weights finds none of them here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    for module in ("files", "evaluation.prompts", "evaluation.networks"):
        monkeypatch.setattr(f"bksdm_utils.{module}.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)


def test_networks_that_are_not_here_are_named_with_the_command(nothing_fetched):
    with pytest.raises(NotAvailable, match="hf download laion/CLIP-ViT-g-14"):
        Evaluator("paper")
    clip = str(ROOT / "data" / "storybook" / "clip")
    for protocol, name in (("paper", "inception_pytorch_fid"), ("clean", "inception_clean_fid")):
        with pytest.raises(NotAvailable, match=f"downloads {name}"):
            Evaluator(protocol, clip=clip)
    with pytest.raises(NotAvailable, match="hf download facebook/dino"):
        dino()
    with pytest.raises(NotAvailable, match="coco_captions"):
        read_prompts(PRESETS["sd-v1.4"].prompts)
    with pytest.raises(NotAvailable, match="coco_statistics"):
        Evaluator("storybook", real=PROTOCOLS["paper"].real, clip=clip)
    with pytest.raises(NotAvailable, match="coco_images"):  # never the paper's statistics of another network
        Evaluator("storybook", real=PROTOCOLS["clean"].real, clip=clip)
    assert find_preset("sd-v1.4", protocol="clean").real is None


def test_what_was_mistyped_is_not_taken_for_missing(tmp_path):
    for told in ({"real": tmp_path / "tpyo.npz"}, {"real": "data/tpyo.zip"}, {"clip": str(tmp_path / "clpi")}):
        with pytest.raises(ValueError, match="missing|no CLIP") as found:
            Evaluator("storybook", cache_dir=tmp_path, **told)
        assert not isinstance(found.value, NotAvailable)
    (tmp_path / "prompts_and_classes.txt").write_text("subject_name,class\ndog,dog\n")
    for subject, dataset, kind in (("dog", tmp_path / "nowhere", NotAvailable), ("dgo", tmp_path, ValueError),
                                   ("my/dgo", tmp_path / "nowhere", ValueError)):  # fmt: skip
        with pytest.raises(ValueError, match="no subject") as found:
            load_subject(subject, dataset=dataset)
        assert type(found.value) is kind


def test_only_what_is_missing_is_skipped_and_only_where_it_may_be(tmp_path, capsys):
    def run(preset):
        return Run("04", find_preset(preset), None, None, 0, "cpu", tmp_path, {}, {}, False)

    def fails(error):
        raise error

    assert run("sd-v1.4").or_skip(fails, NotAvailable("no weights")) is None
    assert "skipped: no weights" in capsys.readouterr().out
    with pytest.raises(ValueError, match="two columns"):
        run("sd-v1.4").or_skip(fails, ValueError("two columns"))
    with pytest.raises(NotAvailable):
        run("storybook").or_skip(fails, NotAvailable("no weights"))


def test_students_of_like_paths_keep_names_of_their_own():
    places = ["runs/a/unet", "/other/a/unet", "runs/b/unet", "runs/a/../a/unet/", "user/model"]
    named = by_short_name(places)
    assert set(named.values()) == {"/other/a/unet", "runs/b/unet", "runs/a/../a/unet/", "user/model"}
    assert list(by_short_name(["runs/a/unet", "user/model"])) == ["a/unet", "user/model"]


def test_long_work_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    network = Network("tiny", "0", 1, lambda x: torch.tensor([float(x)]), lambda x: x)
    compute(FeatureCache(tmp_path / "short", 1), network, {"a": lambda: 1})
    assert capsys.readouterr().out == ""
    plain = tqdm
    monkeypatch.setattr(
        "bksdm_utils.evaluation.features.tqdm", lambda **told: plain(**told | {"delay": 0, "mininterval": 0})
    )
    compute(FeatureCache(tmp_path / "long", 1), network, {str(i): (lambda i=i: i) for i in range(200)})
    told = capsys.readouterr()
    assert "200/200" in told.out and "tiny" in told.out and told.err == ""


def test_a_kill_between_rows_and_index_costs_a_block(tmp_path):
    rows = FeatureCache(tmp_path, 3)
    rows.add(["a", "b"], np.arange(6).reshape(2, 3))
    with rows.numbers.open("ab") as file:
        file.write(b"\x00" * 7)
    with rows.index.open("a") as file:
        file.write("c\nto")
    again = FeatureCache(tmp_path, 3)
    assert list(again.place) == ["a", "b"] and again.all().tolist() == [[0, 1, 2], [3, 4, 5]]
    again.add(["c"], np.ones((1, 3)))
    assert FeatureCache(tmp_path, 3).all()[FeatureCache(tmp_path, 3).where(["c", "a"])].tolist() == [
        [1, 1, 1],
        [0, 1, 2],
    ]


def test_thirty_thousand_pictures_stay_flat_in_memory(tmp_path):
    """Tiny pictures, a network of a few operations: rows, statistics and resumption at COCO's size."""
    count, dim = 30_000, 64
    chance = np.random.default_rng(0)
    tiny = chance.integers(0, 255, (count, 4, 4, 3), np.uint8)
    weights = torch.randn(48, dim, generator=torch.Generator().manual_seed(0))
    network = Network("tiny", "0", dim, lambda x: torch.from_numpy(np.asarray(x)).float().flatten(),
                      lambda x: torch.tanh(x @ weights / 500))  # fmt: skip
    items = {f"{i:064x}": (lambda i=i: Image.fromarray(tiny[i])) for i in range(count)}
    half = dict(list(items.items())[: count // 2])
    tracemalloc.start()
    compute(FeatureCache(tmp_path, dim), network, half)
    first = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    rows = FeatureCache(tmp_path, dim)
    assert compute(rows, network, items) == [] and len(rows.place) == count
    statistics = Statistics.of(rows.all())
    assert tracemalloc.get_traced_memory()[1] < first + 12e6  # the index grows by its 64 digits a picture
    tracemalloc.stop()
    assert np.allclose(statistics.mean, rows.all().mean(0, np.float64))
    assert np.allclose(statistics.covariance, np.cov(rows.all(), rowvar=False))
    assert fid(statistics, Statistics.of(rows.all(), np.arange(count // 2))) < 0.01


class TinyJudge:
    """A CLIP of a few operations."""

    key = "tiny"

    def __init__(self, *_):
        grey = lambda picture: torch.from_numpy(np.array(picture)).float().flatten()[:8]  # noqa: E731
        letters = lambda text: torch.tensor([float(ord(letter)) for letter in text[-8:].rjust(8)])  # noqa: E731
        self.pictures = Network("tiny", "0", 8, grey, lambda x: x)
        self.captions = Network("tiny_text", "0", 8, letters, lambda x: x)
        self.embed = lambda rows: torch.nn.functional.normalize(rows, dim=-1)


def seconds_of_folders(folder, count, pipeline):
    """What each thing that looks at a whole folder takes of the processor; other work beside it counts not."""
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 255, (count, 4, 4, 3), np.uint8)
    prompts = fill(folder, {f"p{i}": (f"caption {i}", Image.fromarray(pixels[i])) for i in range(count)})
    told = Sampling(num_inference_steps=4)
    write_json(folder / "sampling.json", _fixed(told) | {"model": "m"})
    evaluator, tools = Evaluator("tiny", folder.parent / "real.npz"), {
        "manifest": lambda: read_manifest(folder), "whole": lambda: complete_images(folder),
        "resume": lambda: list(sample_folder(pipeline, prompts, folder, told, "m")),
        "evaluate": lambda: evaluator.evaluate(folder, prompts),
        "evaluate again": lambda: evaluator.evaluate(folder, prompts),
    }  # fmt: skip
    taken = {}
    for name, tool in tools.items():
        start = time.process_time()
        assert tool()
        taken[name] = time.process_time() - start
    return taken


def test_folders_cost_time_in_proportion_to_their_pictures(tmp_path, pipeline_dir, monkeypatch):
    classes = Network("classes", "0", 8, lambda x: torch.from_numpy(np.array(x)).float().flatten()[-8:], lambda x: x)
    tiny = Protocol("tiny", as_stored, "tiny", classes=lambda _: classes)
    monkeypatch.setitem(PROTOCOLS, "tiny", tiny)
    monkeypatch.setattr("bksdm_utils.evaluation.evaluator.MetricClip", TinyJudge)
    Statistics(np.zeros(8), np.eye(8)).save(tmp_path / "real.npz", TinyJudge().pictures)
    pipeline = load_pipeline(pipeline_dir)
    seconds_of_folders(tmp_path / "first", 100, pipeline)  # imports and the like
    few, many = (seconds_of_folders(tmp_path / str(count), count, pipeline) for count in (1000, 15_000))
    assert all(many[name] < 2.5 * 15 * few[name] + 0.5 for name in few), (few, many)


def test_broken_real_pictures_are_set_aside(tmp_path, capsys):
    (tmp_path / "real").mkdir()
    for i in range(30):
        render(sample_scene(i), i).save(tmp_path / "real" / f"{i}.png")
    (tmp_path / "real" / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    file = io.BytesIO()
    Image.effect_noise((300, 300), 50).save(file, "JPEG")
    (tmp_path / "real" / "cut_off.jpg").write_bytes(file.getvalue()[:5000])  # its header is whole
    (tmp_path / "real" / "again.png").write_bytes(
        (tmp_path / "real" / "0.png").read_bytes()
    )  # counts twice, as in a zip
    found = Evaluator("storybook", real=tmp_path / "real", cache_dir=tmp_path / "cache")
    assert len(found.real_rows) == 31 and "2 real pictures set aside" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no sampling.json"):
        found.evaluate(tmp_path / "tpyo", storybook_prompts(20))
    assert not (tmp_path / "tpyo").exists()
    assert isinstance(found.judge, MetricClip)
