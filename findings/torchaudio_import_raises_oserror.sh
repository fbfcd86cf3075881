#!/bin/bash
# torchaudio as pip chooses it beside a CPU build of torch is built for CUDA, and importing it raises OSError.
# A guess would be ImportError: `except ImportError` around an optional import of torchaudio does not catch this.
# (torch 2.13.0+cpu comes from PyTorch's own index for CPU builds: give it to pip where it is not set.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0+cpu numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps torchaudio==2.11.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import torch

print(f"torch {torch.__version__}, torchaudio {version('torchaudio')}")
found: Exception | None = None
try:
    import torchaudio  # noqa: F401
except Exception as error:
    found = error
cause = found.__cause__ if found else None
print(f"import torchaudio: {type(found).__name__}, an ImportError: {isinstance(found, ImportError)}; cause: {cause}")
sys.exit(0 if isinstance(found, OSError) and not isinstance(found, ImportError) else 1)
PYTHON
