"""The choice of an attention implementation on made-up machines, and the functions behind the names."""

import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import halo
from halo.config import AttentionName
from halo.errors import UserError
from halo.graph import STAGES
from halo.models import attention
from halo.models.attention import FASTEST, IMPLEMENTATIONS, Machine, choose, refusal, said_of, shape_of
from halo.models.attention_functions import registered, use_attention
from halo.models.fuse import fuse
from halo.models.loading import frozen_states
from halo.preset import load_config
from hypenet import HypeNetConfig, HypeNetForCausalLM
from tests.halo.models import attention_cases, plain_flash
from tests.hypenet.sizes import MIXERS, SIZES
from tests.hypenet.test_transfer import FAMILIES, make_teacher

CONFIG = Qwen3Config(head_dim=128)
PACKAGES = [name for name, known in IMPLEMENTATIONS.items() if known.module]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Shapes are those of training on a GPU."""
    monkeypatch.setattr(attention, "training_dtype", lambda: torch.bfloat16)


@pytest.fixture
def plain_kernels(monkeypatch):
    """Implementations whose package is a few lines of torch."""
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, IMPLEMENTATIONS[name].module, plain_flash)
    registered.cache_clear()
    yield
    registered.cache_clear()


def make_hybrid(**keys) -> HypeNetForCausalLM:
    torch.manual_seed(1)
    return HypeNetForCausalLM(HypeNetConfig(**{**SIZES, "mixer_types": MIXERS, **keys})).eval()


def machine(major: int | None, *installed: str, broken: str = "") -> Machine:
    packages = dict.fromkeys(installed, "") | ({broken: "undefined symbol"} if broken else {})
    return Machine(capability=None if major is None else (major, 0), packages=packages)


def test_the_settings_know_the_same_names():
    assert set(get_args(AttentionName)) == {"auto", *IMPLEMENTATIONS}
    assert {name for rows in FASTEST.values() for row in rows for name in row.order} <= IMPLEMENTATIONS.keys()


@pytest.mark.parametrize("rows", FASTEST.values())
def test_sdpa_is_the_last_choice_of_every_length(rows):
    assert all(row.order[-1] == "sdpa" for row in rows)
    assert [row.tokens for row in rows] == sorted((row.tokens for row in rows), reverse=True)
    assert rows[-1].tokens == 0


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("cudnn", machine(None), "needs a CUDA GPU, and there is none: set attention to auto or sdpa"),
        ("flash_attention_3", machine(8), "runs on GPUs of compute capability 9.x, not 8.0"),
        ("flash_attention_4", machine(8), "runs on GPUs of compute capability 9.x, 10.x, 11.x, not 8.0"),
        ("flash_attention_2", machine(9), "flash_attn.flash_attn_interface is not installed: pip install flash-attn"),
        ("flash_attention_4", machine(9), r"flash_attn.cute is not installed: pip install hypenet-halo\[flash4\], or"),
        (
            "flash_attention_2",
            machine(9, broken="flash_attention_2"),
            r"cannot be imported \(undefined symbol\): install one that was built for this torch, or",
        ),
    ],
)
def test_what_a_machine_cannot_run(name, given, says):
    assert re.search(says, refusal(name, machine=given))
    assert re.search(says, refusal(name, shape_of(CONFIG, 512), given))
    assert "\n" not in refusal(name, machine=given)


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("cudnn", {"head_dim": 256}, "heads are multiples of 8 and at most 128 wide, not 256"),
        ("flash_attention_3", {"head_dim": 100}, "heads are multiples of 8 and at most 256 wide, not 100"),
        ("flash_attention_4", {"attention_dropout": 0.1}, "has no dropout: set attention_dropout to 0"),
        ("flash_attention_2", {"attention_dropout": 0.1}, ""),
    ],
)
def test_what_an_implementation_does_not_take(name, config, says):
    shape = shape_of(Qwen3Config(**{"head_dim": 128} | config), 512, trains=True)
    found = refusal(name, shape, machine(9, *PACKAGES))
    assert says in found and bool(says) == bool(found)
    assert not refusal("sdpa", shape, machine(None))


def test_a_frozen_model_drops_nothing():
    config = Qwen3Config(head_dim=128, attention_dropout=0.1)
    assert not refusal("flash_attention_4", shape_of(config, 512), machine(9, *PACKAGES))


def test_full_precision_is_refused(monkeypatch):
    monkeypatch.setattr(attention, "training_dtype", lambda: torch.float32)
    found = refusal("cudnn", shape_of(CONFIG, 512), machine(9))
    assert found == "it does not compute in torch.float32: set attention to auto or sdpa"


def test_auto_takes_the_first_that_can_run(monkeypatch):
    table = {
        (9, True): [
            attention.Preference(order=("flash_attention_3", "flash_attention_4", "sdpa"), tokens=4096),
            attention.Preference(order=("flash_attention_2", "sdpa")),
        ]
    }
    monkeypatch.setattr(attention, "FASTEST", table)
    long, short = shape_of(CONFIG, 4096, True), shape_of(CONFIG, 4095, True)
    everything = machine(9, *PACKAGES)
    assert (choose(long, everything), choose(short, everything)) == ("flash_attention_3", "flash_attention_2")
    assert choose(long, machine(9, "flash_attention_4")) == "flash_attention_4"
    assert choose(long, machine(9, "flash_attention_4", broken="flash_attention_3")) == "flash_attention_4"
    assert choose(long, machine(9)) == choose(short, machine(9)) == "sdpa"
    assert choose(shape_of(CONFIG, 4096), everything) == "sdpa"  # rows without documents: not in the table
    assert choose(long, machine(None)) == choose(long, machine(7)) == "sdpa"
    wide = shape_of(Qwen3Config(head_dim=264), 4096, True)
    assert choose(wide, everything) == "sdpa"


def test_a_package_is_found_by_the_module_that_is_used(tmp_path, monkeypatch):
    """flash-attn 4 leaves a folder `flash_attn` too, which is not the second version."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    found = {name: attention._is_installed(IMPLEMENTATIONS[name].module) for name in PACKAGES}
    assert found["flash_attention_4"] and not found["flash_attention_2"]
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: _ZN3c10\\nmore')")
    assert attention._is_installed("flash_attn_interface")
    assert attention._fault("flash_attn_interface") == "undefined symbol: _ZN3c10"
    assert not attention._fault("flash_attn.cute")


