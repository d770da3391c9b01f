"""The settings of a conversion: one dataclass for each stage, and `Config`, which holds them all.

Defaults are the paper's (Tables 5 and 12). The string under a field explains it: `--help` of the launchers and the
presets' JSON schema are made from these (halo/preset.py, halo/schema.py). A value that is out of range, or that has
no effect beside the others, raises ValueError; the message begins with the field's name.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from halo import bounds

Schedule = Literal["cosine", "constant", "wsd"]
AttentionName = Literal["auto", "sdpa", "cudnn", "flash_attention_2", "flash_attention_3", "flash_attention_4"]
TOP_K = 64
MIN_LR = 1e-5
CACHE_GB = 64.0
PROBE_SAMPLES = 16
COMMON_SENSE = ("arc_easy", "arc_challenge", "hellaswag", "winogrande", "piqa", "lambada_openai", "mmlu")
"""The paper's tasks, by LM-Evaluation-Harness's names."""
DEFAULT_MIXER = "lightning-attn"
"""`LIGHTNING` of hypenet. Repeated, because hypenet imports torch and transformers, and settings are read without."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The switches of HypeNet's ablations (Table 3, Figures 4 and 5), by the names of HypeNetConfig's keys."""

    attn_use_rope: bool = False
    """RoPE in attention layers. True: "w/ attention RoPE"."""
    attn_use_output_gate: bool = True
    """The output gate of attention layers. False: "w/o attention output gate"."""
    expand_kv_proj: bool = True
    """Give each query head of an RNN layer its own key and value head. False: "w/o RNN GQA to MHA"."""
    lightning_use_rope: bool = True
    """RoPE in Lightning layers. False: "w/o RNN RoPE"."""
    lightning_use_qk_norm: bool = True
    """The norms of queries and keys in Lightning layers. False: "w/o RNN QK-norm"."""
    lightning_use_output_gate: bool = True
    """The output gate of Lightning layers. False: "w/o RNN output gate"."""
    lightning_use_output_norm: bool = True
    """The norm before the output gate of Lightning layers (Eq. 14)."""
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of a mixer other than Lightning that differ from its defaults, by the mixer's name. "none" is None."""

    def switches(self) -> dict[str, Any]:
        """The keyword arguments of `hybrid_config`."""
        options = {
            mixer: {name: None if value == "none" else value for name, value in given.items()}
            for mixer, given in self.mixer_options.items()
        }
        return asdict(self) | {"mixer_options": options}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The text of a stage that prepares its own shards."""

    source: bounds.Line = ""
    """A folder or file of .txt, .jsonl or .parquet documents."""
    samples: bounds.CountOrNone = 0
    """The number of samples to prepare. 0: as many as the source gives, each document used once."""
    needles: bounds.Share = 0.0
    """The fraction of samples that contain a RULER-style needle and its question."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings that every training stage has. A batch counts whole sequences, over all ranks and accumulation
    steps."""

    seq_len: bounds.Tokens
    """Tokens in a sample."""
    batch: bounds.Samples
    """Samples in an optimizer step, over all ranks."""
    micro_batch: bounds.Samples
    """The most samples of one forward on a rank. A rank splits its share of the batch into parts of at most this."""
    steps: bounds.Count
    """Optimizer steps of the stage."""
    lr: bounds.Rate
    """The learning rate after warm-up."""
    min_lr: bounds.Rate = MIN_LR
    """The learning rate at the end of a cosine or wsd schedule."""
    schedule: Schedule = "cosine"
    """The learning rate after warm-up: cosine decay, constant, or constant with a decay at the end (wsd)."""
    warmup: bounds.CountOrNone = 50
    """Steps of linear warm-up from 0 (Appendix B)."""
    decay: bounds.CountOrNone = 0
    """The last steps of a wsd schedule, in which the learning rate falls to min_lr."""
    betas: tuple[bounds.Decay, bounds.Decay] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment."""
    weight_decay: bounds.Rate = 0.0
    """AdamW's weight decay."""
    clip: bounds.Norm = 1.0
    """The largest gradient norm: of all layers together, in stage 1 of each layer alone. 0: no clipping."""
    sequence_parallel: bounds.Ranks = 1
    """The number of ranks that share a sequence, each with a part of its tokens (docs/long-context.md)."""
    seed: bounds.Seed = 0
    """The seed of initial weights, shuffling and the preparation of samples."""
    save_every: bounds.Count = 500
    """Steps between checkpoints. The end of the stage is always saved."""
    keep_last: bounds.Count = 2
    """The number of newest checkpoints to keep. With 1, a damaged checkpoint leaves none to return to."""
    keep_every: bounds.CountOrNone = 0
    """Also keep checkpoints at multiples of this step, until the stage is finished. 0: none."""
    max_skipped: bounds.CountOrNone = 10
    """Consecutive steps that may be skipped for a non-finite loss or gradient, before the return to a checkpoint."""
    profile_from: bounds.CountOrNone = 0
    """The first step (0-based) that torch's profiler traces, on rank 0. Needs profile_steps."""
    profile_steps: bounds.CountOrNone = 0
    """The number of steps to trace, into the stage's tensorboard/. 0: no trace."""
    corpus: Corpus = field(default_factory=Corpus)
    """Text from which the stage prepares its own shards, if `shards` is empty."""
    shards: bounds.Line = ""
    """A folder of prepared MDS shards, or its URL in object storage. Empty: prepare them from `corpus`."""
    shards_cache: bounds.Line = ""
    """A folder on each node's own disk for copies of shards: remote, compressed, or on a slow file system."""
    shards_cache_gb: bounds.Giga = CACHE_GB
    """The largest size of shards_cache (in 1e9 bytes)."""

    def __post_init__(self) -> None:
        _check(self.keep_every % self.save_every == 0, "keep_every", self.keep_every, "a multiple of save_every")
        cached = bool(self.shards_cache) or self.shards_cache_gb == CACHE_GB
        _check(cached, "shards_cache_gb", self.shards_cache_gb, f"left at {CACHE_GB} without shards_cache")
        if self.schedule == "wsd":
            _check(self.decay > 0, "decay", self.decay, "at least 1 for a wsd schedule")
            _check(self.decay <= self.steps, "decay", self.decay, f"at most steps ({self.steps})")
        else:
            _check(self.decay == 0, "decay", self.decay, "0 unless schedule is wsd")
        falls = self.schedule != "constant" or self.min_lr == MIN_LR
        _check(falls, "min_lr", self.min_lr, f"left at {MIN_LR} with a constant schedule")
        traced = self.profile_steps > 0 or self.profile_from == 0
        _check(traced, "profile_from", self.profile_from, "0 without profile_steps")
        _check(self.profile_from < self.steps, "profile_from", self.profile_from, f"less than steps ({self.steps})")


