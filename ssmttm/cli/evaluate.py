"""`ssmttm evaluate eval=NAME key=value ...`: generate and score; `ssmttm evaluate compare A B`: two of its outcomes."""

import argparse
import json
from pathlib import Path

from ssmttm.errors import UserError

_EPILOG = """\
examples:
  ssmttm evaluate eval=builtin store=data/builtin checkpoint=runs/tiny       distances, adherence, musical measures
  ssmttm evaluate eval=builtin store=data/builtin audio=DIR                  of finished audio
  ssmttm evaluate eval=musiccaps prompts=musiccaps-public.csv references=DIR eval.weights.vggish=FILE
  ssmttm evaluate compare runs/eval/a runs/eval/b                            which is better; refuses unlike figures
the same command goes on where it was stopped; all keys stand in configs/eval.yaml, protocols in configs/eval/
"""
_SHORT = {  # option: key
    "store": "store", "checkpoint": "checkpoint", "prompts": "n", "duration": "eval.seconds", "guidance": "guidance",
    "seed": "seed", "out": "out",
}  # fmt: skip


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `evaluate` to the `ssmttm` command."""
    evaluate = commands.add_parser(
        "evaluate",
        help="how good a model's music is and how well it follows its prompts: a protocol from prompts to figures",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
    )
    evaluate.add_argument("words", nargs="*", metavar="eval=NAME [KEY=VALUE ...] | compare A B")
    for option, key in _SHORT.items():
        evaluate.add_argument(f"--{option}", metavar="X", help=f"the same as {key}=X")
    evaluate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run a protocol, or compare two outcomes."""
    words = list(arguments.words)
    if words[:1] == ["compare"]:
        print(compare_folders([Path(word) for word in words[1:]]))
        return
    from ssmttm import config
    from ssmttm.evaluation.protocol.evaluate import evaluate
    from ssmttm.files import directory_lock

    given = {key: getattr(arguments, option) for option, key in _SHORT.items()}
    words += [f"{key}={value}" for key, value in given.items() if value is not None]
    settings = config.load(*words, root="eval")
    out = Path(settings.out)
    with directory_lock(out, "evaluation"):
        evaluate(settings)
    print((out / "report.md").read_text(encoding="utf-8"))
    print(f"{out / 'metrics.json'}\n{out / 'report.md'}")


def compare_folders(folders: list[Path]) -> str:
    """Which of two outcomes of `evaluate` is better, figure by figure.

    Raises:
        UserError: not two folders, no figures in them, damaged ones, or figures that were measured differently.
    """
    from ssmttm.evaluation.metrics.metric import Metric, compare

    if len(folders) != 2:
        raise UserError("write `ssmttm evaluate compare A B`, two folders that `ssmttm evaluate` has written")
    found = []
    for folder in folders:
        path = folder / "figures.json"
        if not path.is_file():
            raise UserError(f"{folder} holds no figures.json: run `ssmttm evaluate ... out={folder}` first")
        try:
            metrics = [Metric(**metric) for metric in json.loads(path.read_text(encoding="utf-8"))["metrics"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged or of another version: run `ssmttm evaluate` again") from error
        found.append({metric.name: metric for metric in metrics})
    shared = [name for name in found[0] if name in found[1]]
    if not shared:
        raise UserError(f"{folders[0]} and {folders[1]} have no figure in common: measure both with one protocol")
    return "\n".join(compare(found[0][name], found[1][name]) for name in shared)
