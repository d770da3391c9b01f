"""What a conversion is made of: one TOML preset, a table for each stage, overrides on top.

    config = load_config("tiny", overrides=["--distill.lr", "5e-5"])

A preset names only what differs from the defaults below, which are the paper's (Tables 5 and 12), or from the shipped
preset that is its `base`. Unknown keys are refused with a suggestion. In a preset, a path that starts with "./" or
"../" is relative to the preset's file.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from halo.errors import UserError
from halo.tables import build, read_toml, suggest
from hypenet.configuration_hypenet import LIGHTNING

PRESETS = Path(__file__).parent / "presets"
Schedule = Literal["cosine", "constant", "wsd"]
TOP_K = 64
CACHE_GB = 64.0
COMMON_SENSE = ("arc_easy", "arc_challenge", "hellaswag", "winogrande", "piqa", "lambada_openai", "mmlu")
"""The paper's tasks, by LM-Evaluation-Harness's names."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The switches of HypeNet's ablations (Table 3, Figures 4 and 5), by the names of HypeNetConfig's keys."""

    attn_use_rope: bool = False
    """RoPE in attention layers. True: "w/ attention RoPE"."""
    attn_use_output_gate: bool = True
    """False: "w/o attention output gate"."""
    expand_kv_proj: bool = True
    """A key and value head in RNN layers for every query head. False: "w/o RNN GQA to MHA"."""
    lightning_use_rope: bool = True
    """False: "w/o RNN RoPE"."""
    lightning_use_qk_norm: bool = True
    """False: "w/o RNN QK-norm"."""
    lightning_use_output_gate: bool = True
    """False: "w/o RNN output gate"."""
    lightning_use_output_norm: bool = True
    """The norm before the output gate (Eq. 14)."""
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For another mixer than Lightning, by its name: what differs from its defaults. The string "none" is None."""

    def switches(self) -> dict[str, Any]:
        """As `hybrid_config` takes them."""
        options = {
            mixer: {name: None if value == "none" else value for name, value in given.items()}
            for mixer, given in self.mixer_options.items()
        }
        return asdict(self) | {"mixer_options": options}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where a stage's text comes from, and how it becomes samples."""

    source: str = ""
    """A folder or file of .txt, .jsonl or .parquet documents."""
    samples: int = 0
    """How many samples to prepare; 0 takes all the source gives, once."""
    needles: float = 0.0
    """The fraction of samples that hold a RULER-style needle and its question."""

    def __post_init__(self) -> None:
        _check(0 <= self.needles <= 1, "needles", self.needles, "from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of the trainer's loop. A batch counts whole sequences, over all ranks and accumulation steps."""

    seq_len: int
    batch: int
    micro_batch: int
    """The most sequences a rank takes at once: it takes the largest part of its share of the batch up to this."""
    steps: int
    lr: float
    min_lr: float = 1e-5
    """Where a cosine or wsd schedule ends."""
    schedule: Schedule = "cosine"
    warmup: int = 50
    """Steps of linear warm-up from 0 (Appendix B)."""
    decay: int = 0
    """The last steps of a wsd schedule, in which the LR falls to min_lr."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest gradient norm: of all layers together, in stage 1 of each alone; 0 turns clipping off."""
    activation_checkpointing: bool = False
    activation_offload: bool = False
    """Whether what activation checkpointing keeps waits for backward in host memory."""
    sequence_parallel: int = 1
    """How many ranks share a sequence, each with a part of its tokens (docs/long-context.md)."""
    seed: int = 0
    save_every: int = 500
    """Steps between checkpoints; the stage's end is always saved."""
    keep_last: int = 2
    """The newest checkpoints that are kept. With one alone, there is none to go back to where it is damaged."""
    keep_every: int = 0
    """Keep also the checkpoints whose step this divides, until the stage is finished; 0: none."""
    max_skipped: int = 10
    """Steps in a row that may be skipped, their loss or gradient not being finite. One more: back to a checkpoint."""
    profile_from: int = 0
    """The first step (0-based) that torch's profiler traces, on rank 0; see profile_steps."""
    profile_steps: int = 0
    """How many steps it traces, into the stage's tensorboard/; 0: none."""
    corpus: Corpus = field(default_factory=Corpus)
    shards: str = ""
    """A folder of prepared MDS shards, or its URL in object storage. Empty: they are prepared from `corpus`."""
    shards_cache: str = ""
    """A folder on each node's own disk for copies of shards: of a URL, of compressed ones, or of a slow folder's."""
    shards_cache_gb: float = CACHE_GB
    """The most that it holds (1e9 bytes)."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch", "micro_batch", "steps", "save_every", "keep_last", "sequence_parallel"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("lr", "min_lr", "warmup", "decay", "weight_decay", "clip", "profile_from", "profile_steps"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        caches = bool(self.shards_cache) or self.shards_cache_gb == CACHE_GB
        _check(caches, "shards_cache_gb", self.shards_cache_gb, f"left at {CACHE_GB} without shards_cache")
        for name in ("keep_every", "max_skipped"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _check(self.keep_every % self.save_every == 0, "keep_every", self.keep_every, "a multiple of save_every")
        offloads = self.activation_offload and not self.activation_checkpointing
        _check(not offloads, "activation_offload", "true", "false without activation_checkpointing")
        _check(len(self.betas) == 2, "betas", self.betas, "two numbers")
        _check(self.schedule != "wsd" or self.decay > 0, "decay", self.decay, "at least 1 for a wsd schedule")


@dataclass(frozen=True, kw_only=True)
class Pretrain(Training):
    """Training from scratch (Table 12), here for the embedded teacher."""

    vocab_size: int = 50_304
    hidden_size: int = 1024
    layers: int = 28
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    ffn: int = 3072
    rope_theta: float = 50_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.sequence_parallel == 1, "sequence_parallel", self.sequence_parallel, "1 in training from scratch")


@dataclass(frozen=True, kw_only=True)
class Finetune(Training):
    mask_documents: bool = False
    """Whether a token sees its own document alone, in attention and in RNN states. A document ends with the separator
    that the shards have after each, which has no target then; the loss is divided as if it had. False: a token sees all
    that stands before it in the sample, as published."""


@dataclass(frozen=True, kw_only=True)
class Distill(Training):
    teacher_placement: Literal["colocated", "dedicated"] = "colocated"
    """Whether every rank holds teacher and student, or some ranks of each node the teacher alone (`teacher_ranks`)."""
    teacher_sharded: bool = False
    """The ranks of a node that hold the teacher share one. False: each holds a whole one."""
    teacher_ranks: int = 0
    """How many ranks of each node hold the teacher, where it is dedicated: the node's last ones."""
    teacher_logits: Literal["factored", "full", "top_k"] = "factored"
    """In which form the teacher supplies its logits (halo/teacher/logits.py). Factored ones are exact."""
    teacher_top_k: int = TOP_K
    """How many logits of each token, with `top_k`."""
    temperature: float = 1.0
    """Of both distributions in the KL; the loss is scaled by its square."""
    cross_entropy: float = 0.0
    """The weight of the next token's cross entropy beside the KL. 0 is Eq. 10."""

    def __post_init__(self) -> None:
        super().__post_init__()
        dedicated = self.teacher_placement == "dedicated"
        _check(self.teacher_ranks >= 1 or not dedicated, "teacher_ranks", self.teacher_ranks, "at least 1 if dedicated")
        _check(self.teacher_ranks == 0 or dedicated, "teacher_ranks", self.teacher_ranks, "0 unless dedicated")
        alone = dedicated and self.teacher_ranks == 1
        _check(not (self.teacher_sharded and alone), "teacher_sharded", "true", "false where one rank is the teacher's")
        whole = self.sequence_parallel == 1 or not dedicated
        _check(whole, "teacher_placement", "dedicated", "colocated where ranks share a sequence")
        _check(self.teacher_top_k >= 1, "teacher_top_k", self.teacher_top_k, "at least 1")
        takes_k = self.teacher_logits == "top_k" or self.teacher_top_k == TOP_K
        _check(takes_k, "teacher_top_k", self.teacher_top_k, f"left at {TOP_K} unless teacher_logits is top_k")
        _check(self.temperature > 0, "temperature", self.temperature, "more than 0")
        _check(self.cross_entropy >= 0, "cross_entropy", self.cross_entropy, "at least 0")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Layer selection (Sec. 4.3)."""

    attention_layers: int = 0
    """How many attention layers to keep; 0 is the paper's floor(L / 4)."""
    layers: tuple[int, ...] = ()
    """Keep these layers (0-based) and measure nothing, e.g. a row of Table 7."""
    epsilon: float = 1e-6
    """Eq. 8's guard against division by zero. At the CSR's sampling error it also keeps noise from ranking layers."""
    needles: int = 500
    """Recall questions of each variant."""
    questions: int = 1000
    """Common-sense (CSR) questions."""
    seq_len: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("needles", "questions", "seq_len"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _check(self.epsilon > 0, "epsilon", self.epsilon, "more than 0")
        _check(len(set(self.layers)) == len(self.layers), "layers", self.layers, "without repeats")
        alone = not (self.layers and self.attention_layers)
        _check(alone, "attention_layers", self.attention_layers, "0 beside layers")


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """The choice of the attention logits scaling (Eq. 11), by loss on held-out documents."""

    form: Literal["hype", "constant"] = "hype"
    """What `candidates` are: bases a of s_t = log_a(t + a), or constants s_t (Figure 8)."""
    candidates: tuple[float, ...] = (100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
    seq_len: int = 65_536
    documents: int = 32
    """How many windows of seq_len tokens."""
    sequence_parallel: int = 1
    """How many ranks share a window, each with a part of its tokens."""

    def __post_init__(self) -> None:
        _check(bool(self.candidates) and min(self.candidates) > 1, "candidates", self.candidates, "numbers above 1")
        small = self.form == "hype" or max(self.candidates) <= 10
        _check(small, "candidates", self.candidates, "at most 10 where they are constants")
        for name in ("documents", "sequence_parallel"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Needle in a haystack over lengths (Table 2)."""

    lengths: tuple[int, ...] = (32_768, 65_536, 131_072, 262_144)
    samples: tuple[int, ...] = (500, 500, 500, 500)
    """Needle samples a cell, one number a length."""
    yarn_from: int = 40_960
    """The teacher's own length: beyond it YaRN's factor is length / yarn_from."""
    batch_tokens: int = 16_384
    """Tokens of one forward; a single longer sample goes alone."""
    sequence_parallel: int = 1
    """How many ranks share a sample, each with a part of its tokens: lengths that one GPU does not hold."""
    seed: int = 0

    def __post_init__(self) -> None:
        same = len(self.samples) == len(self.lengths) > 0
        _check(same, "samples", self.samples, "one number for each of lengths")
        _check(len(set(self.lengths)) == len(self.lengths), "lengths", self.lengths, "without repeats")
        _check(min(self.samples) >= 1, "samples", self.samples, "at least 1 each")
        _check(self.sequence_parallel >= 1, "sequence_parallel", self.sequence_parallel, "at least 1")


@dataclass(frozen=True, kw_only=True)
class CommonSense:
    """Common-sense reasoning, zero-shot, by LM-Evaluation-Harness (Appendix E.2)."""

    tasks: tuple[str, ...] = COMMON_SENSE
    """By the harness's names, or those of `task_folder`."""
    task_folder: str = ""
    """A folder of tasks of your own, in the harness's YAML."""
    samples: int = 0
    """Of each task the first so many; 0: all."""
    batch_tokens: int = 16_384
    """Tokens of one forward."""

    def __post_init__(self) -> None:
        _check(len(set(self.tasks)) == len(self.tasks) > 0, "tasks", self.tasks, "one name or more, without repeats")
        _check(self.samples >= 0, "samples", self.samples, "at least 0")
        _check(self.batch_tokens >= 1, "batch_tokens", self.batch_tokens, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str
    """The preset's name; runs/<name> is the default run folder."""
    teacher: str
    """A Hugging Face id, folder or GGUF file of a causal language model."""
    rnn_mixer: str = LIGHTNING
    architecture: Architecture = field(default_factory=Architecture)
    heldout: str = ""
    """Text whose held-out documents serve selection, the choice of a, and evaluation."""
    pretrain: Pretrain | None = None
    align: Training
    selection: Selection = field(default_factory=Selection)
    distill: Distill
    finetune: Finetune
    scaling: Scaling = field(default_factory=Scaling)
    niah: Evaluation = field(default_factory=Evaluation)
    csr: CommonSense = field(default_factory=CommonSense)

    def __post_init__(self) -> None:
        plain, mixer = Architecture(), self.rnn_mixer
        for name, value in vars(self.architecture).items():
            if name.startswith("lightning_") and mixer != LIGHTNING and value != getattr(plain, name):
                raise ValueError(f"architecture.{name} is Lightning's: set architecture.mixer_options.{mixer} instead")


def load_config(preset: str | Path, overrides: Sequence[str] = (), recorded: Path | None = None) -> Config:
    """Read a preset, apply `--table.key value` overrides, check every key, type and value.

    Args:
        preset: the name of a shipped preset, or the path of a TOML file.
        overrides: alternating `--table.key` (or `--key`) and value, as left over by a command line.
        recorded: a run's config.toml. Where it exists, it stands in for the preset: a run remembers its settings.

    Raises:
        UserError: an unknown preset or key (with the nearest that exists), or a value of the wrong type.
    """
    path = Path(preset)
    if path.suffix != ".toml":
        path = PRESETS / f"{preset}.toml"
    if not path.is_file():
        names = sorted(p.stem for p in PRESETS.glob("*.toml"))
        raise UserError(f"no preset '{preset}'{suggest(str(preset), names)}; presets: {', '.join(names)}")
    table = {"name": path.stem} | _read_preset(path)
    if recorded is not None and recorded.is_file():
        path, table = recorded, read_toml(recorded) | {"name": table["name"]}
    for key, value in _pairs(overrides):
        _assign(table, key, value)
    return build(Config, table, where=str(path))


def _read_preset(path: Path) -> dict[str, Any]:
    """A preset, on top of the shipped one that it names as its `base`, if any."""
    table = _anchor(read_toml(path), path.parent)
    base = table.pop("base", None)
    if base is None:
        return table
    if not (PRESETS / f"{base}.toml").is_file():
        names = [shipped.stem for shipped in PRESETS.glob("*.toml")]
        raise UserError(f"{path} names a base that is no shipped preset: '{base}'{suggest(str(base), names)}")
    merged = _read_preset(PRESETS / f"{base}.toml")
    for key, value in table.items():
        merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    return merged


def _pairs(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """`["--a.b", "1", "--c=2"]` -> `[("a.b", "1"), ("c", "2")]`."""
    pairs, rest = [], list(overrides)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"cannot read '{word}': overrides are written --table.key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"--{key} has no value")
            value = rest.pop(0)
        words = key.split(".")
        keys = [
            word if before == "mixer_options" else word.replace("-", "_")  # a mixer's name may have a hyphen
            for before, word in zip(["", *words], words, strict=False)
        ]
        pairs.append((".".join(keys), value))
    return pairs


def _assign(table: dict[str, Any], key: str, text: str) -> None:
    *tables, last = key.split(".")
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(f"--{key}: '{name}' is a value, not a table")
    try:
        table[last] = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        table[last] = text


def _anchor(value: Any, folder: Path) -> Any:
    """Make "./x" and "../x" absolute, from the preset's folder."""
    if isinstance(value, dict):
        return {k: _anchor(v, folder) for k, v in value.items()}
    if isinstance(value, str) and value.startswith(("./", "../")):
        return str((folder / value).resolve())
    return value


def _check(holds: bool, name: str, value: Any, must_be: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {must_be}, not {list(value) if isinstance(value, tuple) else value}")
