"""Parameters of notebook 05."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from .base import NonNegative, PathText, Positive, parameter
from .shared import SCHEDULERS, PresetSampling, Teacher, prompts_of
from .training import Count, Cropping, Decay, Side, Training

Scale = Annotated[float, Field(gt=0)]
_TRAINING = ("batch_size", "max_train_steps", "learning_rate", "lr_schedule", "lr_warmup_steps", "mixed_precision")


class DreamBoothTraining(PresetSampling, Cropping, Training.preset_decides(*_TRAINING), Teacher):
    """Notebook 05: a small model learns one subject; the defaults are BK-SDM's scripts'."""

    notebook: ClassVar[str] = "05_dreambooth"
    ema_decay: float = parameter(0.0, "decay of averaged weights; 0 keeps no average")
    scheduler: SCHEDULERS | None = parameter("dpm++", "pndm, dpm++, euler, ddim or lcm; None is the teacher's own")
    student: PathText | None = parameter(
        None, "U-Net folder or hub id; None: notebook 03's of this variant", heading="DreamBooth"
    )
    models: tuple[Literal["teacher", "student"], ...] = parameter(("teacher", "student"), "teacher, student or both")
    methods: tuple[Literal["full", "lora"], ...] = parameter(("full", "lora"), "full, lora or both")
    full_learning_rate: NonNegative | None = parameter(None, "of full fine-tuning, where learning_rate is None")
    lora_learning_rate: NonNegative | None = parameter(None, "of LoRA, where learning_rate is None")
    subject: str | None = parameter(None, "tabby, koi, sunset_balloon; one of google/dreambooth's; a folder of images")
    class_word: str | None = parameter(None, "what a folder of your own shows, such as dog")
    live: bool | None = parameter(None, "prompts for the living or for things; None goes by the class")
    dataset_dir: PathText = parameter("data/dreambooth/dataset", "google/dreambooth's subjects")
    identifier: str | None = parameter(None, "a rare word for the subject")
    prior_loss_weight: NonNegative = parameter(1.0, "of the class images' loss; 0 trains without prior preservation")
    num_class_images: Count | None = parameter(None, "class images that the model samples before it is trained")
    class_images_dir: PathText | None = parameter(None, "folder of class images to use instead, at most so many")
    class_images_by: PathText | None = parameter(None, "pipeline that samples them; None: each model its own")
    train_text_encoder: bool | None = parameter(None, "also train the text encoder")
    text_learning_rate: NonNegative | None = parameter(None, "of the text encoder; None: the U-Net's")
    lora_rank: Positive = parameter(16, "rank of the U-Net's adapters", heading="LoRA")
    lora_alpha: Scale = parameter(27.0, "their scale is alpha / rank")
    lora_dropout: Decay = parameter(0.0, "probability that an adapter's input is set to zero in training")
    lora_targets: tuple[str, ...] | None = parameter(None, "ends of the names of the layers that get adapters")
    lora_text_rank: Positive = parameter(16, "rank of the text encoder's adapters")
    lora_text_alpha: Scale = parameter(17.0, "their scale is alpha / rank")
    lora_text_dropout: Decay = parameter(0.0, "probability that an adapter's input is set to zero in training")
    lora_text_targets: tuple[str, ...] = parameter(("q_proj", "v_proj"), "their layers")
    gradient_checkpointing: bool = parameter(False, "less memory, more time", heading="images and evaluation")
    resolution: Side | None = parameter(None, "pixels a side of the images; None is what the model was trained for")
    drift_steps: Count | None = parameter(None, "of the run without prior preservation; None: 2 x max_train_steps")
    num_images: Positive = parameter(2, "images of each prompt")
    validation_prompts: str | None = parameter(None, "sampled during training, | between two; None: the subject's")
    validation_steps: Positive | None = parameter(None, "steps between two validations; None: a third of the run")
    sampling_batch_size: Positive | None = parameter(None, "images in one pass on a GPU")
    clip: PathText | None = parameter(None, "CLIP folder or hub id of the scores")
    keep_models: bool = parameter(True, "no keeps the LoRAs alone, not whole pipelines of gigabytes")
    images_dir: PathText | None = parameter(None, "folder of the images; None: outputs/cache/images")
    resume: bool = parameter(False, "continue from this folder's checkpoints")

    @model_validator(mode="after")
    def _prior_has_images(self) -> Self:
        if self.prior_loss_weight and self.num_class_images == 0:
            raise ValueError("prior preservation needs num_class_images of 1 or more, or prior_loss_weight 0")
        if self.lora_targets == () or self.lora_text_targets == ():
            raise ValueError("lora_targets and lora_text_targets need ends of layers' names, such as to_q, to_v")
        named = [name for name in ("class_images_dir", "class_images_by") if getattr(self, name)]
        if named and not self.prior_loss_weight:
            raise ValueError(f"{named[0]} is for prior preservation, which prior_loss_weight 0 switches off")
        if len(named) > 1:
            raise ValueError("class_images_dir and class_images_by are given: expected one of them")
        if self.validation_prompts is not None and not prompts_of(self.validation_prompts):
            raise ValueError("validation_prompts is empty: expected texts with | between them, or None")
        if self.text_learning_rate is not None and self.train_text_encoder is False:
            raise ValueError("text_learning_rate is given, train_text_encoder False: the text encoder is not trained")
        return self

    def for_method(self, method: str) -> DreamBoothTraining:
        """These parameters for one method, its learning rate in place."""
        rates = {"full": self.full_learning_rate, "lora": self.lora_learning_rate}
        rate = rates[method] if self.learning_rate is None else self.learning_rate
        return self.but(methods=(method,), learning_rate=rate)

    @property
    def text_rate_factor(self) -> float:
        """The text encoder's learning rate as a multiple of the U-Net's; needs `for_method`'s rate."""
        if not self.learning_rate:
            raise ValueError("text_learning_rate is a multiple of learning_rate: expected one of more than 0")
        return self.text_learning_rate / self.learning_rate
