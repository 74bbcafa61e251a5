"""Scores of a folder of pictures by a named protocol: resumable, and never of other pictures than those they stand for.

A protocol says what the judging networks see of a picture, which networks they are, and what the real pictures are.
Rows that a network has computed are kept beside the pictures under each picture's hash, so that one more picture
costs one more row; a file of scores carries a hash of the pictures, the networks and the real pictures.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from . import storybook
from .data import Skipped, in_threads, storybook_examples
from .downloads import DOWNLOADS
from .engine import alone
from .pictures import (
    Prompt,
    check_filled,
    check_same_prompts,
    not_here,
    picture_path,
    storybook_scene,
    whole_pictures,
)
from .presets import ROOT, resolve
from .run import write_json
from .scores import (
    ClipJudge,
    Network,
    Score,
    Statistics,
    cosines,
    fid,
    half_sample_error,
    inception_classes,
    inception_clean,
    inception_pytorch,
    inception_score,
    kid,
    mean_score,
    named_rightly,
)

VERSION = 2  # of how rows and scores are computed: what another version has kept is not read
FEW = 10_000  # pictures below which a FID says little
FEWEST = 20  # pictures that are scored at all
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def as_stored(picture: Image.Image) -> Image.Image:
    """The picture itself."""
    return picture


def as_paper(picture: Image.Image) -> Image.Image:
    """What the paper's scores are of: JPEG of quality 75, Pillow's bicubic to 256 pixels, JPEG of quality 75 again.

    A file that is a JPEG already is not compressed once more before it is made smaller.
    """
    if picture.format != "JPEG":
        picture = _jpeg(picture.convert("RGB"))
    return _jpeg(picture.resize((256, 256), Image.Resampling.BICUBIC))


def _jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=75)
    return Image.open(file)


@dataclass(frozen=True)
class Protocol:
    """How pictures are scored.

    Attributes:
        view: what the networks see of a stored picture.
        clip: the CLIP of the CLIP score; for storybook it gives the other scores' features too.
        features: makes the network of FID and KID; None is the CLIP.
        classes: makes the network of the Inception score; None is the CLIP.
        real: what is compared with unless told otherwise; None is storybook's renders.
        image_format: what pictures are kept in. The paper's view makes JPEGs of them anyway, and these take a third.
    """

    name: str
    view: Callable[[Image.Image], Image.Image]
    clip: str
    features: Callable[[str], Network] | None = None
    classes: Callable[[str], Network] | None = None
    real: str | None = None
    image_format: str = "png"


VIT_G = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"
PROTOCOLS = {
    "paper": Protocol(
        "paper", as_paper, VIT_G, inception_pytorch, inception_classes, DOWNLOADS["coco_statistics"].path, "jpeg"
    ),
    # The paper's statistics are of another network and of 256 pixels: here COCO's own pictures are looked at.
    "clean": Protocol("clean", as_stored, VIT_G, inception_clean, inception_classes, DOWNLOADS["coco_pictures"].path),
    "storybook": Protocol("storybook", as_stored, "data/storybook/clip"),
}


def find_protocol(name: str) -> Protocol:
    """A protocol by name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}: expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


# --- rows that are computed once --------------------------------------------------------------------------------------


