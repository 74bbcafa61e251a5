"""Image-text folders as latents."""

import numpy as np
import pytest
import torch
from PIL import Image

from bksdm_utils.config.training import TrainingData
from bksdm_utils.data.images import to_pixels
from bksdm_utils.models.pipelines import load_pipeline
from bksdm_utils.training.latents import load_data
from bksdm_utils.training.rng import BatchRng


def photo(path, size=(90, 70), mode="RGB"):
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Ordinary and odd images, and every kind of bad row."""
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "grey.png", (33, 200), "L")
    photo(tmp_path / "palette.png", (64, 64), "P")
    Image.new("RGBA", (50, 80), (255, 0, 0, 128)).save(tmp_path / "clear.png")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:300])
    (tmp_path / "text.png").write_text("no image")
    good = ["a.jpg,a photo", 'grey.png,"grey, and with a comma"', "palette.png,Ünïcode ☃", "clear.png,half clear"]
    bad = ["broken.jpg,cut", "text.png,no image", "gone.png,no file", "a.jpg,", "../a.jpg,outside", ",no name"]
    rows = [*good, *bad]
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


def load(folder, pipeline, cache, resolution=64):
    config = TrainingData(train_data_dir=str(folder), cache_dir=str(cache), resolution=resolution, flip=True)
    return load_data(config, pipeline)


def test_unusable_rows_and_images_are_set_aside_by_name(folder, pipeline_dir, tmp_path):
    latents = load(folder, load_pipeline(pipeline_dir), tmp_path / "cache")
    assert latents.captions == ["a photo", "grey, and with a comma", "Ünïcode ☃", "half clear"]
    names = {"broken.jpg", "text.png", "gone.png", "a.jpg", "../a.jpg", "(no name)"}
    assert {name for name, _ in latents.skipped} == names
    assert len(latents) == 4 and latents.shape == (4, 8, 8)
    again = load(folder, load_pipeline(pipeline_dir), tmp_path / "cache")
    assert all(torch.equal(*m) for m in zip(again.moments([0], [1]), latents.moments([0], [1]), strict=True))
    assert sorted(again.skipped) == sorted(latents.skipped)


def test_the_second_flip_is_the_mirrored_image(folder, pipeline_dir, tmp_path):
    pipeline = load_pipeline(pipeline_dir)
    latents = load(folder, pipeline, tmp_path / "cache")
    pixels = to_pixels(Image.open(folder / "a.jpg"), 64).flip(-1)
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels[None]).latent_dist.mean[0] * pipeline.vae.config.scaling_factor
    assert torch.allclose(latents.moments([0], [1])[0][0], expected, atol=2e-3)


def test_the_cache_follows_images_resolution_and_vae(folder, pipeline_dir, tmp_path):
    pipeline = load_pipeline(pipeline_dir)
    cache = tmp_path / "cache"

    def entries():
        load(folder, pipeline, cache)
        return len(list(cache.iterdir()))

    assert [entries(), entries()] == [1, 1]
    photo(folder / "a.jpg", (91, 70))
    assert entries() == 2
    pipeline.vae.encoder.conv_in.bias.data += 1
    assert entries() == 3
    load(folder, pipeline, cache, resolution=32)
    assert len(list(cache.iterdir())) == 4


def test_batches_sample_the_posterior_by_step(folder, pipeline_dir, tmp_path):
    latents = load(folder, load_pipeline(pipeline_dir), tmp_path / "cache")
    draws = [latents.batch(BatchRng(0, step, range(2), 2, len(latents))) for step in (0, 0, 1)]
    assert torch.equal(draws[0][0], draws[1][0]) and not torch.equal(draws[0][0], draws[2][0])
    assert draws[0][0].shape == (2, 4, 8, 8) and draws[0][1].shape == (2, 20)


def test_only_unreadable_images_is_an_error(tmp_path, pipeline_dir):
    (tmp_path / "a.png").write_text("no image")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
    with pytest.raises(ValueError, match="none of 1 images could be read"):
        load(tmp_path, load_pipeline(pipeline_dir), tmp_path / "cache")
