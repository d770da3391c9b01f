"""A small teacher and hybrid with weights large enough that logits differ clearly."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from hypenet.configuration_hypenet import HypeNetConfig
from hypenet.modeling_hypenet import HypeNetForCausalLM
from tests.hypenet.sizes import EACH, MIXERS, SIZES, SMALL


def _norms_off_one(model: PreTrainedModel) -> PreTrainedModel:
    """Norms at one would hide a norm in the wrong place."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


@pytest.fixture
def teacher() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return _norms_off_one(Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)))


@pytest.fixture
def make_hybrid() -> Callable[..., HypeNetForCausalLM]:
    """A function from keys of the configuration to a hybrid."""

    def make(**keys: object) -> HypeNetForCausalLM:
        torch.manual_seed(1)
        return _norms_off_one(HypeNetForCausalLM(HypeNetConfig(**{**SIZES, "mixer_types": MIXERS, **keys})))

    return make


@pytest.fixture(params=EACH)
def make_model(
    request: pytest.FixtureRequest, make_hybrid: Callable[..., HypeNetForCausalLM]
) -> Callable[..., HypeNetForCausalLM]:
    """A function from keys of the configuration to a model of two layers: each mixer in turn, and attention."""
    options = {name: options for name, options in SMALL.items() if name == request.param}

    def make(**keys: object) -> HypeNetForCausalLM:
        types = [request.param, "attn"]
        keys = {"mixer_types": types, "num_hidden_layers": 2, "attn_logits_scaling": "hype 16", **keys}
        return make_hybrid(**{"mixer_options": options, **keys})

    return make


@pytest.fixture
def hybrid(make_hybrid: Callable[..., HypeNetForCausalLM]) -> HypeNetForCausalLM:
    return make_hybrid(attn_logits_scaling="hype 16")


@pytest.fixture
def tokens() -> torch.Tensor:
    """[2, 50], no padding among them."""
    return torch.randint(1, SIZES["vocab_size"], (2, 50), generator=torch.Generator().manual_seed(2))
