import gc
import io
import tracemalloc
import weakref
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.evaluation import features
from bksdm_utils.evaluation.features import compute, real_images
from bksdm_utils.evaluation.metrics import Statistics, fid
from bksdm_utils.evaluation.networks import Network
from bksdm_utils.files import in_threads

COUNTING = Network("tiny", "0", 1, lambda x: torch.tensor([float(x)]), lambda x: x)


def test_a_kill_costs_one_batch(tmp_path):
    rows, failed = compute(tmp_path, COUNTING, {str(i): (lambda i=i: i) for i in range(70)})
    assert failed == [] and len(rows) == 70

    def fails(pixels):
        raise KeyboardInterrupt

    more = {f"{i}": (lambda i=i: i) for i in range(100)}
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path, replace(COUNTING, forward=fails), more)
    (tmp_path / "000000070.part").write_bytes(b"half of a file")
    computed = []
    network = replace(COUNTING, forward=lambda x: computed.append(len(x)) or x)
    for _ in range(2):
        rows, _ = compute(tmp_path, network, more)
        assert sum(computed) == 30 and [rows[key].item() for key in more] == list(range(100))


def test_long_work_shows_its_progress(tmp_path, capsys, monkeypatch):
    compute(tmp_path / "short", COUNTING, {"a": lambda: 1})
    assert capsys.readouterr().out == ""
    plain = tqdm
    monkeypatch.setattr(features, "tqdm", lambda **kwargs: plain(**kwargs | {"delay": 0, "mininterval": 0}))
    compute(tmp_path / "long", COUNTING, {str(i): (lambda i=i: i) for i in range(200)})
    output = capsys.readouterr()
    assert "200/200" in output.out and "tiny" in output.out and output.err == ""


@pytest.mark.slow
def test_thirty_thousand_images_need_little_more_memory_than_their_features(tmp_path):
    """Tiny images, a network of a few operations: features, statistics and resumption at COCO's size."""
    count, dim = 30_000, 64
    tiny = np.random.default_rng(0).integers(0, 255, (count, 4, 4, 3), np.uint8)
    weights = torch.randn(48, dim, generator=torch.Generator().manual_seed(0))
    network = Network("tiny", "0", dim, lambda x: torch.from_numpy(np.array(x)).float().flatten(),
                      lambda x: torch.tanh(x @ weights / 500))  # fmt: skip
    items = {f"{i:064x}": (lambda i=i: Image.fromarray(tiny[i])) for i in range(count)}
    compute(tmp_path, network, dict(list(items.items())[: count // 2]))
    tracemalloc.start()
    by_key, failed = compute(tmp_path, network, items)
    assert failed == [] and len(by_key) == count
    rows = np.stack([by_key[key] for key in items])
    statistics = Statistics.of(rows)
    assert tracemalloc.get_traced_memory()[1] < 2 * rows.nbytes + 30e6
    tracemalloc.stop()
    assert np.allclose(statistics.mean, rows.mean(0, np.float64))
    assert np.allclose(statistics.covariance, np.cov(rows, rowvar=False))
    assert fid(statistics, Statistics.of(rows, np.arange(count // 2))) < 0.01


@pytest.fixture
def real(tmp_path):
    """A folder of three images and a text, and a .zip of it."""
    (tmp_path / "val2014").mkdir()
    for i in range(3):
        render(sample_scene(i), i).save(tmp_path / "val2014" / f"{i}.jpg")
    (tmp_path / "val2014" / "notes.txt").write_text("not an image")
    with zipfile.ZipFile(tmp_path / "val2014.zip", "w") as archive:
        for path in (tmp_path / "val2014").iterdir():
            archive.write(path, f"val2014/{path.name}")
    return tmp_path


@pytest.mark.parametrize("name", ["val2014", "val2014.zip"])
def test_real_images_are_read_from_a_folder_or_zip_by_threads(real, name):
    images = real_images(real / name)
    shapes = list(in_threads(lambda open_: np.asarray(open_()).shape, list(images.values()) * 20))
    assert len(images) == 3 and set(shapes) == {(64, 64, 3)}


def test_an_archive_is_opened_once_and_closed(real, monkeypatch):
    opened = []

    class Counted(zipfile.ZipFile):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            opened.append(weakref.ref(self))

    monkeypatch.setattr(zipfile, "ZipFile", Counted)
    assert all(open_().size == (64, 64) for open_ in real_images(real / "val2014.zip").values())
    gc.collect()
    assert len(opened) == 1 and opened[0]() is None


def test_unusable_real_images_are_explained(real):
    (real / "empty").mkdir()
    zipfile.ZipFile(real / "empty.zip", "w").close()
    (real / "text.zip").write_text("not an archive")
    (real / "damaged.zip").write_bytes((real / "val2014.zip").read_bytes().replace(b"PK\x01\x02", b"PK\x00\x02", 1))
    for name, fault in (("empty", "has no images"), ("empty.zip", "has no images"), ("text.zip", "cannot be read"),
                        ("damaged.zip", "cannot be read")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}.*{fault}"):
            real_images(real / name)


def test_items_that_cannot_be_opened_are_named(tmp_path):
    file = io.BytesIO()
    Image.effect_noise((300, 300), 50).save(file, "JPEG")
    cut = file.getvalue()[:5000]  # its header is complete
    network = Network("size", "0", 2, lambda image: torch.tensor(np.asarray(image).shape[:2]), lambda x: x)
    items = {"whole": lambda: Image.open(file), "cut": lambda: Image.open(io.BytesIO(cut))}
    rows, failed = compute(tmp_path, network, items)
    assert [key for key, _ in failed] == ["cut"] and "truncated" in failed[0][1] and list(rows) == ["whole"]
