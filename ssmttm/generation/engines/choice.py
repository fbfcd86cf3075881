"""Which engine runs a model's steps, and why."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from ssmttm.errors import UserError
from ssmttm.generation.engines.base import Engine
from ssmttm.generation.engines.library import Unavailable, cache_folder, instruction_set, library
from ssmttm.generation.engines.reference import TorchEngine
from ssmttm.models.token_lm import TokenLM
from ssmttm.ops.int8 import Int8Linear

ENGINES = ("auto", "fused", "ort", "torch")
WEIGHTS = ("fp32", "bf16", "int8")


def check_names(engine: str, weights: str) -> None:
    """Raises UserError if there is no such engine, or no such format of weights."""
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}: choose from {', '.join(ENGINES)}")
    if weights not in WEIGHTS:
        raise UserError(f"unknown weights {weights!r}: choose from {', '.join(WEIGHTS)}")


def build(
    model: TokenLM, engine: str = "auto", weights: str = "fp32", threads: int | None = None, exact: bool = True
) -> Engine:
    """An engine for a model in eval mode, whose weights must not change any more.

    Args:
        engine: "fused", "ort" or "torch"; "auto" takes the first of them that can run the model.
        weights: format of the linear layers' weights in a step: "fp32", "bf16" or "int8". A model that was quantised to
            int8 stays so.
        threads: of the fused engine; None: one, or torch's number for weights of more than 100 MB.
        exact: with torch on a CPU, a row has the same bits in any batch, for which rows are padded to a multiple of 4.

    Raises:
        UserError: the requested engine cannot run this model, or no engine can with these weights.
    """
    check_names(engine, weights)
    if weights == "bf16" and any(isinstance(module, Int8Linear) for module in model.modules()):
        raise UserError("this model was quantised to int8, which all engines read: leave weights=bf16 out")
    makers: dict[str, Callable[[], Engine]] = {
        "fused": lambda: _fused(model, weights, threads),
        "ort": lambda: _ort(model, weights),
        "torch": lambda: _torch(model, weights, exact),
    }
    if engine != "auto":
        try:
            return makers[engine]()
        except Unavailable as error:
            raise UserError(f"engine={engine} cannot run this model: {error}") from error
    reasons = []
    for name, make in makers.items():
        try:
            chosen = make()
        except Unavailable as error:
            reasons.append(f"{name}: {error}")
            continue
        chosen.reason = "; ".join(
            ["the fastest that can run" if not reasons else "no faster one runs", chosen.reason, *reasons]
        )
        return chosen
    raise UserError(f"no engine runs this model with {weights} weights ({'; '.join(reasons)}): use weights=fp32")


def describe() -> list[tuple[str, str, str]]:
    """Each engine, whether it is available on this machine, and why: for `ssmttm info`. Builds the fused one."""
    rows = []
    try:
        library()
        rows.append(("fused", "yes", f"compiled for {instruction_set()}, in {cache_folder()}"))
    except Unavailable as error:
        rows.append(("fused", "no", str(error)))
    try:
        rows.append(("ort", "yes", f"onnxruntime {_onnx_runtime_version()}"))
    except Unavailable as error:
        rows.append(("ort", "no", str(error)))
    return [*rows, ("torch", "yes", "the reference, for every model and device")]


class EngineCache:
    """Engines that were built for a model, until its weights change."""

    def __init__(self) -> None:
        self._built: dict[tuple[str, str], tuple[list[tuple[int, int]], Engine]] = {}

    def get(self, model: TokenLM, engine: str, weights: str) -> Engine:
        """As `build`."""
        check_names(engine, weights)
        tensors = [tensor for tensor in model.state_dict(keep_vars=True).values() if not tensor.is_inference()]
        versions = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        known = self._built.get((engine, weights))
        if known is None or known[0] != versions or known[1].model is not model:
            self._built[engine, weights] = known = versions, build(model, engine, weights)
        return known[1]


def _fused(model: TokenLM, weights: str, threads: int | None) -> Engine:
    from ssmttm.generation.engines.fused import FusedEngine

    return FusedEngine(model, weights, threads)


def _ort(model: TokenLM, weights: str) -> Engine:
    _onnx_runtime_version()
    from ssmttm.generation.engines.onnx_runtime import OrtEngine

    return OrtEngine(model, weights)


def _onnx_runtime_version() -> str:
    """Raises Unavailable if a package is missing."""
    try:
        version("onnx")
        return version("onnxruntime")
    except PackageNotFoundError as error:
        raise Unavailable("onnxruntime and onnx are not installed (pip install ssmttm[export])") from error


def _torch(model: TokenLM, weights: str, exact: bool) -> Engine:
    """In torch the model's own weights are used: float32, or int8 if it was quantised."""
    own = "int8" if any(isinstance(module, Int8Linear) for module in model.modules()) else "fp32"
    if weights not in ("fp32", own):
        raise Unavailable(f"it does not read {weights} weights")
    return TorchEngine(model, own, exact)
