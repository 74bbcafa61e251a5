"""Subjects: the storybook's characters, google/dreambooth's, or a folder of images (notebook 05)."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..data.examples import Skipped
from ..data.images import to_rgb
from ..data.rendering import SUBJECTS, render_subject
from ..data.scenes import COLOURS, PLACES, SIZES
from ..evaluation.prompts import Prompt
from ..files import NotAvailable, looked_in, resolve
from ..models.pipelines import Pipeline

DATASET = "data/dreambooth/dataset"
LIVE = ("cat", "dog")  # google/dreambooth's classes that have the prompts for living subjects


@dataclass(frozen=True)
class Subject:
    """What a model is to learn; {} in captions and templates stands for "identifier class_word"."""

    name: str
    class_word: str  # "dog" or "stuffed animal"
    images: tuple[Image.Image, ...]  # 3 to 10
    image_captions: tuple[str, ...]
    templates: tuple[str, ...]  # of the evaluation's prompts
    class_prompts: tuple[str, ...]  # for prior preservation, used in turn
    skipped: Skipped  # (file, reason) of images that could not be read

    def captions(self, identifier: str) -> list[str]:
        """The caption that each image is trained with."""
        return [caption.format(f"{identifier} {self.class_word}") for caption in self.image_captions]

    def prompts(self, identifier: str, num_images: int) -> list[Prompt]:
        """Every template, `num_images` times."""
        words = f"{identifier} {self.class_word}"
        texts = [template.format(words) for template in self.templates]
        return [Prompt(f"{i:02}-{k}", text) for i, text in enumerate(texts) for k in range(num_images)]

    def plain_texts(self, num_images: int) -> list[str]:
        """The same prompts without the identifier, which no CLIP model knows."""
        return [text.format(self.class_word) for text in self.templates for _ in range(num_images)]


def images_hash(captioned: Iterable[tuple[str, Image.Image]]) -> str:
    """A hash of (caption, image) pairs."""
    digest = hashlib.sha256()
    for caption, image in captioned:
        digest.update(caption.encode() + image.convert("RGB").tobytes())
    return digest.hexdigest()[:16]


def load_subject(
    subject: str, class_word: str | None = None, dataset_dir: str | Path = DATASET, live: bool | None = None
) -> Subject:
    """A subject of the storybook or of google/dreambooth by name, or any folder of 3 to 10 images.

    Args:
        class_word: what a folder shows; google/dreambooth's subjects have theirs.
        live: whether the prompts are those for living subjects; None decides by the class.

    Raises:
        NotAvailable: it may be one of google/dreambooth's, which is not downloaded.
        ValueError: no such subject, no readable image, or a folder without a class word.
    """
    if subject in SUBJECTS:
        return _storybook_subject(subject)
    folder = Path(resolve(subject))
    folder = folder if os.path.isdir(folder) else Path(resolve(dataset_dir)) / subject
    classes = _dreambooth_classes(folder.parent)
    if not os.path.isdir(folder):
        kind = NotAvailable if re.fullmatch(r"\w+", subject) and not classes else ValueError
        raise kind(f"no subject {subject!r}: expected {', '.join(SUBJECTS)}, a folder of images, or one of "
                   f"google/dreambooth's in {dataset_dir} (python -m bksdm_utils download dreambooth). It was "
            f"{looked_in(subject)}")  # fmt: skip
    if not (class_word := class_word or classes.get(folder.name)):
        raise ValueError(f"class_word is None: expected what {folder} shows, such as dog")
    images, skipped = open_images(folder)
    if not 3 <= len(images) <= 10:
        print(f"{folder.name}: {len(images)} images; DreamBooth is made for 3 to 10")
    templates = dreambooth_templates(class_word.lower() in LIVE if live is None else live)
    return Subject(folder.name, class_word, images, ("a {}",) * len(images), templates, (f"a {class_word}",), skipped)


def _storybook_subject(name: str) -> Subject:
    """A storybook character in five places; the sixth is new to it. As everywhere in that world, captions name them."""
    class_word, _ = SUBJECTS[name]
    images = tuple(render_subject(name, place, i) for i, place in enumerate(PLACES[:5]))
    templates = (*(f"a {{}} {place}" for place in PLACES), "a big {} in the snow", "a big {} at night")
    looks = itertools.product(PLACES, COLOURS, SIZES)
    prompts = [f"a {size} {colour} {class_word} {place}" for place, colour, size in looks]
    random.Random(0).shuffle(prompts)
    return Subject(name, class_word, images, templates[:5], templates, tuple(prompts), [])


def open_images(folder: Path) -> tuple[tuple[Image.Image, ...], Skipped]:
    """The readable images of a folder by name, and (file, reason) of the others; ValueError where there is none."""
    images, skipped = [], []
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        try:
            images.append(to_rgb(Image.open(path)))
        except Exception as error:  # Pillow raises many kinds for a broken file
            skipped.append((path.name, f"unreadable image: {error}"))
    if not images:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3]) or "it is empty"
        raise ValueError(f"{folder} has no readable image: expected 3 to 10 of the subject ({reasons})")
    return tuple(images), skipped


def _dreambooth_classes(dataset_dir: Path) -> dict[str, str]:
    """Subject -> class word, of google/dreambooth's prompts_and_classes.txt; empty without that file."""
    path = dataset_dir / "prompts_and_classes.txt"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = re.findall(r"^(\w+),([\w ]+)$", text, re.MULTILINE)
    return {name: class_word for name, class_word in lines if name != "subject_name"}


