"""Fine-tuning with transformers' Trainer keeps the zeros."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import tprune
from tests.decoders import decoder, tokens
from tests.llm_weights.test_command import SMALL, run
from tests.llm_weights.tiny import prune
from tprune.errors import UserError
from tprune.models.blocks import find_decoder


def train(model, callbacks, folder):
    """Three steps with weight decay and momentum, two of them on accumulated gradients."""
    model.requires_grad_(True)
    rows = [{"input_ids": row, "labels": row} for row in tokens(6, 12)]
    settings = TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, settings, train_dataset=rows, callbacks=callbacks).train()


def zeros(model):
    """Where every prunable matrix is zero."""
    found = find_decoder(model)
    return {
        matrix.name: matrix.read() == 0
        for index in range(len(found.blocks))
        for matrix in found.matrices(index)
    }


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_what_was_pruned_stays_zero_while_the_rest_is_trained(name, text, tmp_path):
    model = decoder(name)
    handle = prune(model, "sparsegpt", text, pattern="2:4")
    before, weights = zeros(model), [parameter.clone() for parameter in model.parameters()]
    train(model, [tprune.keep_zeros(handle)], tmp_path)
    after = zeros(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed = zip(weights, model.parameters(), strict=True)
    assert all(not torch.equal(one, other) for one, other in changed)


def test_masks_come_from_an_output_folder_too_and_without_them_zeros_are_lost(folder, text, tmp_path):
    out = tmp_path / "out"
    result = run(
        *f"--method wanda --sparsity 0.5 {folder} --data {text} --no-eval --out {out}".split(), *SMALL
    )
    assert result.exit_code == 0
    model, other = tprune.load(str(out)), tprune.load(str(out))
    before = zeros(model)
    train(model, [tprune.keep_zeros(str(out))], tmp_path / "kept")
    train(other, [], tmp_path / "lost")
    after, lost = zeros(model), zeros(other)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(before[name], lost[name]) for name in before)


def test_masks_of_another_model_and_no_masks_at_all_are_refused(text, tmp_path):
    handle = prune(decoder(), "wanda", text, sparsity=0.5)
    with pytest.raises(UserError, match="does not fit this model"):
        train(decoder(intermediate_size=64), [tprune.keep_zeros(handle)], tmp_path)
    with pytest.raises(UserError, match="no masks"):
        tprune.keep_zeros(prune(decoder(), "shortgpt", text, sparsity=0.34))
    with pytest.raises(UserError, match="not an output folder"):
        tprune.keep_zeros(str(tmp_path))
