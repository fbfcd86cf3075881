"""A TokenLM's tensors under the names of another project.

They are views of the model's tensors: copying into them loads the model, and saving them exports it, so that one table
of names serves both directions.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ssmttm.checkpoint import differences
from ssmttm.errors import UserError
from ssmttm.models.token_lm import TokenLM


def renamed_views(model: TokenLM, table: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a model under the names of a table.

    Args:
        table: regular expressions for full names of a TokenLM, with the other name (`re.Match.expand`). With {k} in it,
            the TokenLM's tensor concatenates those of all codebooks, and the other project has one per codebook.
    """
    views: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        match = next(match for pattern in table if (match := re.fullmatch(pattern, name)))
        other = match.expand(table[match.re.pattern])
        parts = tensor.chunk(model.config.n_codebooks) if "{k}" in other else [tensor]
        views |= {other.replace("{k}", str(k)): part for k, part in enumerate(parts)}
    return views


def load_renamed(model: TokenLM, table: Mapping[str, str], found: Mapping[str, Tensor], source: str | Path) -> None:
    """Load tensors under the table's names into a model. Raises UserError if names or shapes differ from the model's;
    the message has the first three and `source`."""
    views = renamed_views(model, table)
    wrong = differences(views, found)
    if wrong:
        raise UserError(f"{source} has another architecture: {wrong}. Only the one described can be imported")
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(found[name])
