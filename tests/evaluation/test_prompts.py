import pytest

from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.evaluation.prompts import Prompt, check_prompts, read_prompts, storybook_prompts, storybook_scene
from bksdm_utils.files import NotAvailable


@pytest.fixture
def file(tmp_path):
    return tmp_path / "prompts.csv"


def test_a_storybook_prompt_has_its_scene():
    assert storybook_scene(storybook_prompts(5)[3]) == sample_scene(3, "test")
    assert storybook_scene(Prompt("test-3", "another text")) is storybook_scene(Prompt("cat", "a cat")) is None


@pytest.mark.parametrize(
    ("ids", "fault"),
    [(["a", "A"], "an id twice"), (["../a"], "cannot name a file"), (["a/b"], "cannot name a file"),
     (["a\\b"], "cannot name a file"), ([""], "cannot name a file"), ([".a"], "cannot name a file"),
     (["ж" * 80], "cannot name a file")],
)  # fmt: skip
def test_ids_that_cannot_name_files_are_an_error(ids, fault):
    with pytest.raises(ValueError, match=fault):
        check_prompts([Prompt(id, "a cat") for id in ids])


def test_cocos_ids_are_its_file_names(file):
    file.write_text('file_name,text\nCOCO_val2014_000000000042.jpg,"a dog, and ""a cat"""\nb.c.jpg,two\n')
    assert read_prompts(file) == [Prompt("COCO_val2014_000000000042", 'a dog, and "a cat"'), Prompt("b.c", "two")]


def test_without_ids_the_row_number_is_the_id(file):
    file.write_text("prompt\nköttbullar 🍝\nשלום\n", encoding="utf-8-sig")
    assert read_prompts(file, 1) == [Prompt("0", "köttbullar 🍝")]
    file.write_text('text\none\n""\nthree\n')
    assert [prompt.id for prompt in read_prompts(file)] == ["0", "2"]


def test_only_file_names_lose_their_suffix(file):
    file.write_text("id,text\n1.5,one\n1.7,two\nx.jpg,three\n")
    assert [prompt.id for prompt in read_prompts(file)] == ["1.5", "1.7", "x.jpg"]
    file.write_text("file_name,text\na.JPEG,one\n1.5,two\nb.c.webp,three\n")
    assert [prompt.id for prompt in read_prompts(file)] == ["a", "1.5", "b.c"]


def test_rows_without_a_text_are_set_aside_and_counted(file, capsys):
    file.write_text("id,text\na,one\nb,\nc,  \nd,four\n,\n")
    assert [prompt.id for prompt in read_prompts(file, 2)] == ["a", "d"]
    assert "prompts.csv: 2 rows set aside, such as line 3: no text" in capsys.readouterr().out
    read_prompts(file)
    assert "3 rows set aside" in capsys.readouterr().out


def test_rows_after_the_last_one_needed_are_not_checked(file, capsys):
    file.write_text("id,text\na,one\nb,two\n../c,\n../d,four\n")
    assert [prompt.id for prompt in read_prompts(file, 2)] == ["a", "b"] and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "fault"),
    [("", "has no header"), ("text\n", "no prompts"), ("a,b\n1,2\n", "expected text or prompt or caption"),
     ("text,id\n,a\n", "no prompts"), ("text,id\nx,a\ny,a\n", "an id twice"), ("text,id\nx,a/\n", "cannot name a file"),
     ("text,file_name\nx,a/\n", "cannot name"), ("text,id\nx,a\ny,\n", "cannot name a file"),
     ("text,file_name\nx,.jpg\n", "cannot name a file"), ("text,id\nx,../../etc\n", "cannot name a file")],
)  # fmt: skip
def test_unusable_prompt_files_are_explained(file, content, fault):
    file.write_text(content)
    with pytest.raises(ValueError, match=f"prompts.csv.*{fault}"):
        read_prompts(file)


def test_a_file_in_another_encoding_or_missing_is_an_error(file):
    with pytest.raises(ValueError, match="coco_captions") as mistyped:
        read_prompts(file)
    assert not isinstance(mistyped.value, NotAvailable)
    file.write_bytes(b"text\n\xff\xfe\xfa\n")
    with pytest.raises(ValueError, match="UTF-8"):
        read_prompts(file)
