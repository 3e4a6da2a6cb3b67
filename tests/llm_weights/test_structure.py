"""The master test of everything that can be removed: a dense model whose unit is silenced equals the sliced model."""

import copy

import pytest
import torch

import tprune
from tests.decoders import decoder, tokens
from tests.llm_weights.test_artifacts import QUIET, recipe
from tests.llm_weights.tiny import EXPERTS, NAMES, logits, save, stepwise_logits
from tprune.core.weights import StructureEdit
from tprune.models import shapes, units
from tprune.models.blocks import find_decoder
from tprune.models.halves import halves_gone, masked
from tprune.pipelines.run import execute

DENSE = [name for name in NAMES if name not in EXPERTS]
CHANNELS = torch.tensor([0, 3, 4, 11, 30])
EDITS = {
    "heads": [
        StructureEdit(0, keep={"heads": torch.tensor([1])}),
        StructureEdit(2, keep={"heads": torch.tensor([0])}),
    ],
    "channels": [
        StructureEdit(0, keep={"channels": CHANNELS}),
        StructureEdit(1, keep={"channels": CHANNELS + 2}),
    ],
    "attention": [StructureEdit(0, halves=("attention",)), StructureEdit(1, halves=("attention",))],
    "mlp": [StructureEdit(0, halves=("mlp",)), StructureEdit(2, halves=("mlp",))],
    "both halves": [StructureEdit(1, halves=("attention", "mlp"))],
    "block": [StructureEdit(0, removed=True)],
    "everything": [
        StructureEdit(0, halves=("attention",), keep={"channels": CHANNELS}),
        StructureEdit(1, removed=True),
        StructureEdit(2, keep={"heads": torch.tensor([1]), "channels": CHANNELS + 1}),
    ],
}
FOR_EXPERTS = ("heads", "attention", "mlp", "both halves", "block")
CASES = [(name, kind) for name in DENSE for kind in EDITS] + [
    (name, kind) for name in EXPERTS for kind in FOR_EXPERTS
]


def silence(found, edits):
    """What the edits remove, as zeros in the weights and biases of the dense model."""
    for edit in edits:
        gone = {"heads": torch.empty(0, dtype=torch.long)} if "attention" in edit.gone else {}
        gone |= {"channels": torch.empty(0, dtype=torch.long)} if "mlp" in edit.gone else {}
        for kind, keep in {**edit.keep, **gone}.items():
            place = units.site(found, edit.block, kind)
            if place is None:
                found.blocks[edit.block].mlp.register_forward_hook(lambda module, arguments, out: out * 0)
                continue
            columns = place.reader.weight if units.is_transposed(place.reader) else place.reader.weight.T
            silent = torch.ones(place.count, place.width, dtype=torch.bool)
            silent[keep] = False
            columns[silent.flatten()] = 0
            if len(keep) == 0 and place.reader.bias is not None:
                place.reader.bias.zero_()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_silenced_masked_and_sliced_models_are_the_same_also_through_the_cache(name, kind):
    sliced, ids = decoder(name), tokens(2, 20)
    silent, dense = copy.deepcopy(sliced), copy.deepcopy(sliced)
    silence(find_decoder(silent), EDITS[kind])
    expected = logits(silent, ids)
    scale = expected.abs().max()
    before = logits(dense, ids)
    assert (before - expected).abs().max() > 1e-3 * scale
    with masked(find_decoder(dense), EDITS[kind]):
        assert (logits(dense, ids) - expected).abs().max() < 2e-5 * scale
    assert torch.equal(logits(dense, ids), before)
    shapes.apply(find_decoder(sliced), EDITS[kind])
    assert sum(p.numel() for p in sliced.parameters()) < sum(p.numel() for p in silent.parameters())
    assert (logits(sliced, ids) - expected).abs().max() < 2e-5 * scale
    assert (stepwise_logits(sliced, ids) - expected).abs().max() < 2e-5 * scale


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("kind", ["heads", "channels"])
def test_the_members_of_a_dependency_group_are_all_that_a_unit_has(name, kind):
    found = find_decoder(decoder(name))
    place = units.site(found, 1, kind)
    group = units.members(found, 1, place)
    entries = [units.by_unit(matrix.read(), axis, place.count) for matrix, axis in group]
    assert sum(part[0].numel() for part in entries) == place.cost
    assert [axis for _, axis in group] == [0] * (len(group) - 1) + [1]
    before = [len(part) for part in entries]
    keep = torch.tensor([0])
    units.shrink(found, 1, place, keep)
    after = units.members(found, 1, units.site(found, 1, kind))
    for (matrix, axis), part in zip(after, entries, strict=True):
        assert torch.equal(units.by_unit(matrix.read(), axis, 1), part[keep])
    assert before == [place.count] * len(group)


def test_a_masked_decoder_inside_another_loses_what_both_leave_out():
    model, ids = decoder(), tokens(2, 20)
    found = find_decoder(model)
    one = [StructureEdit(1, keep={"channels": torch.arange(40)}), StructureEdit(0, halves=("mlp",))]
    other = [StructureEdit(1, keep={"channels": torch.arange(10, 48)}, halves=("attention",))]
    both = [
        StructureEdit(1, keep={"channels": torch.arange(10, 40)}, halves=("attention",)),
        StructureEdit(0, halves=("mlp",)),
    ]
    with masked(found, one), masked(found, other):
        nested = logits(model, ids)
    with masked(found, both):
        assert torch.equal(logits(model, ids), nested)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_new_weights_of_what_stays_are_the_same_masked_and_sliced(name):
    sliced, ids = decoder(name), tokens(2, 20)
    dense, before = copy.deepcopy(sliced), logits(sliced, ids)
    edits = []
    for index, kind, keep in ((0, "channels", CHANNELS), (1, "heads", torch.tensor([1]))):
        place = units.site(find_decoder(dense), index, kind)
        weight = torch.randn(32, len(keep) * place.width, generator=torch.Generator().manual_seed(index))
        edits.append(StructureEdit(index, keep={kind: keep}, weight={kind: weight}))
    with masked(find_decoder(dense), edits):
        found = logits(dense, ids)
    assert torch.equal(logits(dense, ids), before)
    shapes.apply(find_decoder(sliced), edits)
    expected = logits(sliced, ids)
    assert (expected - before).abs().max() > 1e-3
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "opt", "mixtral"])
def test_models_without_some_halves_are_saved_and_loaded_in_every_layout(name, text, tmp_path):
    source, ids = save(tmp_path / "model", name), tokens(2, 20)
    report = execute(recipe(source, text, "blockpruner"), QUIET, out=str(tmp_path / "out"), evaluate=False)
    assert report["kind"] == "wrapped"
    model = tprune.load(str(tmp_path / "out"))
    assert any(halves_gone(block) for block in find_decoder(model).blocks)
    expected = logits(model, ids)
    assert (stepwise_logits(model, ids) - expected).abs().max() < 2e-5 * expected.abs().max()
