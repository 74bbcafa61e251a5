"""Captions as open_clip reads them, and statistics of real images that are kept."""

import numpy as np
import pytest

from bksdm_utils.evaluation.evaluator import Evaluator
from bksdm_utils.evaluation.metrics import Statistics
from bksdm_utils.evaluation.networks import MetricClip, clean_text

CLIP = "data/storybook/clip"


@pytest.mark.parametrize(
    ("text", "read"),
    [("a cat &amp; a dog", "a cat & a dog"), ("a cat &amp;amp; a dog", "a cat & a dog"), ("a cafÃ©", "a café"),
     ("  a  cat\n\ton a mat ", "a cat on a mat"), ("the “big” cat’s", "the \"big\" cat's"), ("a cat", "a cat")],
)  # fmt: skip
def test_captions_are_mended(text, read):
    assert clean_text(text) == read


def test_a_caption_with_entities_scores_as_its_text():
    clip = MetricClip(CLIP)
    assert clip.texts(["a big red cat  on the sea"]).equal(clip.texts(["a big red cat on the&#32;sea"]))


def test_statistics_of_real_images_are_kept_and_read(tmp_path):
    first = Evaluator("storybook", cache_dir=tmp_path)
    (path,) = tmp_path.glob("*.npz")
    assert first.features.name in path.name and str(len(first.real_features)) in path.name
    again = Evaluator("storybook", real=path, cache_dir=tmp_path)
    assert np.array_equal(again.real.mean, first.real.mean) and again.real_features is None
    other = first.features.__class__("another", "another key", first.features.dim, None, None)
    with pytest.raises(ValueError, match="another network"):
        Statistics.load(path, other)
