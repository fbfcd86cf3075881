"""Music without torch, of what `ssmttm onnx MODEL FOLDER` wrote: generate_onnx.py FOLDER "a slow waltz" --out x.wav"""
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
parser.add_argument("--guidance", type=float, help="default: the model's own")
for name, default in {"out": "out.wav", "duration": 10.0, "seed": 0, "temperature": 1.0, "top-k": 250}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
asked = parser.parse_args()
facts = json.loads((asked.folder / "system.json").read_text())
graphs = {path.stem: onnxruntime.InferenceSession(path) for path in asked.folder.glob("*.onnx")}

def step(states: dict, codes: np.ndarray) -> tuple:  # codes [rows, K] -> logits [rows, K, V], the states behind them
    logits, *behind = graphs["step"].run(None, states | {"codes": codes})
    return logits, states | dict(zip(facts["states"], behind, strict=True))

def read(ids: list) -> dict:  # the states of one row behind its text, or behind no text where there are no ids
    tokens, real, axes = np.array([ids or [0]]), np.full((1, len(ids) or 1), bool(ids)), {"batch": 1, "cached": 0}
    states = {k: np.zeros([axes.get(n, n) for n in v["shape"]], v["dtype"]) for k, v in facts["states"].items()}
    (text,) = graphs["text_encoder"].run(None, {"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
    told = graphs["condition"].run(None, {"text": text, "mask": real})
    states |= dict(zip([output.name for output in graphs["condition"].get_outputs()], told, strict=True))
    if facts["conditioning"] == "prefix":  # the text's tokens are positions in front of the music
        if facts["positions"] == "sinusoidal":
            states["position"] -= len(ids)
        for token in told[0][0, : len(ids)]:
            states |= {"prefix": token[None], "is_prefix": np.array([True])}
            states = step(states, np.full((1, facts["n_codebooks"]), facts["special_token_id"]))[1]
        states |= {"prefix": told[0][:, 0], "is_prefix": np.array([False])}
    return states

def stack(parts: list) -> np.ndarray:  # rows one below the other, with room for the longest text
    room = np.max([part.shape for part in parts], axis=0)
    return np.concatenate([np.pad(part, [(0, n) for n in room - part.shape]) for part in parts])

prompt = Tokenizer.from_file(str(asked.folder / "tokenizer.json")).encode(asked.prompt).ids
scale, pattern = facts["guidance_scale"] if asked.guidance is None else asked.guidance, facts["pattern"]
rows = [read(ids) for ids in ([prompt] if scale == 1 else [prompt, facts["null_ids"]])]
states, random = {name: stack([row[name] for row in rows]) for name in rows[0]}, np.random.default_rng(asked.seed)
n_samples = round(asked.duration * facts["sample_rate"])
frames = np.arange(-(-n_samples // facts["hop_length"]))  # [T]
starts = 1 + np.array(pattern["offsets"]) + np.array(pattern["passes"]) * len(frames)  # [K], behind an empty position
places = starts[:, None] + pattern["stride"] * frames  # [K, T], where in the sequence each code stands
sequence = np.full((len(places), places.max() + 1), facts["special_token_id"])
for position in range(1, sequence.shape[1]):
    logits, states = step(states, np.tile(sequence[:, position - 1], (len(rows), 1)))
    logits = (logits[-1] + scale * (logits[0] - logits[-1])) / asked.temperature  # [K, V], guided by the null row
    kept = np.where(logits < np.sort(logits)[:, [-min(asked.top_k, logits.shape[1])]], -np.inf, logits)
    drawn = (kept + random.gumbel(size=kept.shape)).argmax(1)  # which draws from softmax(kept)
    sequence[:, position] = np.where((places == position).any(1), drawn, facts["special_token_id"])
(wav,) = graphs["codec_decoder"].run(None, {"codes": np.take_along_axis(sequence, places, 1)[None]})  # [1, 1, samples]
soundfile.write(asked.out, wav[0, 0, :n_samples], facts["sample_rate"])
