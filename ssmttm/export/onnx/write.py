"""Write a model as ONNX: a folder that a program without torch can make music with.

text_encoder.onnx, condition.onnx, step.onnx and codec_decoder.onnx are what `ssmttm.export.onnx.graphs` says; tokenizer.json
is the text encoder's and cuts captions as it does; system.json holds all numbers that a program needs besides, and
where the model comes from. docs/onnx.md tells how they go together.
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
from ssmttm.generation.loading import ModelFolder, open_model_folder
from ssmttm.generation.pipeline import MusicPipeline
from ssmttm.text.encoders import TextEncoder

NULL_CONDITIONS = ("empty_caption", "no_tokens")


def export_onnx(model: str | Path | None, out: str | Path) -> Path:
    """Write a model of one stage, its text encoder and its codec's decoder as ONNX graphs in float32.

    A model that can be told a melody or a tempo is written as it is when told neither.

    Args:
        model: an exported folder, a run, a checkpoint, the name of an embedded model, or a hub id; None: the embedded
            tiny model.
        out: the folder to write, a new one.

    Raises:
        UserError: the extra `export` is not installed, there is no such model, it has two stages or reads captions in a
            way that the files cannot hold, or `out` exists.
    """
    missing = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
    if missing:
        raise UserError(f"writing ONNX needs {' and '.join(missing)}: pip install 'ssmttm[export]'")
    folder, out = open_model_folder(model), Path(out)
    pipe = MusicPipeline.from_pretrained(model, device="cpu")
    if pipe.second_stage is not None:
        raise UserError(f"{folder.name} has two stages, ONNX export takes one: export a model without a painter")
    if folder.null_condition not in NULL_CONDITIONS:
        raise UserError(
            f"{folder.name} reads captions as {folder.null_condition!r}, ONNX export knows {' and '.join(NULL_CONDITIONS)}: "
            "such a model runs with sample.py only"
        )
    step = StepGraph(pipe.model)
    graphs: dict[str, Graph] = {
        "text_encoder": EncoderGraph(pipe.text_encoder),
        "condition": ConditionGraph(pipe.model),
        "step": step,
        "codec_decoder": DecoderGraph(pipe.codec),
    }
    with new_folder(out) as aside:
        for name, graph in graphs.items():
            write_graph(graph, aside / f"{name}.onnx")
        tokenizer = _tokenizer(pipe.text_encoder)
        tokenizer.save(str(aside / "tokenizer.json"))
        null_ids = [] if folder.null_condition == "no_tokens" else tokenizer.encode("").ids
        document = {**_sizes(pipe), "null_ids": null_ids, "states": _states(step), **_origin(folder, pipe)}
        (aside / "system.json").write_text(json.dumps(document, indent=2) + "\n")
    return out


@torch.no_grad()
def write_graph(graph: Graph, path: Path) -> None:
    """Trace a graph with its examples and write it; inputs and outputs keep their names, free axes stay free."""
    # torch asks of sizes 0 and 1 how they lie in memory; the graph does not, and takes them too
    dims = {count: torch.export.Dim(count, min=2) for axes in graph.axes.values() for count in axes.values()}
    shapes = [{axis: dims[count] for axis, count in graph.axes[name].items()} for name in graph.examples]
    with _quiet():
        program = torch.onnx.export(
            graph.eval(),
            tuple(graph.examples.values()),
            input_names=list(graph.examples),
            output_names=graph.outputs,
            dynamic_shapes=(tuple(shapes),),
            dynamo=True,
            verbose=False,
        )
    for given in program.model.graph.inputs:
        fixed = [count for axis, count in graph.axes[given.name].items() if isinstance(given.shape[axis], int)]
        if fixed:
            raise RuntimeError(f"{path.stem}: {given.name} came out with a fixed number of {', '.join(fixed)}")
    program.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that are not needed and of its own future."""
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
    """The encoder's tokenizer as one of the `tokenizers` package, which cuts long captions and does not pad."""
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
        "sample_rate": codec.sample_rate,
        "hop_length": codec.hop_length,
        "frame_rate": codec.frame_rate,
        "n_codebooks": codec.n_codebooks,
        "codebook_size": codec.codebook_size,
        "special_token_id": pipe.model.special_token_id,
        "pattern": asdict(pipe.pattern),
        "guidance_scale": pipe.guidance_scale,
        "conditioning": config.conditioning,
        "positions": config.positions,
    }


def _states(step: StepGraph) -> dict[str, Any]:
    """Of each state that a step carries on: its shape, with words for free axes, and its type in numpy's words."""
    return {
        name: {
            "shape": [step.axes[name].get(axis, size) for axis, size in enumerate(step.examples[name].shape)],
            "dtype": str(step.examples[name].dtype).removeprefix("torch."),
        }
        for name in step.carried
    }


def _origin(folder: ModelFolder, pipe: MusicPipeline) -> dict[str, Any]:
    return {"facts": pipe.facts, "card": folder.card}
