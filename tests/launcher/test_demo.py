"""The whole of HALO in small: what it leaves behind, and what it says."""

import json
import shutil
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from halo.launch import EXIT_SAVED
from halo.preset import load_config
from halo.run import sha256
from tests.distributed.test_stopping import start
from tests.launcher.conftest import SMALL, TEACHER, ZERO3, free_port


def test_every_stage_leaves_its_record(demo):
    run, _ = demo
    for stage in ("align", "selection", "distill", "finetune", "scaling", "export", "niah"):
        record = json.loads((run / stage / "stage.json").read_text())
        for name, expected in record["files"].items():
            assert sha256(run / stage / name) == expected["sha256"]
    assert not list(run.rglob("*.partial"))


def test_what_attention_took_is_said_once(demo):
    assert demo[1].count("attention: auto takes ") == 1


def test_stage_1_leaves_rnn_mixers_and_nothing_of_the_teacher(demo):
    run, _ = demo
    names = load_file(run / "align" / "mixers.safetensors")
    assert {name.split(".")[0] for name in names} == {str(layer) for layer in range(8)}
    assert {name.split(".", 1)[1] for name in names} == {
        *(f"{p}_proj.weight" for p in "qkvoz"),
        *(f"{n}_norm.weight" for n in "qko"),
    }


def test_selection_keeps_a_quarter_of_the_layers(demo):
    run, _ = demo
    scores = json.loads((run / "selection" / "scores.json").read_text())
    assert len(scores["attention_layers"]) == 2
    assert sorted(scores["attention_layers"]) == sorted(scores["ranking"][:2])
    config = json.loads((run / "export" / "model" / "config.json").read_text())
    kept = [layer for layer, mixer in enumerate(config["mixer_types"]) if mixer == "attn"]
    assert kept == scores["attention_layers"]


