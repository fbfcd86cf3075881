"""Steps of torch on a GPU as one CUDA graph: the step, guidance, filters and the draw, without a word from the host.

A graph replays the same kernels on the same memory. So all that changes from position to position (codes, uniforms,
template, added embeddings) lies in buffers on the device, which a counter on the device indexes. On a CPU the same
function is called instead of a graph, so that tests run what a GPU runs.
Shapes: R rows, B items, K codebooks, D model width, V' logits of a codebook.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmttm.generation.engines.base import AddedEmbeddings, Engine, Steps
from ssmttm.generation.request import Sampling
from ssmttm.mixers import Attention
from ssmttm.models.controls import Controls
from ssmttm.models.token_lm import LMState, TokenLM

MAX_POSITIONS = 256  # of one call of `run`; longer ones are split
WARM_UP = 3  # calls before a capture, in which libraries choose their kernels and allocate


def can_capture(model: TokenLM) -> bool:
    """Whether a step always runs the same kernels on the same memory: the cache of self-attention grows."""
    return not any(isinstance(module, Attention) for module in model.modules())


class CapturedSteps(Steps):
    """Steps on one state. One graph is kept, of the last settings of the sampling."""

    def __init__(self, engine: Engine, state: LMState, n_items: int, n_conditional: int | None = None) -> None:
        super().__init__(engine, state, n_items, n_conditional)
        model, device = engine.model, engine.model.embedding.weight.device
        rows, shape, self.added = state.batch_size, (n_items, model.config.n_codebooks), None
        dtype = model.embedding.weight.dtype
        added = AddedEmbeddings(model)
        if not added.is_empty:
            self.added = added
            self.vectors = torch.zeros(MAX_POSITIONS, rows, model.config.d_model, device=device, dtype=dtype)
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        self.codes = torch.zeros(shape, dtype=torch.long, device=device)
        self.template = torch.zeros(MAX_POSITIONS, *shape, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(MAX_POSITIONS, *shape, dtype=torch.float64, device=device)
        self.found = torch.zeros_like(self.template)
        self.logits = torch.zeros(rows, shape[1], model.n_logits, dtype=dtype, device=device)
        self._settings: tuple[Sampling, bool] | None = None
        self._replay: Callable[[], None] | None = None

    @torch.inference_mode()
    def step(self, codes: Tensor, controls: Controls, index: int) -> Tensor:
        controls = self.controls_of_rows(controls, slice(index, index + 1))
        return self.engine.model.step(codes[self.item_of_row], self.state, controls)

    @torch.inference_mode()
    def run(
        self, codes: Tensor | None, logits: Tensor, template: Tensor, uniforms: Tensor, controls: Controls, index: int,
        sampling: Sampling, guided: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        found = []
        if codes is None:  # the first position has its logits already
            drawn = self.engine.draw(logits, uniforms[0], sampling, guided)
            codes = drawn.where(template[0] < 0, template[0])
            found.append(codes[None])
        first = len(found)
        replay = self._captured(sampling, guided)
        for start in range(first, len(template), MAX_POSITIONS):
            count = min(MAX_POSITIONS, len(template) - start)
            self.template[:count], self.uniforms[:count] = (
                template[start : start + count],
                uniforms[start : start + count],
            )
            if self.added is not None:
                self.vectors[:count] = self.added.compute(self, controls, index + start, count)
            self.codes.copy_(codes)
            self.index.zero_()
            for _ in range(count):
                replay()
            self.state.position += count
            codes = self.codes.clone()
            found.append(self.found[:count].clone())
        return torch.cat(found), self.logits.clone() if first < len(template) else logits

    def _advance(self, sampling: Sampling, guided: bool) -> None:
        """One step and one draw, in the buffers."""
        model = self.engine.model
        x = F.embedding_bag(self.codes[self.item_of_row] + model.offsets, model.embedding.weight, mode="sum")  # [R, D]
        if self.added is not None:
            x = x + self.vectors.index_select(0, self.index)[0]
        self.logits.copy_(model.step_embedded(x, self.state))
        drawn = self.engine.draw(self.logits, self.uniforms.index_select(0, self.index)[0], sampling, guided)
        known = self.template.index_select(0, self.index)[0]
        self.codes.copy_(drawn.where(known < 0, known))
        self.found.index_copy_(0, self.index, self.codes[None])
        self.index.add_(1)

    def _captured(self, sampling: Sampling, guided: bool) -> Callable[[], None]:
        """The graph of `_advance` with these settings; on a CPU, the function."""
        if self._replay is None or self._settings != (sampling, guided):
            self._settings = (sampling, guided)
            advance = lambda: self._advance(sampling, guided)  # noqa: E731
            self._replay = self._capture(advance) if self.codes.is_cuda else advance
        return self._replay

    def _capture(self, advance: Callable[[], None]) -> Callable[[], None]:
        kept = self._memory()
        before = [tensor.clone() for tensor in kept]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                advance()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            advance()
        for tensor, value in zip(kept, before, strict=True):
            tensor.copy_(value)
        return graph.replay

    def _memory(self) -> list[Tensor]:
        """What a step changes: the mixers' states."""
        sublayers = [sublayer.inner for block in self.state.blocks for sublayer in block]
        values = [value for inner in sublayers if inner is not None for value in vars(inner).values()]
        return [value for value in values if isinstance(value, Tensor)]
