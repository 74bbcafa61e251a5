"""`bksdm sample`: prompts of a file, one prompt, or a subject's."""

import pytest
from click.testing import CliRunner

from bksdm_utils.config.evaluation import SampleFolder
from bksdm_utils.workbook.cli import main
from bksdm_utils.workbook.jobs import _prompts


def test_a_subjects_prompts_are_sampled_several_times():
    prompts = _prompts(SampleFolder(subject="tabby", num_images=3))
    assert len(prompts) == 24 and len({prompt.id for prompt in prompts}) == 24
    assert all("z cat" in prompt.text for prompt in prompts)
    assert "a sks11df cat" in _prompts(SampleFolder(subject="tabby", identifier="sks11df"))[0].text


def test_one_command_samples_a_subject(tmp_path):
    arguments = {"subject": "koi", "num_images": 1, "num_inference_steps": 4, "scheduler": "dpm++"}
    options = [part for name, value in arguments.items() for part in ("-p", name, str(value))]
    result = CliRunner().invoke(main, ["sample", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "images").glob("*.png"))) == 8


@pytest.mark.parametrize(
    ("parameters", "said"),
    [({"subject": "tabby", "prompt": "a cat"}, "prompt and subject are given"), ({"identifier": "z"}, "name it by sub"),
     ({"subject": "tabby", "prompts": "a.csv"}, "prompts and subject are given")],
)  # fmt: skip
def test_contradictions_are_refused(parameters, said):
    with pytest.raises(ValueError, match=said):
        SampleFolder(**parameters)
