"""The settings as options: every key has a line, a type and a default, and is read as a preset writes it."""

import pytest

from halo.config import Config, Distill
from halo.errors import UserError
from halo.options import attribute_docs, read_overrides, settings


def test_every_setting_has_a_line_that_explains_it():
    keys = [setting.key for setting in settings()]
    assert len(keys) == len(set(keys)) > 150
    for setting in settings():
        assert len(setting.doc) > 10, setting.key
        assert "\n" not in setting.doc


def test_the_line_of_an_inherited_key_is_its_base_class():
    docs = attribute_docs(Distill)
    assert docs["lr"] == "The learning rate after warm-up."
    assert docs["temperature"].startswith("The temperature of both distributions")
    assert attribute_docs(Config)["teacher"].startswith("A Hugging Face id")


def test_values_are_written_as_in_a_preset():
    words = ["--distill.lr", "5e-5", "--distill.steps=20_000", "--align.betas", "[0.9, 0.99]", "--name", "7"]
    words += ["--distill.teacher-sharded", "true", "--niah.lengths=[1, 2]", "--heldout", "a b", "--align.lr", "-1"]
    table, keys = read_overrides(words)
    assert table == {
        "distill": {"lr": 5e-5, "steps": 20_000, "teacher_sharded": True},
        "align": {"betas": [0.9, 0.99], "lr": -1},
        "name": "7",
        "niah": {"lengths": [1, 2]},
        "heldout": "a b",
    }
    assert keys[:2] == ["distill.lr", "distill.steps"]


def test_the_last_of_two_values_counts():
    assert read_overrides(["--distill.lr", "1", "--distill.lr", "2"])[0] == {"distill": {"lr": 2}}


@pytest.mark.parametrize("given", ["{gla = {use_rope = false}}", None])
def test_options_of_a_mixer_as_a_table_or_one_by_one(given):
    key = "--architecture.mixer_options"
    words = [key, given] if given else [f"{key}.gla.use-rope", "false"]
    assert read_overrides(words)[0] == {"architecture": {"mixer_options": {"gla": {"use_rope": False}}}}


def test_options_of_a_mixer_that_contradict():
    key = "--architecture.mixer_options.gla"
    with pytest.raises(UserError, match=r"--architecture.mixer_options.gla.use_rope: 'gla' is a value, not a table"):
        read_overrides([key, "1", f"{key}.use_rope", "false"])


def test_a_beginning_of_a_key_is_not_the_key():
    with pytest.raises(UserError, match=r"--distill.temp is an unknown key"):
        read_overrides(["--distill.temp", "2"])
