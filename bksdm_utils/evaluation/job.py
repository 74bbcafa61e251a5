"""Until every caller imports from `folders`."""

from .folders import read_job_prompts, sample, sample_in_processes  # noqa: F401
