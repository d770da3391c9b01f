"""Presets: what ships parses and builds; what is wrong is named, with the right key suggested."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halo.config import COMMON_SENSE, DEFAULT_MIXER, Architecture, Training
from halo.errors import UserError
from halo.preset import PRESETS, default_run, load_config
from halo.tables import config_table, to_toml
from halo.training.trainer import learning_rate
from hypenet import HypeNetConfig, HypeNetForCausalLM
from hypenet.configuration_hypenet import LIGHTNING
from hypenet.transfer import hybrid_config
from tests.halo.teachers import teacher_config

SHIPPED = sorted(path.stem for path in PRESETS.glob("*.toml"))
CONVERSIONS = ["hypenet-2b", "hypenet-5b", "hypenet-9b"]
SMALL = ["smollm2-135m", "tiny"]
"""Presets with recipes of our own."""


def test_the_presets_of_the_paper_ship():
    longer = [f"{name}-{length}" for name in CONVERSIONS if name not in SMALL for length in ("64k", "256k")]
    assert sorted(SHIPPED) == sorted([*CONVERSIONS, *longer, *SMALL])


@pytest.mark.parametrize("preset", SHIPPED)
def test_every_preset_parses_and_survives_toml(preset):
    config = load_config(preset)
    assert config.name == preset
    assert tomllib.loads(to_toml(config_table(config))) == config_table(config)


@pytest.mark.parametrize("preset", [*CONVERSIONS, "tiny"])
def test_every_preset_builds(preset):
    """The hybrid of the preset, at full size, on the meta device."""
    teacher = teacher_config(load_config(preset).teacher)
    layers = teacher.num_hidden_layers
    config = hybrid_config(teacher, attention_layers=list(range(layers // 4)))
    with torch.device("meta"):
        hybrid = HypeNetForCausalLM(config)
    assert config.mixer_types.count("attn") == layers // 4
    billions = sum(p.numel() for p in hybrid.parameters()) / 1e9
    assert billions == pytest.approx(
        {"hypenet-2b": 1.9, "hypenet-5b": 4.7, "hypenet-9b": 9.3, "tiny": 0.002}[preset], rel=0.1
    )


@pytest.mark.parametrize("preset", [name for name in SHIPPED if name not in SMALL])
def test_the_paper_presets_train_on_the_papers_tokens(preset):
    """Table 5: 320M, 1B and 1B tokens."""
    config = load_config(preset)
    tokens = [t.steps * t.batch * t.seq_len for t in (config.align, config.distill, config.finetune)]
    assert tokens == pytest.approx([320e6, 1e9, 1e9], rel=0.05)


def test_a_preset_on_top_of_another():
    longer, base = load_config("hypenet-9b-64k"), load_config("hypenet-9b")
    settings = longer.finetune
    assert (settings.seq_len, settings.batch, settings.sequence_parallel) == (65_536, 32, 2)
    changed = {"seq_len": 16_384, "batch": 128, "sequence_parallel": 1}
    assert replace(longer, name=base.name, finetune=replace(settings, **changed)) == base


def test_a_base_that_does_not_ship(tmp_path):
    (tmp_path / "mine.toml").write_text('base = "hypenet-9"')
    with pytest.raises(UserError, match=r"a base that is no shipped preset: 'hypenet-9' \(did you mean"):
        load_config(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--distil.lr", "1"], "--distil is an unknown key (did you mean 'distill'?)"),
        (["--distill.learning_rate", "1"], "--distill.learning_rate is an unknown key"),
        (["--distill.stesp", "1"], "--distill.stesp is an unknown key (did you mean 'steps'?)"),
        (["--align.mask_documents", "true"], "--align.mask_documents is an unknown key (finetune has it)"),
        (["--distill.steps", "many"], "--distill.steps must be a whole number, not 'many'"),
        (["--distill.steps", "true"], "--distill.steps must be a whole number, not True"),
        (["--distill.lr", '"1"'], "--distill.lr must be a number, not '1'"),
        (["--distill.betas", "[0.9]"], "--distill.betas must be a list of 2 values, not [0.9]"),
        (["--niah.lengths", "[256, 1.5]"], "--niah.lengths must be a whole number, not 1.5"),
        (["--distill.steps", "1.5"], "steps must be a whole number, not 1.5"),
        (["--distill.teacher_placement", "replicated"], "must be one of colocated, dedicated, not 'replicated'"),
        (["--distill.teacher_placement", "dedicated"], "teacher_ranks must be at least 1 if dedicated, not 0"),
        (["--distill.probe_lengths", "[512]"], "probe_lengths must be empty without probe_every, not [512]"),
        (["--distill.probe_samples", "8"], "probe_samples must be left at 16 without probe_every, not 8"),
        (["--distill.probe_every=1", "--distill.probe_lengths=[9,9]"], "probe_lengths must be without repeats"),
        (["--distill.teacher_ranks", "1"], "teacher_ranks must be 0 unless dedicated, not 1"),
        (["--distill.teacher_logits", "top_p"], "teacher_logits must be one of factored, full, top_k, not 'top_p'"),
        (["--distill.teacher_logits=top_k", "--distill.teacher_top_k=0"], "teacher_top_k must be at least 1, not 0"),
        (["--distill.teacher_top_k", "8"], "teacher_top_k must be left at 64 unless teacher_logits is top_k, not 8"),
        (
            [
                *("--distill.teacher_placement", "dedicated", "--distill.teacher_ranks", "1"),
                *("--distill.teacher_sharded", "true"),
            ],
            "teacher_sharded must be false where one rank is the teacher's, not true",
        ),
        (
            ["--distill.teacher_fp8", "true", "--distill.teacher_sharded", "true"],
            "teacher_fp8 must be false with teacher_sharded, which gathers weights in bf16, not true",
        ),
        (["--distill.schedule", "cosin"], "must be one of cosine, constant, wsd, not 'cosin' (did you mean 'cosine'?)"),
        (["--distill", "3"], "--distill is a table: write --distill.key value"),
        (["--teacher.path", "x"], "'teacher' is a value, not a table"),
        (["--niah.lengths", "7"], "lengths must be a list, not 7"),
        (["--distill.lr"], "--distill.lr: expected one argument"),
        (["--distill.micro_batch", "0"], "micro_batch must be at least 1, not 0"),
        (["--distill.corpus.needles", "1.5"], "needles must be at most 1.0, not 1.5"),
        (["--distill.schedule", "wsd"], "tiny.toml: distill.decay must be at least 1 for a wsd schedule, not 0"),
        (["--selection.epsilon", "0"], "epsilon must be at least 1e-12, not 0"),
        (["--distill.lr", "inf"], "--distill.lr must be finite, not inf"),
        (["--distill.betas", "[0.9, 1]"], "betas must be at most 0.999999, not 1"),
        (["--distill.betas", "[nan, 0.9]"], "betas must be finite, not nan"),
        (["--distill.seed", "-1"], "--distill.seed must be at least 0, not -1"),
        (["--distill.corpus.samples", "-1"], "--distill.corpus.samples must be at least 0, not -1"),
        (["--distill.schedule", "wsd", "--distill.decay", "999"], "decay must be at most steps (350), not 999"),
        (["--distill.shards_cache", "x", "--distill.shards_cache_gb", "0"], "shards_cache_gb must be more than 0"),
        (["--distill.temperature", "inf"], "temperature must be finite, not inf"),
        (["--pretrain.heads", "0"], "--pretrain.heads must be at least 1, not 0"),
        (["--pretrain.kv_heads", "3"], "--pretrain.kv_heads must be a divisor of heads (4), not 3"),
        (["--pretrain.head_dim", "31"], "--pretrain.head_dim must be even, for RoPE, not 31"),
        (["--selection.attention_layers", "-3"], "attention_layers must be at least 0, not -3"),
        (["--selection.layers", "[-1]"], "--selection.layers must be at least 0, not -1"),
        (["--scaling.candidates", "[2, nan]"], "candidates must be finite, not nan"),
        (["--scaling.lengths", "[1]"], "--scaling.lengths must be at least 2, not 1"),
        (["--scaling.lengths", "[8, 8]"], "lengths must be one number or more, without repeats, not [8, 8]"),
        (["--niah.lengths", "[-1]", "--niah.samples", "[1]"], "--niah.lengths must be at least 1, not -1"),
        (["--niah.yarn_from", "0"], "--niah.yarn_from must be at least 1, not 0"),
        (["--name", ""], "--name must be the name of a folder, of letters, digits, blanks and ._+=@-, not ''"),
        (["--selection.layers", "[1, 1]"], "layers must be without repeats, not [1, 1]"),
        (["--scaling.candidates", "[1]"], "candidates must be at least 1.01, not 1"),
        (["--scaling.form", "constant"], "candidates must be at most 10 where they are constants, not [128.0, 512.0"),
        (
            ["--architecture.attn_use_rop", "true"],
            "--architecture.attn_use_rop is an unknown key (did you mean 'attn_use_rope'?)",
        ),
        (["--architecture.attn_use_rope", "yes"], "attn_use_rope must be true or false, not 'yes'"),
        (["--architecture.mixer_options", "gla"], "mixer_options must be a table, not 'gla'"),
        (["--architecture.mixer_options.gla", "1"], "mixer_options.gla must be a table, not 1"),
        (
            ["--rnn_mixer", "gla", "--architecture.lightning_use_rope", "false"],
            "architecture.lightning_use_rope is Lightning's: set architecture.mixer_options.gla instead",
        ),
        (["--niah.samples", "[3]"], "samples must be one number for each of lengths, not [3]"),
        (["distill.lr", "1"], "cannot read 'distill.lr': settings are written --table.key value"),
    ],
)
def test_bad_overrides_are_named(overrides, message):
    with pytest.raises(UserError) as error:
        load_config("tiny", overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_take_effect():
    config = load_config("tiny", ["--distill.lr", "5e-5", "--distill.steps=7", "--name", "mine"])
    assert (config.distill.lr, config.distill.steps, config.name) == (5e-5, 7, "mine")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--align.activation_checkpointing", "true"], "is an unknown key (distill, finetune have it)"),
        (["--align.activation_offload", "true"], "is an unknown key (distill, finetune have it)"),
        (["--pretrain.activation_checkpointing", "true"], "is an unknown key (distill, finetune have it)"),
        (["--pretrain.activation_offload", "true"], "is an unknown key (distill, finetune have it)"),
        (["--finetune.activation_offload", "true"], "must be false without activation_checkpointing, not true"),
        (["--distill.decay", "5"], "must be 0 unless schedule is wsd, not 5"),
        (["--finetune.min_lr", "1e-6"], "must be left at 1e-05 with a constant schedule, not 1e-06"),
        (["--distill.profile_from", "5"], "must be 0 without profile_steps, not 5"),
        (["--distill.profile_from=350", "--distill.profile_steps=1"], "must be less than steps (350), not 350"),
        (["--distill.shards_cache_gb", "5"], "must be left at 64.0 without shards_cache, not 5.0"),
        (["--csr.task_folder=x", f"--csr.tasks={list(COMMON_SENSE)}"], "must be empty unless tasks names tasks of it"),
    ],
)
def test_an_option_without_effect_is_refused(overrides, message):
    with pytest.raises(UserError) as error:
        load_config("tiny", overrides)
    assert str(error.value).startswith(f"{overrides[0].partition('=')[0]} {message}")


def test_a_schedule_may_change_beside_the_defaults_of_another(tmp_path):
    """Also where a run has recorded all defaults."""
    recorded = tmp_path / "config.toml"
    recorded.write_text(to_toml(config_table(load_config("tiny"))))
    for source in (None, recorded):
        assert load_config("tiny", ["--distill.schedule", "constant"], recorded=source).distill.schedule == "constant"


TABLE_3 = {
    "w/o RNN RoPE": "lightning_use_rope false",
    "w/ attention RoPE": "attn_use_rope true",
    "w/o RNN QK-norm": "lightning_use_qk_norm false",
    "w/o RNN GQA to MHA": "expand_kv_proj false",
    "w/o RNN output gate": "lightning_use_output_gate false",
    "w/o attention output gate": "attn_use_output_gate false",
}


@pytest.mark.parametrize("row", TABLE_3)
def test_every_row_of_table_3_is_a_switch(row):
    """It differs from the default, reaches HypeNet's configuration, and is in the guide."""
    name, value = TABLE_3[row].split()
    switches = load_config("tiny", [f"--architecture.{name}", value]).architecture.switches()
    plain = load_config("tiny").architecture.switches()
    assert {key for key in plain if plain[key] != switches[key]} == {name}
    config = hybrid_config(teacher_config("Qwen/Qwen3-1.7B"), [0], **switches)
    assert getattr(config, name) == switches[name]
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    assert f"| {row} | `--architecture.{TABLE_3[row]}` |" in guide


