import io
import tarfile
from collections import deque

import numpy as np
import pytest
import torch
from conftest import disk_full_beyond
from PIL import Image
from safetensors import safe_open

from bksdm_utils.config.training import KDTraining
from bksdm_utils.files import check_disk
from bksdm_utils.models.pipelines import load_pipeline
from bksdm_utils.training.encoding import token_ids
from bksdm_utils.training.latents import LatentDataset, _write_shard, encode, load_latents
from bksdm_utils.training.rng import BatchRng
from bksdm_utils.training.streams import StreamedDataset


def png(number, size=(40, 36)):
    noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pipeline(pipeline_dir):
    return load_pipeline(pipeline_dir)


@pytest.fixture
def folder(tmp_path):
    """Ten images, the third of which is none."""
    path = tmp_path / "images"
    path.mkdir()
    for i in range(10):
        (path / f"{i}.png").write_bytes(png(i) if i != 3 else b"no image")
    rows = "".join(f"{i}.png,caption {i}\n" for i in range(10))
    (path / "metadata.csv").write_text("file_name,text\n" + rows)
    return path


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("bksdm_utils.training.latents.SHARD_SIZE", 4)


def config(path, cache_dir=None, **parameters):
    cache_dir = str(cache_dir) if cache_dir else None
    return KDTraining.filled(
        preset="sd-v1.4", train_data_dir=str(path), cache_dir=cache_dir, resolution=64, **parameters
    )  # fmt: skip