class Rows:
    """Rows of numbers under the hash of what they were computed from: a file that grows, and its index.

    A kill loses the last block at most: what stands in only one of the two files is cut off.
    """

    def __init__(self, folder: Path, dim: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.numbers, self.index, self.dim = folder / "rows.f32", folder / "index.txt", dim
        for path in (self.numbers, self.index):
            path.touch()
        keys = self.index.read_bytes().split(b"\n")[:-1]  # without the last, which is torn or empty
        whole = min(len(keys), self.numbers.stat().st_size // (4 * dim))
        with self.numbers.open("ab") as numbers, self.index.open("ab") as index:
            numbers.truncate(whole * 4 * dim)
            index.truncate(sum(len(key) + 1 for key in keys[:whole]))
        self.place = {key.decode(): i for i, key in enumerate(keys[:whole])}

    def add(self, keys: Sequence[str], rows: np.ndarray) -> None:
        """Appends rows, (len(keys), dim)."""
        with self.numbers.open("ab") as numbers, self.index.open("a", encoding="utf-8") as index:
            numbers.write(np.ascontiguousarray(rows, np.float32).tobytes())
            numbers.flush()
            index.write("".join(f"{key}\n" for key in keys))
        for key in keys:
            self.place[key] = len(self.place)

    def all(self) -> np.ndarray:
        """Every row, (N, dim), as a file mapped to memory."""
        shape = (len(self.place), self.dim)
        return np.memmap(self.numbers, np.float32, "r", shape=shape) if self.place else np.zeros(shape, np.float32)

    def where(self, keys: Sequence[str]) -> np.ndarray:
        """The places of these keys among all rows."""
        return np.array([self.place[key] for key in keys], np.int64)


def _progress(total: int, what: str) -> tqdm:
    """A plain line now and then, with an estimate, for work that takes more than ten seconds."""
    return tqdm(total=total, desc=what, file=sys.stdout, mininterval=10, delay=10, ascii=True, ncols=70)


def compute(rows: Rows, network: Network, items: Mapping[str, Callable[[], object]]) -> Skipped:
    """Has the network describe what is not described yet; the next items are prepared while it works.

    Work of more than ten seconds says how far it is.

    Args:
        items: hash -> what opens the picture or gives the text.

    Returns:
        (hash, reason) of what could not be opened.
    """
    failed: Skipped = []
    batch_size = 128 if torch.cuda.is_available() else 32  # a CPU's caches hold few pictures of 299 pixels

    def prepared(key: str) -> tuple[str, torch.Tensor | str]:
        try:
            return key, network.prepare(items[key]())
        except Exception as error:  # Pillow raises many kinds for a broken file
            return key, str(error) or type(error).__name__

    todo = [key for key in items if key not in rows.place]
    ready = in_threads(prepared, todo, ahead=2 * batch_size)
    with _progress(len(todo), network.name) as bar:
        while batch := list(islice(ready, batch_size)):
            failed += [(key, found) for key, found in batch if isinstance(found, str)]
            good = [(key, found) for key, found in batch if not isinstance(found, str)]
            if good:
                with torch.no_grad():
                    rows.add([key for key, _ in good], network.forward(torch.stack([x for _, x in good])).float().cpu())
            bar.update(len(batch))
    return failed


# --- real pictures ----------------------------------------------------------------------------------------------------


@contextmanager
def real_pictures(place: str | Path | None, count: int = 1000) -> Iterator[dict[str, Callable[[], Image.Image]]]:
    """Real pictures by the hash of their contents: of a folder or a .zip, or renders of storybook's test scenes.

    They can be opened within the block.

    Args:
        place: None is the storybook.
        count: of storybook's renders.

    Raises:
        Missing: a download that was not fetched yet.
        ValueError: no such file or folder, it cannot be read, or it holds no pictures.
    """
    if place is None:
        yield {example.key: example.open for example in storybook_examples(count, "test")}
        return
    place = _real_place(place)
    with _archive(place) if place.is_file() else nullcontext() as archive:
        found = _pictures_below(place) if archive is None else _pictures_in(archive)
        if not found:
            raise ValueError(f"{place} holds no pictures: expected {', '.join(sorted(PICTURES))}")
        yield found


def _real_place(place: str | Path) -> Path:
    place = Path(resolve(place))
    if not place.exists():
        raise not_here(place)(
            f"{place} is missing: expected statistics (.npz), a folder or a .zip of real pictures. COCO's come by "
            "python -m bksdm_utils.downloads coco_statistics (or coco_pictures)"
        )
    return place


def _archive(place: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(place)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{place} cannot be read ({error}): expected an .npz with mu and sigma, a folder or a .zip of "
                         "pictures") from error  # fmt: skip


def _pictures_below(folder: Path) -> dict[str, Callable[[], Image.Image]]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    hashes = in_threads(lambda path: hashlib.sha256(path.read_bytes()).hexdigest(), paths)
    return {f"{key}-{path.relative_to(folder)}": partial(Image.open, path)
            for key, path in zip(hashes, paths, strict=True)}  # fmt: skip


def _pictures_in(archive: zipfile.ZipFile) -> dict[str, Callable[[], Image.Image]]:
    """Opened through the one archive, which several threads may read; its table alone takes a second to load."""
    names = sorted(name for name in archive.namelist() if Path(name).suffix.lower() in PICTURES)

    def opened(name: str) -> Image.Image:
        return Image.open(io.BytesIO(archive.read(name)))

    return {f"{archive.getinfo(name).CRC:08x}-{name}": partial(opened, name) for name in names}


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Scores of a folder of pictures, and all that says of what they are.

    Attributes:
        scores: name -> `Score`.
        clip_scores: id of each picture -> its own cosine, lowest first.
        skipped: (id, reason) of pictures that are missing or damaged.
        key: a hash of pictures, captions, networks and real pictures.
    """

    protocol: str
    key: str
    num_images: int
    scores: dict[str, Score]
    clip_scores: dict[str, float]
    skipped: Skipped

    @property
    def warning(self) -> str:
        """What must be said beside the FID; empty where there are enough pictures."""
        if self.num_images >= FEW:
            return ""
        return (f"FID of {self.num_images:,} pictures is biased upwards: comparable only with values of as many "
                f"pictures, never with published ones of 30,000")  # fmt: skip


class Evaluator:
    """Scores folders of pictures by one protocol.

    Args:
        protocol: a name of `PROTOCOLS`.
        real: statistics (.npz with mu and sigma), or a folder or .zip of pictures; None is the protocol's own.
        clip: another CLIP than the protocol's.
        cache_dir: where the rows of real pictures are kept.

    Raises:
        Missing: weights of its networks, or COCO's real pictures, that were not fetched yet.
        ValueError: an unknown protocol, or unusable real pictures.
    """

    def __init__(
        self,
        protocol: str,
        real: str | Path | None = None,
        device: str = "cpu",
        cache_dir: str | Path | None = None,
        clip: str | None = None,
    ):
        self.protocol = find_protocol(protocol)
        self.judge = ClipJudge(clip or self.protocol.clip, device)
        self.features = self.protocol.features(device) if self.protocol.features else self.judge.pictures
        self.classes = self.protocol.classes(device) if self.protocol.classes else None
        self.place, self.cache_dir = real or self.protocol.real, Path(cache_dir or ROOT / "outputs" / "cache" / "real")
        _ = self.real  # a mistake in it is found before any picture is drawn

    @cached_property
    def real(self) -> Statistics:
        """What the drawn pictures are compared with."""
        if self._statistics_only:
            nameless = self.protocol.name == "paper"  # whose published statistics say nothing of their network
            return Statistics.load(_real_place(self.place), self.features, nameless)
        return Statistics.of(self.real_rows)

    @property
    def _statistics_only(self) -> bool:
        return self.place is not None and Path(self.place).suffix == ".npz"

    @cached_property
    def real_rows(self) -> np.ndarray | None:
        """Features of the real pictures, (N, D); None where only their statistics are known."""
        if self._statistics_only:
            return None
        with real_pictures(self.place) as items, alone(self.cache_dir, wait=True):
            rows = self._rows(self.cache_dir, self.features)
            failed = compute(rows, self._seen(self.features), items)
        if failed:
            print(f"{len(failed)} real pictures set aside, such as {failed[0]}")
        return rows.all()[rows.where([key for key in items if key in rows.place])]

    def evaluate(self, folder: Path, prompts: Sequence[Prompt]) -> Evaluation:
        """Scores the pictures of `prompts` in a folder that `pictures.sample` filled; what is known is not computed
        again.

        Raises:
            ValueError: no such folder, too few whole pictures, or pictures of other prompts under these ids.
        """
        check_filled(folder)
        with alone(folder, wait=True):
            hashes, skipped = self._whole(folder, prompts)
            key = self._key(hashes, prompts)
            path = folder / f"scores-{self.protocol.name}.json"
            if (known := _read(path, key)) is not None:
                return replace(known, skipped=skipped)  # other pictures may be missing than when it was written
            texts = {prompt.id: prompt.text for prompt in prompts}
            chosen = [Prompt(id, texts[id]) for id in hashes]
            scores, clip_scores = self._scores(folder, chosen, hashes)
            found = Evaluation(self.protocol.name, key, len(chosen), scores, clip_scores, skipped)
            write_json(path, {**asdict(found), "scores": {name: s._asdict() for name, s in scores.items()}})
            return found

    def fid_by_number(self, folder: Path, prompts: Sequence[Prompt], counts: Sequence[int]) -> dict[int, Score]:
        """Mean of the FID of random subsets of each size, and their spread, which for large subsets is too small."""
        check_filled(folder)
        with alone(folder, wait=True):
            hashes, _ = self._whole(folder, prompts)
            rows = self._computed(folder, self.features, hashes)
        chance, all_, places = np.random.default_rng(0), rows.all(), rows.where(list(hashes.values()))
        found = {}
        for count in sorted({min(count, len(places)) for count in counts}):
            subsets = [chance.permutation(places)[:count] for _ in range(10 if count < len(places) else 1)]
            values = [fid(Statistics.of(all_, subset), self.real) for subset in subsets]
            found[count] = Score(float(np.mean(values)), float(np.std(values)))
        return found

    # --- how ---

    def _whole(self, folder: Path, prompts: Sequence[Prompt]) -> tuple[dict[str, str], Skipped]:
        """id -> hash of each picture that is what the manifest says, and the others.

        In the order of ids: splits and halves are of the same pictures whatever the order of the prompts.
        """
        have = whole_pictures(folder)
        check_same_prompts(folder, prompts, have)
        hashes = {id: have[id].sha256 for id in sorted(prompt.id for prompt in prompts) if id in have}
        skipped = [(p.id, "missing or damaged: draw the folder again") for p in prompts if p.id not in have]
        if len(hashes) < FEWEST:
            raise ValueError(f"{folder} has {len(hashes)} whole pictures of {len(prompts)}: scores need {FEWEST} at "
                             "least")  # fmt: skip
        return hashes, skipped

    def _key(self, hashes: Mapping[str, str], prompts: Sequence[Prompt]) -> str:
        texts = {prompt.id: prompt.text for prompt in prompts}
        about = [str(VERSION), self.protocol.name, self.judge.key, self.features.key]
        about += [getattr(self.classes, "key", ""), f"KID: {self.real_rows is not None}"]
        about += [f"{id}\x00{texts[id]}\x00{sha256}" for id, sha256 in sorted(hashes.items())]
        digest = hashlib.sha256("\x01".join(about).encode())
        for numbers in (self.real.mean, self.real.covariance):
            digest.update(numbers.tobytes())
        return digest.hexdigest()[:16]

    def _seen(self, network: Network) -> Network:
        """The network, looking at pictures as the protocol has it."""
        prepare = lambda picture: network.prepare(self.protocol.view(picture))  # noqa: E731
        return Network(network.name, network.key, network.dim, prepare, network.forward)

    def _rows(self, folder: Path, network: Network) -> Rows:
        return Rows(folder / f"rows-{VERSION}-{network.name}-{self.protocol.name}-{network.key}", network.dim)

    def _computed(self, folder: Path, network: Network, hashes: Mapping[str, str]) -> Rows:
        rows = self._rows(folder, network)
        items = {sha256: partial(Image.open, picture_path(folder, id)) for id, sha256 in hashes.items()}
        failed = compute(rows, self._seen(network), items)
        if failed:
            raise ValueError(f"{folder}: pictures cannot be opened though they are as drawn: {failed[:3]}")
        return rows

    def _scores(
        self, folder: Path, prompts: Sequence[Prompt], hashes: Mapping[str, str]
    ) -> tuple[dict[str, Score], dict[str, float]]:
        sha256 = [hashes[prompt.id] for prompt in prompts]
        features = self._computed(folder, self.features, hashes)
        drawn, places = features.all(), features.where(sha256)
        distance = lambda chosen: fid(Statistics.of(drawn, places[chosen]), self.real)  # noqa: E731
        everything = np.arange(len(places))
        scores = {"fid": Score(distance(everything), half_sample_error(distance, len(places)))}
        if self.real_rows is not None:
            scores["kid"] = kid(drawn[places], self.real_rows)
        seen = features if self.features is self.judge.pictures else self._computed(folder, self.judge.pictures, hashes)
        looked_at, at = seen.all(), seen.where(sha256)
        scores["inception_score"] = inception_score(self._logits(folder, sha256, hashes, looked_at, at))
        cosine = self._cosines(folder, prompts, looked_at, at)
        scores["clip_score"] = mean_score(cosine)
        if self.protocol.name == "storybook" and all(storybook_scene(prompt) for prompt in prompts):
            scores |= self._storybook(folder, prompts, looked_at, at)
        order = np.argsort(cosine)
        return scores, {prompts[i].id: round(float(cosine[i]), 5) for i in order}

    def _logits(self, folder, sha256: Sequence[str], hashes, looked_at: np.ndarray, at: np.ndarray) -> np.ndarray:
        if self.classes is None:
            return self.judge.storybook_logits(torch.from_numpy(looked_at[at])).cpu().numpy()
        classes = self._computed(folder, self.classes, hashes)
        return classes.all()[classes.where(sha256)]

    def _cosines(self, folder: Path, prompts: Sequence[Prompt], looked_at: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Each picture's cosine with its caption, block by block."""
        network = self.judge.captions
        rows = Rows(folder / f"rows-{VERSION}-{network.name}-{network.key}", network.dim)
        keys = [hashlib.sha256(prompt.text.encode()).hexdigest() for prompt in prompts]
        compute(rows, network, {key: (lambda p=p: p.text) for key, p in zip(keys, prompts, strict=True)})
        texts, where, found = rows.all(), rows.where(keys), []
        for start in range(0, len(at), 2048):
            block = slice(start, start + 2048)
            images = self.judge.embed(torch.from_numpy(looked_at[at[block]]))
            found.append(cosines(images.cpu(), torch.from_numpy(texts[where[block]])))
        return torch.cat(found).numpy()

    def _storybook(self, folder: Path, prompts, looked_at: np.ndarray, at: np.ndarray) -> dict[str, Score]:
        """Accuracies: attributes of single objects by the CLIP, relations of two by the nearest render."""
        scenes = [storybook_scene(prompt) for prompt in prompts]
        single = np.array([len(scene.things) == 1 for scene in scenes])
        scores = {}
        if single.any():
            images = self.judge.embed(torch.from_numpy(looked_at[at[single]]))
            right = named_rightly(self.judge, images, [s for s, one in zip(scenes, single, strict=True) if one])
            scores = {attribute: mean_score(found) for attribute, found in right.items()}
        pairs = [(p, s) for p, s in zip(prompts, scenes, strict=True) if s.relation]
        if pairs:
            found = in_threads(
                lambda pair: _relation_shown(Image.open(picture_path(folder, pair[0].id)), pair[1]), pairs
            )
            scores["relation"] = mean_score(list(found))
        return scores


def by_short_name(places: Sequence[str]) -> dict[str, str]:
    """Each folder or hub id once, by its last two parts, or by as many as tell it from the others."""
    different, count = {Path(os.path.abspath(place)).parts: place for place in places}, 2
    while len(named := {"/".join(parts[-count:]): place for parts, place in different.items()}) < len(different):
        count += 1
    return named


def distance_to(teacher: Path, folder: Path, prompts: Sequence[Prompt]) -> Score:
    """How far a model's pictures lie from the teacher's of the same prompts and noise: root mean square over pixels,
    in grey levels of 255, averaged over the pictures that both folders have whole.

    Raises:
        ValueError: they have none in common, or a picture was drawn from another text than its prompt's.
    """
    have, theirs = whole_pictures(folder), whole_pictures(teacher)
    check_same_prompts(folder, prompts, have)
    check_same_prompts(teacher, prompts, theirs)
    both = [prompt.id for prompt in prompts if prompt.id in have and prompt.id in theirs]
    if not both:
        raise ValueError(f"{folder} and {teacher} have no picture in common: draw the same prompts in both")

    def distance(id: str) -> float:
        one, other = (np.asarray(Image.open(picture_path(f, id)).convert("RGB"), np.float32) for f in (folder, teacher))
        return float(np.sqrt(np.square(one - other).mean()))

    return mean_score(list(in_threads(distance, both)))


def _relation_shown(picture: Image.Image, scene: storybook.Scene) -> bool:
    options = scene.alternatives("relation")
    return storybook.nearest(picture, options) == options.index(scene)


def _read(path: Path, key: str) -> Evaluation | None:
    """The scores of a file, if they are of just these pictures, networks and real pictures."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["key"] != key:
            return None
        none = {"value": float("nan"), "error": float("nan")}
        scores = {
            n: Score(**{k: none[k] if v is None else v for k, v in s.items()}) for n, s in about["scores"].items()
        }
        return Evaluation(**{**about, "scores": scores, "skipped": [tuple(s) for s in about["skipped"]]})
    except (OSError, ValueError, KeyError, TypeError):
        return None
