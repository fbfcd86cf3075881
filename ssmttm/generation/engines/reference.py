"""The decoding step in torch: the reference, for every model and device."""

import math

from torch import Tensor

from ssmttm.generation.engines.base import Engine, Steps
from ssmttm.generation.engines.captured import CapturedSteps, can_capture
from ssmttm.models.controls import Controls
from ssmttm.models.token_lm import LMState, TokenLM

# MKL sums the products of 1, of 2 or 3, and of 4 rows or more in different orders, and splits the rows over threads. In
# multiples of 4 a row's result does not depend on the other rows, bit for bit.
ROWS = 4


class TorchEngine(Engine):
    """`TokenLM.step`; on a GPU, in a CUDA graph with the draw if the model allows it.

    exact: on a CPU a row has the same bits in any batch; rows are padded to a multiple of 4 for it (one row alone then
    costs 1.5 times as much).
    """

    name = "torch"

    def __init__(self, model: TokenLM, weights: str = "fp32", exact: bool = True) -> None:
        super().__init__(model, weights)
        self.exact = exact
        self.on_cpu = model.embedding.weight.device.type == "cpu"
        self.batched_prefill = not self.on_cpu
        self.captures = not self.on_cpu and can_capture(model)
        if not self.on_cpu:
            self.reason = "a CUDA graph" if self.captures else "step by step, since the cache of attention grows"

    def bind(self, state: LMState, n_items: int, n_conditional: int | None = None) -> Steps:
        kind = CapturedSteps if self.captures else TorchSteps
        return kind(self, state, n_items, n_conditional)

    def n_rows(self, rows: int) -> int:
        return math.ceil(rows / ROWS) * ROWS if self.on_cpu and self.exact else rows


class TorchSteps(Steps):
    """Steps of a TokenLM."""

    def step(self, codes: Tensor, controls: Controls, index: int) -> Tensor:
        controls = self.controls_of_rows(controls, slice(index, index + 1))
        return self.engine.model.step(codes[self.item_of_row], self.state, controls)
