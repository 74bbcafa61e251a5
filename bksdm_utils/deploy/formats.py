"""Export as a diffusers folder with a model card, and what the other formats share (notebook 06)."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData

from ..config.deploy import DemoAndExport
from ..files import NotAvailable, new_folder
from ..models.pipelines import Pipeline
from ..models.saving import save_pipeline

TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

A Stable Diffusion whose U-Net had blocks removed and was retrained by knowledge distillation, after BK-SDM
([arXiv 2305.15798](https://arxiv.org/abs/2305.15798)).

| | |
|---|---|
| removal plan | {{ model_name }} |
| U-Net parameters | {{ num_parameters }} |
| teacher | {{ base_model }} |
| training data | {{ data or "not recorded" }} |
| optimizer steps | {{ steps or "not recorded" }} |
| licence | {{ licence or "not recorded" }} |

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/to/this/folder")
pipe("…", guidance_scale={{ guidance_scale }}, num_inference_steps={{ num_inference_steps }}).images[0]
```

## Scores

Protocol: {{ protocol or "not recorded" }}; images: {{ num_images or "not recorded" }}. Scores of other protocols or of
another number of images are not comparable.

| score | value |
|---|---|
{% for name, value in scores.items() %}| {{ name }} | {{ "%.3f" % value }} |
{% else %}| not recorded | |
{% endfor %}
## Terms and limits

A distilled student inherits what its teacher learned from its data, its biases and its licence's terms.
{% if "openrail" in (licence or "") %}The teacher's licence, {{ licence }}, allows only the uses that its attachment A
does not restrict, and asks whoever passes these weights on, or serves them, to pass on the same terms.
{% endif %}
It was not checked for safety, and no safety checker is included: what it generates is not filtered. Filter prompts and
images before others see them.
"""


class NotExpressible(ValueError):
    """A format cannot hold this model; the message names one that can."""


def require(extra: str, *packages: str) -> list:
    """Optional packages, imported; `extra` is what installs them. Raises NotAvailable."""
    try:
        return [importlib.import_module(name) for name in packages]
    except ImportError as error:
        raise NotAvailable(f"{error.name} is not installed: pip install -e '.[{extra}]'") from error


def check_sd(pipeline: StableDiffusionPipeline) -> None:
    """Raises NotExpressible for an SDXL pipeline."""
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise NotExpressible(f"this format is for SD-v1 and SD-v2, not for a {type(pipeline).__name__}: use diffusers")


def student_card(config: DemoAndExport, plan: str, student: Pipeline, path: str | Path) -> ModelCard:
    """The model card of a student; its training from the result.json of notebook 03 beside its folder, if any."""
    file, known = Path(path).parent / "result.json", {"base_model": config.teacher, "scores": {}}
    result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() and not config.lora else {}
    if result.get("notebook") == "03_kd_training":
        trained, metrics = result["config"], result["metrics"]
        known = {"base_model": trained["teacher"], "data": trained["train_data_dir"] or "storybook scenes, rendered",
                 "steps": f"{metrics['steps']:,}", "scores": metrics["after"],
                 "protocol": f"{trained['preset']}, notebook 03", "num_images": trained["num_images"]}  # fmt: skip
    licence = config.licence or (None if config.own_teacher else config.chosen_preset.licence)
    data = ModelCardData(
        library_name="diffusers", pipeline_tag="text-to-image", base_model=known["base_model"], model_name=plan,
        license=licence or "other", tags=["stable-diffusion", "bk-sdm", "knowledge-distillation"],
    )  # fmt: skip
    title = f"{plan}, distilled from {config.preset}" + " with a LoRA merged" * bool(config.lora)
    return ModelCard.from_template(
        data, template_str=TEMPLATE, title=title, num_parameters=f"{student.unet.num_parameters():,}",
        licence=licence, guidance_scale=config.guidance_scale, num_inference_steps=config.num_inference_steps,
        **known,
    )  # fmt: skip


def save_diffusers(pipeline: Pipeline, folder: str | Path, card: ModelCard) -> str:
    """A plain diffusers folder with its model card, as `save_pipeline`.

    Raises:
        ValueError: the folder exists or cannot be written.
    """
    with new_folder(folder) as part:
        save_pipeline(pipeline, part)
        card.save(part / "README.md")
    return "loaded by StableDiffusionPipeline.from_pretrained"
