"""Everything a user can get wrong ends all ranks with one line and status 2, and leaves earlier results untouched."""

import json
import resource
import shutil
from pathlib import Path

import pytest

from halo.errors import EXIT_USER_ERROR
from halo.preset import load_config
from halo.run import claim
from tests.launcher.conftest import SMALL, TEACHER, deepspeed, python
from tests.launcher.refusals import edit, refusal


@pytest.fixture
def finished(demo, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(demo[0], tmp_path / "run")


# The attention


def test_an_attention_implementation_that_cannot_run(tmp_path):
    """Before the teacher is looked for."""
    overrides = ["--attention", "cudnn", "--teacher", "/no/such/folder"]
    said = refusal("align", tmp_path / "run", *overrides)
    assert said == "attention = cudnn: it needs a CUDA GPU, and there is none: set attention to auto or sdpa"
    assert not (tmp_path / "run").exists()


# The data


def test_a_truncated_and_a_missing_shard(finished):
    shutil.rmtree(finished / "distill")
    shard = next((finished / "data" / "distill").glob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert f"{shard} is truncated or altered" in refusal("distill", finished)
    shard.unlink()
    assert f"{shard} is missing" in refusal("distill", finished)
    assert not (finished / "distill").exists()


def test_shards_of_another_length_or_corpus(finished):
    shutil.rmtree(finished / "distill")
    other = str(finished / "data" / "finetune")
    assert "samples of 256 tokens, not 128" in refusal(
        "distill", finished, "--distill.shards", other, "--distill.seq_len", "128"
    )
    assert "was prepared with samples = 16, now 24" in refusal("distill", finished, "--distill.corpus.samples", "24")


def test_no_data_at_all(tmp_path):
    message = refusal("align", tmp_path / "run", "--align.corpus.source", "")
    assert "align has no data" in message
    assert "--align.shards" in message


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["--heldout", "/nowhere"], "text source /nowhere does not exist"),
        (["--heldout", ""], "the preset's `heldout` is empty"),
        (["--selection.layers", "[8]"], "the teacher's layers are 0 to 7"),
        (["--selection.attention_layers", "8"], "the teacher has 8 layers, of which at least one must be kept"),
        (["--selection.layers", "[0, 1, 2, 3, 4, 5, 6, 7]"], "nothing would be converted"),
        (["--distill.corpus.source", "/nowhere"], "text source /nowhere does not exist"),
        (["--distill.corpus.source", ""], "distill has no data"),
        (["--distill.shards", "/nowhere"], "/nowhere holds no token shards"),
        (["--distill.teacher_logits=top_k", "--distill.teacher_top_k=2000"], "teacher_top_k = 2000 is more than the"),
        (["--distill.teacher_fp8", "true"], "teacher_fp8 needs an NVIDIA GPU of compute capability 8.9 or newer, and"),
        (["--finetune.corpus.source", "/nowhere"], "text source /nowhere does not exist"),
    ],
)
def test_what_a_later_stage_lacks_is_told_before_the_first(tmp_path, settings, line):
    assert line in refusal("niah", tmp_path / "run", *settings, prepare=True)
    assert not (tmp_path / "run").exists()


def test_fewer_samples_than_a_batch(tmp_path):
    message = refusal("align", tmp_path / "run", "--align.corpus.samples", "3")
    assert "holds 3 samples, fewer than one batch of 4" in message


# The stages before


def test_a_missing_predecessor(tmp_path):
    message = refusal("distill", tmp_path / "run")
    assert "distill needs" in message
    assert "align, which is missing: run launcher/align.py first" in message


def test_a_half_written_predecessor(finished):
    (finished / "align" / "stage.json").unlink()
    assert "align, which was interrupted" in refusal("distill", finished)
    (finished / "align" / "stage.json").write_text("{")
    assert "stage.json is not valid JSON" in refusal("distill", finished)


@pytest.mark.parametrize(
    "text", ["\xff", "{", "[]", '{"made_from": [], "files": {}, "summary": {}}']
    + [f'{{"made_from": {{}}, "files": {files}, "summary": {{}}}}' for files in ("[1]", '{"x": {}}', '{"x": 3}')]
)  # fmt: skip
def test_a_record_that_is_no_record(finished, text):
    (finished / "align" / "stage.json").write_text(text, encoding="latin1")
    assert f"remove {finished / 'align'} to make it again" in refusal("distill", finished)


