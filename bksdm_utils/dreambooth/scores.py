"""Scores of the DreamBooth paper: DINO, CLIP-I, CLIP-T."""

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
    judge: MetricClip, dino: Network | None, pictures: Sequence[Image.Image], real: Sequence[Image.Image],
    texts: Sequence[str],
) -> dict[str, Score]:  # fmt: skip
    """The scores of the DreamBooth paper (section 4.2), with standard errors over the drawn pictures.

    Args:
        dino: DINO's ViT-S/16; None leaves it out.
        texts: what each drawn picture shall show, without the identifier.

    Returns:
        clip_i, dino: mean cosine between drawn and real pictures; clip_t: between drawn pictures and their texts.
    """
    drawn = judge.images(pictures)
    scores = {"clip_i": mean_score((drawn @ judge.images(real).T).mean(1).cpu())}
    if dino is not None:
        looks = [F.normalize(dino(list(some)), dim=-1) for some in (pictures, real)]
        scores["dino"] = mean_score((looks[0] @ looks[1].T).mean(1).cpu())
    return scores | {"clip_t": mean_score((drawn * judge.texts(list(texts))).sum(-1).cpu())}


def table(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """Subjects and their scores, and a last line with the means over subjects and their standard errors.

    Args:
        rows: "subject" -> name, and score -> (value, error).
    """
    names = list(dict.fromkeys(name for row in rows for name in row if name != "subject"))
    lines = [{"subject": row["subject"], **{n: str(Score(*row[n])) for n in names if n in row}} for row in rows]
    means = {name: str(mean_score([row[name][0] for row in rows if name in row])) for name in names}
    return pd.DataFrame([*lines, {"subject": "mean", **means}])
