#!/bin/bash
# mauve-text gives 0.75, not 1, for a set of embeddings against itself when its clusters are equally large, and 1 when
# they are not. The MAUVE Audio Divergence built on it (-log) is then 0.29 for equal sets, instead of 0.
# The points of its divergence curve are all (1, 1) there, and it sorts them, and the end points, by one axis only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mauve-text==0.4.0 faiss-cpu==1.15.1 scikit-learn==1.9.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import sys
from importlib.metadata import version

import mauve
import numpy as np

print(f"mauve-text {version('mauve-text')}, two far clusters, the same array given as both sets")
rng = np.random.default_rng(0)
found = {}
for sizes in ((40, 40), (40, 41)):
    x = np.concatenate([rng.normal(centre, 0.01, (n, 8)) for n, centre in zip(sizes, ([1] + 7 * [0], [0, 1] + 6 * [0]))])
    found[sizes] = float(mauve.compute_mauve(x, x, num_buckets=2).mauve)
    print(f"clusters of {sizes[0]} and {sizes[1]} rows: {found[sizes]:.4f}")
sys.exit(0 if abs(found[40, 40] - 0.75) < 1e-6 and found[40, 41] > 0.999 else 1)
PYTHON
