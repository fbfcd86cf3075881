"""Pure functions of tensors: for each operation a sequential reference, a fast portable path and a one-position step.

On a CUDA device with the kernels installed, `ssmttm.ops.backend` selects them.
"""
