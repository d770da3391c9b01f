"""What a graph is recorded from: forward and backward with other tensors as parameters. A graph needs a GPU."""

import pytest
import torch

from halo.teacher.batch import Batch
from halo.teacher.colocated import Teacher
from halo.training.objectives import Alignment, Distillation, NextToken
from halo.training.recording import Minimised
from tests.distributed import jobs


def align():
    teacher = jobs.make_teacher()
    torch.manual_seed(1)
    return Alignment(jobs.new_mixers(teacher, "lightning-attn"), Teacher(teacher))


def distill():
    teacher = jobs.make_teacher()
    return Distillation(jobs.make_student(teacher), Teacher(teacher))


def finetune():
    return NextToken(jobs.make_student(jobs.make_teacher()))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("make", [align, distill, finetune])
def test_aliases_have_the_gradients_of_the_parameters(make, accumulation):
    objective = make().train()
    minimised = Minimised(objective, accumulation, recordable=False)
    batches = [jobs.batch_of(objective, torch.randint(1, 64, (2, 16))) for _ in range(2)]
    for batch in batches:
        minimised(batch)[0].backward()
    expected = {name: p.grad for name, p in objective.named_parameters()}
    objective.zero_grad()
    for batch in batches:
        handed_out, loss, values = minimised._hand_out(*minimised._made_with_aliases(batch))
        handed_out.backward()
        assert torch.equal(handed_out * accumulation, loss)
        assert values.keys() == objective(batch)[1].keys()
    for name, p in objective.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


def test_a_loss_that_is_not_finite_has_no_finite_gradient():
    objective = finetune()
    minimised = Minimised(objective, 1, recordable=False)
    plain = objective.student.lm_head.weight
    with torch.no_grad():
        plain[0] = torch.inf
    minimised(Batch.on_host(torch.randint(1, 64, (2, 16))))[0].backward()
    assert not any(p.grad.isfinite().all() for p in objective.parameters())
