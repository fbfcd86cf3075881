"""The card of a model for people: what it was trained on, how to repeat it, and what was measured.

An export writes data, licences, steps and validation metrics. `complete_card` adds what only its author knows:

licence   SPDX id of the weights
sampling  settings of a call that gives none; those that it leaves out are the usual ones
recipe    commands from an empty folder to the model, in order
figures   {what was measured: value}, and `command`, which measures them
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmttm.errors import UserError
from ssmttm.model_folder import read_card, write_card


def complete_card(folder: Path, licence: str, recipe: Sequence[str], figures: Mapping[str, Any]) -> dict[str, Any]:
    """Add licence, recipe and figures to the card of an exported model, in place. Returns the card.

    Raises:
        UserError: there is no card, or the recipe is empty.
    """
    card = read_card(folder)
    if not recipe or not all(command.strip() for command in recipe):
        raise UserError(f"{folder}: the recipe is empty: give the commands that make this model")
    card |= {"licence": licence, "recipe": list(recipe), "figures": dict(figures)}
    write_card(folder, card)
    return card


def describe_card(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The card as (name, text), for `ssmttm info`; parts that a card lacks are left out."""
    data = card.get("data") or {}
    hours = (data.get("hours") or {}).get("train")
    licences = ", ".join(f"{licence} ({count:,} segments)" for licence, count in (data.get("licences") or {}).items())
    rows = [
        ("licence", card.get("licence")),
        ("parameters", f"{card['parameters']:,}" if "parameters" in card else None),
        ("data", f"{data.get('store', 'unnamed')}, {hours:g} h to train on; {licences}" if hours else licences or None),
        ("training", _training(card)),
        ("sampling", _sampling(card.get("sampling"))),
        *(("recipe", command) for command in card.get("recipe", ())),
        *((f"figure: {name}", str(value)) for name, value in card.get("figures", {}).items()),
    ]
    return [(name, text) for name, text in rows if text]


def _sampling(settings: Any) -> str | None:
    if not isinstance(settings, Mapping):
        return None
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def _training(card: Mapping[str, Any]) -> str | None:
    if "step" not in card:
        return None
    seconds = card.get("training_seconds")
    return f"{card['step']:,} steps" + (f", {seconds / 3600:.1f} h" if seconds else "")
