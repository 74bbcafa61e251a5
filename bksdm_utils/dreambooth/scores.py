"""Scores of the DreamBooth paper: DINO, CLIP-I, CLIP-T (notebooks 05 and 07)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

from ..evaluation.metrics import Score, mean_score
from ..evaluation.networks import MetricClip, Network


@torch.no_grad()
def subject_scores(
    clip: MetricClip, dino: Network | None, images: Sequence[Image.Image], real: Sequence[Image.Image],
    texts: Sequence[str],
) -> dict[str, Score]:  # fmt: skip
    """The scores of the DreamBooth paper (section 4.2), with standard errors over the sampled images.

    Args:
        dino: DINO's ViT-S/16; None leaves its score out.
        real: the subject's images.
        texts: the prompt of each sampled image, without the identifier.

    Returns:
        clip_i, dino: mean cosine between sampled and real images; clip_t: between sampled images and their texts.
    """
    embeddings = clip.images(images)
    scores = {"clip_i": mean_score((embeddings @ clip.images(real).T).mean(1).cpu())}
    if dino is not None:
        sampled_rows, real_rows = (F.normalize(dino(list(some)), dim=-1) for some in (images, real))
        scores["dino"] = mean_score((sampled_rows @ real_rows.T).mean(1).cpu())
    return scores | {"clip_t": mean_score((embeddings * clip.texts(list(texts))).sum(-1).cpu())}


def table(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """Subjects and their scores, and a last row with the means over subjects and their standard errors.

    Args:
        rows: "subject" -> name, and score -> (value, error).
    """
    names = list(dict.fromkeys(name for row in rows for name in row if name != "subject"))
    lines = [{"subject": row["subject"], **{n: str(Score(*row[n])) for n in names if n in row}} for row in rows]
    means = {name: str(mean_score([row[name][0] for row in rows if name in row])) for name in names}
    return pd.DataFrame([*lines, {"subject": "mean", **means}])
