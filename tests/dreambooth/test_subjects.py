"""Subjects: google/dreambooth's layout and prompts, folders of images, storybook characters, tokens."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from bksdm_utils.data.rendering import SUBJECTS, render, render_subject
from bksdm_utils.data.scenes import COLOURS, OBJECTS, Scene, Thing
from bksdm_utils.dreambooth.subjects import (
    check_words,
    class_prompts,
    dreambooth_subjects,
    dreambooth_templates,
    load_subject,
)
from bksdm_utils.evaluation.prompts import storybook_prompts
from bksdm_utils.models.pipelines import load_pipeline


@pytest.fixture(scope="module")
def pipeline(pipeline_dir):
    return load_pipeline(pipeline_dir)


@pytest.fixture
def subject():
    return load_subject("tabby")


@pytest.fixture
def dataset(tmp_path):
    """google/dreambooth's layout, with thirty subjects of small random images."""
    folder, rng = tmp_path / "dataset", np.random.default_rng(0)
    classes = {"backpack": "backpack", "bear_plushie": "stuffed animal", "cat2": "cat", "dog2": "dog"}
    classes |= {f"thing{i}": "toy" for i in range(26)}
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(3):
            noise = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name / f"{i:02}.jpg")
    rows = "\n".join(f"{name},{word}" for name, word in classes.items())
    (folder / "prompts_and_classes.txt").write_text(f"Classes\n\nsubject_name,class\n{rows}\n\n{PROMPTS}")
    return folder


# The second half of google/dreambooth's prompts_and_classes.txt (CC BY 4.0): {0} is the identifier, {1} the class.
ANYWHERE = """\
'a {0} {1} in the jungle'
'a {0} {1} in the snow'
'a {0} {1} on the beach'
'a {0} {1} on a cobblestone street'
'a {0} {1} on top of pink fabric'
'a {0} {1} on top of a wooden floor'
'a {0} {1} with a city in the background'
'a {0} {1} with a mountain in the background'
'a {0} {1} with a blue house in the background'
'a {0} {1} on top of a purple rug in a forest'
"""
THINGS = """\
'a {0} {1} with a wheat field in the background'
'a {0} {1} with a tree and autumn leaves in the background'
'a {0} {1} with the Eiffel Tower in the background'
'a {0} {1} floating on top of water'
'a {0} {1} floating in an ocean of milk'
'a {0} {1} on top of green grass with sunflowers around it'
'a {0} {1} on top of a mirror'
'a {0} {1} on top of the sidewalk in a crowded street'
'a {0} {1} on top of a dirt road'
'a {0} {1} on top of a white rug'
"""
LIVING = """\
'a {0} {1} wearing a red hat'
'a {0} {1} wearing a santa hat'
'a {0} {1} wearing a rainbow scarf'
'a {0} {1} wearing a black top hat and a monocle'
'a {0} {1} in a chef outfit'
'a {0} {1} in a firefighter outfit'
'a {0} {1} in a police outfit'
'a {0} {1} wearing pink glasses'
'a {0} {1} wearing a yellow shirt'
'a {0} {1} in a purple wizard outfit'
"""
LOOKS = """\
'a red {0} {1}'
'a purple {0} {1}'
'a shiny {0} {1}'
'a wet {0} {1}'
'a cube shaped {0} {1}'
"""


def listed(*prompts):
    """Prompts as that file lists them."""
    return "prompt_list = [\n" + "".join(prompts).replace("'\n", "'.format(unique_token, class_token),\n") + "]\n"


PROMPTS = "Prompts\n\nObject Prompts\n" + listed(ANYWHERE, THINGS, LOOKS)
PROMPTS += "\nLive Subject Prompts\n" + listed(ANYWHERE, LIVING, LOOKS)


def test_templates_are_those_of_the_paper():
    theirs = [tuple(re.findall(r"^'(.*)'\.format", half, re.MULTILINE)) for half in PROMPTS.split("Live Subject")]
    ours = [tuple(t.format("{0} {1}") for t in dreambooth_templates(live)) for live in (False, True)]
    assert ours == theirs and all(len(prompts) == 25 for prompts in theirs)


