"""Logit filters, and sampling: support and frequencies."""

import pytest
import torch

from ssmttm.generation.engines import filters


def logits_of(*probabilities):
    return torch.tensor(probabilities).log()


def kept_codes(logits):
    return torch.isfinite(logits).nonzero().squeeze(-1).tolist()


def test_top_k_keeps_the_largest_and_zero_keeps_all():
    logits = logits_of(0.1, 0.4, 0.2, 0.3)
    assert kept_codes(filters.top_k(logits, 2)) == [1, 3]
    assert kept_codes(filters.top_k(logits, 0)) == kept_codes(filters.top_k(logits, 9)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("p", "expected"), [(0.4, [1]), (0.41, [1, 3]), (0.71, [1, 2, 3]), (0.95, [0, 1, 2, 3]), (1e-9, [1])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, expected):
    assert kept_codes(filters.top_p(logits_of(0.1, 0.4, 0.2, 0.3), p)) == expected


def test_temperature_below_one_sharpens():
    logits = logits_of(0.25, 0.75)
    assert torch.allclose(filters.temperature(logits, 0.5).softmax(-1), torch.tensor([0.1, 0.9]))


def test_filters_treat_rows_independently():
    rows = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    for filter_rows in (lambda x: filters.top_k(x, 5), lambda x: filters.top_p(x, 0.6)):
        one_by_one = torch.stack([torch.stack([filter_rows(row) for row in item]) for item in rows])
        assert torch.equal(filter_rows(rows), one_by_one)


def test_draw_follows_the_distribution_within_its_support():
    logits = logits_of(0.5, 0.0, 0.3, 0.2, 0.0)
    uniforms = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1]
    codes = filters.draw(logits.expand(len(uniforms), -1), uniforms)
    frequencies = codes.bincount(minlength=5) / len(uniforms)
    assert torch.allclose(frequencies, torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0]), atol=1e-4)


def test_draw_at_the_ends_of_the_unit_interval_gives_possible_codes():
    logits = torch.full((2, 8), -torch.inf)
    logits[:, 3] = 0.0
    logits[:, 5] = -3.0
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert filters.draw(logits, ends).tolist() == [3, 5]
