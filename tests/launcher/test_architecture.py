"""Another teacher and another architecture than the default's, from the command line to the exported model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from halo.models.tokenizer import load_tokenizer
from halo.preset import load_config
from tests.halo.gguf_teacher import make_llama, write_gguf
from tests.launcher.conftest import SMALL, Launch


def test_a_llama_from_gguf_with_everything_switched(tmp_path: Path, launch: Launch, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    tokenizer = load_tokenizer(Path(load_config("tiny").teacher))
    teacher = write_gguf(tmp_path / "llama.gguf", make_llama(tokenizer), tokenizer)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    # fmt: off
    switches = [
        "--architecture.attn_use_rope", "true", "--architecture.attn_use_output_gate", "false",
        "--architecture.expand_kv_proj", "false", "--architecture.lightning_use_rope", "false",
        "--architecture.lightning_use_qk_norm", "false", "--architecture.lightning_use_output_gate", "false",
        "--scaling.form", "constant", "--scaling.candidates", "[1.5]", "--scaling.allow_none", "false",
        "--selection.attention_layers", "1",
    ]
    # fmt: on
    run = tmp_path / "run"
    done = launch("launcher/export.py", "--run", str(run), "--teacher", str(teacher), *SMALL, *switches)
    assert done.returncode == 0, done.stdout + done.stderr
    model = AutoModelForCausalLM.from_pretrained(run / "export" / "model", dtype=torch.float32)
    config = model.config
    assert (config.attn_use_rope, config.attn_use_output_gate, config.attn_logits_scaling) == (True, False, 1.5)
    assert sorted(config.mixer_types) == ["attn", "lightning-attn"]
    rnn = model.model.layers[config.mixer_types.index("lightning-attn")].self_attn
    assert (rnn.q_norm, rnn.z_proj, rnn.options.use_rope, rnn.k_proj.out_features) == (None, None, False, 24)
    prompt = tokenizer("It is a truth", return_tensors="pt", add_special_tokens=False)
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
