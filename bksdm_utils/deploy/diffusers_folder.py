"""Export as a diffusers folder with a model card (notebook 06)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file

from ..config.deploy import DemoAndExport
from ..files import new_folder
from ..models.pipelines import Pipeline
from .formats import prefixed, save_tokenizer

TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

A Stable Diffusion whose U-Net had blocks removed and was retrained by knowledge distillation, after BK-SDM
([arXiv 2305.15798](https://arxiv.org/abs/2305.15798)).

| | |
|---|---|
| removal plan | {{ plan }} |
| U-Net parameters | {{ num_parameters }} |
| teacher | {{ base_model }} |
| training data | {{ data }} |
| optimizer steps | {{ steps }} |
| licence | {{ licence }} |

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/to/this/folder")
pipe("…", guidance_scale={{ guidance_scale }}, num_inference_steps={{ num_inference_steps }}).images[0]
```

## Scores

Protocol: {{ protocol }}; images: {{ num_images }}. Scores of other protocols or of another number of images are not
comparable.

| score | value |
|---|---|
{% for name, value in scores.items() %}| {{ name }} | {{ value }} |
{% endfor %}
## Limits

A distilled student inherits what its teacher learned from its data, its biases and its licence's terms. It was not
checked for safety; no safety checker is included.
"""


@dataclass(frozen=True)
class Card:
    """The contents of a model card; what is None is written as not recorded.

    Attributes:
        scores: name -> value, which have a meaning only with `protocol` and `num_images`.
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


def model_card(card: Card) -> ModelCard:
    """The card in Markdown, with the metadata that the Hugging Face hub reads."""
    texts = {name: "not recorded" if value is None else f"{value:,}" if isinstance(value, int) else value
             for name, value in vars(card).items()}  # fmt: skip
    texts["scores"] = card.scores or {"not recorded": ""}
    data = ModelCardData(
        library_name="diffusers", pipeline_tag="text-to-image", base_model=card.base_model,
        license=card.licence or "other", tags=["stable-diffusion", "bk-sdm", "knowledge-distillation"],
    )  # fmt: skip
    return ModelCard.from_template(data, template_str=TEMPLATE, **texts)


def student_card(config: DemoAndExport, plan: str, student: Pipeline, path: str | Path) -> Card:
    """The card of a student: its training from the result.json of notebook 03 beside its folder, where one exists."""
    file = Path(path).parent / "result.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() and not config.lora else {}
    known = {}
    if result.get("notebook") == "03_kd_training":
        trained, metrics = result["config"], result["metrics"]
        known = {"base_model": trained["teacher"], "data": trained["train_data_dir"] or "storybook scenes, rendered",
                 "steps": metrics["steps"], "scores": {k: f"{v:.3f}" for k, v in metrics["after"].items()},
                 "protocol": f"{trained['preset']}, notebook 03", "num_images": trained["num_images"]}  # fmt: skip
    title = f"{plan}, distilled from {config.preset}" + " with a LoRA merged" * bool(config.lora)
    return Card(title, plan, **{"base_model": config.teacher, **known}, licence=config.licence,
                num_parameters=student.unet.num_parameters(), guidance_scale=config.guidance_scale,
                num_inference_steps=config.num_inference_steps)  # fmt: skip


def save_diffusers(pipeline: Pipeline, folder: str | Path, card: Card) -> str:
    """A plain diffusers folder with its model card, in full precision; `from_pretrained(folder)` loads it anywhere.

    Half precision would be loaded as it is by transformers and as full by diffusers, which do not work together. The
    text encoder's names get the prefix `text_model.`, without which transformers 4 keeps random weights.

    Raises:
        ValueError: the folder exists or cannot be written.
    """
    with new_folder(folder) as part:
        pipeline.save_pretrained(part)
        for file in part.glob("*/*.safetensors"):
            text = file.parent.name.startswith("text_encoder")
            tensors = {prefixed(name) if text else name: tensor.float() if tensor.is_floating_point() else tensor
                       for name, tensor in load_file(file).items()}  # fmt: skip
            save_file(tensors, file, metadata={"format": "pt"})
        for config in part.glob("text_encoder*/config.json"):
            content = json.loads(config.read_text(encoding="utf-8"))
            config.write_text(json.dumps(content | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
        for name in ("tokenizer", "tokenizer_2"):  # SDXL has two
            if tokenizer := getattr(pipeline, name, None):
                save_tokenizer(tokenizer, part / name)
        model_card(card).save(part / "README.md")
    return "loaded by StableDiffusionPipeline.from_pretrained"
