"""A new mixer is one file and one line: in a copy of the package, everything that asks a mixer knows it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from hypenet.linear_attention import linear_attention
from hypenet.mixers import MIXERS, Mixer, mixer
from hypenet.rnn_mixer import OuterProductMixer, RNNMixer

ROOT = Path(__file__).parents[2]

BY_STATES = '''
from typing import Any

import torch
from torch import Tensor

from .cache import State
from .mixers import mixer
from .rnn_mixer import OuterProductMixer


@mixer("by-states")
class ByStates(OuterProductMixer):
    """Every head forgets a tenth at each token."""

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor, tokens: Tensor | None, **carried: Any
    ) -> tuple[Tensor, State | None]:
        decay = torch.full((self.heads,), 0.9, device=q.device).log()
        return self.recurrence(q, k, v, decay, scale=self.scaling, **carried)
'''

BY_HEADS = '''
from typing import Any

from torch import Tensor

from .cache import State
from .mixers import mixer
from .rnn_mixer import RNNMixer


def running_sum(q: Tensor, k: Tensor, v: Tensor, **carried: Any) -> tuple[Tensor, None]:
    """What a head has seen is one number for each of its channels."""
    return q * (k * v).cumsum(1), None


@mixer("by-heads")
class ByHeads(RNNMixer):
    recurrence = staticmethod(running_sum)
    split = "heads"

    def multiply_adds(self, seq_len: int) -> float:
        return 5 * self.head_dim

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor, tokens: Tensor | None, **carried: Any
    ) -> tuple[Tensor, State | None]:
        return self.recurrence(q, k, v, **carried)
'''

ASK = """
import json, sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import hypenet
from halo.preset import load_config
from halo.errors import UserError
from halo.parallel.checks import check_degree
from halo.parallel.exchanges import parallelize
from halo.plan.cluster import Cluster, Setup, Zero
from halo.plan.load import build_models
from halo.plan.stage import plan_stage
from halo.training.flops import sequence_flops
from halo.training.gpus import find_gpu
from hypenet.export import export_pretrained

zero = Zero.read({"zero_optimization": {"stage": 1}}, 2)
cluster = Cluster(gpu=find_gpu("h100"), gpus_per_node=2)
found = {"from": hypenet.__file__}
for name in ("by-states", "by-heads"):
    config = replace(load_config("tiny"), rnn_mixer=name)
    planned = build_models(config)
    plans = [
        plan_stage(planned, stage, Setup(training=getattr(config, stage), cluster=cluster, zero=zero))
        for stage in ("align", "distill")
    ]
    mixer = planned.mixers[0]
    try:
        check_degree("degree", 5, seq_len=500, ranks=5, mixers=[mixer])
        refusal = ""
    except UserError as error:
        refusal = str(error)
    parallelize([mixer], SimpleNamespace(degree=2))
    found[name] = {
        "flops": sequence_flops(mixer, 4096),
        "heads": mixer.heads,
        "width": mixer.head_dim,
        "planned": all(0 < plan.mfu < 1 and plan.allocated > 0 for plan in plans),
        "refusal": refusal,
        "exchange": type(mixer.recurrence).__name__,
    }

small = hypenet.HypeNetConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, mixer_types=["by-states", "attn", "by-heads"],
)
torch.manual_seed(0)
model = hypenet.HypeNetForCausalLM(small).eval()
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
export_pretrained(model, PreTrainedTokenizerFast(tokenizer_object=words), sys.argv[1], logits_scaling=None)
found["logits"] = model(torch.arange(1, 30)[None], use_cache=False).logits.sum().item()
print(json.dumps(found))
"""

LOAD = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hypenet", "halo", "fla"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
print(model(torch.arange(1, 30)[None], use_cache=False).logits.sum().item())
"""


def with_mixers(sources: dict[str, str], folder: Path) -> Path:
    """A folder to import from: a copy of hypenet with one file and one line more for each mixer."""
    package = folder / "hypenet"
    shutil.copytree(ROOT / "hypenet", package, ignore=shutil.ignore_patterns("__pycache__"))
    modeling = package / "modeling_hypenet.py"
    line = "from .mixers import "
    assert modeling.read_text().count(line) == 1
    for name, source in sources.items():
        cls = name.title().replace("_", "")
        (package / f"mixer_{name}.py").write_text(source)
        modeling.write_text(modeling.read_text().replace(line, f"from .mixer_{name} import {cls}\n{line}"))
    return folder


def python(program: str, argument: Path, path: list[Path], home: Path) -> str:
    """The last line that a process of its own prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "DS_ACCELERATOR": "cpu"}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(argument)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=home, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_flops_plan_sequence_parallelism_and_export_know_it(tmp_path):
    copy = with_mixers({"by_states": BY_STATES, "by_heads": BY_HEADS}, tmp_path)
    found = json.loads(python(ASK, tmp_path / "exported", [copy, ROOT], tmp_path))
    assert found["from"] == str(copy / "hypenet" / "__init__.py")
    states, heads = found["by-states"], found["by-heads"]
    assert states["planned"] and heads["planned"]
    assert states["flops"] == 2 * states["heads"] * 2 * states["width"] ** 2
    assert heads["flops"] == 2 * heads["heads"] * 5 * heads["width"]
    assert (states["exchange"], heads["exchange"]) == ("ChunkStates", "HeadParallel")
    assert states["refusal"] == ""
    assert heads["refusal"].startswith(f"degree = 5 does not divide the {heads['heads']} heads of ByHeads")

    assert (tmp_path / "exported" / "mixer_by_heads.py").read_text() == BY_HEADS
    assert float(python(LOAD, tmp_path / "exported", [], tmp_path)) == pytest.approx(found["logits"], rel=1e-5)


def test_a_mixer_without_these_answers_cannot_be_defined():
    with pytest.raises(TypeError, match=r"^Mine sets recurrence without split and multiply_adds: see hypenet"):
        type("Mine", (RNNMixer,), {"recurrence": staticmethod(linear_attention)})
    with pytest.raises(TypeError, match=r"^Mine lacks split and multiply_adds: see hypenet"):
        mixer("mine")(type("Mine", (Mixer,), {}))
    with pytest.raises(TypeError, match=r"^Mine lacks multiply_adds: see hypenet"):
        mixer("mine")(type("Mine", (RNNMixer,), {"split": "no"}))
    with pytest.raises(TypeError, match=r'^Mine learns its first state: set split to "heads" or "no"'):
        type("Mine", (OuterProductMixer,), {"first_state": lambda mixer, q, batch: None})
    assert "mine" not in MIXERS


def test_every_mixer_says_how_it_can_be_split():
    assert {cls.split for cls in MIXERS.values()} == {"states", "heads", "attention"}
    assert all(issubclass(cls, Mixer) and issubclass(cls, nn.Module) for cls in MIXERS.values())
