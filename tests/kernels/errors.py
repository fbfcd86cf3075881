"""Comparison of named results, and the largest errors seen, which pytest prints as a table at the end."""

from collections import defaultdict

import torch

COLUMNS = "y", "states", "gradients"
LARGEST = defaultdict(dict)  # row -> column -> the largest error


def with_gradients(function, operands, weights=None):
    """The results of a function by name, and the gradients of a weighted sum of them.

    Args:
        function: from keyword operands to results by name.
        operands: tensors by name; None is an operand left out.
        weights: of the sum, by name of the result; None: random.

    Returns:
        Detached results, and "grad NAME" for each operand.
    """
    leaves = {name: None if value is None else value.detach().requires_grad_() for name, value in operands.items()}
    results = function(**leaves)
    weights = weights or {name: _random(value, seed) for seed, (name, value) in enumerate(results.items())}
    total = sum((weights[name] * value.to(weights[name].dtype)).sum() for name, value in results.items())
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(total, list(present.values()))
    found = {name: value.detach() for name, value in results.items()}
    return found | {f"grad {name}": gradient for name, gradient in zip(present, gradients, strict=True)}


def assert_near(row, found, expected, tolerance):
    """Each result within `tolerance` of the largest value of its expectation; the errors go into `row` of the table."""
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in found}
    for name, error in errors.items():
        column = "gradients" if name.startswith("grad ") else "states" if name.endswith("state") else "y"
        LARGEST[row][column] = max(error, LARGEST[row].get(column, 0.0))
    assert max(errors.values()) <= tolerance, {name: f"{error:.1e}" for name, error in errors.items()}


def relative_error(found, expected):
    """The largest difference as a part of the largest value."""
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)).item()


def table():
    """The largest errors as lines of Markdown."""
    lines = [f"| what | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row, errors in LARGEST.items():
        cells = (f"{errors[column]:.0e}".replace("0e+00", "0") if column in errors else "-" for column in COLUMNS)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def _random(like, seed):
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
