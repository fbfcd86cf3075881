"""Programs that tests run in forked processes."""

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from processes import run_program


def test_program_starts_without_the_accelerator_of_this_process(tmp_path):
    """A second Accelerator of a process cannot have another precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="no")
    program = tmp_path / "program.py"
    program.write_text("from accelerate import Accelerator\nAccelerator(cpu=True, mixed_precision='bf16')\n")
    try:
        code, output = run_program([str(program)], tmp_path)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert code == 0, output
