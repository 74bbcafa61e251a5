import io
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from bksdm_utils.config.training import TrainingData
from bksdm_utils.data.images import open_image, to_pixels
from bksdm_utils.data.shards import open_table
from bksdm_utils.data.sources import load_examples


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (10, 8), colour).save(file, "PNG")
    return file.getvalue()


def write_shards(folder, kind, count=5, image="image", caption="text"):
    """Two shards of parquet or WebDataset, as `datasets` and img2dataset write them."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, numbers in enumerate((range(3), range(3, count))):
        if kind == "parquet":
            rows = [{image: {"bytes": png("red"), "path": None}, caption: f"caption {i}", "width": 10} for i in numbers]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{shard}.parquet")
            continue
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in numbers:
                for name, content in ((f"{i:04}.{image}", png("red")), (f"{i:04}.{caption}", f"caption {i}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


def test_storybook_examples_are_rendered_scenes():
    examples, skipped = load_examples(TrainingData(num_train_scenes=3))
    assert [example.name for example in examples] == ["train-0", "train-1", "train-2"] and skipped == []
    assert examples[1].open().size == (64, 64) and " " in examples[1].captions[0]
    assert len({example.key for example in examples}) == 3


def test_unusable_rows_of_a_folder_are_set_aside_by_name(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path.parent / "outside.png").write_bytes(png("red"))
    rows = ["a.png,a photo", 'a.png,"quotes, and a comma"', "a.png,Ünïcode ☃", "gone.png,no file", "a.png,",
            "../outside.png,outside", ",no name"]  # fmt: skip
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "\n".join(rows) + "\n", encoding="utf-8")
    examples, skipped = load_examples(TrainingData(train_data_dir=str(tmp_path)))
    assert [example.captions for example in examples] == [("a photo",), ("quotes, and a comma",), ("Ünïcode ☃",)]
    assert examples[0].open().size == (10, 8)
    assert [name for name, _ in skipped] == ["gone.png", "a.png", "../outside.png", "(no name)"]


def test_an_examples_key_follows_its_content(tmp_path):
    def key():
        (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
        return load_examples(TrainingData(train_data_dir=str(tmp_path)))[0][0].key

    (tmp_path / "a.png").write_bytes(png("red"))
    red = key()
    assert key() == red
    (tmp_path / "a.png").write_bytes(png("blue"))
    assert key() != red


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no captions: looked for metadata.csv.*there is nothing.*Expected a folder"),
     ("", "has no header: .*file_name,text"),
     ("name,caption\na.jpg,x\n", "expected file_name, or another that image_column names"),
     ("file_name,text\n", "none of 0 rows is usable"),
     ("file_name,text\ngone.jpg,x\n", "none of 1 rows is usable.*gone.jpg"),
     ('file_name,text\n"' + "x" * 140_000, "line 2.*a quote that is not closed")],
)  # fmt: skip
def test_a_folder_without_usable_rows_is_an_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metadata.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_examples(TrainingData(train_data_dir=str(tmp_path)))


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nowhere.*expected a folder.*download laion"):
        load_examples(TrainingData(train_data_dir=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(("kind", "image", "caption"), [("parquet", None, None), ("parquet", "photo", "title"),
                                                        ("tar", "png", "txt")])  # fmt: skip
def test_shards_have_the_columns_image_and_text(tmp_path, kind, image, caption):
    folder = write_shards(tmp_path / "shards", kind, image=image or "image", caption=caption or "text")
    config = TrainingData(train_data_dir=str(folder), image_column=image, caption_column=caption)
    examples, skipped = load_examples(config)
    assert [example.captions[0] for example in examples] == [f"caption {i}" for i in range(5)] and skipped == []
    assert examples[4].open().size == (10, 8)
    pattern = config.but(train_data_dir=str(folder / f"*.{kind}"))
    rows = list(open_table(pattern, streaming=True))
    assert all(set(row) == {"image", "text"} for row in rows) and open_image(rows[4]["image"]).size == (10, 8)
    assert [row["text"] for row in rows] == [f"caption {i}" for i in range(5)]


def test_rows_of_a_table_without_captions_are_set_aside(tmp_path):
    texts = [["a", "b"], [""], ["only", ""]]
    rows = [{"image": {"bytes": png("red"), "path": None}, "text": text} for text in texts]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "0.parquet")
    examples, skipped = load_examples(TrainingData(train_data_dir=str(tmp_path)))
    assert [example.captions for example in examples] == [("a", "b"), ("only",)]
    assert skipped == [("row 1", "empty caption")]


def test_missing_columns_and_data_sets_are_named(tmp_path):
    config = TrainingData(train_data_dir=str(write_shards(tmp_path / "shards", "parquet")), caption_column="caption")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="the columns image, text, width: expected caption, or another that"):
            open_table(config, streaming)
    with pytest.raises(ValueError, match="nobody/nothing could not be opened.*needs a network"):
        load_examples(TrainingData(train_data_dir="nobody/nothing"))


@pytest.mark.parametrize(
    ("name", "mode", "size"),
    [("ink.jpg", "CMYK", (30, 20)), ("deep.png", "I;16", (20, 30)), ("dot.png", "RGB", (1, 1)),
     ("wide.jpg", "RGB", (8000, 5000)), ("mask.png", "1", (16, 16)), ("veil.png", "LA", (20, 20))],
)  # fmt: skip
def test_images_of_every_mode_become_pixels(name, mode, size, tmp_path):
    """Inks, sixteen bits, one pixel, forty megapixels, one bit, grey with transparency."""
    white = {"CMYK": (0, 0, 0, 0), "I;16": 65535, "1": 1, "LA": (0, 0)}.get(mode, (255, 255, 255))
    Image.new(mode, size, white).save(tmp_path / name)
    pixels = to_pixels(Image.open(tmp_path / name), 64)
    assert pixels.shape == (3, 64, 64) and pixels.min() > 0.97  # all of them are white


def test_pixels_are_a_centre_crop():
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 255
    assert to_pixels(Image.fromarray(wide), 64).min() == 1


def test_the_first_image_of_an_animation_is_used(tmp_path):
    red, blue = Image.new("RGB", (10, 10), "red"), Image.new("RGB", (10, 10), "blue")
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue, red])
    pixels = to_pixels(Image.open(tmp_path / "a.gif"), 64)
    assert pixels[0].min() > 0.9 and pixels[2].max() < -0.9
