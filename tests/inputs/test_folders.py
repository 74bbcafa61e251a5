"""Image-text folders as people bring them: each layout is read, or refused by name; what is not used is named."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from bksdm_utils.config.training import TrainingData
from bksdm_utils.data.sources import load_examples

SEEDS = range(3)
WORDS = ("girl", "a cat", "café", "solo, smile", "naïve art", "东京", "3 boats", "O'Brien", '"quoted"', "50 %")


def captions(seed, count=4):
    rng = random.Random(seed)
    return [f"{i} {' '.join(rng.sample(WORDS, 3))}" for i in range(count)]


def image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 0, 0)).save(path)


def loaded(folder, **config):
    """Captions by the name of the image, and reasons by the name of what was set aside."""
    examples, skipped = load_examples(TrainingData(train_data_dir=str(folder), **config))
    for example in examples:
        example.open().load()
    return {example.name: example.captions[0] for example in examples}, dict(skipped)


def jsonl(path, rows, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row, **settings) for row in rows), encoding="utf-8")


def parquet(path, rows):
    import pyarrow
    from pyarrow import parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pyarrow.Table.from_pylist(rows), path)


def cells(texts):
    """Rows of a shard: an image and its caption."""
    import io

    rows = []
    for i, text in enumerate(texts):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "text": text})
    return rows


def rows(texts, prefix=""):
    return [{"file_name": f"{prefix}{i}.png", "text": text} for i, text in enumerate(texts)]


def metadata_jsonl(folder, texts):
    jsonl(folder / "metadata.jsonl", rows(texts))
    return ""


def metadata_jsonl_in_ascii(folder, texts):
    jsonl(folder / "metadata.jsonl", [{**row, "width": 8} for row in rows(texts)], ensure_ascii=True)
    return ""


def metadata_parquet(folder, texts):
    parquet(folder / "metadata.parquet", rows(texts))
    return ""


def split_with_csv(folder, texts):
    (folder / "train").mkdir()
    table = "\n".join(f'{i}.png,"{text.replace(chr(34), chr(34) * 2)}"' for i, text in enumerate(texts))
    (folder / "train" / "metadata.csv").write_text(f"file_name,text\n{table}", encoding="utf-8")
    return "train/"


def split_with_jsonl(folder, texts):
    jsonl(folder / "train" / "metadata.jsonl", rows(texts))
    return "train/"


def splits_under_one_table(folder, texts):
    jsonl(folder / "metadata.jsonl", [*rows(texts, "train/"), {"file_name": "test/9.png", "text": "no"}])
    return "train/"


def nested_names(folder, texts):
    jsonl(folder / "metadata.jsonl", rows(texts, "deep/er/"))
    return "deep/er/"


def names_of_windows(folder, texts):
    jsonl(folder / "metadata.jsonl", rows(texts, "deep\\"))
    return "deep/"


def table_in_a_subfolder(folder, texts):
    jsonl(folder / "set" / "metadata.jsonl", rows(texts))
    return "set/"


def texts_beside_images(folder, texts):
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(f"\n{text}\n", encoding="utf-8")
    return ""


def texts_with_byte_order_marks(folder, texts):
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8-sig")
    return ""


def texts_in_numbered_folders(folder, texts):
    (folder / "10_cat").mkdir()
    for i, text in enumerate(texts):
        (folder / "10_cat" / f"{i}.txt").write_text(text, encoding="utf-8")
    return "10_cat/"


def table_beside_its_archive(folder, texts):
    (folder / "images.tar").write_bytes(b"what the images came in")
    return metadata_jsonl(folder, texts)


LAYOUTS = (
    metadata_jsonl, metadata_jsonl_in_ascii, metadata_parquet, split_with_csv, split_with_jsonl, splits_under_one_table,
    nested_names, names_of_windows, table_in_a_subfolder, texts_beside_images, texts_with_byte_order_marks,
    texts_in_numbered_folders, table_beside_its_archive,
)  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_is_read(tmp_path, layout, seed):
    texts = captions(seed)
    prefix = layout(tmp_path, texts)
    for i in range(len(texts)):
        image(tmp_path / f"{prefix}{i}.png", 40 * i)
    found, skipped = loaded(tmp_path)
    assert found == {f"{prefix}{i}.png": text for i, text in enumerate(texts)}
    assert set(skipped) <= {"test/9.png"}


@pytest.mark.parametrize("split", ["test", "validation", "val", "dev", "eval", "Test"])
@pytest.mark.parametrize("layout", [split_with_csv, texts_beside_images, metadata_jsonl], ids=lambda f: f.__name__)
def test_images_of_other_splits_are_not_trained_on(tmp_path, layout, split):
    texts = captions(0)
    prefix = layout(tmp_path, texts)
    for i in range(len(texts)):
        image(tmp_path / f"{prefix}{i}.png")
    image(tmp_path / split / "held.png")
    (tmp_path / split / "held.txt").write_text("held out")
    found, skipped = loaded(tmp_path)
    assert len(found) == len(texts) and skipped == {f"{split}/held.png": "of another split than train"}


@pytest.mark.parametrize("where", ["", "data", "train"])
@pytest.mark.parametrize("seed", SEEDS)
def test_shards_of_the_training_split_are_read(tmp_path, monkeypatch, where, seed):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = captions(seed)
    parquet(tmp_path / "set" / where / "train-00000-of-00001.parquet", cells(texts))
    parquet(tmp_path / "set" / where / "test-00000-of-00001.parquet", cells(["held out"]))
    found, skipped = loaded(tmp_path / "set")
    assert list(found.values()) == texts and not skipped


def test_the_tables_that_img2dataset_writes_beside_its_archives_are_no_shards(tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for i, row in enumerate(cells(captions(0))):
            for name, content in ((f"{i}.png", row["image"]["bytes"]), (f"{i}.txt", row["text"].encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    parquet(tmp_path / "00000.parquet", [{"url": "https://somewhere", "status": "success"}])
    (tmp_path / "00000_stats.json").write_text("{}")
    assert list(loaded(tmp_path)[0].values()) == captions(0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [("{", "not JSON"), ('{"file_name": "0.png", "text": "caf', "not JSON"), ("[1, 2]", "a list instead of an object"),
     ("7", "a int instead of an object"), ('{"file_name": "0.png", "text": "caf\xe9"}', "not JSON in UTF-8")],
)  # fmt: skip
@pytest.mark.parametrize("seed", SEEDS)
def test_broken_lines_of_json_are_set_aside_by_number(tmp_path, line, reason, seed):
    texts = captions(seed)
    for i in range(len(texts)):
        image(tmp_path / f"{i}.png")
    lines = [json.dumps(row).encode() for row in rows(texts)]
    bad = random.Random(seed).randrange(len(lines))
    lines[bad] = line.encode("latin-1")
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    found, skipped = loaded(tmp_path)
    assert len(found) == len(texts) - 1 and reason in skipped[f"line {bad + 1}"]
    assert skipped[f"{bad}.png"] == "no table names it"


@pytest.mark.parametrize(
    ("caption", "reason"),
    [(7, "the caption is int"), (1.5, "the caption is float"), ({"en": "a cat"}, "the caption is dict"),
     (None, "empty"),
     ([{"raw": "a cat"}], "the caption is dict"), ("", "empty caption"), ([], "empty caption"),
     (True, "the caption is bool")],
)  # fmt: skip
def test_captions_that_are_no_texts_are_set_aside(tmp_path, caption, reason):
    image(tmp_path / "0.png")
    image(tmp_path / "1.png")
    jsonl(tmp_path / "metadata.jsonl", [*rows(["a cat"]), {"file_name": "1.png", "text": caption}])
    found, skipped = loaded(tmp_path)
    assert found == {"0.png": "a cat"} and reason in skipped["1.png"]


def test_captions_in_bytes_are_texts(tmp_path):
    image(tmp_path / "0.png")
    image(tmp_path / "1.png")
    parquet(tmp_path / "metadata.parquet", [{"file_name": "0.png", "text": "café".encode()},
                                            {"file_name": "1.png", "text": "café".encode("latin-1")}])  # fmt: skip
    found, skipped = loaded(tmp_path)
    assert found == {"0.png": "café"} and "not text in UTF-8" in skipped["1.png"]


def test_several_captions_of_an_image_are_all_kept(tmp_path):
    image(tmp_path / "0.png")
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": "0.png", "text": ["one", "two"]}])
    examples, _ = load_examples(TrainingData(train_data_dir=str(tmp_path)))
    assert examples[0].captions == ("one", "two")


@pytest.mark.parametrize("seed", SEEDS)
def test_images_without_a_caption_are_named(tmp_path, seed):
    texts = captions(seed)
    texts_beside_images(tmp_path, texts)
    for i in range(len(texts)):
        image(tmp_path / f"{i}.png")
    image(tmp_path / "alone.jpg")
    (tmp_path / "1.txt").write_text("")
    (tmp_path / "2.txt").write_bytes("café".encode("latin-1"))
    found, skipped = loaded(tmp_path)
    assert list(found) == ["0.png", "3.png"] and set(skipped) == {"1.png", "2.png", "alone.jpg"}
    assert "no alone.txt" in skipped["alone.jpg"] and "empty" in skipped["1.png"] and "not UTF-8" in skipped["2.png"]


def only_images(folder):
    image(folder / "0.png")


def class_folders(folder):
    image(folder / "cat" / "0.png")
    image(folder / "dog" / "0.png")


def a_table_of_another_name(folder):
    image(folder / "0.png")
    (folder / "captions.csv").write_text("file_name,text\n0.png,a cat")


def an_archive(folder):
    (folder / "images.zip").write_bytes(b"PK")


def nothing(folder):
    folder.mkdir(exist_ok=True)


def two_tables(folder):
    only_images(folder)
    jsonl(folder / "metadata.jsonl", rows(["a cat"]))
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a dog")


def json_of_another_kind(folder):
    only_images(folder)
    (folder / "metadata.jsonl").write_text('[{"file_name": "0.png",\n"text": "a cat"}]')


def an_array(folder):
    only_images(folder)
    parquet(folder / "metadata.parquet", [{"name": "0.png", "text": "a cat"}])


def no_parquet(folder):
    only_images(folder)
    (folder / "metadata.parquet").write_bytes(b"PAR1")


def only_a_test_split(folder):
    image(folder / "test" / "0.png")
    (folder / "test" / "0.txt").write_text("a cat")


def both_kinds_of_shards(folder):
    parquet(folder / "a.parquet", cells(["a cat"]))
    (folder / "b.tar").write_bytes(b"")


REFUSED = {
    only_images: "looked for metadata.csv, metadata.jsonl.*there is 0.png",
    class_folders: "has no captions.*there is cat/0.png, dog/0.png",
    a_table_of_another_name: "there is 0.png, captions.csv",
    an_archive: "there is images.zip",
    nothing: "there is nothing",
    two_tables: "has metadata.csv and metadata.jsonl: keep the one that counts",
    json_of_another_kind: "metadata.jsonl has no line such as .*line 1",
    an_array: "has the columns name, text: expected file_name, or another that image_column names",
    no_parquet: "metadata.parquet could not be read .* expected a Parquet file",
    only_a_test_split: "has no captions",
    both_kinds_of_shards: "has both .tar and .parquet files: name one kind",
}


@pytest.mark.parametrize("layout", REFUSED, ids=lambda layout: layout.__name__)
def test_what_is_no_layout_is_refused_by_what_was_looked_for(tmp_path, layout):
    layout(tmp_path)
    with pytest.raises(ValueError, match=REFUSED[layout]):
        loaded(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "data/nowhere", "./nowhere", "../nowhere/images", "a" * 300, "a/" * 300])
def test_a_path_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"looked for /.* and /.*; /.* exists.*a folder of images"):
        loaded(name)


def test_an_empty_path_is_refused():
    with pytest.raises(ValueError, match="train_data_dir is '': expected"):
        TrainingData(train_data_dir="")


@pytest.mark.parametrize("seed", SEEDS)
def test_links_are_followed_once(tmp_path, seed):
    texts = captions(seed)
    elsewhere = tmp_path / "elsewhere"
    (folder := tmp_path / "set" / "a").mkdir(parents=True)
    texts_beside_images(folder, texts)
    for i in range(len(texts)):
        image(elsewhere / f"{i}.png")
        (folder / f"{i}.png").symlink_to(elsewhere / f"{i}.png")
    (folder / "loop").symlink_to(tmp_path / "set")
    assert list(loaded(tmp_path / "set")[0].values()) == texts
