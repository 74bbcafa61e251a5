"""Tables as people bring them: each ends in the right value, a row set aside by its line, or an error by name."""

import random

import pytest
from PIL import Image

from bksdm_utils.config.training import TrainingData
from bksdm_utils.data.sources import load_examples
from bksdm_utils.data.tables import read_csv
from bksdm_utils.evaluation.prompts import read_prompts

WORDS = ("girl", "a cat", "café", "solo", "smile", "naïve art", "东京", "3 boats", "O'Brien", "50 %", "x=1", "#tag")
SEEDS = range(5)


def captions(rng, count=6):
    return [" ".join(rng.sample(WORDS, 3)) for _ in range(count)]


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def loaded(folder, content, **config):
    """Captions by image, and (name, reason) of the rows that were set aside."""
    data = content if isinstance(content, bytes) else content.encode()
    (folder / "metadata.csv").write_bytes(data)
    examples, skipped = load_examples(TrainingData(train_data_dir=str(folder), **config))
    rows = [(name, reason) for name, reason in skipped if reason != "no table names it"]  # that is of images
    return {example.name: example.captions[0] for example in examples}, rows


def lines(texts):
    return [f"{i}.png,{text}" for i, text in enumerate(texts)]


WHOLE = {
    "plain": lambda texts: "\n".join(["file_name,text", *lines(texts)]),
    "ends with a line break": lambda texts: "\n".join(["file_name,text", *lines(texts), ""]),
    "Windows line breaks": lambda texts: "\r\n".join(["file_name,text", *lines(texts), ""]),
    "byte order mark": lambda texts: "\n".join(["\ufefffile_name,text", *lines(texts)]),
    "all quoted": lambda texts: "\n".join(['"file_name","text"', *(f'"{i}.png","{t}"' for i, t in enumerate(texts))]),
    "columns the other way": lambda texts: "\n".join(
        ["text,file_name", *(f"{t},{i}.png" for i, t in enumerate(texts))]
    ),
    "a third column": lambda texts: "\n".join(["file_name,text,width", *(f"{line},512" for line in lines(texts))]),
    "semicolons": lambda texts: "\n".join(["file_name;text", *(f"{i}.png;{t}" for i, t in enumerate(texts))]),
    "tabs": lambda texts: "\n".join(["file_name\ttext", *(f"{i}.png\t{t}" for i, t in enumerate(texts))]),
    "empty lines": lambda texts: "\n\n".join(["file_name,text", *lines(texts)]),
    "spaces around names": lambda texts: "\n".join(
        ["file_name, text", *(f" {i}.png ,{t}" for i, t in enumerate(texts))]
    ),
    "prompt instead of text": lambda texts: "\n".join(["file_name,prompt", *lines(texts)]),
    "caption instead of text": lambda texts: "\n".join(["file_name,caption", *lines(texts)]),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", WHOLE)
def test_every_row_is_read(folder, kind, seed):
    texts = captions(random.Random(f"{kind}{seed}"))
    found, skipped = loaded(folder, WHOLE[kind](texts))
    assert found == {f"{i}.png": text for i, text in enumerate(texts)} and not skipped


@pytest.mark.parametrize("seed", SEEDS)
def test_commas_without_quotes_belong_to_the_last_of_two_columns(folder, seed):
    rng = random.Random(seed)
    texts = [", ".join(rng.sample(WORDS, rng.randint(2, 5))) for _ in range(6)]
    found, skipped = loaded(folder, "\n".join(["file_name,text", *lines(texts)]))
    assert found == {f"{i}.png": text for i, text in enumerate(texts)} and not skipped


@pytest.mark.parametrize("seed", SEEDS)
def test_quoted_texts_may_hold_commas_quotes_and_line_breaks(folder, seed):
    rng = random.Random(seed)
    texts = [f'{a}{rng.choice([", ", " ""the"" ", chr(10), chr(10) + chr(10)])}{b}' for a, b in
             (rng.sample(WORDS, 2) for _ in range(6))]  # fmt: skip
    rows = [f'{i}.png,"{text}"' for i, text in enumerate(texts)]
    found, skipped = loaded(folder, "\n".join(["file_name,text", *rows]))
    assert found == {f"{i}.png": text.replace('""', '"') for i, text in enumerate(texts)} and not skipped


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_quote_that_is_not_closed_costs_its_own_line(folder, where, seed):
    texts = captions(random.Random(seed))
    bad = {"first": 0, "middle": 3, "last": 5}[where]
    rows = [f'{i}.png,"{t}' if i == bad else f"{i}.png,{t}" for i, t in enumerate(texts)]
    found, skipped = loaded(folder, "\n".join(["file_name,text", *rows]))
    assert found == {f"{i}.png": text for i, text in enumerate(texts) if i != bad}
    assert [name for name, _ in skipped] == [f"line {bad + 2}"] and "quote" in skipped[0][1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp932"])
def test_lines_in_another_encoding_are_set_aside(folder, encoding, seed):
    rng = random.Random(seed)
    word = "京都" if encoding == "cp932" else "café"
    bad = rng.randrange(6)
    rows = [f"{i}.png,{word if i == bad else 'a cat'}".encode(encoding) for i in range(6)]
    found, skipped = loaded(folder, b"\n".join([b"file_name,text", *rows]))
    assert set(found.values()) == {"a cat"} and len(found) == 5
    assert skipped == [(f"line {bad + 2}", "not UTF-8: save the file in that encoding")]


@pytest.mark.parametrize("seed", SEEDS)
def test_utf_16_is_refused_by_name(folder, seed):
    texts = captions(random.Random(seed))
    with pytest.raises(ValueError, match="UTF-16.*save it as CSV in UTF-8"):
        loaded(folder, "\n".join(["file_name,text", *lines(texts)]).encode("utf-16"))


@pytest.mark.parametrize("seed", SEEDS)
def test_more_fields_than_the_header_are_set_aside_by_line(folder, seed):
    rng = random.Random(seed)
    bad = rng.randrange(6)
    rows = [f"{i}.png,512,a cat{', smile' * rng.randint(1, 3) if i == bad else ''}" for i in range(6)]
    found, skipped = loaded(folder, "\n".join(["file_name,width,text", *rows]))
    assert len(found) == 5 and skipped[0][0] == f"line {bad + 2}" and "the header has 3" in skipped[0][1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("row", ["{}.png", "{}.png,", '{}.png,""', "{}.png,   "])
def test_rows_without_a_caption_are_set_aside(folder, row, seed):
    bad = random.Random(f"{row}{seed}").randrange(6)
    rows = [row.format(i) if i == bad else f"{i}.png,a cat" for i in range(6)]
    found, skipped = loaded(folder, "\n".join(["file_name,text", *rows]))
    assert len(found) == 5 and skipped == [(f"{bad}.png", "empty caption")]


@pytest.mark.parametrize("name", ["../0.png", "/etc/hosts", "a/../../0.png", "", "missing.png"])
def test_names_outside_the_folder_or_missing_are_set_aside(folder, name):
    found, skipped = loaded(folder, f"file_name,text\n1.png,a cat\n{name},a dog\n")
    assert found == {"1.png": "a cat"} and len(skipped) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_links_within_the_folder_are_followed(folder, tmp_path_factory, seed):
    elsewhere = tmp_path_factory.mktemp("blobs")
    Image.new("RGB", (8, 8), (seed, 200, 0)).save(elsewhere / "blob.png")
    (folder / "linked.png").symlink_to(elsewhere / "blob.png")
    (folder / "deep").symlink_to(elsewhere, target_is_directory=True)
    found, skipped = loaded(folder, "file_name,text\nlinked.png,one\ndeep/blob.png,two\n")
    assert found == {"linked.png": "one", "deep/blob.png": "two"} and not skipped


def test_two_possible_caption_columns_must_be_told_apart(folder):
    content = "file_name,text,caption\n0.png,short,a long caption\n"
    with pytest.raises(ValueError, match="expected one of text and caption alone, or another that caption_column"):
        loaded(folder, content)
    assert loaded(folder, content, caption_column="caption")[0] == {"0.png": "a long caption"}
    assert loaded(folder, content, caption_column="text")[0] == {"0.png": "short"}


def test_the_columns_of_a_folder_can_be_named(folder):
    content = "image,blip\n0.png,a cat\n"
    assert loaded(folder, content, image_column="image", caption_column="blip")[0] == {"0.png": "a cat"}
    with pytest.raises(ValueError, match="has the columns image, blip: expected nope, or another that caption_column"):
        loaded(folder, content, image_column="image", caption_column="nope")


@pytest.mark.parametrize("content", ["", "\n\n", "   \n"])
def test_an_empty_table_is_an_error(folder, content):
    with pytest.raises(ValueError, match="has no header: expected a first line"):
        loaded(folder, content)


@pytest.mark.parametrize("seed", SEEDS)
def test_prompts_are_read_by_the_same_rules(tmp_path, capsys, seed):
    rng = random.Random(seed)
    texts, bad, file = captions(rng), rng.randrange(6), tmp_path / "prompts.csv"
    rows = [f'{i},"{t}' if i == bad else f"{i},{t}, {rng.choice(WORDS)}" for i, t in enumerate(texts)]
    file.write_text("\n".join(["id,text", *rows]), encoding="utf-8")
    prompts = read_prompts(file)
    assert [prompt.id for prompt in prompts] == [str(i) for i in range(6) if i != bad]
    assert all(prompt.text.startswith(texts[int(prompt.id)] + ", ") for prompt in prompts)
    assert f"1 rows set aside, such as line {bad + 2}" in capsys.readouterr().out


def test_a_large_table_is_read_in_time_that_grows_with_its_lines(tmp_path):
    file = tmp_path / "many.csv"
    file.write_text("file_name,text\n" + "".join(f'{i}.png,"a cat, {i}"\n' for i in range(20_000)) + '0.png,"open\n')
    table = read_csv(file)
    assert len(table.rows) == 20_000 and table.set_aside[0][0] == "line 20002"
