"""Tasks of LM-Evaluation-Harness: scored as by its own class for Hugging Face models, and what is refused."""

import copy
import json
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from halo.data.corpus import read_documents
from halo.errors import UserError
from halo.measuring.evaluation import Pair, log_likelihoods
from halo.measuring.harness import Likelihoods, Tasks, _LikelihoodModel
from halo.measuring.report import Score, csr_markdown
from halo.models.tokenizer import EOS
from hypenet import HypeNetConfig, HypeNetForCausalLM, export_pretrained
from tests.halo.tokenizer_kinds import KINDS

CHOICES = """
output_type: multiple_choice
test_split: test
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
"""
FILES = {
    "short.yaml": f"task: short\ncustom_dataset: !function data.short\n{CHOICES}metric_list: [{{metric: acc}}]\n",
    "long.yaml": f"task: long\ncustom_dataset: !function data.long\n{CHOICES}"
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "shown.yaml": f"task: shown\ncustom_dataset: !function data.short\n{CHOICES}num_fewshot: 2\nfewshot_split: test\n",
    "lost.yaml": "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: /no/such/file.json}}\n" + CHOICES,
    "both.yaml": "group: both\ntask: [short, long]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n",
    "bare.yaml": "group: bare\ntask: [short, long]\n",
    "uneven.yaml": "group: uneven\ntask: [short, long]\naggregate_metric_list: [{metric: acc_norm}]\n",
    "mine.yaml": "group: mine\ntask: [hellaswag]\naggregate_metric_list: [{metric: acc}]\n",
    "word.yaml": """
task: word
custom_dataset: !function data.word
output_type: loglikelihood
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + target}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "written.yaml": """
task: written
custom_dataset: !function data.word
output_type: generate_until
test_split: test
doc_to_text: "{{context}}"
doc_to_target: target
metric_list: [{metric: exact_match}]
""",
    "data.py": """
import json
from pathlib import Path

from datasets import Dataset

ROWS = json.loads((Path(__file__).parent / "rows.json").read_text())


def short(**_):
    return {"test": Dataset.from_list(ROWS["short"])}


def long(**_):
    return {"test": Dataset.from_list(ROWS["long"])}


def word(**_):
    return {"test": Dataset.from_list(ROWS["word"])}
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Of tasks, whose rows are Austen's words: two of choices, one of a last word."""
    words = np.array(next(read_documents(corpus, "held_out")).split())
    rng = np.random.default_rng(0)

    def span(least: int, most: int) -> str:
        begin, length = rng.integers(len(words) - most), rng.integers(least, most)
        return " ".join(words[begin : begin + length])

    def question(most: int) -> dict:
        return {"context": span(1, most), "choices": [span(1, 9) for _ in range(4)], "answer": int(rng.integers(4))}

    rows = {"short": [question(5) for _ in range(30)], "long": [question(60) for _ in range(20)]}
    rows["word"] = [{"context": span(1, 20), "target": span(1, 2)} for _ in range(20)]
    path = tmp_path_factory.mktemp("tasks")
    for name, text in FILES.items():
        (path / name).write_text(text)
    (path / "rows.json").write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module", params=["plain", "with BOS"])
def reader(tokenizer: PreTrainedTokenizerFast, request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """A tokenizer of Qwen's kind, and one of Llama's, which begins each text with a token of its own."""
    if request.param == "plain":
        return tokenizer
    reader = copy.deepcopy(tokenizer)
    reader.add_special_tokens({"bos_token": "<s>"})
    reader.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", reader.bos_token_id)]
    )
    return reader


@pytest.fixture(scope="module")
def reference(model: Qwen3ForCausalLM, reader: PreTrainedTokenizerFast) -> HFLM:
    model.resize_token_embeddings(len(reader))
    return HFLM(pretrained=model, tokenizer=reader, batch_size=3, max_length=512)


def likelihoods(model: Qwen3ForCausalLM, batch_tokens: int = 200) -> Likelihoods:
    return partial(log_likelihoods, model, batch_tokens=batch_tokens)


@pytest.fixture
def folder_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, without the harness's own tasks: looking through these would take seconds."""

    def manager(include_path: str | None, include_defaults: bool = True) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("halo.measuring.harness.TaskManager", manager)
    return folder


def test_likelihoods_are_the_harness_own(model, reader, reference) -> None:
    asked = [("It is a truth", " universally"), ("It is a truth ", "universally acknowledged"), ("", "Emma")]
    asked += [("", EOS + "Emma"), ("<s>It is", " a truth"), ("a\n\n", "b"), ("Emma Woodhouse, handsome, " * 9, "with")]
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(asked)]
    for batch_tokens in (1, 100):
        found = _LikelihoodModel(reader, likelihoods(model, batch_tokens)).loglikelihood(requests)
        for (value, written), (expected, expected_written) in zip(
            found, reference.loglikelihood(requests, disable_tqdm=True), strict=True
        ):
            assert value == pytest.approx(expected, rel=1e-5)
            assert written == expected_written


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_begins_where_its_characters_do(corpus: Path, kind: str) -> None:
    made = KINDS[kind](list(read_documents(corpus / "emma.txt", "train"))[:2])
    asked = [("It is", " so"), ("It is ", "so"), ("she sa", "id it"), (" ", "so"), ("a\n\n", "b"), ("<s>It is", " a")]
    pairs = [_LikelihoodModel(made, _no_likelihoods)._encode_pair(*pair) for pair in asked]
    for (context, continuation), (before, after) in zip(asked, pairs, strict=True):
        begins = made.bos_token_id in made("a")["input_ids"] or context.startswith("<s>")
        whole = made(context.removeprefix("<s>") + continuation, add_special_tokens=False)["input_ids"]
        assert before and after
        if context.strip() and not context.startswith("<s>"):
            assert before + after == [made.bos_token_id] * begins + whole
        assert made.decode(after).strip() in (continuation.strip(), "said it")  # a shared token belongs to it
        assert made.eos_token_id not in before + after
    assert pairs[0] == pairs[1]


