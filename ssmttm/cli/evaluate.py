"""`ssmttm evaluate eval=NAME key=value ...` runs a protocol; `ssmttm evaluate compare A B` compares two results."""

import argparse
import json
from pathlib import Path

from ssmttm.errors import UserError

_EPILOG = """\
examples:
  ssmttm evaluate eval=builtin store=data/builtin checkpoint=runs/tiny       distances, adherence, music metrics
  ssmttm evaluate eval=builtin store=data/builtin audio=DIR                  of existing audio
  ssmttm evaluate eval=musiccaps prompts=musiccaps-public.csv references=DIR eval.weights.vggish=FILE
  ssmttm evaluate compare runs/eval/a runs/eval/b                            which is better, metric by metric
An interrupted command resumes when run again. All keys: ssmttm/config/commands.py; protocols: configs/eval/.
"""
_SHORT = {  # option: key
    "store": "store", "checkpoint": "checkpoint", "prompts": "n", "duration": "eval.seconds", "guidance": "guidance",
    "seed": "seed", "out": "out",
}  # fmt: skip


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `evaluate` to the `ssmttm` command."""
    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate a model: audio quality, prompt adherence, music metrics",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
    )
    evaluate.add_argument("words", nargs="*", metavar="eval=NAME [KEY=VALUE ...] | compare A B")
    for option, key in _SHORT.items():
        evaluate.add_argument(f"--{option}", metavar="X", help=f"the same as {key}=X")
    evaluate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run a protocol, or compare two results."""
    words = list(arguments.words)
    if words[:1] == ["compare"]:
        print(compare_folders([Path(word) for word in words[1:]]))
        return
    from ssmttm import config
    from ssmttm.evaluation.protocol.evaluate import evaluate
    from ssmttm.files import directory_lock

    options = {key: getattr(arguments, option) for option, key in _SHORT.items()}
    paths = ("store", "checkpoint", "out")
    for key, value in options.items():
        if value is not None:
            words.append(config.override(key, value) if key in paths else f"{key}={value}")
    settings = config.load(*words, root="eval")
    out = Path(settings.out)
    with directory_lock(out, "evaluation"):
        evaluate(settings)
    print((out / "report.md").read_text(encoding="utf-8"))
    print(f"{out / 'metrics.json'}\n{out / 'report.html'}")


def compare_folders(folders: list[Path]) -> str:
    """Compare two output folders of `evaluate`, one line a metric."""
    from ssmttm.evaluation.metrics.metric import Metric, compare

    if len(folders) != 2:
        raise UserError("usage: ssmttm evaluate compare A B, two output folders of `ssmttm evaluate`")
    results = []
    for folder in folders:
        path = folder / "metrics.json"
        if not path.is_file():
            raise UserError(f"no metrics.json in {folder}: run `ssmttm evaluate ... out={folder}` first")
        try:
            metrics = [Metric(**metric) for metric in json.loads(path.read_text(encoding="utf-8"))["metrics"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged or of another version: run `ssmttm evaluate` again") from error
        results.append({metric.name: metric for metric in metrics})
    first, second = results
    common = [name for name in first if name in second]
    if not common:
        raise UserError(f"{folders[0]} and {folders[1]} have no metric in common: use one protocol for both")
    return "\n".join(compare(first[name], second[name]) for name in common)
