"""Many visitors of the demo page at once: is every answer right, does its memory stay flat, what is refused?

    python benchmarks/demo.py                             # twenty visitors for a minute

The page runs in its own process. A visitor sends a request, waits, and sends another with another seed, after a second
where the queue was full. Every answer is compared with what the same request gives here.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import gradio_client
import numpy as np
import psutil
from PIL import Image

from bksdm_utils.config.deploy import Demo
from bksdm_utils.deploy.demo import STUDENT, load_models
from bksdm_utils.deploy.playground import Request, generate_request
from bksdm_utils.files import ROOT
from bksdm_utils.workbook.headless import print_table

PROMPTS = ("a big red boat on the sea", "a small blue cat in the snow", "a big green tree at night")


def served(port: int) -> tuple[subprocess.Popen, str]:
    """The page, started and answering: (process, address)."""
    command = [sys.executable, "-m", "bksdm_utils", "demo", "-p", "port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    address = next(m[0] for line in process.stdout if (m := re.search(r"http://127\.0\.0\.1:\d+", line)))
    return process, address


def visit(address: str, number: int, ending: float, answers: list, errors: collections.Counter) -> None:
    """One visitor, until `ending`: appends (request, images) to answers, counts errors."""
    visitor, rng = gradio_client.Client(address, verbose=False), random.Random(number)
    while time.monotonic() < ending:
        prompt, seed = rng.choice(PROMPTS), rng.randrange(6)
        try:
            answer = visitor.predict(prompt=prompt, negative_prompt="", seed=seed, steps=4, guidance=2, images=1,
                                     size=64, api_name="/text_to_image")  # fmt: skip
        except Exception as error:  # the client has several classes for what the page says
            errors[str(error)[:90]] += 1
            time.sleep(1)
            continue
        images = [np.asarray(Image.open(item["image"])) for gallery in answer[1:] for item in gallery]
        answers.append(((prompt, seed), images))


def watch(process: psutil.Process, ending: float, memory: list[float]) -> None:
    """MB of memory in use by the page, once a second."""
    while time.monotonic() < ending:
        memory.append(process.memory_info().rss / 1e6)
        time.sleep(1)


def wrong(answers: list) -> int:
    """How many answers differ from what their request gives here by more than a rounded grey level."""
    students = [STUDENT] if (ROOT / STUDENT).is_dir() else []
    models, right = load_models(Demo().teacher, students), {}
    for prompt, seed in {request for request, _ in answers}:
        request = Request(prompt=prompt, seed=seed, steps=4, guidance=2)
        right[prompt, seed] = [np.asarray(generate_request(m, request)[0][0]).astype(int) for m in models.values()]
    return sum(len(images) != len(right[request])
               or any(np.abs(p - r).max() > 1 for p, r in zip(images, right[request], strict=False))
               for request, images in answers)  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--port", type=int, default=7871)
    chosen = parser.parse_args()
    process, address = served(chosen.port)
    try:
        answers, errors, memory = [], collections.Counter(), []
        visit(address, -1, time.monotonic() + 5, [], errors)  # the first request allocates memory for good
        ending = time.monotonic() + chosen.seconds
        with ThreadPoolExecutor(chosen.visitors) as visitors:
            threading.Thread(target=watch, args=(psutil.Process(process.pid), ending, memory)).start()
            coming = [visitors.submit(visit, address, n, ending, answers, errors) for n in range(chosen.visitors)]
        for visitor in coming:
            visitor.result()  # one that could not connect is an error
    finally:
        process.terminate()
    waits = {"answers": len(answers), "wrong": wrong(answers), "MB in the first ten seconds": f"{max(memory[:10]):.0f}",
             "MB in the last ten": f"{max(memory[-10:]):.0f}"}  # fmt: skip
    print_table((f"{chosen.visitors} visitors, {chosen.seconds} s", ""), [*waits.items(), *errors.items()])


if __name__ == "__main__":
    main()