def _no_likelihoods(pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError("not asked here")


def test_the_harness_does_not_cut_an_exports_prompts(reader, tmp_path) -> None:
    """Its own model of a folder, asked with prompts that are longer than the teacher's length."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    length = {"max_position_embeddings": 64, "vocab_size": len(reader), "initializer_range": 0.3}
    config = HypeNetConfig(**sizes, **length, head_dim=16, mixer_types=["lightning-attn", "attn"])
    hybrid = HypeNetForCausalLM(config).eval()
    hybrid.generation_config.max_length = 64
    export_pretrained(hybrid, reader, tmp_path, logits_scaling=None)
    harness = HFLM(pretrained=str(tmp_path), batch_size=2, device="cpu", dtype="float32", trust_remote_code=True)
    needle, hay = "The key is seven. ", "Emma Woodhouse, handsome, clever and rich. " * 30
    pairs = [(needle + hay, " seven"), ("Anne. " + hay, " seven"), (hay, " rich")]
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]
    found = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    ours = _LikelihoodModel(reader, likelihoods(hybrid)).loglikelihood(requests)
    assert found == pytest.approx([value for value, _ in ours], rel=1e-4)
    assert found[0] != pytest.approx(found[1], rel=1e-6)  # what begins the prompt is read
    settings = {"until": ["\n"], "max_gen_toks": 4}
    asked = Instance(request_type="generate_until", doc={}, arguments=(needle + hay, settings), idx=0)
    tokens = torch.tensor([reader(needle + hay).input_ids])
    assert tokens.shape[1] > 64
    written = hybrid.generate(tokens, max_new_tokens=4, do_sample=False)[0, tokens.shape[1] :]
    text = reader.decode(written, skip_special_tokens=True)
    assert harness.generate_until([asked], disable_tqdm=True) == [text.split("\n")[0]]


def test_scores_are_the_harness_own(model, reader, reference, folder_alone: Path) -> None:
    """Of tasks of every kind, with and without examples in the prompt, and of a group."""
    wanted = {"word": ("acc", 20), "both": ("acc", 50), "long": ("acc_norm", 20), "shown": ("acc_norm", 30)}
    tasks = Tasks(list(wanted), str(folder_alone))
    manager = TaskManager(include_path=str(folder_alone), include_defaults=False)
    for name, (metric, samples) in wanted.items():
        assert (tasks.metrics[name], tasks.samples[name]) == (metric, samples)
        report = simple_evaluate(reference, tasks=[name], task_manager=manager, bootstrap_iters=0)
        found = [tasks.score(name, reader, likelihoods(model)) for _ in range(2)]
        assert found == [report["results"][name][f"{metric},none"]] * 2
        assert name == "word" or 0 < found[0] < 1


def test_the_first_samples_alone(model, tokenizer, folder_alone: Path) -> None:
    asked = []

    def count(pairs):
        asked.append(len(pairs))
        return torch.zeros(len(pairs)), torch.zeros(len(pairs))

    tasks = Tasks(["both", "word"], str(folder_alone), samples=7)
    assert tasks.samples == {"both": 14, "word": 7}
    for name in tasks.samples:
        tasks.score(name, tokenizer, count)
    assert asked == [56, 7]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["longer"], "there is no task 'longer' in LM-Evaluation-Harness (did you mean 'long'?)"),
        (["written"], "the task 'written' has no accuracy by likelihoods (it is generate_until, with exact_match)"),
        (["bare"], "the task 'bare' has no accuracy by likelihoods (it is multiple_choice, with no score of its own)"),
        (["uneven"], "the task 'uneven' has no accuracy by likelihoods (it is multiple_choice, with no score of its"),
        (["long", "lost"], "the data of the task 'lost' cannot be fetched: "),
    ],
)
def test_what_is_refused(folder_alone: Path, names: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        Tasks(names, str(folder_alone))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_group_of_the_harness_own_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their data is another matter: here there is no network."""
    monkeypatch.setattr("halo.measuring.harness.TaskManager", cache(TaskManager))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"the data of the task 'mine' cannot be fetched: .*hellaswag"):
        Tasks(["mine"], str(folder))
    with pytest.raises(UserError, match="'ai2_arc' is a tag in LM-Evaluation-Harness: name the tasks"):
        Tasks(["ai2_arc"], str(folder))
    with pytest.raises(UserError, match="the folder of tasks /no/such does not exist"):
        Tasks(["hellaswag"], "/no/such")


def test_the_table() -> None:
    def scores(hellaswag: float) -> dict[str, Score]:
        return {
            "hellaswag": Score(metric="acc_norm", value=hellaswag, samples=10_042),
            "winogrande": Score(metric="acc", value=0.5, samples=1267),
        }

    assert csr_markdown({"teacher": scores(0.75), "hybrid": scores(0.7)}) == (
        "| CSR, % | hellaswag | winogrande | **average** |\n"
        "| :-- | --: | --: | --: |\n"
        "| teacher | 75 | 50 | 62.5 |\n"
        "| hybrid | 70 | 50 | 60 |\n"
        "| *metric* | acc_norm | acc |  |\n"
        "| *samples* | 10,042 | 1,267 |  |\n"
    )
