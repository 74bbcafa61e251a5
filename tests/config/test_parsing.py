"""Every parameter of every notebook and command, by every way in: parsed by its type, or refused by name."""

import json
from typing import get_args, get_origin

import pytest
import yaml
from papermill.cli import _resolve_type

from bksdm_utils.config.base import Config, expected, is_text, kind_of, takes_none
from bksdm_utils.config.deploy import Demo
from bksdm_utils.config.evaluation import SampleFolder
from bksdm_utils.config.training import KDTraining, Training
from bksdm_utils.workbook.parameters import CLASSES

ALL = [*CLASSES.values(), SampleFolder, Demo, Training]
FIELDS = [(kind, name) for kind in ALL for name in kind.model_fields]
WITH = {"streaming": {"train_data_dir": "shards"}, "checkpoint": {"resume": True}, "ema_device": {"ema_decay": 0.9},
        "lr_decay_start": {"lr_schedule": "linear"}, "identifier": {"subject": "tabby"},
        "class_word": {"subject": "tabby"}}  # what a parameter needs beside it  # fmt: skip
IDS = [f"{kind.__name__}.{name}" for kind, name in FIELDS]


def sort_of(kind, name):
    """Whether a parameter is a list, and the type of its values."""
    annotation = kind_of(kind.model_fields[name])
    several = get_origin(annotation) is tuple
    inner = get_args(annotation)[0] if several else annotation
    return several, get_args(inner)[0] if hasattr(inner, "__metadata__") else inner


def accepted_and_refused(kind, name):
    """(text, value) pairs that the parameter takes, and values that it refuses, by its type."""
    several, inner = sort_of(kind, name)
    if inner is bool:
        good = [("true", True), ("No", False), ("on", True), ("OFF", False), ("1", True), ("0", False), (True, True)]
        bad = ["maybe", "t", "2", 2, 1.0, "", [True]]
    elif inner is int:
        good, bad = [("8", 8), (8, 8), ("8.0", 8), ("8e0", 8)], ["8.5", 8.5, True, False, "eight", "nan", "inf"]
        bad += [] if several else [[8], "8,8"]
    elif inner is float:
        good, bad = [("5e-1", 0.5), (0.5, 0.5), ("0.5", 0.5)], ["half", True, "nan", "inf", float("nan")]
        bad += [] if several else [[0.5]]
    elif get_origin(inner) is not None:  # one of several words
        words = get_args(inner)
        good, bad = [(words[0], words[0]), (words[-1], words[-1])], ["another", 7, True, 0.5]
    else:
        good, bad = [("a word", "a word")], [7, 0.5, True, {"a": 1}]
        if name == "preset":
            good, bad = [("sd-v1.4", "sd-v1.4")], [*bad]
        if name == "budget":
            good, bad = [("macs:0.6", "macs:0.6"), ("params:.5", "params:.5")], [*bad, "a word", "macs:2"]
    if several:
        good = [(value, (parsed,)) for value, parsed in good if not isinstance(value, list)]
        good += [([value for value, _ in good], tuple(p for _, (p,) in good))]
        good += [] if name.endswith("targets") else [("", ()), ([], ())]
    if name == "trackers":
        good, bad = [("tensorboard", ("tensorboard",)), ("", ())], ["another"]
    return good, bad


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=IDS)
def test_a_value_is_parsed_by_its_type_or_refused_by_name(kind, name):
    good, bad = accepted_and_refused(kind, name)
    beside = {other: value for other, value in WITH.get(name, {}).items() if other in kind.model_fields}
    for value, parsed in good:
        assert getattr(kind(**{name: value}, **beside), name) == parsed, value
    for value in bad:
        with pytest.raises(ValueError, match=name) as refused:
            kind(**{name: value})
        assert "expected" in str(refused.value), value


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=IDS)
def test_the_default_survives_every_way_in(kind, name):
    default = getattr(kind(), name)
    plain = list(default) if isinstance(default, tuple) else default
    assert getattr(kind(**{name: plain}), name) == default
    assert getattr(kind(**{name: yaml.safe_load(yaml.safe_dump(plain))}), name) == default
    assert getattr(kind(**{name: json.loads(json.dumps(plain))}), name) == default
    if default is not None and not isinstance(default, tuple):
        assert getattr(kind(**{name: str(default)}), name) == default  # -p of our command, papermill -r


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=IDS)
def test_none_is_taken_where_it_means_something_and_named_elsewhere(kind, name):
    if takes_none(kind.model_fields[name]):
        assert getattr(kind(**{name: None}), name) is None
    else:
        with pytest.raises(ValueError, match=f"{name} is None: expected"):
            kind(**{name: None})


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n in FIELDS if is_text(k.model_fields[n])])
@pytest.mark.parametrize("typed", ["007", "1.5", "1e3"])
def test_what_plain_papermill_makes_of_a_text_is_refused(kind, name, typed):
    with pytest.raises(ValueError, match="papermill -r|expected a list"):
        kind(**{name: _resolve_type(typed)})


def test_what_papermill_makes_of_switches_is_read_by_the_switchs_type():
    assert [KDTraining(resume=_resolve_type(text)).resume for text in ("false", "False", "no", "0", "1", "true")] == [
        False, False, False, False, True, True]  # fmt: skip