def test_the_default_mixer_is_hypenets():
    assert DEFAULT_MIXER == LIGHTNING


def test_the_defaults_are_hypenet():
    config = HypeNetConfig()
    assert {name: getattr(config, name) for name in Architecture().switches()} == Architecture().switches()


def test_another_mixers_options():
    """Its name may have a hyphen; TOML has no None."""
    given = ["--architecture.mixer_options.linear-attn.use-rope", "false"]
    given += ["--architecture.mixer_options.linear-attn.qk_norm", "none"]
    config = load_config("tiny", ["--rnn_mixer", "linear-attn", *given])
    assert config.architecture.switches()["mixer_options"] == {"linear-attn": {"use_rope": False, "qk_norm": None}}
    assert tomllib.loads(to_toml(config_table(config))) == config_table(config)


def test_mixer_options_that_are_typed_as_a_whole_replace_those_before(tmp_path):
    recorded, gla = tmp_path / "config.toml", ["--rnn_mixer", "gla"]
    config = load_config("tiny", [*gla, "--architecture.mixer_options.gla.use_rope", "false"])
    recorded.write_text(to_toml(config_table(config)))
    assert load_config("tiny", recorded=recorded).architecture.mixer_options == {"gla": {"use_rope": False}}
    again = load_config("tiny", ["--architecture.mixer_options", "{}"], recorded=recorded)
    assert again.architecture.mixer_options == {}


