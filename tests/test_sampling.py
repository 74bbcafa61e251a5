import numpy as np
import torch

from bksdm_utils.evaluation.sampling import Sampling, image_seed, sample_batches
from bksdm_utils.models.pipelines import load_pipeline


def test_a_picture_does_not_depend_on_its_batch(pipeline_dir):
    pipeline = load_pipeline(pipeline_dir)
    prompts = ["a big red cat at night", "a small blue star by day", "a big green tree on the sea"]
    sampling, seeds = Sampling(num_inference_steps=4, guidance_scale=4.0), [5, 6, 7]
    (together,) = sample_batches(pipeline, prompts, seeds, sampling)
    for i, picture in enumerate(together):
        ((alone,),) = sample_batches(pipeline, prompts[i : i + 1], seeds[i : i + 1], sampling)
        assert np.array_equal(np.asarray(picture), np.asarray(alone))
    assert image_seed(3, 0) != image_seed(3, 1) != image_seed(4, 1)


def test_threads_do_not_cut_off_each_others_captions(pipeline_dir):
    """Captions longer than the text encoder reads, drawn in several threads: once their tokenizer was shared."""
    pipeline, threads = load_pipeline(pipeline_dir), torch.get_num_threads()
    texts = [f"a big red cat and {i} more things that nobody will ever read to the very end of it" for i in range(64)]
    sampling, seeds = Sampling(num_inference_steps=4, guidance_scale=1.0), list(range(64))
    drawn = []
    for workers in (1, 4):
        torch.set_num_threads(workers)
        drawn.append([np.asarray(p) for some in sample_batches(pipeline, texts, seeds, sampling) for p in some])
    torch.set_num_threads(threads)
    assert np.array_equal(*drawn)
