"""These tests need an environment of their own (`make test-kernels`), which sets TRITON_INTERPRET=1."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

if not collect_ignore_glob:
    import environment
    import errors
    import pytest
    import torch

    environment.install()
    torch.set_num_threads(1)

    @pytest.fixture(autouse=True)
    def _seed():
        torch.manual_seed(0)

    def pytest_terminal_summary(terminalreporter):
        if errors.LARGEST:
            terminalreporter.section("largest errors, as a part of the largest value")
            terminalreporter.write_line("\n".join(errors.table()))