def test_a_path_on_the_command_line_is_relative_to_where_one_stands():
    assert load_config("tiny", ["--distill.shards", "./shards"]).distill.shards == "./shards"


def test_a_run_stands_in_for_its_preset(tmp_path):
    recorded = tmp_path / "config.toml"
    recorded.write_text(to_toml(config_table(load_config("tiny", ["--distill.lr", "0.5", "--align.steps", "3"]))))
    config = load_config("tiny", ["--align.steps", "4"], recorded=recorded)
    assert (config.distill.lr, config.align.steps) == (0.5, 4)


@pytest.mark.parametrize("text", ["a\nb", "\t\x00\x1f\x7f", '"\\', "é\u2028"])
def test_a_run_records_any_text(text):
    config = replace(load_config("tiny"), heldout=text)
    assert tomllib.loads(to_toml(config_table(config)))["heldout"] == text


@pytest.mark.parametrize(
    ("preset", "line"),
    [
        ('base = "tiny"\nname = 3', "name must be a string, not 3"),
        ("teacher = " + "9" * 5000, "is not valid TOML: Exceeds the limit"),
        ("teacher = " + "[" * 5000, "is not valid TOML: maximum recursion depth"),
    ],
)
def test_a_preset_that_is_no_preset(tmp_path, preset, line):
    path = tmp_path / "mine.toml"
    path.write_text(preset)
    with pytest.raises(UserError) as error:
        assert default_run(path).parent == Path("runs")
        load_config(path)
    assert line in str(error.value)


