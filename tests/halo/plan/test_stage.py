"""Plans: plain arithmetic on sizes, what must be less when one does more, and the dry run against real bytes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from halo.config import Config
from halo.errors import UserError
from halo.plan.advice import advice
from halo.plan.assumptions import GIB
from halo.plan.cluster import Cluster, Setup, Zero
from halo.plan.load import Models, build_models
from halo.plan.shapes import PUBLISHED, teacher_shapes
from halo.plan.stage import StagePlan, plan_stage, stages_of
from halo.plan.text import assumptions, heading, table, verdict
from halo.preset import load_config
from halo.training.gpus import find_gpu
from tests.halo.teachers import teacher_config

DS_CONFIGS = Path(__file__).parents[3] / "ds_configs"
PRESETS = ["hypenet-2b", "hypenet-5b", "hypenet-9b"]


@pytest.fixture(scope="module")
def nine() -> tuple[Config, Models]:
    config = load_config("hypenet-9b")
    return config, build_models(config)


def zero(name: str, ranks: int) -> Zero:
    return Zero.read(json.loads((DS_CONFIGS / f"{name}.json").read_text()), ranks)


def plan(
    of: tuple[Config, Models],
    stage: str = "distill",
    *,
    gpu: str = "h200",
    nodes: int = 1,
    gpus_per_node: int = 8,
    ds_config: str = "zero3",
    **settings,
) -> StagePlan:
    config, models = of
    setup = Setup(
        training=replace(getattr(config, stage), **settings),
        cluster=Cluster(gpu=find_gpu(gpu), nodes=nodes, gpus_per_node=gpus_per_node),
        zero=zero(ds_config, nodes * gpus_per_node),
    )
    return plan_stage(models, stage, setup)


# Sizes


def test_the_published_shapes_are_the_teachers(nine):
    for name in PUBLISHED:
        known, tested = teacher_shapes(name)[0], teacher_config(name)
        for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "head_dim", "tie_word_embeddings"):
            assert getattr(known, key) == getattr(tested, key), key
    assert sum(p.numel() for p in nine[1].teacher.parameters()) == pytest.approx(8.19e9, rel=1e-3)


@pytest.mark.parametrize(("preset", "billions"), list(zip(PRESETS, [1.93, 4.82, 9.47], strict=True)))
def test_every_stage_trains_what_it_should(preset, billions):
    config = load_config(preset)
    models = build_models(config)
    trained = {stage: plan((config, models), stage).load.parameters for stage in stages_of(config)}
    assert trained["distill"] == trained["finetune"] == pytest.approx(billions * 1e9, rel=1e-2)
    # Stage 1: q, k, v, o and z of every layer, and three norms.
    shape = models.teacher.config
    width, heads = shape.hidden_size, shape.num_attention_heads * 128
    assert trained["align"] == shape.num_hidden_layers * (5 * width * heads + 2 * 128 + heads)


def test_what_zero_cuts(nine):
    """bf16 weights and gradients, fp32 weights and two moments: 16 bytes a parameter, over the ranks."""
    whole, cut = plan(nine, ds_config="zero1", gpus_per_node=1), plan(nine, gpus_per_node=2)
    n = 9_474_302_976
    assert whole.load.parameters == n
    assert [whole.memory[part] for part in ("parameters", "optimizer", "gradients")] == [2 * n, 12 * n, 2 * n]
    assert [cut.memory[part] for part in ("parameters", "optimizer", "gradients")] == [n, 6 * n, n]
    assert (whole.checkpoint, cut.checkpoint) == (14 * n, 12 * n)


def test_a_sharded_teacher_keeps_head_and_embedding_whole(nine):
    whole, sharded = (plan(nine, teacher_sharded=how) for how in (False, True))
    teacher, ends = whole.memory["teacher"] / 2, 2 * 151_936 * 4096 + 4096
    assert teacher == pytest.approx(8.19e9, rel=1e-3)
    assert sharded.memory["teacher"] / 2 == pytest.approx(ends + (teacher - ends) / 8)
    assert sharded.time["exchange not hidden"] > whole.time["exchange not hidden"]


def test_a_teacher_in_fp8(nine):
    """A byte a weight of its layers, four a row, and two of all else: norms, embedding and head."""
    plain, fp8 = (plan(nine, teacher_fp8=how) for how in (False, True))
    ends, norms = 2 * 151_936 * 4096, 4096 + 36 * (2 * 4096 + 2 * 128)
    rows = 36 * (2 * 4096 + 2 * 1024 + 2 * 12_288 + 4096)
    weights = plain.memory["teacher"] / 2 - ends - norms
    assert fp8.memory["teacher"] == 2 * (ends + norms) + weights + 4 * rows
    assert 0.6 * plain.time["teacher"] < fp8.time["teacher"] < 0.75 * plain.time["teacher"]
    assert "teacher whole, in FP8, on every GPU" in table(fp8)
    assert "teacher_sharded" not in advice(nine[1], plan(nine, gpu="l40s", teacher_fp8=True))
    with pytest.raises(UserError, match=r"NVIDIA A100-SXM4-80GB has no FP8 products: set it to false"):
        plan(nine, gpu="a100", teacher_fp8=True)


def test_an_optimizer_on_the_host(nine):
    there, here = plan(nine, ds_config="zero3_offload"), plan(nine)
    assert there.memory["optimizer"] == 0
    assert there.needed < here.needed
    assert (there.host, here.host) == ((12 + 6 + 2) * there.load.parameters, 0)
    assert there.time["optimizer"] > 10 * here.time["optimizer"]


# What must be less


def test_zero3_counts_the_head_and_two_layers_or_what_the_json_allows(nine):
    config, models = nine
    whole = models.hybrid.lm_head.weight.nbytes
    one = max(sum(p.nbytes for p in layer.parameters()) for layer in models.hybrid.model.layers)

    def gathered(**changes: object) -> float:
        settings = {"stage": 3, "stage3_prefetch_bucket_size": "auto", "reduce_bucket_size": "auto"} | changes
        zero = Zero.read({"zero_optimization": settings}, 8)
        return plan_stage(
            models, "distill", Setup(training=config.distill, cluster=Cluster(gpu=find_gpu("h200")), zero=zero)
        ).memory["gathered"]

    auto = {"stage3_max_live_parameters": "auto", "stage3_max_reuse_distance": "auto"}
    assert plan(nine).memory["gathered"] == gathered(**auto) == whole + 2 * one
    assert gathered(**auto, stage3_prefetch_bucket_size=0) == whole + one
    assert gathered(**auto | {"stage3_max_live_parameters": 2_000_000_000}) == 4e9
    assert gathered(**auto | {"stage3_max_reuse_distance": 1_000_000_000}) == whole + 5 * one


def test_more_ranks_need_less_memory_under_zero3(nine):
    needed = [plan(nine, gpus_per_node=ranks, micro_batch=1).needed for ranks in (1, 2, 4, 8)]
    needed += [plan(nine, nodes=nodes, micro_batch=1).needed for nodes in (2, 4)]
    assert needed == sorted(needed, reverse=True)


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_activation_checkpointing_needs_less_memory_and_more_time(nine, stage):
    options = [
        {"activation_checkpointing": False},
        *({"activation_checkpointing": True, "kept_layers": n} for n in (36, 9, 0)),
    ]
    plans = [plan(nine, stage, **option) for option in options]
    assert [p.needed for p in plans] == sorted((p.needed for p in plans), reverse=True)
    assert [p.seconds for p in plans] == sorted(p.seconds for p in plans)
    assert plans[0].mfu > plans[-1].mfu


def test_as_many_layers_as_fit_keep_their_activations(nine):
    kept = [plan(nine, gpu=gpu, gpus_per_node=8, micro_batch=12).load.kept for gpu in ("a100-40gb", "h100", "b200")]
    assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == 36
    p = plan(nine, gpu="h100", gpus_per_node=8, micro_batch=12, seq_len=1024)
    assert 0 < p.load.kept < 36 and p.fits
    more = replace(p.setup, training=replace(p.setup.training, kept_layers=p.load.kept + 8))
    assert not plan_stage(nine[1], "distill", more).fits


def test_smaller_micro_batches_need_less_memory(nine):
    needed = [plan(nine, micro_batch=size, activation_checkpointing=False).needed for size in (12, 6, 3, 1)]
    assert needed == sorted(needed, reverse=True)
    odd = plan(nine, micro_batch=5)
    assert (odd.micro_batch, odd.accumulation) == (4, 3)  # of a share of 12


def test_each_stage_of_zero_needs_no_more_than_the_one_before(nine):
    needed = [plan(nine, ds_config=f"zero{stage}", gpus_per_node=4).needed for stage in (1, 2, 3)]
    assert needed == sorted(needed, reverse=True)


def test_faster_gpus_take_less_time_and_slower_networks_more(nine):
    assert plan(nine, gpu="h200").seconds < plan(nine, gpu="a100").seconds
    config, models = nine
    cluster = Cluster(gpu=find_gpu("h200"), nodes=4)
    slow = replace(cluster, gpu=replace(cluster.gpu, network=1e9))
    fast, slower = (
        plan_stage(models, "distill", Setup(training=config.distill, cluster=c, zero=zero("zero3", c.ranks))).seconds
        for c in (cluster, slow)
    )
    assert fast < slower


def test_time_tokens_and_hours_agree(nine):
    p = plan(nine, nodes=2)
    assert p.seconds == sum(p.time.values())
    assert p.tokens_per_second == pytest.approx(96 * 512 / p.seconds)
    assert p.gpu_hours == pytest.approx(20_000 * p.seconds * 16 / 3600)
    assert p.probe == 0
    assert "probe" not in table(p)
    probed = plan(nine, nodes=2, probe_every=3000, probe_lengths=(512,), probe_samples=32)  # as many tokens as a step
    assert 0 < probed.probe < p.time["layers"] / 2
    assert probed.gpu_hours == pytest.approx(p.gpu_hours + 7 * probed.probe * 16 / 3600)
    assert "an evaluation (probe_every), s" in table(probed)
    assert p.mfu == pytest.approx(p.tokens_per_second * p.load.flops_per_token / 16 / 989e12)
    assert 0.1 < p.mfu < 0.7


TWELVE, THIRTY_TWO = {"batch": 12}, {"batch": 32, "micro_batch": 32}
WITH, WITHOUT = {"activation_checkpointing": True}, {"activation_checkpointing": False}
NONE_KEPT = WITH | {"kept_layers": 0}


@pytest.mark.parametrize(
    ("preset", "layers", "gpu", "ds_config", "stage", "settings", "seconds", "gib"),
    [
        ("hypenet-2b", 28, "h100", "zero1", "align", THIRTY_TWO, 0.185, 13.0),
        ("hypenet-2b", 28, "h100", "zero1", "distill", TWELVE | WITHOUT, 0.192, 44.2),
        ("hypenet-2b", 28, "h100", "zero1", "distill", TWELVE | NONE_KEPT, 0.288, None),
        ("hypenet-2b", 28, "h100", "zero1", "finetune", {"batch": 1} | NONE_KEPT, 0.598, 30.5),
        ("hypenet-2b", 28, "h100", "zero1", "finetune", {"batch": 1}, 0.418, 63.7),
        ("hypenet-2b", 28, "h100", "zero1", "finetune", {"batch": 1, "seq_len": 131_072} | NONE_KEPT, 7.4, None),
        ("hypenet-5b", 36, "h200", "zero3", "distill", {"batch": 24, "gpus_per_node": 2}, 0.642, 76.2),
        ("hypenet-9b", 36, "h200", "zero3", "finetune", NONE_KEPT | {"batch": 2, "gpus_per_node": 2}, 2.282, 84.7),
        ("hypenet-9b", 18, "h200", "zero3", "distill", TWELVE | NONE_KEPT, 0.589, 95.6),
        ("hypenet-9b", 18, "h200", "zero3", "distill", TWELVE | WITHOUT, 0.496, 107.9),
        ("hypenet-9b", 36, "h200", "zero1", "align", THIRTY_TWO, 0.844, 66.0),
    ],
)
def test_a_plan_is_what_was_measured(tmp_path, preset, layers, gpu, ds_config, stage, settings, seconds, gib):
    """By `benchmarks.stages` (docs/benchmarks.md): memory within a tenth, time within a fifth.

    All on one GPU but the 5B: where there are to be two, the other was not there, and time lacks the exchange. Memory
    is left out where it was measured when an optimizer's step took all gradients at once.
    """
    config = load_config(preset)
    shapes = teacher_config(config.teacher)
    shapes.num_hidden_layers, shapes.layer_types = layers, shapes.layer_types[:layers]
    shapes.save_pretrained(tmp_path)
    config = replace(config, teacher=str(tmp_path))
    settings = {"gpus_per_node": 1} | settings
    planned = plan((config, build_models(config)), stage, gpu=gpu, ds_config=ds_config, **settings)
    if gib is not None:
        assert planned.allocated / GIB == pytest.approx(gib, rel=0.1)
    assert planned.seconds == pytest.approx(seconds, rel=0.2)


# What is said


def test_advice_makes_it_fit(nine):
    p = plan(nine, gpu="a100", activation_checkpointing=False, seq_len=1024)
    assert not p.fits
    words = advice(nine[1], p)
    assert words.startswith("--distill.activation_checkpointing true would make it fit, in ")
    assert verdict(p, words).startswith("distill does not fit: ")
    assert "\n" not in verdict(p, words)


def test_advice_combines_changes_and_says_where_nothing_helps(nine):
    words = advice(nine[1], plan(nine, gpu="h20", ds_config="zero1", gpus_per_node=2, activation_checkpointing=False))
    assert words.startswith("--distill.activation_checkpointing true --")
    assert "would make it fit, in " in words
    words = advice(nine[1], plan(nine, gpu="rtx4090"))
    assert words.startswith("even --distill.")
    assert words.endswith("take larger GPUs")


def test_advice_on_speed_fits_too(nine):
    p = plan(nine, gpu="b200", kept_layers=0)
    assert p.fits
    assert advice(nine[1], p).startswith("faster by ")


def test_the_text_has_every_part(nine):
    p = plan(nine, nodes=2)
    text = table(p)
    assert "distill: 20,000 steps of 96 x 512 tokens, 0.983B in all; 9.47B parameters are trained" in text
    assert (
        "a GPU computes 6 sequences once a step; activation checkpointing of 0 of 36 layers; teacher whole on every GPU"
        in text
    )
    parts = {**p.memory, **p.time}
    assert all(name in text for name, size in parts.items() if size)
    for words in ("allocated", "needed", "tokens/s a GPU", "MFU", "GPU hours of the stage", "a checkpoint, GB"):
        assert words in text
    assert "2 nodes of 8 NVIDIA H200" in heading(nine[1], p.setup.cluster, p.setup.zero, "x.json")
    assert "matrix products" in assumptions(p.setup.cluster)


# What is refused


def test_ranks_that_do_not_divide_the_batch(nine):
    with pytest.raises(UserError, match="24 ranks do not divide a batch of 32: use 16 ranks"):
        plan(nine, "align", nodes=3)


def test_a_teacher_whose_shapes_are_not_known(tmp_path):
    with pytest.raises(UserError, match=r"the shapes of the teacher 'Qwen/Qwen3-0.6B' are not known here"):
        teacher_shapes("Qwen/Qwen3-0.6B")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        teacher_shapes(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(UserError, match="is a 'gemma2'; supported: llama"):
        teacher_shapes(str(tmp_path))


def test_a_local_teacher_is_read_and_said():
    config = load_config("tiny")
    shapes, source = teacher_shapes(config.teacher)
    assert shapes.hidden_size == 128
    assert source == f"the shapes of {config.teacher}"
    assert stages_of(config) == ["pretrain", "align", "distill", "finetune"]


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {"stage": 0}}, {"zero_optimization": {"stage": 4}}])
def test_a_zero_stage_that_does_not_train(config):
    with pytest.raises(UserError, match="no zero_optimization with stage 1, 2 or 3: set one"):
        Zero.read(config, 8)