def write_shards(folder, kind, count=20, per_shard=7, bad=()):
    """Parquet or WebDataset shards as `datasets` and img2dataset write them; images in `bad` are none."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, count, per_shard)):
        numbers = range(start, min(count, start + per_shard))
        images = [png(i) if i not in bad else b"no image" for i in numbers]
        if kind == "parquet":
            rows = [{"image": {"bytes": p, "path": f"{i}.png"}, "text": f"caption {i}"}
                    for i, p in zip(numbers, images, strict=True)]  # fmt: skip
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{shard}.parquet")
            continue
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i, data in zip(numbers, images, strict=True):
                for name, content in ((f"{i:04}.png", data), (f"{i:04}.txt", f"caption {i}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


# --- the cache


def test_a_build_that_was_killed_continues_where_it_stopped(folder, pipeline, tmp_path, small_shards, monkeypatch):
    whole = load_latents(config(folder, cache_dir=tmp_path / "whole"), pipeline)
    calls = []

    def killed_at_the_second(*arguments):
        calls.append(arguments[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr("bksdm_utils.training.latents.encode", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        load_latents(config(folder, cache_dir=tmp_path / "cut"), pipeline)
    resumed = load_latents(config(folder, cache_dir=tmp_path / "cut"), pipeline)
    assert calls == [range(0, 4), range(4, 8), range(4, 8), range(8, 10)]  # the first shard was kept
    for one, other in zip(*(sorted((tmp_path / n).rglob("*.safetensors")) for n in ("whole", "cut")), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert resumed.captions == whole.captions and len(resumed) == 9


def test_a_shard_that_is_cut_off_is_made_again(folder, pipeline, tmp_path, small_shards):
    whole = load_latents(config(folder, cache_dir=tmp_path), pipeline)
    shard = next(tmp_path.rglob("00001.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    again = load_latents(config(folder, cache_dir=tmp_path), pipeline)
    assert shard.read_bytes() == content and again.captions == whole.captions


def test_a_full_disk_keeps_the_shards_before_it(folder, pipeline, tmp_path, small_shards):
    with disk_full_beyond(2000), pytest.raises(OSError, match="shard 1/3 could not be written.*Make room"):
        load_latents(config(folder, cache_dir=tmp_path / "cache"), pipeline)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(load_latents(config(folder, cache_dir=tmp_path / "cache"), pipeline)) == 9


def test_too_little_disk_is_reported_before_encoding(folder, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(check_disk.__globals__["shutil"], "disk_usage", lambda _: type("U", (), {"free": 10}))
    with pytest.raises(ValueError, match="the cache of latents: .* GB needed"):
        load_latents(config(folder, cache_dir=tmp_path / "cache"), pipeline)


def test_latents_stay_on_disk_and_are_read_in_any_order(folder, pipeline, tmp_path, small_shards):
    data = load_latents(config(folder, cache_dir=tmp_path), pipeline)
    order = [8, 0, 3, 5, 2]  # over all three shards
    mean, std = data.moments(order, [0, 1, 0, 1, 0])
    whole = [safe_open(path, "pt") for path in sorted(tmp_path.rglob("*.safetensors"))]
    for name, moments in (("mean", mean), ("std", std)):
        stored = torch.cat([file.get_tensor(name) for file in whole]).float()
        assert torch.equal(moments, stored[order, [0, 1, 0, 1, 0]])
    assert data.captions[3] == "caption 4"  # image 3 is set aside, the captions move up with the latents
    assert torch.equal(data.token_ids[3], token_ids(pipeline, ["caption 4"])[0])


def test_processes_share_the_shards(folder, pipeline, tmp_path, small_shards, monkeypatch):
    whole = load_latents(config(folder, cache_dir=tmp_path / "whole"), pipeline)
    written = []

    def write(path, *rest):
        written.append(path.name)
        return original(path, *rest)

    original = _write_shard
    monkeypatch.setattr("bksdm_utils.training.latents._write_shard", write)
    monkeypatch.setattr(
        "bksdm_utils.training.latents.LatentDataset", lambda *_: None
    )  # the other process's shards are not there yet
    for index in (1, 0):
        monkeypatch.setattr(
            "bksdm_utils.training.latents.shared_work", lambda count, _, index=index: range(index, count, 2)
        )
        load_latents(config(folder, cache_dir=tmp_path / "shared"), pipeline)
    assert written == ["00001.safetensors", "00000.safetensors", "00002.safetensors"]
    monkeypatch.setattr("bksdm_utils.training.latents.LatentDataset", LatentDataset)
    assert load_latents(config(folder, cache_dir=tmp_path / "shared"), pipeline).captions == whole.captions


def test_an_image_with_several_captions_gets_one_of_them(tmp_path, pipeline):
    import pyarrow
    import pyarrow.parquet

    texts = [["a", "b", "c"], "", ["only", ""]]
    rows = [{"image": {"bytes": png(i), "path": None}, "texts": t if t else [""]} for i, t in enumerate(texts)]
    (tmp_path / "shards").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "shards" / "0.parquet")
    data = load_latents(config(tmp_path / "shards", caption_column="texts", cache_dir=tmp_path / "cache"), pipeline)
    assert data.captions == ["a", "only"] and [name for name, _ in data.skipped] == ["row 1"]
    known = token_ids(pipeline, ["a", "b", "c", "only"]).tolist()
    seen = [ids for step in range(20) for ids in data.batch(BatchRng(0, step, range(2), 2, 2))[1].tolist()]
    assert {known.index(ids) for ids in seen} == {0, 1, 2, 3}


def test_captions_of_any_length_are_taken(tmp_path, pipeline):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png," + "red cat " * 1250 + "\n")
    data = load_latents(config(tmp_path, cache_dir=tmp_path / "cache"), pipeline)
    assert len(data.captions[0]) == 9_999 and data.token_ids.shape == (1, pipeline.tokenizer.model_max_length)


# --- tables and streams


@pytest.mark.parametrize(("kind", "image", "caption"), [("parquet", "image", "text"), ("tar", "png", "txt")])
def test_shards_are_cached_or_streamed(kind, image, caption, tmp_path, pipeline, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    path = write_shards(tmp_path / "shards", kind, bad=(4,))
    columns = {"image_column": image, "caption_column": caption}
    whole = load_latents(config(path, **columns, cache_dir=tmp_path / "cache"), pipeline)
    assert whole.captions == [f"caption {i}" for i in range(20) if i != 4]
    assert [name for name, _ in whole.skipped] == ["row 4"]
    stream = StreamedDataset(config(path / f"*.{kind}", streaming=True, **columns), pipeline)
    ids = [row for step in range(5) for row in stream.batch(BatchRng(0, step, range(4), 4, None))[1].tolist()]
    known = token_ids(pipeline, [f"caption {i}" for i in range(20)]).tolist()
    seen = sorted(known.index(row) for row in ids)
    assert 4 not in seen and len(set(seen)) == 19 and len(stream.skipped) == 1  # its path took the next row


def test_a_stream_gives_each_position_the_same_whatever_the_processes_and_interruptions(tmp_path, pipeline):
    path = write_shards(tmp_path / "shards", "parquet")
    settings = config(path, streaming=True)

    def batches(steps, positions):
        stream = StreamedDataset(settings, pipeline)
        return [torch.cat([stream.batch(BatchRng(0, s, p, 4, None))[0] for p in positions]) for s in steps]

    whole = batches(range(12), [range(4)])  # 48 rows: into the third epoch
    assert not torch.equal(whole[0], whole[5])
    for other in (batches(range(12), [range(0, 2), range(2, 4)]), batches(range(12), [[i] for i in range(4)])):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[7:], batches(range(7, 12), [range(4)]), strict=True))


def test_a_stream_samples_the_latents_that_the_cache_would_hold(tmp_path, pipeline):
    path = write_shards(tmp_path / "shards", "parquet", count=1)
    cached = load_latents(config(path, cache_dir=tmp_path / "cache"), pipeline)
    streamed = StreamedDataset(config(path, streaming=True), pipeline)
    for step in range(4):  # both flips come up
        one = cached.batch(BatchRng(0, step, range(2), 2, 1))
        other = streamed.batch(BatchRng(0, step, range(2), 2, None))
        assert torch.allclose(one[0], other[0], atol=5e-3) and torch.equal(one[1], other[1])  # fp16 in the cache


def test_a_broken_shard_is_set_aside(tmp_path, pipeline):
    path = write_shards(tmp_path / "shards", "tar")
    (path / "1.tar").write_bytes((path / "1.tar").read_bytes()[:700])
    stream = StreamedDataset(config(path, streaming=True, image_column="png", caption_column="txt"), pipeline)
    for step in range(4):
        stream.batch(BatchRng(0, step, range(4), 4, None))
    assert any(name == "shard 1" for name, _ in stream.skipped)


def test_a_stream_of_nothing_usable_says_so(tmp_path, pipeline):
    path = write_shards(tmp_path / "shards", "parquet", count=3, bad=(0, 1, 2))
    with pytest.raises(ValueError, match="none of 4 rows is usable"):
        StreamedDataset(config(path, streaming=True), pipeline).batch(BatchRng(0, 0, range(4), 4, None))


def test_missing_columns_and_data_sets_are_named(tmp_path, pipeline):
    path = write_shards(tmp_path / "shards", "parquet", count=3)
    with pytest.raises(ValueError, match="has the columns image, text: expected caption, or another that"):
        StreamedDataset(config(path, streaming=True, caption_column="caption"), pipeline)
    with pytest.raises(ValueError, match="nobody/nothing could not be opened.*needs a network"):
        load_latents(config("nobody/nothing", cache_dir=tmp_path), pipeline)
    with pytest.raises(ValueError, match="streaming needs shards"):
        KDTraining.filled(streaming=True)


def test_rows_without_a_picture_or_with_several_captions_are_no_trouble_to_a_stream(tmp_path, pipeline):
    import pyarrow
    import pyarrow.parquet

    cells = [{"bytes": png(i), "path": None} if i else None for i in range(4)]
    rows = [{"image": cell, "text": ["a", "b"] if i else ["c"]} for i, cell in enumerate(cells)]
    (tmp_path / "shards").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "shards" / "0.parquet")
    stream = StreamedDataset(config(tmp_path / "shards", streaming=True), pipeline)
    known = token_ids(pipeline, ["a", "b", "c"]).tolist()
    for step in range(6):  # three epochs
        rng = BatchRng(0, step, range(2), 2, None)
        assert all(ids in known[:2] for ids in stream.batch(rng)[1].tolist())
        assert all(ids in known for ids in stream.other_token_ids(rng).tolist())
    assert len({name for name, _ in stream.skipped}) == len(stream.skipped) <= 3


def test_a_stream_keeps_no_more_than_a_batch_while_it_reads_up_to_a_step(tmp_path, pipeline, monkeypatch):
    path, alive = write_shards(tmp_path / "shards", "parquet"), []
    stream = StreamedDataset(config(path, streaming=True), pipeline)
    kept = deque
    monkeypatch.setattr(
        "bksdm_utils.training.streams.deque", lambda rows, maxlen: alive.append(maxlen) or kept(rows, maxlen=maxlen)
    )
    stream.batch(BatchRng(0, 30, range(2), 2, None))
    assert alive[0] == 2


def test_random_conditioning_has_other_captions_in_both_kinds_of_data(tmp_path, pipeline):
    path = write_shards(tmp_path / "shards", "parquet")
    for data in (load_latents(config(path, cache_dir=tmp_path / "cache"), pipeline),
                 StreamedDataset(config(path, streaming=True), pipeline)):  # fmt: skip
        rng = BatchRng(0, 0, range(4), 4, data.num_examples)
        own, others = data.batch(rng)[1], data.other_token_ids(rng)
        assert others.shape == own.shape and not torch.equal(own, others)
