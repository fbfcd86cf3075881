"""Complete the card of an embedded model: licence, recipe, and figures from an evaluation.

    python -m benchmarks.model_card ssmttm/assets/NAME --recipe "python -m data_prep ..." "python train.py ..." \
        --results runs/models/measure.json --system new

The figures are those of the system in `measure.json` (`benchmarks/embedded_models.py`). Without --results, only the
recipe and the licence are written, and figures that the card has are kept.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmttm.errors import UserError, run_cli
from ssmttm.export.card import complete_card, describe_card
from ssmttm.model_folder import read_card

COMMAND = "python -m benchmarks.embedded_models measure"
TITLES = {"family": "lead's family", "tempo_class": "tempo class", "mode": "mode", "key": "key"}


def figures_of(document: Mapping[str, Any], system: str) -> dict[str, str]:
    """The figures of a system of measure.json, in words."""
    if system not in document["systems"]:
        raise UserError(f"no system {system} was measured: there are {', '.join(document['systems'])}")
    found = document["systems"][system]
    figures = {"prompts": f"{document['prompts']} held-out captions of 10 s, seed {document['seed']}"}
    for kind, suffix in (("right", ""), ("paraphrases", ", free-form prompts")):
        for name, rate in found.get(kind, {}).items():
            figures[f"{TITLES[name]}{suffix}"] = f"{100 * rate['rate']:.1f} % of {rate['n']}"
    for name in ("fad", "kad"):
        true, codec = (document["systems"][other]["distances"][name]["value"] for other in ("true music", "codec"))
        value = found["distances"][name]["value"]
        figures[name.upper()] = f"{value:.4g} (true music {true:.4g}, codec {codec:.4g})"
    settings = document["sampling"].get(system, {})
    names = [name for name in ("guidance_scale", "top_p") if name in settings]
    figures["sampling"] = ", ".join(f"{name.replace('_', ' ')} {settings[name]:g}" for name in names)
    return figures | {"command": COMMAND}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the card and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an exported model")
    parser.add_argument("--recipe", nargs="+", required=True, metavar="COMMAND", help="in the order of their use")
    parser.add_argument("--licence", default="CC0-1.0", help="SPDX id (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=None, help="measure.json of an evaluation")
    parser.add_argument("--system", default=None, help="the model's name in it")
    arguments = parser.parse_args(argv)
    if (arguments.results is None) != (arguments.system is None):
        raise UserError("--results and --system belong together")
    figures = read_card(arguments.folder).get("figures", {})
    if arguments.results is not None:
        figures = figures_of(json.loads(arguments.results.read_text()), arguments.system)
    card = complete_card(arguments.folder, arguments.licence, arguments.recipe, figures)
    for name, text in describe_card(card):
        print(f"{name:28} {text}")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