def test_a_command_that_was_killed_before_it_wrote_anything(tmp_path):
    """Its folder is still free."""
    (tmp_path / "config.toml.partial").write_text("name")
    claim(tmp_path, load_config("tiny"))


def test_a_damaged_predecessor(finished):
    weights = finished / "align" / "mixers.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "mixers.safetensors is damaged" in refusal("distill", finished)
    weights.unlink()
    assert "mixers.safetensors is missing" in refusal("distill", finished)


def test_a_predecessor_made_for_another_teacher(finished):
    record = json.loads((finished / "align" / "stage.json").read_text())
    record["made_from"]["teacher"] = "0" * 64
    (finished / "align" / "stage.json").write_text(json.dumps(record))
    assert "align was made from another teacher" in refusal("distill", finished)


def test_a_tokenizer_that_was_changed_in_the_teachers_folder(finished, teacher, monkeypatch):
    """The ids of all texts are others then."""
    content = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    edit(teacher / "tokenizer.json", model=content["model"])
    monkeypatch.setattr("halo.pipeline.find_teacher", lambda _: teacher)
    assert "align was made from another teacher" in refusal("align", finished)


def test_a_stage_made_with_other_settings(finished):
    assert "align was made from another lr (0.003, now 0.5)" in refusal("distill", finished, "--align.lr", "0.5")


# The folder and the settings


def test_a_folder_of_another_run(finished, teacher, tmp_path):
    message = refusal("align", finished, "--teacher", str(teacher))
    assert f"belongs to another run, with another teacher ('{TEACHER}', now '{teacher}')" in message
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("precious")
    assert "holds files but no run" in refusal("align", tmp_path / "papers")


def test_a_run_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        assert refusal("align", tmp_path / name) == f"{tmp_path / name} is no folder: choose another --run"
    message = refusal("align", tmp_path / "file" / "run")
    assert message == f"{tmp_path / 'file' / 'run'}: Not a directory; mend that, and type the same command again"


def test_a_full_disk_leaves_nothing_half_written(finished):
    """As a stage ends: stood in for by the largest file that this process may write."""
    shutil.rmtree(finished / "export")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        message = refusal("export", finished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message == f"{finished / 'export' / 'model'}: File too large; mend that, and type the same command again"
    assert not list((finished / "export").iterdir())


def test_a_deepspeed_config_that_says_what_the_preset_says(tmp_path):
    for settings, message in [
        ({"train_batch_size": 7}, "train_batch_size = 7, the preset 4"),
        ({"optimizer": {"type": "Adam"}}, "sets 'optimizer', which HALO's preset decides"),
    ]:
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 1}} | settings))
        assert message in refusal("align", tmp_path / "run", ds_config=str(path))
    for text, message in [("[]", "no table of keys"), ('{"zero_optimization": 3}', "must be a JSON object")]:
        path.write_text(text)
        assert message in refusal("align", tmp_path / "run", ds_config=str(path))
    path.write_bytes(b"\xff")
    assert "is not valid JSON" in refusal("align", tmp_path / "run", ds_config=str(path))
    assert "cannot be read (Is a directory)" in refusal("align", tmp_path / "run", ds_config=str(tmp_path))
    path.write_text("{")
    assert "is not valid JSON" in refusal("align", tmp_path / "run", ds_config=str(path))
    assert "no DeepSpeed config at" in refusal("align", tmp_path / "run", ds_config=str(tmp_path / "none.json"))


def test_a_choice_of_layers_that_do_not_exist(finished):
    shutil.rmtree(finished / "selection")
    assert "the teacher's layers are 0 to 7" in refusal("selection", finished, "--selection.layers", "[3, 8]")


def test_ranks_that_cannot_share_sequences(tmp_path):
    message = refusal("align", tmp_path / "run", "--align.sequence_parallel", "2")
    assert message == "align.sequence_parallel = 2 does not divide the 1 ranks: use 1"


def test_an_unknown_mixer(tmp_path):
    message = refusal("align", tmp_path / "run", "--rnn_mixer", "lightning")
    assert message.startswith("no RNN mixer 'lightning' (did you mean 'lightning-attn'?); there are: ")
    assert "no RNN mixer 'attn'" in refusal("align", tmp_path / "run", "--rnn_mixer", "attn")


