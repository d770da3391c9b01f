"""A teacher whose layers run as HypeNet's do, without a mask, gives what transformers' own forward gives."""

import pytest
import torch

from halo.models.fuse import fuse
from halo.models.loading import frozen_states
from tests.hypenet.test_transfer import FAMILIES, make_teacher


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("window", "activation"), [(None, "silu"), (5, "silu"), (None, "gelu")])
def test_hidden_states(family, window, activation):
    model = make_teacher(family, hidden_act=activation)
    config = model.config
    if window is not None:
        windows = {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 2}
        if config.model_type == "llama":
            pytest.skip("has no windows")
        model = type(model)(type(config)(**config.to_dict() | windows | {"layer_types": None})).eval()
    input_ids = torch.randint(0, config.vocab_size, (2, 12))
    with torch.no_grad():
        expected = model.model(input_ids, attention_mask=torch.ones_like(input_ids)).last_hidden_state
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.testing.assert_close(frozen_states(model, input_ids), expected, rtol=1e-3, atol=1e-4)
    fuse(model)
    torch.testing.assert_close(frozen_states(model, input_ids), expected, rtol=1e-3, atol=1e-4)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
