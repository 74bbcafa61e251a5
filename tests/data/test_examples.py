import numpy as np
import pytest
import torch
from PIL import Image

from bksdm_utils.config.presets import find_preset
from bksdm_utils.data.examples import read_folder
from bksdm_utils.data.images import to_pixels
from bksdm_utils.models.pipelines import load_pipeline
from bksdm_utils.training.latents import load_latents
from bksdm_utils.training.rng import BatchRng


def photo(path, size=(90, 70), mode="RGB"):
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Ordinary and odd pictures, and every kind of bad row."""
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "grey.png", (33, 200), "L")
    photo(tmp_path / "palette.png", (64, 64), "P")
    Image.new("RGBA", (50, 80), (255, 0, 0, 128)).save(tmp_path / "clear.png")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:300])
    (tmp_path / "text.png").write_text("no picture")
    good = ["a.jpg,a photo", 'grey.png,"grey, and with a comma"', "palette.png,Ünïcode ☃", "clear.png,half clear"]
    bad = ["broken.jpg,cut", "text.png,no picture", "gone.png,no file", "a.jpg,", "../a.jpg,outside", ",no name"]
    rows = [*good, *bad]
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


def preset(folder, resolution=64):
    return find_preset("sd-v1.4", train_data_dir=str(folder), resolution=resolution)


def test_odd_rows_and_pictures_are_set_aside_by_name(folder, pipeline_dir, tmp_path):
    latents = load_latents(preset(folder), load_pipeline(pipeline_dir), tmp_path / "cache")
    assert latents.captions == ["a photo", "grey, and with a comma", "Ünïcode ☃", "half clear"]
    assert {name for name, _ in latents.skipped} == {
        "broken.jpg",
        "text.png",
        "gone.png",
        "a.jpg",
        "../a.jpg",
        "(no name)",
    }
    assert len(latents) == 4 and latents.shape == (4, 8, 8)
    again = load_latents(preset(folder), load_pipeline(pipeline_dir), tmp_path / "cache")
    assert all(torch.equal(*m) for m in zip(again.moments([0], [1]), latents.moments([0], [1]), strict=True))
    assert sorted(again.skipped) == sorted(latents.skipped)


def test_the_second_flip_is_the_mirrored_picture(folder, pipeline_dir, tmp_path):
    pipeline = load_pipeline(pipeline_dir)
    latents = load_latents(preset(folder), pipeline, tmp_path / "cache")
    pixels = to_pixels(Image.open(folder / "a.jpg"), 64).flip(-1)
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels[None]).latent_dist.mean[0] * pipeline.vae.config.scaling_factor
    assert torch.allclose(latents.moments([0], [1])[0][0], expected, atol=2e-3)


def test_the_cache_knows_pictures_resolution_and_vae(folder, pipeline_dir, tmp_path):
    pipeline = load_pipeline(pipeline_dir)
    cache = tmp_path / "cache"

    def entries():
        load_latents(preset(folder), pipeline, cache)
        return len(list(cache.iterdir()))

    assert [entries(), entries()] == [1, 1]
    photo(folder / "a.jpg", (91, 70))
    assert entries() == 2
    pipeline.vae.encoder.conv_in.bias.data += 1
    assert entries() == 3
    load_latents(preset(folder, resolution=32), pipeline, cache)
    assert len(list(cache.iterdir())) == 4


def test_batches_sample_the_posterior_and_follow_the_draw(folder, pipeline_dir, tmp_path):
    latents = load_latents(preset(folder), load_pipeline(pipeline_dir), tmp_path / "cache")
    draws = [latents.batch(BatchRng(0, step, range(2), 2, len(latents))) for step in (0, 0, 1)]
    assert torch.equal(draws[0][0], draws[1][0]) and not torch.equal(draws[0][0], draws[2][0])
    assert draws[0][0].shape == (2, 4, 8, 8) and draws[0][1].shape == (2, 20)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (None, "is missing: write a CSV file"),
        ("name,caption\na.jpg,x\n", "expected file_name and text"),
        ("", "expected file_name and text"),
        ("file_name,text\n", "none of 0 rows is usable"),
        ("file_name,text\ngone.jpg,x\n", "none of 1 rows is usable"),
    ],
)
def test_a_folder_without_usable_rows_says_what_is_wrong(tmp_path, write, said):
    if write is not None:
        (tmp_path / "metadata.csv").write_text(write)
    with pytest.raises(ValueError, match=said):
        read_folder(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder"):
        read_folder(tmp_path / "nowhere")


def test_only_unreadable_pictures_is_an_error(tmp_path, pipeline_dir):
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
    with pytest.raises(ValueError, match="none of 1 pictures could be read"):
        load_latents(preset(tmp_path), load_pipeline(pipeline_dir), tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "mode", "size"),
    [("ink.jpg", "CMYK", (30, 20)), ("deep.png", "I;16", (20, 30)), ("dot.png", "RGB", (1, 1)),
     ("wide.jpg", "RGB", (8000, 5000)), ("mask.png", "1", (16, 16)), ("veil.png", "LA", (20, 20))],
)  # fmt: skip
def test_pictures_of_every_kind_become_pixels(name, mode, size, tmp_path):
    """Inks, sixteen bits, one pixel, forty megapixels, one bit, grey with transparency."""
    white = {"CMYK": (0, 0, 0, 0), "I;16": 65535, "1": 1, "LA": (0, 0)}.get(mode, (255, 255, 255))
    Image.new(mode, size, white).save(tmp_path / name)
    pixels = to_pixels(Image.open(tmp_path / name), 64)
    assert pixels.shape == (3, 64, 64) and pixels.min() > 0.97  # all of them are white


def test_of_an_animation_the_first_picture_counts(tmp_path):
    red, blue = Image.new("RGB", (10, 10), "red"), Image.new("RGB", (10, 10), "blue")
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue, red])
    pixels = to_pixels(Image.open(tmp_path / "a.gif"), 64)
    assert pixels[0].min() > 0.9 and pixels[2].max() < -0.9