def test_texts_keep_their_commas_and_numbers_in_words_are_numbers():
    config = CLASSES["06"](prompt="a boat, red, big", learning_rate="1e-4")
    assert (config.prompt, config.learning_rate) == ("a boat, red, big", 1e-4)
    assert CLASSES["04"](students=["a,b", "c"]).students == ("a,b", "c")


def test_yamls_no_is_the_precision_no():
    assert KDTraining(**yaml.safe_load("mixed_precision: no")).mixed_precision == "no"
    with pytest.raises(ValueError, match="mixed_precision is True"):
        KDTraining(mixed_precision=True)


@pytest.mark.parametrize(("value", "fits"), [(0, True), (2**63 - 1, True), (-1, False), (2**63, False), ("-1", False)])
def test_seeds_are_whole_numbers_of_63_bits(value, fits):
    if fits:
        assert KDTraining(seed=value).seed == value
    else:
        with pytest.raises(ValueError, match="seed"):
            KDTraining(seed=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("max_train_steps", -5), ("learning_rate", -1e-4), ("resolution", 100), ("ema_decay", 1.5),
     ("caption_dropout", 2), ("lambda_sd", -1), ("ablation_steps", -1), ("num_images", 0)],
)  # fmt: skip
def test_bounds_are_named_in_the_error(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}: expected .*(or more|or less|multiple)"):
        KDTraining(**{name: value})


def test_every_fault_is_named_at_once():
    with pytest.raises(ValueError) as refused:
        KDTraining.filled(batch_size=0, kd="other", learning_rate="fast")
    assert all(name in str(refused.value) for name in ("batch_size", "kd", "learning_rate"))


def test_a_misspelt_parameter_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="batchsize .did you mean batch_size"):
        KDTraining(batchsize=3)


def test_home_folders_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    assert KDTraining(train_data_dir="~/images").train_data_dir == "/somebody/images"


@pytest.mark.parametrize("kind", [k for k in ALL if hasattr(k, "filled")])
@pytest.mark.parametrize("preset", ["storybook", "sd-v1.4", "sd-v2.1", "sdxl-base"])
def test_a_filled_configuration_reads_back_from_json_as_an_equal_one(kind, preset):
    config = kind.filled(preset=preset)
    assert kind(**json.loads(config.model_dump_json())) == config
    given = {name: value for name, value in config.chosen_preset.values_for(kind.__name__).items()
             if name in kind.model_fields and kind.model_fields[name].default is None}  # fmt: skip
    assert all(getattr(config, name) == value for name, value in given.items())


def test_presets_name_no_parameter_that_no_class_has():
    names = {name for kind in CLASSES.values() for name in kind.model_fields}
    for preset in {k.filled().chosen_preset.name for k in ALL if hasattr(k, "filled")} | {"sd-v1.4", "sdxl-base"}:
        filled = KDTraining.filled(preset=preset).chosen_preset
        assert set(filled.common) <= names
        for kind, values in filled.own.items():
            (owner,) = [k for k in CLASSES.values() if k.__name__ == kind]
            assert set(values) <= set(owner.model_fields), kind


def test_a_configuration_is_frozen_and_its_copies_are_checked():
    config = KDTraining.filled()
    with pytest.raises(Exception, match="frozen"):
        config.batch_size = 3
    assert config.but(batch_size=3).batch_size == 3
    with pytest.raises(ValueError, match="batch_size"):
        config.but(batch_size=-3)
    part = config.part(Training, max_train_steps=7)
    assert (part.max_train_steps, part.learning_rate) == (7, config.learning_rate)


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="train_data_dir"):
        KDTraining(streaming=True)
    with pytest.raises(ValueError, match="num_class_images"):
        CLASSES["05"](num_class_images=0)
    with pytest.raises(ValueError, match="lora_targets"):
        CLASSES["05"](lora_targets="")


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (Training, {"ema_decay": 0, "ema_device": "cpu"}, "without an average"),
        (Training, {"lr_decay_start": 0.5}, "lr_schedule constant"),
        (Training, {"lr_schedule": "polynomial", "learning_rate": 1e-8}, "polynomial falls to 1e-07"),
        (KDTraining, {"checkpoint": "step_00000002"}, "resume=True continues"),
        (KDTraining, {"published_tiny": True, "variant": "bk_small"}, "bk_tiny's block taps"),
        (KDTraining, {"published_tiny": True, "variant": "bk_tiny", "kd": "self_attention"}, "bk_tiny's block taps"),
        (KDTraining, {"streaming": True, "train_data_dir": "x", "max_train_samples": 5}, "max_train_samples needs"),
        (CLASSES["05"], {"class_images_dir": "x", "prior_loss_weight": 0}, "class_images_dir is for prior"),
        (CLASSES["05"], {"text_learning_rate": 1e-6, "train_text_encoder": False}, "text_learning_rate is given"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused(kind, values, said):
    with pytest.raises(ValueError, match=said):
        kind(**values)


def test_what_is_expected_is_said_in_words():
    fields = KDTraining.model_fields
    assert expected(fields["batch_size"]) == "a whole number of 1 or more, or None"
    assert "block, self_attention" in expected(fields["kd"])
    assert isinstance(KDTraining(), Config)
