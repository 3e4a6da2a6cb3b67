import pytest
from hypothesis import given
from hypothesis import strategies as st

from tprune.core.budget import (
    PROJECTOR,
    Site,
    Stage,
    bisect,
    counts_entering,
    falling_counts,
    mean_entering,
    mean_leaving,
    scale_layer,
)


def test_a_stage_between_attention_and_mlp_spares_that_mlp():
    stages = [Stage(Site(1, between=True), 4), Stage(Site(2), 2)]
    assert counts_entering(stages, 8, 3) == [8, 8, 8, 4, 2, 2]


def test_the_projector_comes_before_every_layer():
    assert counts_entering([Stage(PROJECTOR, 3)], 9, 2) == [3] * 4


def test_sparsevlm_table_is_reproduced_by_the_leaving_count():
    # 576 tokens; layers 0-1 full, then 309, 204 and 113 leave layers 2-5, 6-14 and 15-31 (its "192" setting).
    stages = [Stage(Site(3), 309), Stage(Site(7), 204), Stage(Site(16), 113)]
    assert 576 * mean_leaving(stages, 576, 32) == pytest.approx(192.0, abs=0.1)
    assert 576 * mean_entering(stages, 576, 32) == pytest.approx(206.5, abs=0.1)


@given(st.floats(0, 1), st.integers(2, 50))
def test_bisect_comes_as_near_as_the_steps_allow(target, steps):
    def measure(knob):
        return round(knob * steps) / steps

    assert abs(measure(bisect(measure, target)) - target) <= 0.5 / steps + 1e-9


def test_layers_scale_with_depth():
    assert [scale_layer(layer, 12, 24) for layer in (3, 6, 9)] == [6, 12, 18]
    assert scale_layer(11, 12, 4) == 3


def test_falling_counts_are_those_of_pyramidkv_and_add_up_to_the_budget():
    # kvpress@8bb29b9, PyramidKVPress.get_layer_budget without a window; each rounded for itself.
    cases = {
        (100.0, 1000, 8, 4.0): [175, 154, 132, 111, 89, 68, 46, 25],
        (600.0, 1000, 8, 20.0): [1000, 886, 771, 657, 543, 429, 314, 200],
    }
    for (mean, most, layers, steepness), expected in cases.items():
        found = falling_counts(mean, most, layers, steepness)
        assert sum(found) == mean * layers
        assert all(abs(one - other) <= 1 for one, other in zip(found, expected, strict=True))
    assert falling_counts(37.0, 50, 5, 1.0) == [37] * 5
    assert falling_counts(10.0, 50, 1, 4.0) == [10]
