"""Settings of all tests."""

import os

# Before torch is loaded, and for the programs that tests start: several tests run at a time.
for name, value in {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)