@dataclass(frozen=True, kw_only=True)
class Align(Training):
    """Stage 1: each RNN layer learns the output of the attention layer that it may replace (Sec. 4.2)."""


@dataclass(frozen=True, kw_only=True)
class Pretrain(Training):
    """Training from scratch (Table 12), here for the embedded teacher."""

    vocab_size: bounds.Width = 50_304
    """Tokens of the vocabulary. The tokenizer is trained on the corpus."""
    hidden_size: bounds.Width = 1024
    """The width of the residual stream."""
    layers: bounds.Layers = 28
    """The number of layers."""
    heads: bounds.Width = 16
    """Query heads of a layer."""
    kv_heads: bounds.Width = 8
    """Key and value heads of a layer."""
    head_dim: bounds.Width = 128
    """The width of a head."""
    ffn: bounds.Width = 3072
    """The inner width of an MLP."""
    rope_theta: bounds.RopeBase = 50_000.0
    """The base of RoPE's frequencies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.sequence_parallel == 1, "sequence_parallel", self.sequence_parallel, "1 in training from scratch")
        _check(self.heads % self.kv_heads == 0, "kv_heads", self.kv_heads, f"a divisor of heads ({self.heads})")
        _check(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even, for RoPE")


@dataclass(frozen=True, kw_only=True)
class CheckpointedTraining(Training):
    """Training of the whole hybrid, where activations may be recomputed in the backward pass."""

    activation_checkpointing: bool = False
    """Keep only the inputs of layers for the backward pass, and recompute the other activations."""
    kept_layers: bounds.LayersOrAuto = -1
    """Layers that keep all activations all the same. -1: as many as fit in the GPU's memory."""
    activation_offload: bool = False
    """Keep these inputs in host memory until the backward pass. Needs activation_checkpointing."""
    probe_every: bounds.CountOrNone = 0
    """Steps between evaluations on `heldout` during training (docs/guide.md). The last step has one too. 0: none."""
    probe_lengths: tuple[bounds.Tokens, ...] = ()
    """Tokens of their needle samples. Empty: seq_len, and 2 and 4 times as many."""
    probe_samples: bounds.Samples = PROBE_SAMPLES
    """Their needle samples of each length and variant, and their windows of seq_len tokens of text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths, probed = self.probe_lengths, self.probe_every > 0
        _check(len(set(lengths)) == len(lengths), "probe_lengths", lengths, "without repeats")
        _check(probed or not lengths, "probe_lengths", lengths, "empty without probe_every")
        as_set = probed or self.probe_samples == PROBE_SAMPLES
        _check(as_set, "probe_samples", self.probe_samples, f"left at {PROBE_SAMPLES} without probe_every")
        offloads = self.activation_offload and not self.activation_checkpointing
        _check(not offloads, "activation_offload", "true", "false without activation_checkpointing")
        kept = self.kept_layers == -1 or self.activation_checkpointing
        _check(kept, "kept_layers", self.kept_layers, "-1 without activation_checkpointing")


@dataclass(frozen=True, kw_only=True)
class Finetune(CheckpointedTraining):
    """Stage 3: finetuning of the hybrid at long context, without the teacher."""

    mask_documents: bool = False
    """Isolate documents in attention and state. A document's last token has no target but still counts in the
    divisor. False: a token sees all earlier tokens of its sample, as published."""


@dataclass(frozen=True, kw_only=True)
class Distill(CheckpointedTraining):
    """Stage 2: the hybrid learns the teacher's logits, end to end (Eq. 10)."""

    teacher_placement: Literal["colocated", "dedicated"] = "colocated"
    """Colocated: every rank holds teacher and student. Dedicated: some ranks of each node hold only the teacher."""
    teacher_sharded: bool = False
    """Shard the teacher over the ranks of a node that hold it. False: each of them has a full copy."""
    teacher_ranks: bounds.RanksOrNone = 0
    """The number of ranks of each node, its last ones, that hold a dedicated teacher."""
    teacher_fp8: bool = False
    """Multiply in FP8 in the teacher's decoder layers: faster, smaller, less exact (docs/distillation.md)."""
    teacher_logits: Literal["factored", "full", "top_k"] = "factored"
    """The form in which the teacher supplies its logits (halo/teacher/logits.py). Factored ones are exact."""
    teacher_top_k: bounds.Width = TOP_K
    """The number of logits per token with teacher_logits = top_k."""
    temperature: bounds.Temperature = 1.0
    """The temperature of both distributions in the KL. The loss is multiplied by its square."""
    cross_entropy: bounds.Rate = 0.0
    """The weight of the next token's cross entropy beside the KL. 0 is Eq. 10."""

    def __post_init__(self) -> None:
        super().__post_init__()
        dedicated = self.teacher_placement == "dedicated"
        _check(self.teacher_ranks >= 1 or not dedicated, "teacher_ranks", self.teacher_ranks, "at least 1 if dedicated")
        _check(self.teacher_ranks == 0 or dedicated, "teacher_ranks", self.teacher_ranks, "0 unless dedicated")
        alone = dedicated and self.teacher_ranks == 1
        _check(not (self.teacher_sharded and alone), "teacher_sharded", "true", "false where one rank is the teacher's")
        gathered = self.teacher_fp8 and self.teacher_sharded
        _check(not gathered, "teacher_fp8", "true", "false with teacher_sharded, which gathers weights in bf16")
        whole = self.sequence_parallel == 1 or not dedicated
        _check(whole, "teacher_placement", "dedicated", "colocated where ranks share a sequence")
        takes_k = self.teacher_logits == "top_k" or self.teacher_top_k == TOP_K
        _check(takes_k, "teacher_top_k", self.teacher_top_k, f"left at {TOP_K} unless teacher_logits is top_k")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Layer selection (Sec. 4.3)."""

    attention_layers: bounds.LayersOrNone = 0
    """The number of attention layers to keep. 0: the paper's floor(L / 4)."""
    layers: tuple[bounds.LayersOrNone, ...] = ()
    """Keep these layers (0-based) and measure nothing, e.g. a row of Table 7."""
    epsilon: bounds.Epsilon = 1e-6
    """The epsilon of Eq. 8, against division by zero. As large as the CSR's sampling error, it also damps noise."""
    needles: bounds.Samples = 500
    """The number of recall questions of each needle variant."""
    questions: bounds.Samples = 1000
    """The number of common-sense (CSR) questions."""
    seq_len: bounds.Tokens = 512
    """Tokens of a recall question, its context included."""
    seed: bounds.Seed = 0
    """The seed of the questions."""

    def __post_init__(self) -> None:
        _check(len(set(self.layers)) == len(self.layers), "layers", self.layers, "without repeats")
        alone = not (self.layers and self.attention_layers)
        _check(alone, "attention_layers", self.attention_layers, "0 beside layers")


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """The choice of the attention logits scaling (Eq. 11), by needle recall and loss on held-out text."""

    form: Literal["hype", "constant"] = "hype"
    """The meaning of `candidates`: bases a of s_t = log_a(t + a), or constants s_t (Figure 8)."""
    candidates: tuple[bounds.Scale, ...] = (100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
    """The values to compare, with each other and with no scaling."""
    allow_none: bool = True
    """Whether no scaling may be chosen. False: it is only measured."""
    lengths: tuple[bounds.Window, ...] = (16_384, 65_536)
    """The context lengths, in tokens."""
    needles: bounds.SamplesOrNone = 32
    """The number of needle samples of each variant at each length. 0: the loss alone decides, as in the paper."""
    documents: bounds.Samples = 32
    """The number of windows of held-out text at each length, whose loss is measured; long documents come first."""
    sequence_parallel: bounds.Ranks = 1
    """The number of ranks that share a sample, each with a part of its tokens."""
    seed: bounds.Seed = 0
    """The seed of the needle samples."""

    def __post_init__(self) -> None:
        names = {f"{candidate:g}" for candidate in self.candidates}
        _check(len(names) == len(self.candidates) > 0, "candidates", self.candidates, "of 6 different digits")
        small = self.form == "hype" or max(self.candidates) <= 10
        _check(small, "candidates", self.candidates, "at most 10 where they are constants")
        distinct = len(set(self.lengths)) == len(self.lengths) > 0
        _check(distinct, "lengths", self.lengths, "one number or more, without repeats")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Needle in a haystack over lengths (Table 2)."""

    lengths: tuple[bounds.Tokens, ...] = (32_768, 65_536, 131_072, 262_144)
    """The context lengths, in tokens."""
    samples: tuple[bounds.Samples, ...] = (500, 500, 500, 500)
    """The number of samples of a table cell, for each of `lengths`."""
    yarn_from: bounds.Tokens = 40_960
    """The teacher's own context length. Beyond it, YaRN's factor is length / yarn_from."""
    batch_tokens: bounds.Count = 16_384
    """The most tokens of one forward. A longer sample is evaluated alone."""
    sequence_parallel: bounds.Ranks = 1
    """The number of ranks that share a sample, each with a part of its tokens, for lengths that exceed one GPU."""
    seed: bounds.Seed = 0
    """The seed of the samples."""

    def __post_init__(self) -> None:
        same = len(self.samples) == len(self.lengths) > 0
        _check(same, "samples", self.samples, "one number for each of lengths")
        _check(len(set(self.lengths)) == len(self.lengths), "lengths", self.lengths, "without repeats")


@dataclass(frozen=True, kw_only=True)
class CommonSense:
    """Common-sense reasoning, zero-shot, by LM-Evaluation-Harness (Appendix E.2)."""

    tasks: tuple[bounds.Word, ...] = COMMON_SENSE
    """Names of the harness's tasks, or of those in `task_folder`."""
    task_folder: bounds.Line = ""
    """A folder with your own tasks, in the harness's YAML, and Python, which it runs. Name them in `tasks`."""
    samples: bounds.CountOrNone = 0
    """Evaluate only the first samples of each task, this many. 0: all."""
    batch_tokens: bounds.Count = 16_384
    """The most tokens of one forward."""

    def __post_init__(self) -> None:
        _check(len(set(self.tasks)) == len(self.tasks) > 0, "tasks", self.tasks, "one name or more, without repeats")
        named = self.tasks != COMMON_SENSE or not self.task_folder
        _check(named, "task_folder", self.task_folder, "empty unless tasks names tasks of it")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a conversion."""

    name: bounds.FolderName
    """The preset's name. runs/<name> is the default run folder."""
    teacher: bounds.Word
    """A Hugging Face id, folder or GGUF file of a causal language model."""
    rnn_mixer: bounds.Word = DEFAULT_MIXER
    """The RNN mixer of the layers that replace attention."""
    attention: AttentionName = "auto"
    """What computes softmax attention, of teacher and student. Auto: the fastest that can run (docs/guide.md)."""
    architecture: Architecture = field(default_factory=Architecture)
    """The switches of HypeNet's ablations."""
    heldout: bounds.Line = ""
    """A folder or file with held-out documents, which selection, scaling and evaluation measure on."""
    pretrain: Pretrain | None = None
    """Training a teacher from scratch."""
    align: Align
    """Stage 1."""
    selection: Selection = field(default_factory=Selection)
    """Layer selection."""
    distill: Distill
    """Stage 2."""
    finetune: Finetune
    """Stage 3."""
    scaling: Scaling = field(default_factory=Scaling)
    """The choice of the attention logits scaling."""
    niah: Evaluation = field(default_factory=Evaluation)
    """Needle in a haystack."""
    csr: CommonSense = field(default_factory=CommonSense)
    """Common-sense reasoning."""

    def __post_init__(self) -> None:
        plain, mixer = Architecture(), self.rnn_mixer
        for name, value in vars(self.architecture).items():
            if name.startswith("lightning_") and mixer != DEFAULT_MIXER and value != getattr(plain, name):
                raise ValueError(f"architecture.{name} is Lightning's: set architecture.mixer_options.{mixer} instead")


def _check(holds: bool, name: str, value: Any, must_be: str) -> None:
    if not holds:
        value = list(value) if isinstance(value, tuple) else value
        raise ValueError(f"{name} must be {must_be}, not {bounds.shown(str(value))}")
