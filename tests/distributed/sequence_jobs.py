"""Functions that the tests of sequence parallelism run on each rank."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from halo.data.needle import NeedleSample
from halo.distributed import all_sum, world_size
from halo.measuring.evaluation import loss_at_length, needle_recall, share_sequences
from halo.models.attention import IMPLEMENTATIONS
from halo.models.attention_functions import use_attention
from halo.parallel.sequence import SequenceGroup
from halo.stages.align import new_mixers
from halo.teacher.colocated import Teacher
from halo.training.engine import Engine, read_ds_config
from halo.training.objectives import Alignment, Distillation, NextToken
from halo.training.trainer import Objective
from hypenet import HypeNetConfig, HypeNetForCausalLM
from tests.distributed import jobs
from tests.halo.models import plain_flash

B, T, SEPARATOR = 2, 64, 63
OPTIONS = {"swa": {"window": 5}, "gsa": {"slots": 6}, "ttt": {"mini_batch_size": 5}}
"""Options of mixers that make a few tokens many: short windows, few slots."""
Gradients = dict[str, Tensor]


def tokens(packed: bool) -> Tensor:
    """[B, T]. If `packed`, documents end at the end of a chunk, within one, several in one, and none in some."""
    ids = torch.randint(0, SEPARATOR, (B, T), generator=torch.Generator().manual_seed(3))
    if packed:
        ids[0, [9, 15, 52]] = SEPARATOR
        ids[1, [16, 18, 47]] = SEPARATOR
    return ids


def student(mixer: str) -> HypeNetForCausalLM:
    """Two layers of the mixer around one of attention. Norms are not at their initial values."""
    torch.manual_seed(1)
    options = {mixer: OPTIONS[mixer]} if mixer in OPTIONS else {}
    types = [mixer, "attn", mixer]
    keys = jobs.SHAPE | {"num_hidden_layers": 3, "mixer_types": types, "mixer_options": options}
    model = HypeNetForCausalLM(HypeNetConfig(**keys))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def next_token(mixer: str, degree: int, packed: bool, **options: Any) -> NextToken:
    separator = SEPARATOR if packed else None
    return NextToken(student(mixer), separator=separator, sequence=SequenceGroup(degree), **options)


def alignment(mixer: str, degree: int) -> Alignment:
    teacher = jobs.make_teacher(num_hidden_layers=2)
    torch.manual_seed(1)
    return Alignment(new_mixers(teacher, mixer), Teacher(teacher, sequence=SequenceGroup(degree)))


def distillation(mixer: str, degree: int) -> Distillation:
    teacher = Teacher(jobs.make_teacher(num_hidden_layers=2), sequence=SequenceGroup(degree, apart=True))
    return Distillation(student(mixer), teacher, cross_entropy=0.5, sequence=SequenceGroup(degree))


def loss_and_gradients(objective: Objective, ids: Tensor, engine: Engine | None = None) -> tuple[Tensor, Gradients]:
    """The mean over the ranks of the loss and of each parameter's gradient, without ZeRO or as ZeRO gives it."""
    batch = jobs.batch_of(objective, ids)
    if engine is None:
        objective.zero_grad()
        loss, _ = objective.train()(batch)
        loss.backward()
        found = {name: all_sum(p.grad) / world_size() for name, p in objective.named_parameters()}
    else:
        loss, _ = engine.accumulate(batch)
        found = {name: safe_get_full_grad(p).clone() for name, p in objective.named_parameters()}
        engine.step(0.0)
    return all_sum(loss.detach()) / world_size(), found


@contextmanager
def under(zero: str | None, objective: Objective) -> Iterator[Engine | None]:
    if zero is None:
        yield None
        return
    degree = world_size()
    settings = jobs.training(batch=B, micro_batch=B, seq_len=T, sequence_parallel=degree, clip=0.0)
    config = read_ds_config(jobs.DS_CONFIGS / zero)
    engine = Engine(objective.train(), settings, config, objective.external_parameters())
    yield engine
    engine.close()


def of_mixers(
    mixers: list[str], zero: str | None, dtype: torch.dtype = torch.float32
) -> dict[tuple[str, str], tuple[Tensor, Gradients]]:
    """`loss_and_gradients` of stage 3 with each mixer, on whole rows and on packed ones; all ranks share each row."""
    found = {}
    for mixer in mixers:
        objective = next_token(mixer, world_size(), packed=False).to(dtype)
        with under(zero, objective) as engine:
            found[mixer, "whole"] = loss_and_gradients(objective, tokens(packed=False), engine)
            objective.separator = SEPARATOR
            found[mixer, "packed"] = loss_and_gradients(objective, tokens(packed=True), engine)
    return found


def of_stages(mixer: str) -> dict[str, tuple[Tensor, Gradients]]:
    """`loss_and_gradients` of stages 1 and 2."""
    stages: dict[str, Callable[[str, int], Objective]] = {"align": alignment, "distill": distillation}
    return {name: loss_and_gradients(make(mixer, world_size()), tokens(False)) for name, make in stages.items()}


