import torch
from conftest import NARROW_XL

from bksdm_utils.core.families import TextConditioning, unet_inputs
from bksdm_utils.models.pipelines import load_pipeline
from bksdm_utils.training.encoding import token_ids


def test_sdxl_conditioning_equals_its_pipelines(pipeline_xl_dir):
    pipe = load_pipeline(pipeline_xl_dir)
    kwargs = TextConditioning(pipe)(token_ids(pipe, ["a cat", "a big red boat"]))
    hidden_states, _, pooled, _ = pipe.encode_prompt(["a cat", "a big red boat"], do_classifier_free_guidance=False)
    assert torch.equal(kwargs["encoder_hidden_states"], hidden_states)
    assert torch.equal(kwargs["added_cond_kwargs"]["text_embeds"], pooled)
    ids = pipe._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, text_encoder_projection_dim=16)
    assert torch.equal(kwargs["added_cond_kwargs"]["time_ids"], ids.repeat(2, 1))
    larger = TextConditioning(pipe, resolution=96)(token_ids(pipe, ["a cat"]))
    assert larger["added_cond_kwargs"]["time_ids"].tolist() == [[96, 96, 0, 0, 96, 96]]


def test_sdxl_inputs_have_the_added_conditions():
    inputs = unet_inputs(NARROW_XL, batch_size=2)
    assert inputs["added_cond_kwargs"]["text_embeds"].shape == (2, 16)
    assert inputs["added_cond_kwargs"]["time_ids"].shape == (2, 6)
