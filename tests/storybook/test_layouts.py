"""The text tower that tells what stands where, and the U-Net that is fitted to another text encoder."""

import pytest
import torch

from bksdm_utils.core.plans import VARIANTS, student_config
from bksdm_utils.data.scenes import OPPOSITE, RELATIONS, Scene, Thing, sample_scene
from bksdm_utils.storybook import clip
from bksdm_utils.storybook.networks import (
    LAYOUT_CLASSES,
    SIDES,
    LayoutHead,
    layout_classes,
    layout_tokens,
    new_clip,
    new_tokenizer,
    new_unet,
    side_states,
    text_layout_loss,
    translate_text,
)

PAIR = Scene((Thing("big", "white", "star"), Thing("small", "green", "cat")), "by day", "left of")


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer([sample_scene(i).caption for i in range(300)])


def test_a_layout_says_on_which_side_each_thing_stands():
    assert PAIR.layout == {"left of": PAIR.things[0], "right of": PAIR.things[1]}
    assert all(OPPOSITE[OPPOSITE[relation]] == relation for relation in RELATIONS)


def test_equal_layouts_have_equal_classes_whatever_the_order_of_the_words():
    mirrored = Scene(PAIR.things[::-1], PAIR.place, "right of")
    assert layout_classes(PAIR) == layout_classes(mirrored)
    assert layout_classes(PAIR) != layout_classes(Scene(PAIR.things, PAIR.place, "right of"))
    assert all(number < total for number, total in zip(layout_classes(PAIR), LAYOUT_CLASSES, strict=True))


def test_a_part_of_the_layout_is_told_as_soon_as_it_can_be(tokenizer):
    words = tokenizer.convert_ids_to_tokens(tokenizer(PAIR.caption).input_ids)
    (first, second, end), (early, late, full) = layout_tokens(PAIR, tokenizer)
    assert (words[first], words[second], words[end]) == ("of</w>", "cat</w>", tokenizer.eos_token)
    assert full == layout_classes(PAIR) and late[:-1] == full[:-1] and late[-1] == early[-1] == -100
    assert sum(number > 0 for number in early[:-1]) == 3  # size, colour and object of the first thing alone


def test_the_text_tower_is_given_a_gradient_from_each_of_the_three_tokens(tokenizer):
    torch.manual_seed(0)
    model = LayoutHead(new_clip(tokenizer))
    ends, classes = layout_tokens(PAIR, tokenizer)
    ids = tokenizer([PAIR.caption], return_tensors="pt").input_ids
    losses = text_layout_loss(model, ids, torch.tensor([ends]), torch.tensor([classes]))
    losses["loss"].backward()
    total = losses["first"] + losses["second"] + losses["end"]
    assert losses["loss"].item() == pytest.approx(total.item())
    assert model.clip.text_model.embeddings.token_embedding.weight.grad.abs().sum() > 0


def test_each_class_is_told_by_the_patches_of_its_own_side():
    states = torch.zeros(1, 65, 96)
    states[0, 0], patches = 9, states[0, 1:].view(8, 8, 96)
    patches[:, :4] = 1
    told = side_states(states)[0, :, 0].tolist()
    left, right = list(SIDES).index("left of"), list(SIDES).index("right of")
    assert len(told) == len(LAYOUT_CLASSES)
    assert (told[3 * left], told[3 * right], told[0], told[-1]) == (1, 0, 0.5, 9)


def test_a_trained_text_tower_stays_as_it_is(tokenizer, tmp_path):
    new_clip(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = clip._initial(tmp_path)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(name.startswith("clip.vision_model") for name in trained)
    assert not any(name.startswith("clip.text_model") for name in trained)


def test_a_unet_of_three_stages_has_the_named_variants():
    unet = new_unet(4, (8, 16, 16))
    for name in ("bk_base", "bk_small", "bk_tiny"):
        config = student_config(unet.config, VARIANTS[name](unet.config))
        assert len(config["block_out_channels"]) == (2 if name == "bk_tiny" else 3)


def test_a_unet_fitted_to_another_text_encoder_predicts_the_same():
    torch.manual_seed(0)
    unet, old = new_unet(4, (8, 16)).eval(), torch.randn(8, 20, 96)
    new = old @ torch.linalg.qr(torch.randn(96, 96)).Q
    latents, timesteps = torch.randn(2, 4, 4, 4), torch.tensor([10, 900])
    with torch.no_grad():
        before = unet(latents, timesteps, old[:2]).sample
        assert not torch.allclose(unet(latents, timesteps, new[:2]).sample, before, atol=1e-4)
        translate_text(unet, old, new)
        torch.testing.assert_close(unet(latents, timesteps, new[:2]).sample, before, atol=1e-4, rtol=1e-4)
