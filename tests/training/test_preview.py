"""Images of the validation: what is sampled, saved, given to the trackers, shown and scored."""

import numpy as np
import pytest
from distilling import prepared, write_config
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bksdm_utils.config.training import KDTraining
from bksdm_utils.evaluation.sampling import generate
from bksdm_utils.evaluation.scorer import PROMPTS, Scorer
from bksdm_utils.files import read_log
from bksdm_utils.training.preview import image_rows, newest_grid
from bksdm_utils.workbook.jobs import prepare_training, run_job
from bksdm_utils.workbook.live import Live

PROMPT = "a golden vase, with different flowers"


@pytest.fixture
def previewed(narrow):
    return narrow | {"validation_prompts": f"{PROMPT} | a cat", "num_validation_images": 3, "num_inference_steps": 4,
                     "validation_steps": 3, "trackers": "tensorboard"}  # fmt: skip


def pixels(image):
    return np.asarray(image).astype(int)


def test_each_validation_saves_teacher_above_student_and_gives_it_to_tensorboard(previewed, tmp_path):
    folder = tmp_path / "run"
    config = write_config(folder, **previewed)
    job, _ = prepare_training(config, folder)
    for _ in job.progress():
        pass
    grids = sorted((folder / "validation").iterdir())
    assert [path.name for path in grids] == [f"step_0000000{step}.png" for step in (0, 3, 6)]
    first, last = (pixels(Image.open(grids[i])) for i in (0, -1))
    assert first.shape == (2 * 64, 3 * 64, 3)  # three images of two prompts, in turn
    expected = generate(job.pipe, [PROMPT, "a cat", PROMPT], num_inference_steps=4)
    assert np.array_equal(first[:64], np.hstack([pixels(image) for image in expected]))
    assert np.array_equal(first[:64], last[:64]) and not np.array_equal(first[64:], last[64:])
    with job.trainer.ema_weights() as averaged:  # the averaged student, from the teacher's noise
        own = generate(type(job.pipe)(**{**job.pipe.components, "unet": averaged}, requires_safety_checker=False),
                       [PROMPT, "a cat", PROMPT], num_inference_steps=4)  # fmt: skip
    assert np.array_equal(last[64:], np.hstack([pixels(image) for image in own]))
    events = EventAccumulator(str(folder / "bksdm")).Reload()
    assert [event.step for event in events.Images("validation")] == [0, 3, 6]
    assert (events.Images("validation")[0].height, events.Images("validation")[0].width) == (2 * 64, 3 * 64)
    assert read_log(folder / "validation.csv") == [{"step": step} for step in (0, 3, 6)]


def test_prompts_are_scored_where_a_clip_is_at_hand(previewed, tmp_path):
    folder = tmp_path / "run"
    config = write_config(folder, **previewed, clip="data/storybook/clip")
    run_job(config, folder)
    rows = read_log(folder / "validation.csv")
    assert [set(row) for row in rows] == [{"step", "clip_score"}] * 3 and rows[0] != rows[-1]


def test_which_prompts_are_sampled():
    published, storybook = (Scorer(KDTraining.filled(preset=name)) for name in ("sd-v1.4", "storybook"))
    assert list(published.preview.captions) == [*PROMPTS, *PROMPTS] and published.preview.clip is None
    assert storybook.preview.captions == [scene.caption for scene in storybook.validation_scenes[:8]]
    with pytest.raises(ValueError, match="validation_prompts is empty"):
        KDTraining(validation_prompts=" | ")


def test_a_grid_is_at_most_eight_images_wide():
    red, blue = ([Image.new("RGB", (4, 4), colour)] * 10 for colour in ("red", "blue"))
    grid = image_rows([red, blue])
    assert grid.size == (32, 16)
    assert [grid.getpixel((0, y)) for y in (0, 4, 8, 12)] == [(255, 0, 0), (0, 0, 255)] * 2
    assert grid.getpixel((8, 8)) == (255, 255, 255)


def test_the_live_display_shows_the_newest_grid_once(tmp_path, monkeypatch):
    shown = []

    class Handle:
        def update(self, content):
            shown.append(content.filename)

    monkeypatch.setattr("bksdm_utils.workbook.live.display", lambda **_: Handle())
    live = Live(10, {}, tmp_path)
    assert newest_grid(tmp_path) is None
    live.update([], [])
    (tmp_path / "validation").mkdir()
    for step in (0, 3):
        Image.new("RGB", (4, 4)).save(tmp_path / "validation" / f"step_{step:08}.png")
        live.update([], [])
        live.update([], [])
    assert [name[-12:] for name in shown] == ["00000000.png", "00000003.png"]


def test_without_prompts_and_scores_nothing_is_sampled(narrow, tmp_path):
    job = prepared(tmp_path / "run", **narrow)
    job.validate_pipeline = None
    job.begin(resume=False)
    job.validate()
    assert job.validation.rows == [] and not (tmp_path / "run" / "validation").exists()