def test_google_dreambooth_is_read_as_published(dataset):
    assert len(dreambooth_subjects(dataset)) == 30
    bear = load_subject("bear_plushie", dataset_dir=dataset)
    assert bear.class_word == "stuffed animal" and len(bear.images) == 3 and len(bear.templates) == 25
    assert bear.prompts("sks", 4)[0].text == "a sks stuffed animal in the jungle" and len(bear.prompts("sks", 4)) == 100
    assert bear.plain_texts(1)[-1] == "a cube shaped stuffed animal"
    assert bear.captions("sks")[0] == "a sks stuffed animal" and bear.class_prompts == ("a stuffed animal",)
    assert load_subject("dog2", dataset_dir=dataset).templates == dreambooth_templates(True)
    assert load_subject("backpack", dataset_dir=dataset).templates == dreambooth_templates(False)
    assert load_subject(str(dataset / "backpack"), "hamster", live=True).templates == dreambooth_templates(True)
    with pytest.raises(ValueError, match="download dreambooth"):
        load_subject("dog99", dataset_dir=dataset)
    with pytest.raises(ValueError, match="download dreambooth"):
        dreambooth_subjects(dataset / "cat2")


def test_broken_images_are_set_aside_and_empty_folders_refused(tmp_path):
    for i in range(4):
        render_subject("tabby", "by day", i).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff cut off")
    with pytest.raises(ValueError, match="class_word"):
        load_subject(str(tmp_path))
    mine = load_subject(str(tmp_path), "cat")
    assert len(mine.images) == 4 and [name for name, _ in mine.skipped] == ["broken.jpg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no readable image.*it is empty"):
        load_subject(str(tmp_path / "empty"), "cat")
    (tmp_path / "empty" / "photo.heic").write_bytes(b"of another kind")
    with pytest.raises(ValueError, match="no readable image.*photo.heic"):
        load_subject(str(tmp_path / "empty"), "cat")


def test_storybook_characters_look_like_no_training_image():
    for name, (word, _) in SUBJECTS.items():
        subject = load_subject(name)
        assert len(subject.images) == 5 and subject.class_word == word in OBJECTS
        plain = [render(Scene((Thing("big", c, word),), "by day"), 0)
                 for c in COLOURS]  # fmt: skip
        character = np.asarray(render_subject(name, "by day", 0)).astype(int)
        assert min(np.abs(np.asarray(p).astype(int) - character).mean() for p in plain) > 1
    words = [p.text for p in class_prompts(load_subject("tabby"), 100)]
    assert all(" cat " in text for text in words) and len(set(words)) == 96


@pytest.mark.parametrize(
    ("identifier", "word", "fault"),
    [(" ", "cat", "it is empty"), ("cat", "cat", "have cat"), ("Cat", "cat", "have cat"),
     ("red", "cat", "have red"), ("big z", "cat", "have big"), ("xqzvwjkypxqzvw", "cat", "splits"),
     ("z", "hippopotamuses and rhinoceroses", "text encoder reads 18")],
)  # fmt: skip
def test_identifiers_and_classes_that_cannot_work_are_refused(pipeline, subject, identifier, word, fault):
    with pytest.raises(ValueError, match=fault):
        check_words(pipeline, identifier, replace(subject, class_word=word))


def test_words_of_several_tokens_are_reported(pipeline, subject, capsys):
    check_words(pipeline, "sks", subject)
    assert "identifier 'sks' is 3 tokens" in capsys.readouterr().out
    check_words(pipeline, "z", replace(subject, class_word="dog"))
    assert "class 'dog' is 3 tokens" in capsys.readouterr().out
    check_words(pipeline, "z", subject)
    assert capsys.readouterr().out == ""
    check_words(pipeline, "z", replace(subject, templates=dreambooth_templates(True)))
    assert "the ends of 6 prompts are cut off, such as 'a z cat" in capsys.readouterr().out


def test_ids_of_prompts_are_unique_and_not_the_storybooks(subject):
    ids = [prompt.id for prompt in subject.prompts("z", 3)]
    assert len(set(ids)) == len(ids) == 24 and storybook_prompts(1)[0].id not in ids
