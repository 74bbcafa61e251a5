"""How good pictures are. First form: CLIP score, and the storybook world's exact zero-shot accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from . import storybook
from .presets import Preset, resolve
from .sampling import Pipeline, generate
from .storybook import Scene


class ClipJudge:
    """A CLIP that compares pictures with texts.

    Args:
        folder: a transformers CLIPModel folder or hub id with its tokenizer and image processor.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        self.model = CLIPModel.from_pretrained(folder).to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.processor = CLIPImageProcessor.from_pretrained(folder)

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image], batch_size: int = 128) -> torch.Tensor:
        """What the vision tower makes of pictures before its projection, (N, D), for the FID."""
        found = []
        for start in range(0, len(pictures), batch_size):
            batch = [picture.convert("RGB") for picture in pictures[start : start + batch_size]]
            pixels = self.processor(batch, return_tensors="pt").pixel_values
            found.append(self.model.vision_model(pixels.to(self.model.device)).pooler_output)
        return torch.cat(found)

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Unit-length embeddings of pictures, (N, D)."""
        return F.normalize(self.model.visual_projection(self.features(pictures)), dim=-1)

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> torch.Tensor:
        """Unit-length embeddings of texts, (N, D)."""
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = self.model.text_model(tokens.to(self.model.device)).pooler_output
        return F.normalize(self.model.text_projection(text), dim=-1)


def clip_score(judge: ClipJudge, pictures: Sequence[Image.Image], captions: Sequence[str]) -> float:
    """Mean cosine between each picture and its caption (the paper's convention: not scaled by 100, not clipped)."""
    if len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures but {len(captions)} captions: give one caption for each picture")
    return (judge.images(pictures) * judge.texts(captions)).sum(-1).mean().item()


def fid(features: torch.Tensor, real_features: torch.Tensor) -> float:
    """Fréchet distance between Gaussians fitted to the features (N, D) of drawn and of real pictures, by clean-fid.

    Few pictures bias it upwards: only values of equally many pictures and one feature network may be compared.
    """
    from cleanfid.fid import frechet_distance  # takes a second that other scores need not wait for

    moments = [(f.mean(0), np.cov(f, rowvar=False)) for f in (features.double().cpu().numpy(),
                                                              real_features.double().cpu().numpy())]  # fmt: skip
    return float(frechet_distance(*moments[0], *moments[1]))


def zero_shot_accuracy(
    judge: ClipJudge, pictures: Sequence[Image.Image], scenes: Sequence[Scene], singles_only: bool = True
) -> dict[str, float]:
    """Share of storybook pictures whose size, colour, object and place the judge names rightly among all alternatives.

    Args:
        singles_only: judge pictures of one object only, where nothing is ambiguous.
    """
    chosen = [i for i, scene in enumerate(scenes) if len(scene.things) == 1 or not singles_only]
    if not chosen:
        raise ValueError("no picture of a single object among the scenes: give more scenes, or singles_only=False")
    embedded = judge.images([pictures[i] for i in chosen])
    accuracy = {}
    for attribute in storybook.ATTRIBUTES:
        options = [scenes[i].alternatives(attribute) for i in chosen]
        texts = judge.texts([option.caption for group in options for option in group])
        similarity = torch.einsum("nd,nod->no", embedded, texts.view(len(chosen), len(options[0]), -1))
        truth = torch.tensor([group.index(scenes[i]) for i, group in zip(chosen, options, strict=True)])
        accuracy[attribute] = (similarity.argmax(1).cpu() == truth).float().mean().item()
    return accuracy


PROMPTS = (
    "a photo of a golden retriever puppy in the snow", "a bowl of ramen on a wooden table",
    "a lighthouse at sunset, oil painting", "a red bicycle leaning against a brick wall",
    "portrait of an old fisherman with a white beard", "a city street at night in the rain",
    "a castle on a hill, watercolor", "a vase of tulips by the window",
)  # fmt: skip


class Scorer:
    """Draws the same captions from the same noise with any pipeline and scores the pictures.

    Storybook pipelines draw held-out scenes, for `proxy` other ones than for `scores`; pipelines of another world draw
    `PROMPTS`, which without a judge are only looked at.

    Args:
        settings: the preset in force; gives judge, number of pictures, steps and guidance.
    """

    def __init__(self, settings: Preset, device: str = "cpu", seed: int = 0):
        self.settings, self.seed, self.scenes = settings, seed, []
        self.captions = list(PROMPTS[: settings.num_images])
        storybook_only = settings.train_data_dir is None  # a judge of that world knows no other pictures
        self.judge = ClipJudge(resolve(settings.judge), device) if settings.judge and storybook_only else None
        if storybook_only:
            self.scenes = [storybook.sample_scene(i, "test") for i in range(settings.num_images)]
            self.captions = [scene.caption for scene in self.scenes]
            numbers = range(settings.num_validation_images)
            self.validation_scenes = [storybook.sample_scene(i, "validation") for i in numbers]

    def draw(self, pipeline: Pipeline) -> list[Image.Image]:
        """One picture for each caption."""
        return self._draw(pipeline, self.captions, self.settings.num_inference_steps)

    def _draw(self, pipeline, captions: Sequence[str], num_inference_steps: int) -> list[Image.Image]:
        return generate(pipeline, captions, seed=self.seed, num_inference_steps=num_inference_steps,
                        guidance_scale=self.settings.guidance_scale)  # fmt: skip

    def scores(self, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """CLIP score and, for storybook, zero-shot accuracies of single-object pictures; empty without a judge."""
        if self.judge is None:
            return {}
        scores = {"clip_score": clip_score(self.judge, pictures, self.captions)}
        if any(len(scene.things) == 1 for scene in self.scenes):
            scores |= zero_shot_accuracy(self.judge, pictures, self.scenes)
        return {name: round(value, 4) for name, value in scores.items()}

    def proxy(self, pipeline: Pipeline, num_inference_steps: int = 10) -> dict[str, float]:
        """CLIP score, and FID beside real renders of the same scenes, of quickly drawn pictures, to follow a training
        by; NaN without a judge."""
        if self.judge is None:
            return {"clip_score": float("nan"), "fid": float("nan")}
        captions = [scene.caption for scene in self.validation_scenes]
        pictures = self._draw(pipeline, captions, num_inference_steps)
        distance = fid(self.judge.features(pictures), self._real_features)
        score = clip_score(self.judge, pictures, captions)
        return {"clip_score": round(score, 4), "fid": round(distance, 3)}

    @cached_property
    def _real_features(self) -> torch.Tensor:
        scenes = self.validation_scenes
        return self.judge.features([storybook.render(scene, seed) for seed, scene in enumerate(scenes)])