def with_flash_attention(mixers: list[str]) -> list[tuple[Tensor, Gradients]]:
    """`loss_and_gradients` in float64 of stage 3 on packed rows with each mixer, and of stage 2.

    One rank computes them with torch's own attention, several with flash attention's functions, written in torch.
    """
    sys.modules[IMPLEMENTATIONS["flash_attention_4"].module] = plain_flash
    name = "flash_attention_4" if world_size() > 1 else "sdpa"
    objectives: list[Objective] = []
    for mixer in mixers:
        model = use_attention(student(mixer), name)
        objectives.append(NextToken(model, separator=SEPARATOR, sequence=SequenceGroup(world_size())))
    teacher = use_attention(jobs.make_teacher(num_hidden_layers=2).double(), name)
    asked = Teacher(teacher, sequence=SequenceGroup(world_size(), apart=True))
    model = use_attention(student(mixers[0]), name)
    objectives.append(Distillation(model, asked, cross_entropy=0.5, sequence=SequenceGroup(world_size())))
    return [loss_and_gradients(objective.double(), tokens(packed=True)) for objective in objectives]


def in_tiles(zero: str | None) -> tuple[Tensor, Gradients]:
    """Stage 3 with everything that saves memory, on packed rows."""
    objective = next_token(
        "lightning-attn", world_size(), packed=True, activation_checkpointing=True, activation_offload=True
    )
    with patch("halo.parallel.activations.TILE", 7), under(zero, objective) as engine:
        return loss_and_gradients(objective, tokens(packed=True), engine)


def with_a_wrong_exchange(what: str, mixer: str) -> tuple[Tensor, Gradients]:
    """`loss_and_gradients`, but the ranks exchange wrong tensors."""
    gather, exchange = SequenceGroup.gather, SequenceGroup.exchange
    wrong = {
        "states of other ranks": ("gather", lambda group, x: gather(group, x).roll(1, dims=0)),
        "no decay": ("gather", lambda group, x: _kept_whole(gather(group, x))),
        "heads of other ranks": ("exchange", lambda group, x, **dims: exchange(group, x, **dims).roll(1, dims=1)),
    }
    with patch.object(SequenceGroup, *wrong[what]):
        return loss_and_gradients(next_token(mixer, world_size(), False), tokens(False))


def _kept_whole(gathered: Tensor) -> Tensor:
    """As if no chunk's state decayed."""
    gathered[..., -1] = 1
    return gathered


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """The bytes that this rank receives from others, by collective."""
    received: dict[str, int] = {}

    def count(name: str) -> Any:
        plain = getattr(dist, name)

        def collective(output: Any, given: Tensor, group: Any = None) -> Any:
            size = dist.get_world_size(group)
            everything = sum(x.nbytes for x in output) if isinstance(output, list) else output.nbytes
            received[name] = received.get(name, 0) + everything * (size - 1) // size
            return plain(output, given, group=group)

        return patch.object(dist, name, collective)

    with count("all_to_all_single"), count("all_gather"):
        yield received


def bytes_received(mixers: list[str], length: int) -> dict[str, dict[str, int]]:
    """By mixer: the bytes for forward and backward of one layer, over rows of `length` tokens."""
    found = {}
    for mixer in mixers:
        model = HypeNetForCausalLM(HypeNetConfig(**jobs.SHAPE | {"num_hidden_layers": 1, "mixer_types": [mixer]}))
        objective = NextToken(model, sequence=SequenceGroup(world_size()))
        with counted() as received:
            objective(jobs.batch_of(objective, torch.zeros(B, length, dtype=torch.long)))[0].backward()
        found[mixer] = received
    return found


def answers(prompts: list[list[int]]) -> list[NeedleSample]:
    """The two tokens that the hybrid continues a prompt with; for every third prompt, other tokens."""
    model, samples = scaled_hybrid(), []
    for i, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(2):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answer = [(token + (i % 3 == 0)) % SEPARATOR for token in ids[-2:]]
        samples.append(NeedleSample(variant="", prompt_ids=prompt, answer_ids=answer, answer="", depth=0.0))
    return samples


def scaled_hybrid() -> HypeNetForCausalLM:
    model = student("lightning-attn").eval()
    model.config.attn_logits_scaling = "hype 4"
    return model


def evaluate(samples: list[NeedleSample], ids: Tensor, degree: int) -> tuple[float, float, float]:
    """The hybrid's recall and loss, and a teacher's loss."""
    group, hybrid, teacher = SequenceGroup(degree), scaled_hybrid(), jobs.make_teacher()
    for model in (hybrid, teacher):
        share_sequences(model, group)
    recall = needle_recall(hybrid, samples, batch=2, group=group)
    return recall, loss_at_length(hybrid, ids, group=group), loss_at_length(teacher, ids, group=group)


def finetune(shards: Any, folder: Any, zero: str, settings: Any) -> Any:
    """A few steps of stage 3 through the trainer."""
    made = jobs.files(folder)
    place = jobs.placement(read_ds_config(jobs.DS_CONFIGS / zero), settings)
    student = jobs.build_hybrid(made / "hybrid", place)
    objective = NextToken(student, separator=5, sequence=SequenceGroup(settings.sequence_parallel))
    return jobs.run(objective, settings, shards, folder, zero)
