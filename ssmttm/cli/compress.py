"""`ssmttm compress recipe=NAME ...`."""

import argparse

_EPILOG = """\
examples:
  ssmttm compress recipe=tinyttm_tiny teacher=tiny_lm store=data/builtin
                                           train the students, write exported/tinyttm_tiny
  ssmttm compress recipe=tinyttm_tiny teacher=tiny_lm store=data/builtin recipe.codec=null
                                           the same, the teacher's decoder stays
the same command goes on where it was stopped; all keys stand in configs/compress.yaml; recipes: configs/recipe/*.yaml
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `compress` to the `ssmttm` command."""
    compress = commands.add_parser(
        "compress",
        help="make a whole system small: train students of its parts by a recipe and put them together",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
    )
    compress.add_argument("words", nargs="+", metavar="recipe=NAME teacher=MODEL store=STORE [KEY=VALUE ...]")
    compress.set_defaults(run=lambda arguments: run(arguments.words))


def run(words: list[str]) -> None:
    """Follow a recipe and print what came out."""
    from ssmttm import config
    from ssmttm.compress.recipe import compress

    out = compress(config.load(*words, root="compress"))
    print((out / "sizes.md").read_text())
    print(f'{out}\nnext: python sample.py "a slow waltz on a flute" --checkpoint {out}')
