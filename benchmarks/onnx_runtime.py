"""The embedded model in ONNX Runtime against torch, one thread: a step of two rows, decoding, encoding a caption.

python benchmarks/onnx_runtime.py
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from paired import environment, paired, summary

from ssmttm import MusicPipeline
from ssmttm.export.onnx import export_onnx
from ssmttm.export.onnx.graphs import StepGraph
from ssmttm.text import TextCondition

ROWS, SECONDS, CAPTION = 2, 10, "a slow waltz in D minor on a music box"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="of one stage, such as a run of experiment=tiny")
    parser.add_argument("--folder", type=Path, help="its ONNX folder (default: exported to a temporary one)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/onnx.json"))
    parser.add_argument("--rounds", type=int, default=41)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        measure(arguments, arguments.folder or export_onnx(arguments.model, Path(temporary) / "onnx"))


@torch.inference_mode()
def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Print the times and write them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    graphs = {path.stem: onnxruntime.InferenceSession(path, options) for path in folder.glob("*.onnx")}
    pipe = MusicPipeline.from_pretrained(arguments.model, device="cpu")
    model, codec, encoder = pipe.model, pipe.codec, pipe.text_encoder
    frames = round(SECONDS * codec.frame_rate)
    codes = torch.randint(codec.codebook_size, (1, codec.n_codebooks, frames))
    ids = np.array(encoder.tokenizer([CAPTION])["input_ids"])  # [1, L]
    mask = np.ones_like(ids)
    state = model.init_state(ROWS)
    text = TextCondition(torch.randn(ROWS, 8, model.config.text_dim), torch.ones(ROWS, 8, dtype=torch.bool))
    column = codes[..., 0].expand(ROWS, -1)
    model.prefill(column[..., None], text, state)
    step = {name: example.numpy() for name, example in StepGraph(model).examples.items()}
    cases = {
        "a step of 2 rows": {
            "torch": lambda: model.step(column, state),
            "ONNX Runtime": lambda: graphs["step"].run(None, step),
        },
        f"decoding {SECONDS} s": {
            "torch": lambda: codec.decode(codes),
            "ONNX Runtime": lambda: graphs["codec_decoder"].run(None, {"codes": codes.numpy()}),
        },
        "encoding a caption": {
            "torch": lambda: encoder.encode([CAPTION]),
            "ONNX Runtime": lambda: graphs["text_encoder"].run(None, {"input_ids": ids, "attention_mask": mask}),
        },
    }
    results = {name: summary(paired(case, arguments.rounds, name), "ONNX Runtime") for name, case in cases.items()}
    for name, case in results.items():
        times = ", ".join(f"{kind} {metrics['median_ms']:.2f} ms" for kind, metrics in case.items())
        print(f"{name}: {times}; torch takes {case['torch']['ratio']:.2f} times as long")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    where = environment() | {"onnxruntime": onnxruntime.__version__}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"environment": where, "results": results, "bytes": sizes}, indent=1) + "\n")
    print(arguments.out)


if __name__ == "__main__":
    main()
