"""Subjects: what DreamBooth learns (notebook 05)."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from ..data.examples import Skipped
from ..data.rendering import SUBJECTS, render_subject
from ..data.scenes import COLOURS, PLACES, SIZES
from ..evaluation.prompts import Prompt
from ..files import NotAvailable, resolve
from ..models.pipelines import Pipeline

DATASET = "data/dreambooth/dataset"


LIVE = ("cat", "dog")  # the living among google/dreambooth's classes, with prompts of their own


@dataclass(frozen=True)
class Subject:
    """What is to be learned.

    Attributes:
        word: what it is, "dog" or "stuffed animal".
        pictures: a handful, by the caption each is learned with; {} stands for "identifier word" here and below.
        templates: prompts to draw it by.
        class_prompts: what the model draws of the class, for prior preservation; used in turn.
        skipped: (file, reason) of pictures that could not be read.
    """

    name: str
    word: str
    pictures: tuple[tuple[str, Image.Image], ...]
    templates: tuple[str, ...]
    class_prompts: tuple[str, ...]
    skipped: Skipped

    @property
    def real(self) -> list[Image.Image]:
        """The pictures alone."""
        return [picture for _, picture in self.pictures]

    def captions(self, identifier: str) -> list[str]:
        """What each picture is learned with."""
        return [caption.format(f"{identifier} {self.word}") for caption, _ in self.pictures]

    def prompts(self, identifier: str, num_images: int) -> list[Prompt]:
        """Every template, `num_images` times, for the sampler."""
        words = f"{identifier} {self.word}"
        return [Prompt(f"{i:02}-{k}", text.format(words)) for i, text in enumerate(self.templates)
                for k in range(num_images)]  # fmt: skip

    def plain_texts(self, num_images: int) -> list[str]:
        """The same prompts without the identifier, which no CLIP knows."""
        return [text.format(self.word) for text in self.templates for _ in range(num_images)]

    @property
    def key(self) -> str:
        """A hash of word, captions and pictures."""
        return _images_hash([*self.pictures, (self.word, Image.new("RGB", (1, 1)))])


def load_subject(
    place: str, word: str | None = None, dataset: str | Path = DATASET, live: bool | None = None
) -> Subject:
    """A subject by name, of google/dreambooth or of the storybook, or any folder with 3 to 10 pictures.

    Args:
        word: the class, for a folder that is none of google/dreambooth's.
        live: draw it by the prompts for the living, or by those for things; None decides by the class.

    Raises:
        Missing: it may be one of google/dreambooth's, which is not here.
        ValueError: there is no such subject, no readable picture, or the class of a folder is not said.
    """
    if place in SUBJECTS:
        return storybook_subject(place)
    folder = Path(resolve(place))
    if not folder.is_dir():
        folder = Path(resolve(dataset)) / place
    if not folder.is_dir():
        fetched = (Path(resolve(dataset)) / "prompts_and_classes.txt").is_file()
        kind = NotAvailable if re.fullmatch(r"\w+", place) and not fetched else ValueError
        raise kind(
            f"no subject {place!r}: expected {', '.join(SUBJECTS)}, a folder of pictures, or a "
            f"name of google/dreambooth's in {dataset} (python -m bksdm_utils.data.downloads dreambooth)"
        )
    known = _dreambooth_words(folder.parent / "prompts_and_classes.txt")
    word = word or known.get(folder.name)
    if not word:
        raise ValueError(f"what is in {folder}? Say it by class_word, such as dog")
    pictures, skipped = _open_all(folder)
    templates = dreambooth_templates(word.lower() in LIVE if live is None else live)
    return Subject(folder.name, word, tuple(("a {}", picture) for picture in pictures), templates, (f"a {word}",),
                   skipped)  # fmt: skip


def storybook_subject(name: str, num_pictures: int = 5) -> Subject:
    """One of storybook's characters, in as many places; the sixth place is new to it.

    In that world captions always say where: so do those of these pictures, and the class is drawn in all its colours.
    """
    word, _ = SUBJECTS[name]
    places = PLACES[:num_pictures]
    pictures = tuple((f"a {{}} {place}", render_subject(name, place, i)) for i, place in enumerate(places))
    templates = [f"a {{}} {place}" for place in PLACES]
    templates += ["a big {} in the snow", "a big {} at night"]
    looks = itertools.product(PLACES, COLOURS, SIZES)
    things = [f"a {size} {colour} {word} {place}" for place, colour, size in looks]
    random.Random(0).shuffle(things)
    return Subject(name, word, pictures, tuple(templates), tuple(things), [])


def _open_all(folder: Path) -> tuple[list[Image.Image], Skipped]:
    pictures, skipped = [], []
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        try:
            pictures.append(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        except Exception as error:  # Pillow raises many kinds for a broken file
            skipped.append((path.name, f"unreadable picture: {error}"))
    if not pictures:
        told = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3]) or "it is empty"
        raise ValueError(f"{folder} has no readable picture: expected 3 to 10 of the subject ({told})")
    if not 3 <= len(pictures) <= 10:
        print(f"{folder.name}: {len(pictures)} pictures; DreamBooth is made for 3 to 10")
    return pictures, skipped


def _dreambooth_words(path: Path) -> dict[str, str]:
    """Subject -> class, of google/dreambooth's prompts_and_classes.txt; empty where there is no such file."""
    if not path.is_file():
        return {}
    lines = re.findall(r"^(\w+),([\w ]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: word for name, word in lines if name != "subject_name"}


def dreambooth_subjects(dataset: str | Path = DATASET) -> list[str]:
    """The names of google/dreambooth's thirty subjects.

    Raises:
        Missing: the data set is not there.
    """
    found = _dreambooth_words(Path(resolve(dataset)) / "prompts_and_classes.txt")
    if not found:
        raise NotAvailable(f"{dataset} has no prompts_and_classes.txt: python -m bksdm_utils.data.downloads dreambooth")
    return list(found)


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
    """The 25 prompts of the DreamBooth paper, for the living or for things."""
    places = (*_PLACES, *(_LIVE if live else _OBJECT))
    return tuple(f"a {{}} {place}" for place in places) + tuple(f"a {look} {{}}" for look in _LOOKS)


def check_words(pipeline: Pipeline, identifier: str, subject: Subject) -> None:
    """Says how the tokenizer takes the identifier and the class.

    Raises:
        ValueError: the identifier is empty or a word of the class's prompts, or captions would be cut off.
    """
    if not identifier.strip():
        raise ValueError("identifier is empty: expected a rare word, such as sks")
    used = {word.lower() for prompt in (subject.word, *subject.class_prompts) for word in prompt.split()}
    if taken := set(identifier.lower().split()) & used:
        raise ValueError(f"the identifier {identifier!r} is no word of its own: prompts of the class {subject.word!r} "
                         f"have {', '.join(sorted(taken))} already, so the subject could not be told from others of "
                         "its kind. Use a rare word, such as sks")  # fmt: skip
    tokenize, room = pipeline.tokenizer.tokenize, pipeline.tokenizer.model_max_length - 2
    longest = max(subject.captions(identifier), key=lambda text: len(tokenize(text)))
    if len(tokenize(longest)) > room:
        raise ValueError(f"the tokenizer splits {longest!r} into {len(tokenize(longest))} tokens, {identifier!r} into "
                         f"{len(tokenize(identifier))} and {subject.word!r} into {len(tokenize(subject.word))} of "
                         f"them: the text encoder reads {room}. Use shorter words")  # fmt: skip
    cut = [p.text for p in subject.prompts(identifier, 1) if len(tokenize(p.text)) > room]
    if cut:
        print(f"the text encoder reads {room} tokens: the ends of {len(cut)} prompts are cut off, such as {cut[0]!r}")
    for name, text in (("identifier", identifier), ("class", subject.word)):
        if len(tokens := tokenize(text)) > len(text.split()):
            print(f"the {name} {text!r} is {len(tokens)} tokens ({' '.join(tokens)}), each known from elsewhere: words "
                  "of one token each are learned more easily")  # fmt: skip


def class_prompts(subject: Subject, num_images: int) -> list[Prompt]:
    """What the model draws of the subject's class before it is trained."""
    texts = itertools.islice(itertools.cycle(subject.class_prompts), num_images)
    return [Prompt(f"class-{i}", text) for i, text in enumerate(texts)]


def _images_hash(pictures: Sequence[tuple[str, Image.Image]]) -> str:
    digest = hashlib.sha256()
    for caption, picture in pictures:
        digest.update(caption.encode() + picture.convert("RGB").tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    """Prints the names of google/dreambooth's subjects, for a sweep of notebook 05 over all of them."""
    print(",".join(dreambooth_subjects()))


if __name__ == "__main__":  # run 05 -p preset sd-v1.4 -p subject $(python -m bksdm_utils.dreambooth.subjects)
    main()
