"""DreamBooth (arXiv 2208.12242): a Stable Diffusion learns one subject from a handful of pictures.

Whole, or by low-rank adapters (LoRA, arXiv 2106.09685); with prior preservation, pictures of the subject's class that
the same model drew before keep it from forgetting what that class looks like. The engine trains; this module says what
is learned from, what is trained, and what the loss is.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from . import storybook
from .data import Skipped, to_pixels
from .distill import training_target
from .engine import Draw, Log, Step, Trainer, TrainingConfig, save_model
from .latents import encoding_batch, posterior, token_ids
from .pictures import Prompt
from .presets import Missing, resolve
from .sampling import LORA_BASE, Pipeline, architecture_hash, model_hash, own_copy
from .scores import ClipJudge, Network, Score, mean_score

DATASET = "data/dreambooth/dataset"
LIVE = ("cat", "dog")  # the living among google/dreambooth's classes, with prompts of their own
METHODS = ("full", "lora")


# --- the subject ------------------------------------------------------------------------------------------------------


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
        return _pictures_hash([*self.pictures, (self.word, Image.new("RGB", (1, 1)))])


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
    if place in storybook.SUBJECTS:
        return storybook_subject(place)
    folder = Path(resolve(place))
    if not folder.is_dir():
        folder = Path(resolve(dataset)) / place
    if not folder.is_dir():
        fetched = (Path(resolve(dataset)) / "prompts_and_classes.txt").is_file()
        kind = Missing if re.fullmatch(r"\w+", place) and not fetched else ValueError
        raise kind(
            f"no subject {place!r}: expected {', '.join(storybook.SUBJECTS)}, a folder of pictures, or a "
            f"name of google/dreambooth's in {dataset} (python -m bksdm_utils.downloads dreambooth)"
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
    word, _ = storybook.SUBJECTS[name]
    places = storybook.PLACES[:num_pictures]
    pictures = tuple((f"a {{}} {place}", storybook.render_subject(name, place, i)) for i, place in enumerate(places))
    templates = [f"a {{}} {place}" for place in storybook.PLACES]
    templates += ["a big {} in the snow", "a big {} at night"]
    looks = itertools.product(storybook.PLACES, storybook.COLOURS, storybook.SIZES)
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
        raise Missing(f"{dataset} has no prompts_and_classes.txt: python -m bksdm_utils.downloads dreambooth")
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


# --- what is trained --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: W x becomes W x + (alpha / rank) B A x.

    The defaults are BK-SDM's. Attributes of the text encoder are ignored where it is not trained.
    """

    rank: int = 16
    alpha: float = 27
    targets: tuple[str, ...] = ("to_q", "to_v")
    text_rank: int = 16
    text_alpha: float = 17
    text_targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        for name in ("rank", "alpha", "text_rank", "text_alpha"):
            if getattr(self, name) <= 0:
                raise ValueError(f"lora {name} is {getattr(self, name)}: expected a positive number")
        if not self.targets or not self.text_targets:
            raise ValueError("lora has no targets: expected names of linear layers, such as to_q, to_v")


