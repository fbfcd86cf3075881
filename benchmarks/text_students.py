"""A text student against the encoder that it stands for, on the test split of a store.

    python train.py experiment=tinyttm_text data.store=STORE run_dir=RUN
    ssmttm export RUN/checkpoints/step-00000760 regressed      # before the language model joins
    ssmttm export RUN joint
    python benchmarks/text_students.py --store STORE --regressed regressed --joint joint

How far the projected text is off, parameters and bytes, the time of one caption on one thread, and what the language
model says of held-out codes when it reads the one encoder or the other, with the same captions and crops.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from paired import environment, paired, summary
from tqdm import tqdm

from ssmttm import MusicPipeline
from ssmttm.data.loader import CodesLoader
from ssmttm.data.store import Store, open_store
from ssmttm.distill.losses import divergence
from ssmttm.distill.text_alignment import align, cut
from ssmttm.models import TokenLM
from ssmttm.patterns import Pattern
from ssmttm.text.encoders import TextEncoder
from ssmttm.training.tasks.lm import interleave, token_losses

BATCH, FRAMES, SHOWN = 8, 100, "a slow waltz in D minor on a music box, with a soft harp behind it"


class Told(NamedTuple):
    """Of each segment, means over codebooks, in nats a code: the cross-entropy, and the divergence of the distributions
    from those of the original system."""

    cross_entropy: list[float]
    kl: list[float]


@torch.inference_mode()
def regression_error(teacher: MusicPipeline, student: TextEncoder, captions: list[str]) -> dict[str, float]:
    """Square distance of the projected states over all tokens, as a share of the original's square and of its variance
    over all tokens (1: no better than one constant)."""
    theirs, ours = [], []
    for caption in tqdm(captions, desc="captions", leave=False):
        wanted, said = (teacher.model.text(e.encode([caption])).tokens[0] for e in (teacher.text_encoder, student))
        pieces = [cut(e.tokenizer, [caption], e.max_tokens)[0] for e in (student, teacher.text_encoder)]
        theirs.append(align(*pieces) @ wanted)
        ours.append(said)
    wanted, said = torch.cat(theirs), torch.cat(ours)  # [tokens, D]
    off = (said - wanted).square().sum()
    spread = (wanted - wanted.mean(0)).square().sum()
    return {"of_square": float(off / wanted.square().sum()), "of_variance": float(off / spread), "tokens": len(wanted)}


class Listener(NamedTuple):
    """A language model, the encoder that it reads, and whether it is told the captions or the empty one."""

    model: TokenLM
    encoder: TextEncoder
    told: bool = True


@torch.inference_mode()
def held_out(listeners: dict[str, Listener], pattern: Pattern, store: Store) -> dict[str, Told]:
    """What each says of the test segments; the first one is the original system."""
    said = {name: Told([], []) for name in listeners}
    loader = CodesLoader(store, "test", BATCH, FRAMES, seed=0, fixed=True)
    size = next(iter(listeners.values())).model.config.codebook_size
    for n in tqdm(range(len(loader) // BATCH), desc="segments", leave=False):
        batch = loader.batch(n)
        sequence, real = interleave(pattern, batch["codes"], batch["frame_mask"], size)
        shown = torch.cat([torch.full_like(sequence[..., :1], size), sequence[..., :-1]], -1)  # [b, K, S]
        original = None
        for name, (model, encoder, told) in listeners.items():
            logits = model(shown, encoder.encode([caption * told for caption in batch["captions"]]))
            log_p = logits[..., :size].log_softmax(-1)
            original = log_p if original is None else original
            apart = divergence(log_p, original).masked_fill(~real, 0)  # [b, K, S]
            for item in range(len(shown)):
                rows, codes = slice(item, item + 1), real[item].sum(-1)  # [K]
                plain, _ = token_losses(logits[rows], sequence[rows], real[rows], size, 0.0)
                said[name].cross_entropy.append(float((plain / codes).mean()))
                said[name].kl.append(float((apart[item].sum(-1) / codes).mean()))
    return said


def compared(said: Told, base: Told) -> dict[str, float]:
    """The means, and how far the cross-entropy lies above that of `base`, paired by segment, with half of its 95 %
    interval."""
    above = np.array(said.cross_entropy) - np.array(base.cross_entropy)
    return {
        "cross_entropy": float(np.mean(said.cross_entropy)),
        "above": float(above.mean()),
        "half_95": float(1.96 * above.std(ddof=1) / len(above) ** 0.5),
        "kl": float(np.mean(said.kl)),
    }


def size_of(encoder: TextEncoder, folder: Path | None) -> dict[str, int]:
    """Parameters and vocabulary; bytes of the weights on disk."""
    parameters = sum(parameter.numel() for parameter in encoder.model.parameters())
    files = [] if folder is None else list(folder.glob("*.safetensors"))
    stored = sum(file.stat().st_size for file in files) or 4 * parameters
    return {"parameters": parameters, "bytes": stored, "vocabulary": len(encoder.tokenizer)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--teacher", default="tiny_lm", help="the language model with its own encoder")
    parser.add_argument("--regressed", type=Path, required=True, help="exported before the language model joined")
    parser.add_argument("--joint", type=Path, required=True, help="exported after it did")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/text_students.json"))
    parser.add_argument("--rounds", type=int, default=61)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store = open_store(arguments.store)
    folders = arguments.teacher, arguments.regressed, arguments.joint
    teacher, regressed, joint = (MusicPipeline.from_pretrained(folder, "cpu") for folder in folders)
    original, student = teacher.text_encoder, joint.text_encoder
    captions = sorted({text for row in store.indices("test") for text in store.captions(int(row))})
    both = {"student": student, "original": original}
    times = paired({name: partial(encoder.encode, [SHOWN]) for name, encoder in both.items()}, arguments.rounds, "text")

    listeners = {
        "original": Listener(teacher.model, original),
        "student": Listener(regressed.model, regressed.text_encoder),
        "student, joint": Listener(joint.model, student),
        "original encoder, joint language model": Listener(joint.model, original),
        "no caption": Listener(teacher.model, original, told=False),
    }
    said = held_out(listeners, teacher.pattern, store)
    results = {
        "sizes": {"original": size_of(original, None), "student": size_of(student, arguments.joint / "text_encoder")},
        "regression": {
            name: regression_error(teacher, pipe.text_encoder, captions)
            for name, pipe in (("regressed", regressed), ("joint", joint))
        },
        "captions": len(captions),
        "one_caption": summary(times, "student"),
        "segments": len(said["original"].kl),
        "held_out": {name: compared(of_one, said["original"]) for name, of_one in said.items()},
    }
    document = {"environment": environment(), "results": results}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
