"""A finished stage: what it records is what it hands on."""

import shutil
from pathlib import Path

from halo.models.tokenizer import load_tokenizer
from halo.preset import load_config
from halo.run import StageFolder, atomic_folder


def test_files_in_folders_are_handed_on_too(tmp_path: Path):
    """A tokenizer with several chat templates has a folder of them."""
    tokenizer = load_tokenizer(load_config("tiny").teacher)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    stage, other = StageFolder(tmp_path / "export", {"x": 1}), StageFolder(tmp_path / "other" / "export", {"x": 1})
    with atomic_folder(stage.path / "model") as partial:
        tokenizer.save_pretrained(partial)
    names = stage.files_in("model")
    assert {"model/tokenizer.json", "model/additional_chat_templates/tool_use.jinja"} < set(names)
    stage.complete(names, {})
    other.take(stage)
    shutil.rmtree(stage.path)
    assert other.is_complete()
    (other.path / "model" / "additional_chat_templates" / "tool_use.jinja").write_text("other")
    assert "tool_use.jinja is damaged" in other.damage()