def dreambooth_subjects(dataset_dir: str | Path = DATASET) -> list[str]:
    """The names of google/dreambooth's thirty subjects.

    Raises:
        NotAvailable: the data set is not downloaded.
    """
    if classes := _dreambooth_classes(Path(resolve(dataset_dir))):
        return list(classes)
    raise NotAvailable(f"{dataset_dir} has no prompts_and_classes.txt: python -m bksdm_utils download dreambooth")


_PLACES = (
    "in the jungle", "in the snow", "on the beach", "on a cobblestone street", "on top of pink fabric",
    "on top of a wooden floor", "with a city in the background", "with a mountain in the background",
    "with a blue house in the background", "on top of a purple rug in a forest",
)  # fmt: skip
_OBJECT = (
    "with a wheat field in the background", "with a tree and autumn leaves in the background",
    "with the Eiffel Tower in the background", "floating on top of water", "floating in an ocean of milk",
    "on top of green grass with sunflowers around it", "on top of a mirror",
    "on top of the sidewalk in a crowded street", "on top of a dirt road", "on top of a white rug",
)  # fmt: skip
_LIVE = (
    "wearing a red hat", "wearing a santa hat", "wearing a rainbow scarf", "wearing a black top hat and a monocle",
    "in a chef outfit", "in a firefighter outfit", "in a police outfit", "wearing pink glasses",
    "wearing a yellow shirt", "in a purple wizard outfit",
)  # fmt: skip
_LOOKS = ("red", "purple", "shiny", "wet", "cube shaped")


def dreambooth_templates(live: bool) -> tuple[str, ...]:
    """The 25 prompts of the DreamBooth paper, for living subjects or for objects."""
    scenes = (*_PLACES, *(_LIVE if live else _OBJECT))
    return tuple(f"a {{}} {scene}" for scene in scenes) + tuple(f"a {look} {{}}" for look in _LOOKS)


def class_prompts(subject: Subject, num_images: int) -> list[Prompt]:
    """Prompts of the subject's class, for images that the model samples before it is trained."""
    texts = itertools.islice(itertools.cycle(subject.class_prompts), num_images)
    return [Prompt(f"class-{i}", text) for i, text in enumerate(texts)]


def check_words(pipeline: Pipeline, identifier: str, subject: Subject) -> None:
    """Checks identifier and class word against the tokenizer; prints what the text encoder cannot read well.

    Raises:
        ValueError: the identifier is empty or a word of the class's prompts, or a caption would be cut off.
    """
    class_words = {word.lower() for prompt in (subject.class_word, *subject.class_prompts) for word in prompt.split()}
    taken = sorted(set(identifier.lower().split()) & class_words)
    if taken or not identifier.strip():
        reason = f"prompts of the class {subject.class_word!r} have {', '.join(taken)}" if taken else "it is empty"
        raise ValueError(f"identifier is {identifier!r}: {reason}. Use a rare word, such as sks")
    tokenize, limit = pipeline.tokenizer.tokenize, pipeline.tokenizer.model_max_length - 2
    counts = {text: len(tokenize(text)) for text in subject.captions(identifier)}
    longest = max(counts, key=counts.get)
    if counts[longest] > limit:
        raise ValueError(f"the tokenizer splits {longest!r} into {counts[longest]} tokens, the text encoder reads "
                         f"{limit}: use a shorter identifier or class_word")  # fmt: skip
    cut = [p.text for p in subject.prompts(identifier, 1) if len(tokenize(p.text)) > limit]
    if cut:
        print(f"the text encoder reads {limit} tokens: the ends of {len(cut)} prompts are cut off, such as {cut[0]!r}")
    for name, text in (("identifier", identifier), ("class", subject.class_word)):
        if len(tokens := tokenize(text)) > len(text.split()):
            print(f"the {name} {text!r} is {len(tokens)} tokens ({' '.join(tokens)}): one-token words are learned best")