def test_every_stage_is_asked_for_what_it_runs(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "choose", lambda shape: asked.append(shape) or "sdpa")
    config = load_config("tiny", ["--finetune.mask_documents", "true"])
    chosen = {name: attention.attention_of_stage(config, name, CONFIG) for name in STAGES if STAGES[name].models}
    assert chosen["distill"] == {"teacher": "sdpa", "student": "sdpa"}
    assert chosen["finetune"] == {"student": "sdpa"}
    assert {shape.tokens for shape in asked} >= {config.finetune.seq_len, max(config.niah.lengths), 0}
    assert [shape.tokens for shape in asked if shape.packed] == [config.finetune.seq_len]


def test_a_stage_that_runs_a_model_says_which():
    for name, stage in STAGES.items():
        source = Path(halo.__file__).with_name("stages").joinpath(f"{name}.py").read_text()
        assert ("context.attention[" in source) == bool(stage.models), name
        assert all(f'["{model}"]' in source for model in stage.models), name


def test_a_named_one_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(attention, "this_machine", lambda: machine(None))
    config = load_config("tiny", ["--attention", "flash_attention_3"])
    with pytest.raises(UserError, match=r"^attention = flash_attention_3: it needs a CUDA GPU, and there is none"):
        attention.attention_of_stage(config, "distill", CONFIG)
    with pytest.raises(UserError, match="attention"):
        load_config("tiny", ["--attention", "flash"])


def test_what_auto_took_is_one_line():
    both = {"teacher": "cudnn", "student": "cudnn"}
    assert said_of({"align": both, "finetune": {"student": "cudnn"}}) == (
        "attention: auto takes cudnn for teacher and student"
    )
    assert said_of({"finetune": {"student": "sdpa"}}) == "attention: auto takes sdpa for student"
    assert said_of({"align": both, "finetune": {"student": "flash_attention_3"}}) == (
        "attention: auto takes for the teacher cudnn (align); "
        "for the student cudnn (align), flash_attention_3 (finetune)"
    )


@pytest.mark.parametrize(("heads", "kv_heads"), attention_cases.HEADS)
@pytest.mark.parametrize("case", attention_cases.CASES)
@pytest.mark.parametrize("name", ["sdpa", "flash_attention_3"])
def test_outputs_and_gradients(plain_kernels, name, case, heads, kv_heads):
    """What the functions of this project do around the kernels, in float64."""
    qkv = attention_cases.inputs(heads, kv_heads, 8, torch.float64, "cpu")
    error = attention_cases.worst_error(attention_cases.attended(name, case, qkv), attention_cases.expected(case, qkv))
    assert error < (1e-6 if case == "scaled logits" else 1e-12)  # s_t is in float32


def test_packed_documents_do_not_see_each_other(plain_kernels):
    qkv = attention_cases.inputs(8, 2, 8, torch.float64, "cpu")
    assert attention_cases.documents_apart("flash_attention_4", qkv)


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_teachers_padding_is_not_seen(plain_kernels, family, name):
    """transformers makes no mask where no mask function is registered."""
    model = make_teacher(family).double()
    ids = torch.randint(1, model.config.vocab_size, (2, 12))
    for mask in (torch.ones(2, 12), torch.tensor([[1] * 12, [0] * 5 + [1] * 7])):
        sdpa = use_attention(model, "sdpa")(ids, attention_mask=mask).logits
        found = use_attention(model, name)(ids, attention_mask=mask).logits
        torch.testing.assert_close(found[mask.bool()], sdpa[mask.bool()], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_a_teachers_window_is_kept(plain_kernels, family):
    """In transformers' own forward, and in the fused one."""
    window = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2}
    config = make_teacher(family).config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(config)(**config.to_dict() | window | {"layer_types": None})).double()
    ids = torch.randint(1, config.vocab_size, (2, 23))
    expected = use_attention(model.eval(), "sdpa")(ids).logits
    assert not torch.allclose(make_teacher(family).double()(ids).logits, expected)
    flash = use_attention(model, "flash_attention_2")
    torch.testing.assert_close(flash(ids).logits, expected, rtol=1e-5, atol=1e-6)
    fuse(flash)
    torch.testing.assert_close(flash.lm_head(frozen_states(flash, ids)), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_hybrid_generates_from_padded_prompts(plain_kernels):
    model = make_hybrid(mixer_types=["swa", "attn"] * 2, mixer_options={"swa": {"window": 5}})
    padded = torch.randint(1, SIZES["vocab_size"], (2, 50))
    mask = torch.ones_like(padded)
    mask[1, :20] = 0
    written = {}
    for name in ("sdpa", "flash_attention_4"):
        use_attention(model, name)
        written[name] = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(written["sdpa"], written["flash_attention_4"])


def test_a_saved_model_names_no_function_of_ours(plain_kernels, tmp_path):
    model = use_attention(make_hybrid(), "flash_attention_4")
    model.save_pretrained(tmp_path)
    assert "halo_" not in (tmp_path / "config.json").read_text()
    assert HypeNetForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
