"""Which implementation computes softmax attention: `attention` in a run's settings (docs/guide.md#attention).

    sdpa                 torch's scaled_dot_product_attention, with the kernel that torch takes: the plain reference
    cudnn                the same with cuDNN's kernel and no other
    flash_attention_2    the packages that IMPLEMENTATIONS names; packed documents in one call
    flash_attention_3
    flash_attention_4

A named implementation that cannot run is refused before anything is loaded, and never replaced by another. halo/models/
attention_functions.py has the functions.

Shapes: T tokens of a row, D width of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch

from halo.accelerator import on_gpu
from halo.config import Config
from halo.errors import UserError, first_line
from halo.graph import STAGES, Model
from halo.models.loading import training_dtype

PLAIN = "sdpa"
INSTEAD = "or set attention to auto or sdpa"


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """What an implementation needs, and what it takes. All take grouped key and value heads, and a scale."""

    module: str = ""
    """The module with its functions. Empty: it is torch's."""
    install: str = ""
    """How to get that module."""
    widest: Mapping[int, int] = field(default_factory=dict)
    """The GPUs that it runs on, by the first number of their compute capability -> the largest D. Empty: any device."""
    multiple: int = 1
    """What D must be a multiple of."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Empty: any."""
    masks: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """The implementation of transformers that takes the same masks: [B, 1, T, S], and a call for each packed document;
    or [B, S], and all packed documents in one call."""
    dropout: bool = True


