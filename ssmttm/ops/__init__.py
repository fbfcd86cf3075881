"""Pure functions of tensors: for each operation a sequential oracle, a fast portable path and a one-position step.

Where tensors lie on a CUDA device and the kernels are installed, `ssmttm.ops.backend` sends the work to them.
"""
