"""`ssmttm compress recipe=NAME ...`."""

import argparse

_EPILOG = """\
examples:
  ssmttm compress recipe=tinyttm_tiny teacher=tiny_lm store=data/builtin
                                           train the students, write exported/tinyttm_tiny
  ssmttm compress recipe=tinyttm_tiny teacher=tiny_lm store=data/builtin recipe.codec=null
                                           the same, with the teacher's decoder
the same command resumes a stopped run; all keys: ssmttm/config/commands.py; recipes: configs/recipe/*.yaml
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `compress` to the `ssmttm` command."""
    compress = commands.add_parser(
        "compress",
        help="compress a whole system: train students of its parts by a recipe and assemble them",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
    )
    compress.add_argument("words", nargs="+", metavar="recipe=NAME teacher=MODEL store=STORE [KEY=VALUE ...]")
    compress.set_defaults(run=lambda arguments: run(arguments.words))


def run(overrides: list[str]) -> None:
    """Run a recipe and print the sizes and the folder of the student system."""
    from ssmttm import config
    from ssmttm.compress.recipe import compress

    out = compress(config.load(*overrides, root="compress"))
    print((out / "sizes.md").read_text())
    print(f'{out}\nnext: python sample.py "a slow waltz on a flute" --checkpoint {out}')