def test_unknown_preset_is_named():
    with pytest.raises(UserError, match=r"no preset 'tiney' \(did you mean 'tiny'\?\)"):
        load_config("tiney")


def test_a_preset_of_ones_own(tmp_path: Path):
    preset = tmp_path / "mine.toml"
    preset.write_text((PRESETS / "tiny.toml").read_text().replace('"./tiny/teacher"', '"./here"'))
    assert load_config(preset).teacher == str(tmp_path / "here")
    preset.write_text("teacher = [")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(preset)
    preset.write_text('teacher = "x"')
    with pytest.raises(UserError, match=r"mine.toml: align is missing"):
        load_config(preset)
    preset.write_text('teacher = "x"\nalgn = 3')
    with pytest.raises(UserError, match=r"mine.toml: algn is an unknown key \(did you mean 'align'\?\)"):
        load_config(preset)
    preset.write_text((PRESETS / "tiny.toml").read_text().replace("steps = 350", 'steps = "350"'))
    with pytest.raises(UserError, match=r"mine.toml: distill.steps must be a whole number, not '350'"):
        load_config(preset)


def test_schedules():
    base = {"seq_len": 8, "batch": 1, "micro_batch": 1, "steps": 100, "lr": 1.0, "warmup": 10}
    cosine = Training(**base, min_lr=0.1)
    assert learning_rate(cosine, 0) == pytest.approx(0.1)
    assert learning_rate(cosine, 9) == learning_rate(cosine, 10) == pytest.approx(1.0)
    assert learning_rate(cosine, 55) == pytest.approx(0.55)
    assert learning_rate(cosine, 99) == pytest.approx(0.1, abs=1e-3)
    constant = Training(**base, schedule="constant")
    assert learning_rate(constant, 99) == 1.0
    wsd = Training(**base, min_lr=0.1, schedule="wsd", decay=20)
    assert learning_rate(wsd, 79) == 1.0
    assert learning_rate(wsd, 90) == pytest.approx(0.55)
