"""Every teacher that cannot be converted is refused in one line."""

from safetensors.torch import load_file, save_file

from tests.launcher.refusals import edit, refusal


def test_a_missing_teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no teacher at '/no/such/folder'" in refusal("align", tmp_path / "run", "--teacher", "/no/such/folder")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal("align", tmp_path / "run", "--teacher", str(tmp_path / "empty"))


def test_a_teacher_that_is_no_causal_language_model(tmp_path, teacher):
    edit(teacher / "config.json", architectures=["Qwen3ForSequenceClassification"])
    message = refusal("align", tmp_path / "run", "--teacher", str(teacher))
    assert "no causal language model" in message
    assert "Qwen3ForSequenceClassification" in message


def test_a_teacher_whose_weights_are_cut_short(tmp_path, teacher):
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights} cannot be read" in refusal("align", tmp_path / "run", "--teacher", str(teacher))


def test_a_teacher_of_another_family(tmp_path, teacher):
    edit(teacher / "config.json", model_type="gemma3")
    message = refusal("align", tmp_path / "run", "--teacher", str(teacher))
    assert "is a 'gemma3'; supported: llama, mistral, qwen2, qwen3" in message


def test_a_teacher_that_hypenet_cannot_represent(tmp_path, teacher):
    edit(teacher / "config.json", model_type="llama", mlp_bias=True)
    message = refusal("align", tmp_path / "run", "--teacher", str(teacher))
    assert f"no hybrid of this architecture from {teacher}: The teacher's MLPs have biases" in message


def test_a_quantized_teacher(tmp_path, teacher):
    edit(teacher / "config.json", quantization_config={"quant_method": "awq"})
    assert f"the teacher at {teacher} is quantized" in refusal("align", tmp_path / "run", "--teacher", str(teacher))


def test_a_teacher_without_all_its_weights(tmp_path, teacher):
    weights = load_file(teacher / "model.safetensors")
    del weights["model.layers.3.self_attn.q_proj.weight"]
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    message = refusal("align", tmp_path / "run", "--teacher", str(teacher))
    assert f"the teacher at {teacher} lacks weights, model.layers.3.self_attn.q_proj.weight among them" in message


def test_a_teacher_with_weights_of_another_kind(tmp_path, teacher):
    (teacher / "model.safetensors").rename(teacher / "pytorch_model.bin")
    assert "lacks .safetensors weights" in refusal("align", tmp_path / "run", "--teacher", str(teacher))


def test_a_teacher_whose_generation_configuration_is_not_valid(tmp_path, teacher):
    """Before the first stage, not after the last step."""
    edit(teacher / "generation_config.json", max_new_tokens=0)
    message = refusal("align", tmp_path / "run", "--teacher", str(teacher))
    assert message.startswith(f"{teacher / 'generation_config.json'}: `max_new_tokens` must be greater than 0")
    assert not (tmp_path / "run").exists()


def test_a_gguf_file_that_is_not_there(tmp_path):
    message = refusal("align", tmp_path / "run", "--teacher", "/no/such/model.gguf")
    assert message == "no teacher at '/no/such/model.gguf': there is no such file"


def test_a_tokenizer_larger_than_the_embedding(tmp_path, teacher):
    edit(teacher / "config.json", vocab_size=1000)
    message = refusal("align", tmp_path / "run", "--teacher", str(teacher))
    assert "has 1024 tokens, more than the teacher's embedding (1000)" in message