def test_an_architecture_that_cannot_be(tmp_path):
    for overrides, message in [
        (("mixer_options.linear-attn.use_rope", "yes"), "use_rope must be true or false, not 'yes'"),
        (("mixer_options.gla.use_rope", "false"), "mixer_options names gla, which no layer"),
        (("mixer_options.linear-attn.qk_norm", "l3"), "qk_norm must be 'rms', 'l2' or None, not 'l3'"),
        (("mixer_options.linear-attn.heads", "3"), "do not fit the mixer"),
    ]:
        given = (f"--architecture.{overrides[0]}", overrides[1])
        assert message in refusal("align", tmp_path / "run", "--rnn_mixer", "linear-attn", *given)


def test_a_misspelt_option_of_a_mixer(tmp_path):
    given = ("--rnn_mixer", "linear-attn", "--architecture.mixer_options.linear-attn.use_rop", "false")
    assert "linear-attn: use_rop is an unknown key (did you mean 'use_rope'?)" in refusal(
        "align", tmp_path / "run", *given
    )


def test_an_architecture_that_a_finished_stage_does_not_have(finished):
    """Switches of attention layers are seen from stage 2 on, those of the RNN from stage 1 on."""
    attention, rnn = ("--architecture.attn_use_rope", "true"), ("--architecture.lightning_use_rope", "false")
    assert refusal("distill", finished, *attention) == (
        f"{finished}/distill was made from another attn_use_rope (False, now True): remove that folder to make it "
        "again, or choose another --run, with --from for the stages that stay the same"
    )
    assert "align was made from another lightning_use_rope (True, now False)" in refusal("distill", finished, *rnn)
    assert "align was made from another rnn_mixer" in refusal("distill", finished, "--rnn_mixer", "gla")


def test_a_refused_command_leaves_the_run_as_it_was(finished):
    """Its settings too: the next command starts from them."""
    assert "align was made from another lr" in refusal("distill", finished, "--align.lr", "0.5")
    assert load_config("tiny", recorded=finished / "config.toml").align.lr == 0.003


def test_a_new_run_does_not_remember_settings_that_failed(tmp_path):
    too_short = ("--align.seq_len", "16")
    assert "no needle samples of 16 tokens" in refusal("align", tmp_path / "run", *too_short)
    assert not list((tmp_path / "run").iterdir())


# Every rank ends


def errors(done) -> list[str]:
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_a_misspelt_key_ends_a_plain_process_with_one_line():
    done = python("launcher/kd.py", "--distil.lr", "1")
    assert done.returncode == 2
    assert errors(done) == ["error: --distil is an unknown key (did you mean 'distill'?)"]


def test_a_misspelt_key_ends_both_ranks_with_one_line(tmp_path, launch):
    done = launch("launcher/kd.py", "--run", str(tmp_path / "run"), "--distill.lrr", "1", ranks=2)
    assert done.returncode == EXIT_USER_ERROR
    assert errors(done) == ["error: --distill.lrr is an unknown key (did you mean 'lr'?)"]


def test_both_ranks_end_with_one_line_and_a_status(tmp_path):
    done = deepspeed("launcher/kd.py", "--preset", "tiny", "--run", str(tmp_path / "run"), ranks=2)
    assert done.returncode != 0
    assert len(errors(done)) == 1
    assert "which is missing: run launcher/align.py first" in errors(done)[0]


def test_an_altered_shard_ends_both_ranks(finished, launch):
    """It is found as it is read for the first time, in the first step."""
    shutil.rmtree(finished / "distill")
    shard = next((finished / "data" / "distill").glob("*.mds"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = launch("launcher/kd.py", "--preset", "tiny", "--run", str(finished), *SMALL, ranks=2)
    assert done.returncode == EXIT_USER_ERROR
    assert errors(done) == [f"error: {shard} is truncated or altered; remove {shard.parent} and prepare it anew"]


def test_more_ranks_than_samples_end_both_ranks(tmp_path, launch):
    done = launch("launcher/align.py", "--run", str(tmp_path / "run"), *SMALL, "--align.batch", "1", ranks=2)
    assert done.returncode == EXIT_USER_ERROR
    assert errors(done) == ["error: 2 ranks are more than the 1 samples of a batch: use fewer ranks"]
