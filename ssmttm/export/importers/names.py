"""A TokenLM's tensors under the names of another project.

They are views of the model's own: what is copied into them fills the model, and as they stand they are its export, so
that one table of names serves both ways.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ssmttm.checkpoint import differences
from ssmttm.errors import UserError
from ssmttm.models.token_lm import TokenLM


def renamed(model: TokenLM, table: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a model under the names of a table.

    Args:
        table: regular expressions for whole names of ours, each with the name that it stands for (`re.Match.expand`).
            Where that holds {k}, ours are the tensors of all codebooks, one behind the other; theirs has one for each.
    """
    views: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        match = next(match for pattern in table if (match := re.fullmatch(pattern, name)))
        theirs = match.expand(table[match.re.pattern])
        parts = tensor.chunk(model.config.n_codebooks) if "{k}" in theirs else [tensor]
        views |= {theirs.replace("{k}", str(k)): part for k, part in enumerate(parts)}
    return views


def fill(model: TokenLM, table: Mapping[str, str], found: Mapping[str, Tensor], source: str | Path) -> None:
    """Fill a model with tensors of the table's names, which must be its own, name by name and shape by shape.

    Raises:
        UserError: they are not; names the first three that differ and `source`.
    """
    views = renamed(model, table)
    wrong = differences(views, found)
    if wrong:
        raise UserError(f"{source} is of another architecture: {wrong}. Only the one described can be imported")
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(found[name])