class Personal(nn.Module):
    """The U-Net and text encoder of a pipeline as one model, so that both are trained, averaged and saved together.

    The networks are the pipeline's own: what is learned, the pipeline draws.

    Args:
        method: "full" trains all weights of the U-Net, "lora" adapters in it.
        train_text_encoder: the same in the text encoder.
        seed: of the adapters' first weights.

    Raises:
        ValueError: an unknown method, an SDXL pipeline, or adapters' targets that name no layer.
    """

    def __init__(
        self, pipeline: StableDiffusionPipeline, method: str = "full", train_text_encoder: bool = True,
        lora: Lora | None = None, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
        if not isinstance(pipeline, StableDiffusionPipeline):
            raise ValueError(f"DreamBooth is not written for a {type(pipeline).__name__}: expected SD-v1 or SD-v2")
        self.unet, self.text_encoder, self.method = pipeline.unet, pipeline.text_encoder, method
        self.lora = (lora or Lora()) if method == "lora" else None
        self.base = architecture_hash(pipeline.unet)
        for part in (self.unet, self.text_encoder, pipeline.vae):
            part.requires_grad_(False)
        if self.lora is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self._adapt(train_text_encoder)
        else:
            self.unet.requires_grad_(True)
            self.text_encoder.requires_grad_(train_text_encoder)

    def _adapt(self, train_text_encoder: bool) -> None:
        wanted = [(self.unet, LoraConfig(r=self.lora.rank, lora_alpha=self.lora.alpha,
                                         target_modules=list(self.lora.targets)))]  # fmt: skip
        if train_text_encoder:
            wanted.append((self.text_encoder, LoraConfig(r=self.lora.text_rank, lora_alpha=self.lora.text_alpha,
                                                         target_modules=list(self.lora.text_targets))))  # fmt: skip
        for part, config in wanted:
            layers = [name for name, layer in part.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
            for target in sorted(config.target_modules):
                if not any(f".{name}".endswith(f".{target}") for name in layers):  # PEFT passes over it in silence
                    raise ValueError(f"no layer of the {type(part).__name__} is called {target}: expected ends of "
                                     f"names such as {layers[-1]}")  # fmt: skip
            part.add_adapter(config, "default")

    def forward(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w), (B,), (B, T) -> the U-Net's prediction, (B, 4, h, w)."""
        told = self.text_encoder(token_ids)[0]
        return self.unet(noisy_latents, timesteps, encoder_hidden_states=told).sample

    @property
    def num_trained(self) -> int:
        """How many parameters are trained."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def save(self, pipeline: StableDiffusionPipeline, folder: Path) -> None:
        """What plain diffusers loads: full, a whole pipeline; lora, what `pipe.load_lora_weights(folder)` takes, with
        its alphas."""
        if self.lora is None:
            save_model(pipeline, folder)
            return
        told = {}
        for name, part in (("unet", self.unet), ("text_encoder", self.text_encoder)):
            if getattr(part, "peft_config", None):
                told[f"{name}_lora_layers"] = get_peft_model_state_dict(part)
                told[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(folder, **told)
        file = folder / "pytorch_lora_weights.safetensors"
        with safe_open(file, "pt") as written:  # again, with what tells its base from others
            about = {**written.metadata(), LORA_BASE: self.base}
            tensors = {name: written.get_tensor(name) for name in written.keys()}  # noqa: SIM118  it is no dict
        save_file(tensors, file, metadata=about)


@dataclass(frozen=True)
class Recipe:
    """How a subject is learned; the defaults are BK-SDM's (its finetune_full.sh and finetune_lora.sh).

    Attributes:
        batch_size: pictures of the subject in a step; with prior preservation as many of its class.
        learning_rates: by method.
        resolution: pixels a side of the pictures; None is the pipeline's own.
    """

    subject: str = "dog2"
    identifier: str = "sks"
    max_train_steps: int = 800
    batch_size: int = 1
    learning_rates: tuple[tuple[str, float], ...] = (("full", 1e-6), ("lora", 1e-4))
    lr_schedule: str = "constant"
    lr_warmup_steps: int = 0
    train_text_encoder: bool = True
    lora: Lora = Lora()
    prior_loss_weight: float = 1.0
    num_class_images: int = 200
    mixed_precision: str = "bf16"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    resolution: int | None = None

    def __post_init__(self):
        if self.prior_loss_weight < 0 or self.num_class_images < 0:
            raise ValueError(f"prior_loss_weight is {self.prior_loss_weight}, num_class_images {self.num_class_images}"
                             ": expected zero or more")  # fmt: skip
        if self.prior_loss_weight and not self.num_class_images:
            raise ValueError("prior preservation needs num_class_images of 1 or more, or a prior_loss_weight of 0")

    def with_parameters(self, **given) -> Recipe:
        """This recipe with what is not None put in place of its own; `learning_rate` is for every method."""
        rate = given.pop("learning_rate", None)
        told = {name: value for name, value in given.items() if value is not None}
        if rate is not None:
            told["learning_rates"] = tuple((method, rate) for method in METHODS)
        return replace(self, **told)

    def training_config(self, method: str, device: str, seed: int, checkpoint_steps: int = 0) -> TrainingConfig:
        """The engine's settings; on a CPU in full precision, and without an average of the weights."""
        return TrainingConfig(
            self.max_train_steps, self.batch_size, learning_rate=dict(self.learning_rates)[method],
            lr_schedule=self.lr_schedule, lr_warmup_steps=self.lr_warmup_steps, ema_decay=0.0, seed=seed,
            optimizer=self.optimizer,
            mixed_precision=self.mixed_precision if device == "cuda" else "no", checkpoint_steps=checkpoint_steps,
        )  # fmt: skip


# A network this small learns with larger steps, and needs more adapters than the paper's two to hold a pattern.
STORYBOOK = Recipe(
    "tabby", "z", 80, 8, (("full", 5e-4), ("lora", 1.5e-3)), "cosine", 0, False,
    Lora(targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")), num_class_images=48,
)  # fmt: skip


def recipe_of(preset: str) -> Recipe:
    """The recipe that suits a preset's teacher."""
    return STORYBOOK if preset == "storybook" else Recipe()


# --- what it learns from ----------------------------------------------------------------------------------------------


@dataclass
class Moments:
    """Latents of a few captioned pictures: the posterior's mean and deviation, (N, 4, h, w), and token ids, (N, T)."""

    mean: torch.Tensor
    std: torch.Tensor
    token_ids: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, pipeline: Pipeline, pictures: Sequence[Image.Image], captions: Sequence[str], resolution: int
    ) -> Moments:
        """Encodes pictures, centre-cropped to `resolution`."""
        size, found = encoding_batch(resolution), []
        for start in range(0, len(pictures), size):
            pixels = torch.stack([to_pixels(picture, resolution) for picture in pictures[start : start + size]])
            found.append(posterior(pipeline, pixels))
        mean, std = (torch.cat(parts) for parts in zip(*found, strict=True))
        return cls(mean, std, token_ids(pipeline, captions).to(mean.device))

    def batch(self, indices: Sequence[int], noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents drawn from the posteriors, and their captions' token ids."""
        return self.mean[indices] + self.std[indices] * noise.to(self.mean), self.token_ids[indices]


class DreamBooth:
    """The loss of DreamBooth: of the subject's pictures, plus, weighted, of the class's. `losses` is the engine's.

    Args:
        scheduler: the DDPM noise schedule; ε- and v-prediction both work.
        prior: pictures of the class; None trains without prior preservation.
    """

    def __init__(self, scheduler: DDPMScheduler, instance: Moments, prior: Moments | None, prior_weight: float = 1.0):
        self.scheduler, self.instance, self.prior, self.prior_weight = scheduler, instance, prior, prior_weight

    def losses(self, model: nn.Module, draw: Draw) -> dict[str, torch.Tensor]:
        """One micro-batch of the subject, and as many pictures of its class: loss, loss_instance, loss_prior."""
        parts = [self._example(self.instance, draw, draw.indices)]
        if self.prior is not None:
            others = replace(draw, num_examples=len(self.prior.mean))  # its own permutation, epoch after epoch
            parts.append(self._example(self.prior, draw, others.indices))
        noisy, timesteps, ids, target = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        errors = F.mse_loss(model(noisy, timesteps, ids).float(), target.float(), reduction="none").mean((1, 2, 3))
        instance, *prior = (part.mean() for part in errors.split(len(draw.positions)))
        losses = {"loss": instance, "loss_instance": instance}
        if prior:
            losses |= {"loss": instance + self.prior_weight * prior[0], "loss_prior": prior[0]}
        return losses

    def _example(self, moments: Moments, draw: Draw, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        shape, device = moments.mean.shape[1:], moments.mean.device
        latents, ids = moments.batch(indices, draw.normal(*shape))
        noise = draw.normal(*shape).to(latents)
        timesteps = draw.integers(self.scheduler.config.num_train_timesteps).to(device)
        target = training_target(self.scheduler, latents, noise, timesteps)
        return self.scheduler.add_noise(latents, noise, timesteps), timesteps, ids, target


def class_prompts(subject: Subject, num_images: int) -> list[Prompt]:
    """What the model draws of the subject's class before it is trained."""
    texts = itertools.islice(itertools.cycle(subject.class_prompts), num_images)
    return [Prompt(f"class-{i}", text) for i, text in enumerate(texts)]


@dataclass
class Lesson:
    """One model learning one subject by one method: `for step in lesson.steps(): …`, then `lesson.save()`.

    The pipeline is a copy that shares what is not trained; it draws what has been learned so far.
    """

    pipeline: StableDiffusionPipeline
    model: Personal
    trainer: Trainer
    loss: DreamBooth
    num_pictures: int
    log: Log

    def steps(self) -> Iterator[Step]:
        """Trains, logging and yielding after every optimizer step; drawing in between is allowed."""
        for step in self.trainer.steps(self.loss.losses, self.num_pictures):
            self.log.append(step.floats())
            yield step

    def save(self, folder: Path) -> int:
        """`Personal.save`; returns the bytes of what was written."""
        self.model.save(self.pipeline, folder)
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def prepare(
    pipeline: StableDiffusionPipeline, subject: Subject, recipe: Recipe, method: str, folder: Path,
    class_images: Sequence[tuple[str, Image.Image]] = (), seed: int = 0, checkpoint_steps: int = 0,
    resume: bool = False,
) -> Lesson:  # fmt: skip
    """Copies U-Net and text encoder of a pipeline in full precision, encodes the pictures, sets up the engine.

    Whether its words can work `check_words` says.

    Args:
        class_images: (caption, picture) of the class, for prior preservation; none trains without.
        checkpoint_steps: steps between two checkpoints in `folder`, 0 keeps none.

    Raises:
        ValueError: a method or settings that cannot work, or a checkpoint of another lesson.
    """
    own = own_copy(pipeline)
    for part in (own.unet, own.text_encoder):
        part.float()
    if recipe.gradient_checkpointing:
        own.unet.enable_gradient_checkpointing()
    model = Personal(own, method, recipe.train_text_encoder, recipe.lora, seed)
    side = recipe.resolution or own.unet.config.sample_size * own.vae_scale_factor
    instance = Moments.of(own, subject.real, subject.captions(recipe.identifier), side)
    prior = Moments.of(own, [p for _, p in class_images], [c for c, _ in class_images], side) if class_images else None
    loss = DreamBooth(DDPMScheduler.from_config(own.scheduler.config), instance, prior, recipe.prior_loss_weight)
    fixed = {"base": model_hash(pipeline), "subject": subject.key, "recipe": replace(recipe, max_train_steps=1),
             "method": method, "class_images": _pictures_hash(class_images), "resolution": side}  # fmt: skip
    config = recipe.training_config(method, own.device.type, seed, checkpoint_steps)
    trainer = Trainer(model, config, folder, resume, fixed, name="personal")
    return Lesson(own, model, trainer, loss, len(subject.pictures), Log(folder / "log.csv", trainer.step))


def _pictures_hash(pictures: Sequence[tuple[str, Image.Image]]) -> str:
    digest = hashlib.sha256()
    for caption, picture in pictures:
        digest.update(caption.encode() + picture.convert("RGB").tobytes())
    return digest.hexdigest()[:16]


# --- how good it is ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def subject_scores(
    judge: ClipJudge, dino: Network | None, pictures: Sequence[Image.Image], real: Sequence[Image.Image],
    texts: Sequence[str],
) -> dict[str, Score]:  # fmt: skip
    """The scores of the DreamBooth paper (section 4.2), with standard errors over the drawn pictures.

    Args:
        dino: DINO's ViT-S/16; None leaves it out.
        texts: what each drawn picture shall show, without the identifier.

    Returns:
        clip_i, dino: mean cosine between drawn and real pictures; clip_t: between drawn pictures and their texts.
    """
    drawn = judge.images(pictures)
    scores = {"clip_i": mean_score((drawn @ judge.images(real).T).mean(1).cpu())}
    if dino is not None:
        looks = [F.normalize(dino(list(some)), dim=-1) for some in (pictures, real)]
        scores["dino"] = mean_score((looks[0] @ looks[1].T).mean(1).cpu())
    return scores | {"clip_t": mean_score((drawn * judge.texts(list(texts))).sum(-1).cpu())}


def table(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """Subjects and their scores, and a last line with the means over subjects and their standard errors.

    Args:
        rows: "subject" -> name, and score -> (value, error).
    """
    names = list(dict.fromkeys(name for row in rows for name in row if name != "subject"))
    lines = [{"subject": row["subject"], **{n: str(Score(*row[n])) for n in names if n in row}} for row in rows]
    means = {name: str(mean_score([row[name][0] for row in rows if name in row])) for name in names}
    return pd.DataFrame([*lines, {"subject": "mean", **means}])


def main() -> None:
    """Prints the names of google/dreambooth's subjects, for a sweep of notebook 05 over all of them."""
    print(",".join(dreambooth_subjects()))


if __name__ == "__main__":  # run 05 -p preset sd-v1.4 -p subject $(python -m bksdm_utils.dreambooth)
    main()
