"""Figures of work in progress."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ..evaluation.folders import Progress
from .figures import curves, image_grid, smoothed


class Live:
    """The curves of a running training: drawn again, and said in a line, every `every` seconds.

    Args:
        goal: the teacher's proxy scores, by name.
    """

    def __init__(self, max_train_steps: int, goal: Mapping[str, float], every: float = 10.0):
        self.total, self.goal, self.every = max_train_steps, goal, every
        self.drawn, self.handle, self.first = 0.0, None, None

    def update(self, rows: Sequence[Mapping], validation: Sequence[Mapping]) -> None:
        """Call it after every step, or now and then; most calls return at once.

        Args:
            rows: `engine.Step.floats` of every step so far.
            validation: rows of "step" and proxy scores.
        """
        if not rows:
            return
        now, last = time.monotonic(), rows[-1]
        if self.first is None:  # the estimate counts from the end of the first step, which is slower than the others
            self.first, self.drawn = (now, last["step"]), now
        if now - self.drawn < self.every or last["step"] == self.first[1]:
            return
        self.drawn, (started, first_step) = now, self.first
        left = (self.total - last["step"]) * (now - started) / (last["step"] - first_step)
        print(f"step {last['step']:.0f}/{self.total}  loss {last['loss']:.4f}  {left:.0f} s left", flush=True)
        self.draw(rows, validation)

    def draw(self, rows: Sequence[Mapping], validation: Sequence[Mapping]) -> Figure:
        """Draws the curves in place of those drawn before; call it once more after the last step."""
        from IPython.display import display

        figure = training_curves(rows, validation, self.goal)
        self.handle = self.handle or display(display_id=True)
        if self.handle is not None:  # None outside a notebook
            self.handle.update(figure)
        plt.close(figure)
        return figure


class Gallery:
    """The newest pictures of a folder that is being filled: drawn again, and said in a line, every `every` seconds."""

    def __init__(self, every: float = 10.0):
        self.every, self.said, self.handle, self.begun = every, time.monotonic(), None, {}

    def update(self, name: str, progress: Progress) -> None:
        """Call it after every pass; most calls return at once."""
        since, before = self.begun.setdefault(name, (time.monotonic(), progress.done))
        if time.monotonic() - self.said < self.every:
            return
        self.said = time.monotonic()
        drawn, left = progress.done - before, progress.total - progress.done
        estimate = f", {_duration(left * (self.said - since) / drawn)} left" if drawn and left else ""
        print(f"{name}: {progress.done:,} of {progress.total:,} pictures{estimate}", flush=True)
        if progress.newest:
            from IPython.display import display

            prompts, drawn = zip(*progress.newest[:8], strict=True)
            figure = image_grid({name: drawn}, [prompt.text for prompt in prompts])
            self.handle = self.handle or display(display_id=True)
            if self.handle is not None:  # None outside a notebook
                self.handle.update(figure)
            plt.close(figure)


def _duration(seconds: float) -> str:
    """ "45 s", "12 min", "3.2 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


PROXIES = {"clip_score": "proxy CLIP score", "fid": "proxy FID"}


def training_curves(rows: Sequence[Mapping], validation: Sequence[Mapping], goal: Mapping[str, float]) -> Figure:
    """The three losses, one line for each tap, and the proxy scores (`goal` has the teacher's) over the steps."""
    steps = [row["step"] for row in rows]

    def series(names: Sequence[str]) -> dict:
        return {
            n.split("/")[-1].removeprefix("loss_"): list(zip(steps, smoothed([r[n] for r in rows]), strict=True))
            for n in names
        }

    losses = series(["loss_task", "loss_output", "loss_feature"])
    taps = series([name for name in rows[0] if name.startswith("feature/")])
    panels = {"loss": losses, "feature loss of each tap": taps}
    for name, title in PROXIES.items():
        scored = [(v["step"], v[name]) for v in validation if v[name] == v[name]]  # NaN: no judge
        if scored:
            panels[title] = {"EMA student": scored, "teacher": [(step, goal[name]) for step, _ in scored]}
    shown = {title: lines for title, lines in panels.items() if any(lines.values())}
    return curves(shown, log=("loss", "feature loss of each tap", "proxy FID"), dashed=["teacher"])
