"""Music without torch, from what `ssmttm onnx MODEL FOLDER` wrote: generate_onnx.py FOLDER "a waltz" --out x.wav"""
import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile
from tokenizers import Tokenizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("prompt")
for name, default in {"out": "out.wav", "duration": 10.0, "seed": 0}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
for name, kind in {"guidance-scale": float, "temperature": float, "top-k": int, "top-p": float, "min-p": float}.items():
    parser.add_argument(f"--{name}", type=kind, help="default: the model's")
args = parser.parse_args()
system = json.loads((args.folder / "system.json").read_text())
sampling = system["sampling"] | {name: value for name, value in vars(args).items() if value is not None}
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1  # the steps are small: more threads only wait for each other
graphs = {path.stem: onnxruntime.InferenceSession(path, options) for path in args.folder.glob("*.onnx")}

def step(states: dict, codes: np.ndarray) -> tuple:  # codes [rows, K] -> logits [rows, K, V], next states
    logits, *next_states = graphs["step"].run(None, states | {"codes": codes})
    return logits, states | dict(zip(system["states"], next_states, strict=True))

def prefill(ids: list) -> dict:  # states of one row after its text; no ids: without text
    tokens, mask, axes = np.array([ids or [0]]), np.full((1, len(ids) or 1), bool(ids)), {"batch": 1, "cached": 0}
    states = {k: np.zeros([axes.get(n, n) for n in v["shape"]], v["dtype"]) for k, v in system["states"].items()}
    (text,) = graphs["text_encoder"].run(None, {"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
    condition = graphs["condition"].run(None, {"text": text, "mask": mask})
    states |= dict(zip([output.name for output in graphs["condition"].get_outputs()], condition, strict=True))
    if system["conditioning"] == "prefix":  # text tokens are positions before the music
        if system["positions"] == "sinusoidal":
            states["position"] -= len(ids)
        for token in condition[0][0, : len(ids)]:
            states |= {"prefix": token[None], "is_prefix": np.array([True])}
            states = step(states, np.full((1, system["n_codebooks"]), system["special_token_id"]))[1]
        states |= {"prefix": condition[0][:, 0], "is_prefix": np.array([False])}
    return states

def concatenate(parts: list) -> np.ndarray:  # rows, zero-padded to the longest text
    shape = np.max([part.shape for part in parts], axis=0)
    return np.concatenate([np.pad(part, [(0, n) for n in shape - part.shape]) for part in parts])

prompt = Tokenizer.from_file(str(args.folder / "tokenizer.json")).encode(args.prompt).ids
scale, pattern = sampling["guidance_scale"], system["pattern"]
rows = [prefill(ids) for ids in ([prompt] if scale == 1 else [prompt, system["null_ids"]])]
states, random = {name: concatenate([row[name] for row in rows]) for name in rows[0]}, np.random.default_rng(args.seed)
n_samples = round(args.duration * system["sample_rate"])
frames = np.arange(-(-n_samples // system["hop_length"]))  # [T]
starts = 1 + np.array(pattern["offsets"]) + np.array(pattern["passes"]) * len(frames)  # [K], after the start column
positions = starts[:, None] + pattern["stride"] * frames  # [K, T], of each code in the sequence
sequence = np.full((len(positions), positions.max() + 1), system["special_token_id"])
for position in range(1, sequence.shape[1]):
    logits, states = step(states, np.tile(sequence[:, position - 1], (len(rows), 1)))
    logits = (logits[-1] + scale * (logits[0] - logits[-1])) / sampling["temperature"]  # [K, V], guided by the null row
    order = np.argsort(-logits)[:, : sampling["top_k"] or None]  # the most likely codes first
    logits = np.take_along_axis(logits, order, 1)
    mass = np.exp(logits - logits[:, :1])
    logits[mass.cumsum(1) - mass >= sampling["top_p"] * mass.sum(1, keepdims=True)] = -np.inf
    logits[mass < sampling["min_p"]] = -np.inf
    drawn = (logits + random.gumbel(size=logits.shape)).argmax(1)  # samples softmax(logits)
    codes = np.take_along_axis(order, drawn[:, None], 1)[:, 0]
    sequence[:, position] = np.where((positions == position).any(1), codes, system["special_token_id"])
(wav,) = graphs["codec_decoder"].run(None, {"codes": np.take_along_axis(sequence, positions, 1)[None]})
soundfile.write(args.out, wav[0, 0, :n_samples], system["sample_rate"])
