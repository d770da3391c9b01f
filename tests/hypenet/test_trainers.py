"""Trainers that others wrote: what they read of the model's outputs is there, and nobody else pays for it."""

import pytest
import torch
from torch import nn
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hypenet.modeling_hypenet import HypeNetForCausalLM
from tests.hypenet.sizes import SIZES

ROWS = [6, 9, 5, 12]
"""The tokens of each sequence."""


class ReadsLogits(Trainer):
    """It looks at logits beside the loss, as TRL's SFTTrainer does for entropy and accuracy."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        predicted = outputs.logits[:, :-1].argmax(-1)
        assert predicted.shape == inputs["labels"][:, 1:].shape
        return (loss, outputs) if return_outputs else loss


def padded(rows):
    length = max(ROWS)
    batch = {name: torch.zeros(len(rows), length, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    labels = torch.full((len(rows), length), -100)
    for i, row in enumerate(rows):
        ids = torch.tensor(row["input_ids"])
        batch["input_ids"][i, : len(ids)], batch["attention_mask"][i, : len(ids)], labels[i, : len(ids)] = ids, 1, ids
    return batch | {"labels": labels}


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(1, SIZES["vocab_size"], (n,), generator=generator).tolist()} for n in ROWS]


@pytest.fixture
def train(rows, tmp_path):
    def run(cls, model, collate):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=5,
        )
        trainer = cls(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return run


@pytest.mark.parametrize("collate", [padded, DataCollatorWithFlattening()], ids=["padded", "packed"])
def test_a_trainer_that_reads_logits_gets_them_and_the_same_losses(train, make_hybrid, collate):
    expected = train(Trainer, make_hybrid(), collate)
    assert len(expected) == 2
    losses = train(ReadsLogits, make_hybrid(logits_in_training=True), collate)
    assert losses == pytest.approx(expected, rel=1e-4)


def test_without_the_switch_there_are_none(make_hybrid, tokens):
    output = make_hybrid().train()(tokens, labels=tokens)
    assert output.logits is None and "logits" not in output


def test_the_switch_is_set_where_the_model_is_loaded_and_kept_where_it_is_saved(make_hybrid, tokens, tmp_path):
    make_hybrid().save_pretrained(tmp_path)
    model = HypeNetForCausalLM.from_pretrained(tmp_path, logits_in_training=True).train()
    output = model(tokens, labels=tokens)
    plain = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(output.loss, plain)
    model.save_pretrained(tmp_path)
    assert HypeNetForCausalLM.from_pretrained(tmp_path).config.logits_in_training