HALF = (torch.bfloat16, torch.float16)
IMPLEMENTATIONS: Mapping[str, Implementation] = {
    PLAIN: Implementation(),
    "cudnn": Implementation(widest={8: 128, 9: 128, 10: 128, 12: 128}, multiple=8, dtypes=HALF),
    "flash_attention_2": Implementation(
        module="flash_attn.flash_attn_interface",  # flash-attn 4 has a `flash_attn` too, without this
        install="pip install flash-attn --no-build-isolation",
        widest={8: 256, 9: 256, 10: 256, 12: 256},
        multiple=8,
        dtypes=HALF,
        masks="flash_attention_2",
    ),
    "flash_attention_3": Implementation(
        module="flash_attn_interface",
        install="build the folder hopper/ of flash-attention",
        widest={9: 256},
        multiple=8,
        dtypes=HALF,
        masks="flash_attention_2",
        dropout=False,
    ),
    "flash_attention_4": Implementation(
        module="flash_attn.cute",
        install="pip install hypenet-halo[flash4]",
        widest={9: 256, 10: 128, 11: 128},
        multiple=8,
        dtypes=HALF,
        masks="flash_attention_2",
        dropout=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Preference:
    """The order in which `auto` asks implementations."""

    order: tuple[str, ...]
    tokens: int = 0
    """It holds for rows of at least this many tokens."""


FASTEST: Mapping[tuple[int, bool], Sequence[Preference]] = {
    # On Hopper, sdpa and flash_attention_4 are measured (docs/benchmarks.md): at 512 tokens sdpa is faster, which takes
    # cuDNN's kernel by itself; at 16,384 and 131,072 flash_attention_4 is, and most of all for packed documents. The
    # others are not measured yet.
    (8, False): [Preference(order=("flash_attention_2", PLAIN))],
    (8, True): [Preference(order=("flash_attention_2", PLAIN))],
    (9, False): [
        Preference(order=("flash_attention_4", "flash_attention_3", PLAIN), tokens=16_384),
        Preference(order=(PLAIN,)),
    ],
    (9, True): [Preference(order=("flash_attention_4", "flash_attention_3", "flash_attention_2", PLAIN))],
    (10, False): [Preference(order=("flash_attention_4", PLAIN))],
    (10, True): [Preference(order=("flash_attention_4", "flash_attention_2", PLAIN))],
}
"""(first number of the compute capability, whether documents are packed) -> preferences, longest rows first. Elsewhere
`auto` takes sdpa."""


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What one model asks of attention in a stage."""

    tokens: int
    """T of a row; 0: rows of many lengths, most of them short."""
    head_dim: int
    packed: bool
    """Whether rows hold documents that must not see each other."""
    dropout: bool
    """Whether attention weights are dropped at random."""
    dtype: torch.dtype


def shape_of(config: Any, seq_len: int, packed: bool = False, *, trains: bool = False) -> AttentionShape:
    """Args:
    config: a model's configuration, or the settings of one that is trained from scratch.
    trains: whether the model is trained, with its dropout.
    """
    return AttentionShape(
        tokens=seq_len,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        packed=packed,
        dropout=trains and getattr(config, "attention_dropout", 0.0) > 0,
        dtype=training_dtype(),
    )


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a rank runs on."""

    capability: tuple[int, int] | None
    """The compute capability of its GPU. None: it has none."""
    packages: Mapping[str, str]
    """Implementations whose module is installed -> why it cannot be imported; empty: it can."""


@cache
def this_machine() -> Machine:
    if not on_gpu():
        return Machine(capability=None, packages={})
    modules = {name: known.module for name, known in IMPLEMENTATIONS.items() if known.module}
    found = {name: _fault(module) for name, module in modules.items() if _is_installed(module)}
    return Machine(capability=torch.cuda.get_device_capability(), packages=found)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # what it is a part of is not there, or cannot be imported
        return False


def _fault(module: str) -> str:
    try:
        import_module(module)
    except Exception as error:  # a package that was built for another torch may raise anything
        return first_line(error)
    return ""


def refusal(name: str, shape: AttentionShape | None = None, machine: Machine | None = None) -> str:
    """Why the implementation `name` cannot run here, and what to do, in one line. Empty: it can.

    Args:
        shape: what is asked of it. None: anything that it takes.
        machine: None: this one.
    """
    known, machine = IMPLEMENTATIONS[name], machine or this_machine()
    if known.widest:
        if machine.capability is None:
            return "it needs a CUDA GPU, and there is none: set attention to auto or sdpa"
        major, minor = machine.capability
        if major not in known.widest:
            runs = ", ".join(f"{number}.x" for number in known.widest)
            return f"it runs on GPUs of compute capability {runs}, not {major}.{minor}: set attention to auto or sdpa"
    if known.module and name not in machine.packages:
        return f"{known.module} is not installed: {known.install}, {INSTEAD}"
    if known.module and (fault := machine.packages[name]):
        return f"{known.module} cannot be imported ({fault}): install one that was built for this torch, {INSTEAD}"
    if shape is None:
        return ""
    if known.dtypes and shape.dtype not in known.dtypes:
        return f"it does not compute in {shape.dtype}: set attention to auto or sdpa"
    if shape.dropout and not known.dropout:
        return f"it has no dropout: set attention_dropout to 0 in the teacher's config.json, {INSTEAD}"
    if known.widest and machine.capability:
        widest = known.widest[machine.capability[0]]
        if shape.head_dim > widest or shape.head_dim % known.multiple:
            return (
                f"here its heads are multiples of {known.multiple} and at most {widest} wide, not {shape.head_dim}: "
                "set attention to auto or sdpa"
            )
    return ""


def choose(shape: AttentionShape, machine: Machine | None = None) -> str:
    """What `auto` takes: the first of FASTEST that can run."""
    machine = machine or this_machine()
    major = machine.capability[0] if machine.capability else 0
    for preference in FASTEST.get((major, shape.packed), ()):
        if shape.tokens >= preference.tokens:
            return next(name for name in preference.order if not refusal(name, shape, machine))
    return PLAIN


def attention_of_stage(config: Config, stage: str, model_config: Any) -> dict[Model, str]:
    """The implementation for each of a stage's models, by `Stage.models`.

    Args:
        model_config: the teacher's configuration; of pretraining, its settings.

    Raises:
        UserError: the implementation that the settings name cannot run here.
    """
    settings, chosen = getattr(config, stage, None), dict[Model, str]()
    for model in STAGES[stage].models:
        shape = shape_of(
            model_config,
            max(getattr(settings, "lengths", (getattr(settings, "seq_len", 0),))),
            getattr(settings, "mask_documents", False),
            trains=STAGES[stage].trains and model == "student",
        )
        chosen[model] = choose(shape) if config.attention == "auto" else config.attention
        check_attention(chosen[model], shape)
    return chosen


def check_attention(name: str, shape: AttentionShape | None = None) -> None:
    """Raises:
    UserError: the implementation cannot run here.
    """
    if name != "auto" and (reason := refusal(name, shape)):
        raise UserError(f"attention = {name}: {reason}")


def said_of(chosen: Mapping[str, Mapping[Model, str]]) -> str:
    """What `auto` took, in one line. `chosen`: stage -> model -> implementation, of one stage at least."""
    names = {name for of_stage in chosen.values() for name in of_stage.values()}
    models = list(dict.fromkeys(model for of_stage in chosen.values() for model in of_stage))
    if len(names) == 1:
        return f"attention: auto takes {names.pop()} for {' and '.join(models)}"
    of_models = []
    for model in models:
        stages: dict[str, list[str]] = {}
        for stage, of_stage in chosen.items():
            if model in of_stage:
                stages.setdefault(of_stage[model], []).append(stage)
        of_models.append(f"for the {model} " + ", ".join(f"{name} ({', '.join(s)})" for name, s in stages.items()))
    return f"attention: auto takes {'; '.join(of_models)}"