def test_the_export_generates_with_its_base_set(demo):
    run, _ = demo
    folder = run / "export" / "model"
    chosen = json.loads((run / "scaling" / "scaling.json").read_text())["attn_logits_scaling"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert model.config.attn_logits_scaling == chosen
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("It is a truth universally acknowledged", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_the_scaling_is_chosen_from_the_whole_curve(demo):
    found = json.loads((demo[0] / "scaling" / "scaling.json").read_text())
    assert [c["attn_logits_scaling"] for c in found["candidates"]] == [None, "hype 128", "hype 512"]
    (chosen,) = (c for c in found["candidates"] if c["name"] == found["chosen"])
    assert chosen["attn_logits_scaling"] == found["attn_logits_scaling"]
    for candidate in found["candidates"]:
        assert candidate["loss"].keys() == candidate["recall"].keys() == {"256", "512"}
        assert all(len(recall) == 3 for recall in candidate["recall"].values())
    assert found["documents"]["512"] == {"windows": 2, "within_one": 2}
    assert f"| **{found['chosen']}** |" in (demo[0] / "scaling" / "scaling.md").read_text()
    assert (demo[0] / "scaling" / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_training_is_watched(demo):
    run, _ = demo
    for stage in ("align", "distill", "finetune"):
        lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 1]
        assert all(line["loss"] > 0 and line["gradient_norm"] > 0 and line["tokens_per_s"] > 0 for line in lines)
        assert list((run / stage / "tensorboard").glob("events.*"))
        probed = [{name for name in line if name.startswith("probe")} for line in lines]
        figures = {"probe_s", "probe/cross_entropy", "probe/niah_single_1/256", "probe/niah_single_2/256"}
        of_stage_2 = figures | {"probe/kl", "probe/agreement", "probe/teacher_entropy"}
        assert probed == {"align": [set()] * 2, "distill": [of_stage_2] * 2, "finetune": [set(), figures]}[stage]


def test_the_table_has_all_rows_and_variants(demo):
    run, printed = demo
    table = (run / "niah" / "niah.md").read_text()
    for row in ("| teacher |", "| teacher + YaRN |", "| hybrid, no scaling |", "| hybrid |", "| *samples* |"):
        assert row in table
    assert table in printed
    assert "tensorboard --logdir" in printed
    assert (run / "niah" / "niah.png").read_bytes().startswith(b"\x89PNG")


def test_common_sense_is_measured_on_any_number_of_ranks(demo, launch, tmp_path):
    """After the export, whether recall was measured or not."""
    reports = []
    for ranks in (1, 2):
        run = shutil.copytree(demo[0], tmp_path / f"run-{ranks}")
        shutil.rmtree(run / "niah")
        done = launch("launcher/csr.py", "--preset", "tiny", "--run", str(run), "--csr.samples", "30", ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert not (run / "niah").exists()
        reports.append(json.loads((run / "csr" / "csr.json").read_text()))
    assert "| teacher |" in (run / "csr" / "csr.md").read_text()
    assert reports[0] == reports[1]
    assert {name: of["austen"]["samples"] for name, of in reports[0]["scores"].items()} == {"teacher": 30, "hybrid": 30}


def test_an_evaluation_that_was_stopped_goes_on(demo, launch, tmp_path):
    """Status 75, as for training: the job queues again, and measures what is missing."""
    run = shutil.copytree(demo[0], tmp_path / "run")
    shutil.rmtree(run / "niah")
    figures = run / "niah" / "checkpoints" / "figures.json"
    command = [sys.executable, "launcher/niah.py", "--run", str(run), *SMALL, "--niah.samples", "[20, 20]"]
    world = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [start(*command, RANK=rank, LOCAL_RANK=rank, **world) for rank in range(2)]
    while not figures.is_file():
        assert all(rank.poll() is None for rank in ranks), [rank.communicate()[0] for rank in ranks]
        time.sleep(0.02)
    ranks[1].send_signal(signal.SIGTERM)
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [EXIT_SAVED] * 2, said
    assert "figures measured and kept: the same command resumes" in said[0]
    kept = json.loads(figures.read_text())["figures"]
    done = launch(*command[1:])
    assert done.returncode == 0, done.stderr
    cells = json.loads((run / "niah" / "niah.json").read_text())["cells"]
    found = {f"{of['variant']} at {of['length']}, {name}": r for of in cells for name, r in of["recall"].items()}
    assert len(found) == 24 > len(kept) > 0
    assert kept == {name: found[name] for name in kept}
    assert not figures.exists()


def test_a_second_start_finds_everything_done(demo, launch):
    run, _ = demo
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "config.toml"}
    again = launch("launcher/convert.py", "--until", "niah", "--run", str(run), *ZERO3, *SMALL)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done already") == 7
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_run_remembers_what_was_set(demo, launch):
    """A later command on the run need not repeat it."""
    run, _ = demo
    again = launch("launcher/niah.py", "--preset", "tiny", "--run", str(run))
    assert again.returncode == 0, again.stderr
    assert f"niah: done already, in {run / 'niah'}" in again.stdout
    assert load_config("tiny", recorded=run / "config.toml").niah.lengths == (256, 512)


def test_kd_as_typed_prepares_what_is_missing(tmp_path, launch):
    run = tmp_path / "typed"
    done = launch("launcher/kd.py", "--ds_config", "ds_configs/zero3.json", "--run", str(run), *SMALL)
    assert done.returncode == 0, done.stderr
    assert "align: missing, running it before distill" in done.stdout
    assert (run / "distill" / "hybrid" / "model.safetensors").is_file()
    assert not (run / "finetune").exists()


def test_pretraining_leaves_a_teacher(tmp_path, launch):
    """The command that made the embedded one, two steps of it."""
    run = tmp_path / "teacher"
    small = ["--pretrain.steps", "2", "--pretrain.batch", "4", "--pretrain.corpus.samples", "16"]
    done = launch("launcher/pretrain.py", "--preset", "tiny", "--run", str(run), *small)
    assert done.returncode == 0, done.stderr
    made, embedded = (AutoModelForCausalLM.from_pretrained(path) for path in (run / "pretrain" / "teacher", TEACHER))
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in embedded.named_parameters()}
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (run / "pretrain" / "teacher", TEACHER)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


@pytest.mark.parametrize("variant", ["niah_single_1", "niah_single_2"])
def test_the_embedded_teacher_recalls_at_its_training_length_and_not_beyond(variant):
    """On keys, values and haystacks that it was not trained on."""
    from halo.data.held_out import HeldOut
    from halo.measuring.evaluation import needle_recall
    from halo.models.loading import load_teacher
    from halo.models.tokenizer import load_tokenizer

    teacher = load_teacher(TEACHER)
    held_out = HeldOut(load_config("tiny").heldout, load_tokenizer(TEACHER))
    assert needle_recall(teacher, held_out.needles(variant, 256, 100, seed=7), batch=50) >= 0.95
    assert needle_recall(teacher, held_out.needles(variant, 512, 50, seed=7), batch=25) <= 0.05
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) < 10e6
