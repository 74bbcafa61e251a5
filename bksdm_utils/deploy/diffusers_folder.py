"""Export as a diffusers folder with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from .export import _prefixed, _save_tokenizer, new_folder


@dataclass(frozen=True)
class Card:
    """What a model card tells; what is None is said to be not recorded.

    Attributes:
        scores: name -> "value ± error"; they mean something with `protocol` and `num_images` only.
        base_model: folder or hub id of the teacher.
    """

    title: str
    plan: str
    base_model: str
    data: str | None = None
    steps: int | None = None
    scores: Mapping[str, str] = field(default_factory=dict)
    protocol: str | None = None
    num_images: int | None = None
    licence: str | None = None
    num_parameters: int | None = None
    guidance_scale: float = 7.5
    num_inference_steps: int = 25


CARD = """\
---
{head}---

# {title}

A Stable Diffusion whose U-Net had blocks removed and was repaired by knowledge distillation, after BK-SDM
([arXiv 2305.15798](https://arxiv.org/abs/2305.15798)).

| | |
|---|---|
| removal plan | {plan} |
| U-Net parameters | {num_parameters} |
| teacher | {base_model} |
| training data | {data} |
| optimizer steps | {steps} |
| licence | {licence} |

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/to/this/folder")
pipe("…", guidance_scale={guidance_scale}, num_inference_steps={num_inference_steps}).images[0]
```

## Scores

Protocol: {protocol}; pictures: {num_images}. Scores of other protocols or of another number of
pictures are not comparable.

| score | value |
|---|---|
{scores}
## Limits

A distilled student inherits what its teacher learned from its data, its biases and its licence's terms. It was not
checked for safety; no safety checker is included.
"""


def model_card(card: Card) -> str:
    """A model card in Markdown, with the head that the Hugging Face hub reads."""

    def known(value: object) -> str:
        return "not recorded" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    head = yaml.safe_dump({
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "base_model": card.base_model,
        "license": card.licence or "other", "tags": ["stable-diffusion", "bk-sdm", "knowledge-distillation"],
    }, sort_keys=False)  # fmt: skip
    scores = "".join(f"| {name} | {value} |\n" for name, value in card.scores.items()) or "| not recorded | |\n"
    told = {name: known(value) for name, value in vars(card).items()}
    return CARD.format(head=head, **told | {"scores": scores})


def save_diffusers(pipeline: StableDiffusionPipeline, folder: str | Path, card: Card) -> Path:
    """A plain diffusers folder with its model card; `from_pretrained(folder)` loads it anywhere.

    The text encoder's names get the prefix `text_model.`, which transformers 5 no longer writes: without it
    transformers 4 keeps random weights in silence.

    Raises:
        ValueError: the folder is there already or cannot be written.
    """
    with new_folder(folder) as part:
        pipeline.save_pretrained(part)
        for number in ("", "_2"):  # SDXL has two
            if (tokenizer := getattr(pipeline, f"tokenizer{number}", None)) is None:
                continue
            _save_tokenizer(tokenizer, part / f"tokenizer{number}")
            for file in (part / f"text_encoder{number}").glob("*.safetensors"):
                save_file({_prefixed(name): t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
        (part / "README.md").write_text(model_card(card), encoding="utf-8")
    return Path(folder)
