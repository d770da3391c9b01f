"""What each stage trains, and what it leaves alone."""

import copy
import weakref

import torch
import torch.nn.functional as F

from halo.stages.align import new_mixers
from halo.teacher.colocated import Teacher
from halo.training.objectives import Alignment, Distillation, NextToken
from tests.distributed.jobs import batch_of, make_student, make_teacher


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(3))


def alignment(teacher) -> Alignment:
    torch.manual_seed(1)
    return Alignment(new_mixers(teacher, "lightning-attn"), Teacher(teacher))


def backward(objective) -> torch.Tensor:
    ids = tokens()
    loss, _ = objective(batch_of(objective, ids))
    loss.backward()
    return loss.detach()


def test_stage_1_trains_nothing_but_rnn_layers():
    teacher = make_teacher()
    before = copy.deepcopy(teacher.state_dict())
    objective = alignment(teacher)
    backward(objective)
    assert all(name.startswith("mixers.") for name, _ in objective.named_parameters())
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.1)
    optimizer.step()
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_stage_1_is_the_mean_squared_error_of_each_layer_on_the_teachers_states():
    """Eq. 7, by hand for one layer: the mixer's input is the teacher's normed input to that layer."""
    teacher = make_teacher().eval()
    objective = alignment(teacher)
    only = Alignment({2: objective.mixers["2"]}, Teacher(teacher))
    ids = tokens()
    hidden = teacher.model(ids, output_hidden_states=True).hidden_states[2]
    layer = teacher.model.layers[2]
    inputs, _ = layer.input_layernorm(hidden)
    rope = teacher.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    target, _ = layer.self_attn(inputs, position_embeddings=rope, attention_mask=None)
    output, _ = objective.mixers["2"](inputs, position_embeddings=rope)
    loss, _ = only(batch_of(only, ids))
    torch.testing.assert_close(loss, F.mse_loss(output, target))


def test_the_layers_of_stage_1_are_independent_regressions():
    """Another layer with a thousand times the error leaves a layer's gradient as it is."""
    gradients = []
    for scale in (1.0, 1000.0):
        teacher = make_teacher()
        objective = alignment(teacher)
        with torch.no_grad():
            objective.mixers["3"].o_proj.weight.mul_(scale)
        backward(objective)
        gradients.append([p.grad for p in objective.mixers["0"].parameters()])
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


def test_stage_1_holds_the_activations_of_one_layer_at_a_time():
    """When a layer's turn comes, nothing is left of what the layer before it computed."""
    objective = alignment(make_teacher())
    alive: dict[str, list[weakref.ref[torch.Tensor]]] = {}

    def note(name: str):
        def hook(_module, _inputs, output):
            earlier = [ref for other, refs in alive.items() if other != name for ref in refs if ref() is not None]
            assert not earlier, f"layer {name} begins while {len(earlier)} activations of others live"
            alive.setdefault(name, []).append(weakref.ref(output))

        return hook

    for name, mixer in objective.mixers.items():
        for part in (mixer.q_proj, mixer.v_proj, mixer.o_norm):
            part.register_forward_hook(note(name))
    backward(objective)
    assert [len(refs) for refs in alive.values()] == [3, 3, 3, 3]


def test_stage_2_trains_the_hybrid_and_not_the_teacher():
    teacher = make_teacher()
    objective = Distillation(make_student(teacher), Teacher(teacher))
    backward(objective)
    assert all(name.startswith("student.") for name, _ in objective.named_parameters())
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_stage_2_is_the_kl_of_the_two_models_logits():
    """Eq. 10 over every token, against plain fp32 logits."""
    teacher = make_teacher()
    student = make_student(teacher)
    ids = tokens()
    objective = Distillation(student, Teacher(teacher))
    loss, _ = objective(batch_of(objective, ids))
    p, q = (F.log_softmax(model(ids).logits.float(), dim=-1) for model in (teacher, student))
    expected = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    torch.testing.assert_close(loss, expected)


def test_stage_3_is_the_shifted_next_token_loss():
    student = make_student(make_teacher())
    ids = tokens()
    objective = NextToken(student)
    loss, _ = objective(batch_of(objective, ids))
    torch.testing.assert_close(loss, student(ids, labels=ids).loss)


def test_stage_2_logs_what_one_watches():
    teacher = make_teacher()
    student = make_student(teacher)
    ids = tokens()
    logits, taught = student(ids).logits, teacher.eval()(ids).logits
    log_q, log_p = logits.log_softmax(-1), taught.log_softmax(-1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    objective = Distillation(student, Teacher(teacher), temperature=1.0, cross_entropy=0.25)
    loss, metrics = objective(batch_of(objective, ids))
    torch.testing.assert_close(metrics["kl"], kl)
    torch.testing.assert_close(metrics["cross_entropy"], nll)
    torch.testing.assert_close(loss, kl + 0.25 * nll)
    assert metrics.keys() == {"kl", "teacher_entropy", "agreement", "cross_entropy"}
