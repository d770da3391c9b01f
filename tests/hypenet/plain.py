"""What several tests compare with or take apart."""

import torch

EXACT = {"rtol": 1e-10, "atol": 1e-10}
"""For float64."""


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(*results):
    return [x for result in results for x in (flat(*result) if isinstance(result, tuple) else [result])]


def delta_rule_plainly(q, k, v, beta, g, scale, state):
    """What the state holds for a key moves towards the value by beta."""
    outputs = []
    for t in range(q.shape[1]):
        if g is not None:
            state = g[:, t].exp().view(*g.shape[:1], g.shape[2], -1, 1) * state
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + beta[:, t, :, None, None] * k[:, t, :, :, None] * error[:, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state
