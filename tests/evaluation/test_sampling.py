import random

import numpy as np
import pytest
import torch

from bksdm_utils.config.evaluation import FolderSampling
from bksdm_utils.evaluation.prompts import storybook_prompts
from bksdm_utils.evaluation.sampling import check_steps, generate, image_seed, sample_batches
from bksdm_utils.files import ROOT
from bksdm_utils.models.pipelines import load_pipeline


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_an_image_does_not_depend_on_its_batch(pipeline_dir):
    pipeline = load_pipeline(pipeline_dir)
    captions = ["a big red cat at night", "a small blue star by day", "a big green tree on the sea"]
    sampling, seeds = FolderSampling(num_inference_steps=4, guidance_scale=4.0), [5, 6, 7]
    (together,) = sample_batches(pipeline, captions, seeds, sampling)
    for i, image in enumerate(together):
        ((single,),) = sample_batches(pipeline, captions[i : i + 1], seeds[i : i + 1], sampling)
        assert np.array_equal(np.asarray(image), np.asarray(single))


def test_every_image_has_its_own_seed():
    seeds = [image_seed(3, 0), image_seed(3, 1), image_seed(4, 1), image_seed(3, "a"), image_seed(3, "b")]
    assert len(set(seeds)) == 5 and image_seed(3, "a") == seeds[3]


@pytest.mark.slow
def test_an_image_does_not_depend_on_batch_size_order_and_threads(threads):
    teacher, prompts = load_pipeline(ROOT / "data" / "storybook" / "teacher"), storybook_prompts(11)
    results = []
    for batch_size, order, workers in (
        (1, prompts, 2),
        (3, random.Random(0).sample(prompts, 11), 1),
        (8, prompts[::-1], 3),
    ):
        threads(workers)
        sampling = FolderSampling(num_inference_steps=4, batch_size=batch_size)
        seeds = [image_seed(0, p.id) for p in order]
        batches = sample_batches(teacher, [p.text for p in order], seeds, sampling)
        images = [np.asarray(image) for batch in batches for image in batch]
        results.append({p.id: image.tobytes() for p, image in zip(order, images, strict=True)})
        assert torch.get_num_threads() == workers
    assert results[0] == results[1] == results[2] and len(set(results[0].values())) == 11


def test_threads_do_not_share_a_tokenizer(pipeline_dir, threads):
    """Captions longer than the text encoder reads: several threads would cut off each other's."""
    pipeline = load_pipeline(pipeline_dir)
    texts = [f"a big red cat and {i} more things that nobody will ever read to the very end of it" for i in range(24)]
    sampled = []
    for workers in (1, 4):
        threads(workers)
        sampled.append([np.asarray(p) for p in generate(pipeline, texts, num_inference_steps=4, guidance_scale=1.0)])
    assert np.array_equal(*sampled)


def test_too_few_steps_for_the_scheduler_are_an_error(pipeline_dir):
    pipeline = load_pipeline(pipeline_dir)
    with pytest.raises(ValueError, match="4 or more, as PNDM needs"):
        generate(pipeline, ["a cat"], num_inference_steps=3)
    check_steps(pipeline, FolderSampling(num_inference_steps=3, scheduler="ddim"))
