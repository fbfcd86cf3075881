"""`python -m data_prep`: see `data_prep.cli`."""

import sys

from data_prep.cli import main
from ssmttm.errors import run_cli

if __name__ == "__main__":
    sys.exit(run_cli(main))
