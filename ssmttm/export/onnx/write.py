"""Export of a model to ONNX, as a folder for programs without torch (docs/onnx.md).

text_encoder.onnx, condition.onnx, step.onnx and codec_decoder.onnx are the graphs of `ssmttm.export.onnx.graphs`.
tokenizer.json is the text encoder's, with its truncation. system.json has sizes, states and the model's provenance.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ssmttm.errors import UserError
from ssmttm.export.onnx.graphs import ConditionGraph, DecoderGraph, EncoderGraph, Graph, StepGraph
from ssmttm.files import new_folder
from ssmttm.generation.loading import open_model_folder
from ssmttm.generation.pipeline import MusicPipeline
from ssmttm.text.encoders import TextEncoder

NULL_CONDITIONS = ("empty_caption", "no_tokens")


def export_onnx(model: str | Path | None, out: str | Path) -> Path:
    """Write a model of one stage, its text encoder and its codec's decoder as ONNX graphs in float32. Raises UserError
    if the extra `export` is not installed, there is no such model, it has two stages or an unsupported null condition,
    or `out` exists.

    Melody and tempo controls are not exported: the graphs are those of the model without them.

    Args:
        model: an exported folder, a run, a checkpoint, the name of an embedded model, or a hub id; None: the embedded
            tiny model.
        out: a new folder.
    """
    missing = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
    if missing:
        raise UserError(f"writing ONNX needs {' and '.join(missing)}: pip install 'ssmttm[export]'")
    folder, out = open_model_folder(model), Path(out)
    pipe = MusicPipeline.from_pretrained(model, device="cpu")
    if pipe.second_stage is not None:
        raise UserError(f"{folder.name} has two stages: ONNX export supports one-stage models only")
    if folder.null_condition not in NULL_CONDITIONS:
        raise UserError(f"ONNX export does not support the null condition {folder.null_condition!r} of {folder.name}")
    if pipe.codec.channels != 1:
        raise UserError(f"{folder.name} has the stereo codec {pipe.codec.name}: ONNX export supports mono codecs only")
    step = StepGraph(pipe.model)
    graphs: dict[str, Graph] = {
        "text_encoder": EncoderGraph(pipe.text_encoder), "condition": ConditionGraph(pipe.model), "step": step,
        "codec_decoder": DecoderGraph(pipe.codec),
    }  # fmt: skip
    with new_folder(out) as temporary:
        for name, graph in graphs.items():
            write_graph(graph, temporary / f"{name}.onnx")
        tokenizer = _tokenizer(pipe.text_encoder)
        tokenizer.save(str(temporary / "tokenizer.json"))
        null_ids = [] if folder.null_condition == "no_tokens" else tokenizer.encode("").ids
        provenance = {"metadata": pipe.metadata, "card": folder.card}
        document = {**_sizes(pipe), "null_ids": null_ids, "states": _states(step), **provenance}
        (temporary / "system.json").write_text(json.dumps(document, indent=2) + "\n")
    return out


@torch.no_grad()
def write_graph(graph: Graph, path: Path) -> None:
    """Trace a graph with its examples and write it, with named inputs and outputs and free axes."""
    # torch specialises sizes 0 and 1; the graph itself accepts them
    dims = {count: torch.export.Dim(count, min=2) for axes in graph.axes.values() for count in axes.values()}
    shapes = [{axis: dims[count] for axis, count in graph.axes[name].items()} for name in graph.examples]
    with _quiet():
        program: Any = torch.onnx.export(
            graph.eval(), tuple(graph.examples.values()), input_names=list(graph.examples),
            output_names=graph.outputs, dynamic_shapes=(tuple(shapes),), dynamo=True, verbose=False,
        )  # fmt: skip
    for exported in program.model.graph.inputs:
        fixed = [count for axis, count in graph.axes[exported.name].items() if isinstance(exported.shape[axis], int)]
        if fixed:
            raise RuntimeError(f"{path.stem}: {exported.name} was exported with fixed axes {', '.join(fixed)}")
    program.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about optional packages and deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _tokenizer(encoder: TextEncoder) -> Any:
    """The encoder's tokenizer for the `tokenizers` package, with truncation and without padding."""
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"the tokenizer of {encoder.name} has no fast form: save it with transformers 5 first")
    tokenizer = type(backend).from_str(backend.to_str())
    tokenizer.no_padding()
    tokenizer.enable_truncation(encoder.max_tokens)
    return tokenizer


def _sizes(pipe: MusicPipeline) -> dict[str, Any]:
    codec, config = pipe.codec, pipe.model.config
    return {
        "sample_rate": codec.sample_rate, "hop_length": codec.hop_length, "frame_rate": codec.frame_rate,
        "n_codebooks": codec.n_codebooks, "codebook_size": codec.codebook_size,
        "special_token_id": pipe.model.special_token_id, "pattern": asdict(pipe.pattern),
        "sampling": asdict(pipe.sampling_defaults), "conditioning": config.conditioning, "positions": config.positions,
    }  # fmt: skip


def _states(step: StepGraph) -> dict[str, Any]:
    """Shape, with names for free axes, and numpy dtype of each state that a step updates."""
    return {
        name: {
            "shape": [step.axes[name].get(axis, size) for axis, size in enumerate(step.examples[name].shape)],
            "dtype": str(step.examples[name].dtype).removeprefix("torch."),
        }
        for name in step.carried
    }
