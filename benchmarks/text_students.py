"""A text student against the original encoder, on the test split of a store.

    python train.py experiment=tinyttm_text data.store=STORE run_dir=RUN
    ssmttm export RUN/checkpoints/step-00000760 regressed      # before the joint phase
    ssmttm export RUN joint
    python benchmarks/text_students.py --store STORE --regressed regressed --joint joint

Error of the projected text, parameters and bytes, time for one caption on one thread, and the language model's
cross-entropy of held-out codes with each encoder, for the same captions and crops.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from paired import environment, paired, summary
from tqdm import tqdm

from ssmttm import MusicPipeline
from ssmttm.data.loader import CodesLoader
from ssmttm.data.store import Store, open_store
from ssmttm.distill.losses import divergence
from ssmttm.distill.text_alignment import alignment_matrix, tokenize
from ssmttm.models import TokenLM
from ssmttm.patterns import Pattern
from ssmttm.text.encoders import TextEncoder
from ssmttm.text.vocabulary import plain_tokenizer, tokenizer_json
from ssmttm.training.tasks.lm import interleave, token_losses

BATCH, FRAMES, CAPTION = 8, 100, "a slow waltz in D minor on a music box, with a soft harp behind it"


class HeldOut(NamedTuple):
    """Means over codebooks for each segment, in nats per code; kl: from the original system."""

    cross_entropy: list[float]
    kl: list[float]


def of_transformers(tokenizer: Any) -> Any:
    """The same tokenizer as a class of transformers."""
    return plain_tokenizer(tokenizer_json(tokenizer), {})


@torch.inference_mode()
def regression_error(teacher: MusicPipeline, student: TextEncoder, captions: list[str]) -> dict[str, float]:
    """Squared error of the projected states over all tokens, relative to the original's square and to its variance
    (1: no better than a constant)."""
    theirs, ours = [], []
    for caption in tqdm(captions, desc="captions", leave=False):
        expected = teacher.model.text(teacher.text_encoder.encode([caption])).tokens[0]
        projected = teacher.model.text(student.encode([caption])).tokens[0]
        encoders = (student, teacher.text_encoder)
        tokens = [tokenize(of_transformers(e.tokenizer), [caption], e.max_tokens)[0] for e in encoders]
        theirs.append(alignment_matrix(*tokens) @ expected)
        ours.append(projected)
    expected, projected = torch.cat(theirs), torch.cat(ours)  # [tokens, D]
    error = (projected - expected).square().sum()
    variance = (expected - expected.mean(0)).square().sum()
    return {
        "relative_to_square": float(error / expected.square().sum()),
        "relative_to_variance": float(error / variance),
        "tokens": len(expected),
    }


class System(NamedTuple):
    """A language model, its text encoder, and whether it gets the captions or the empty caption."""

    model: TokenLM
    encoder: TextEncoder
    use_captions: bool = True


@torch.inference_mode()
def held_out(systems: dict[str, System], pattern: Pattern, store: Store) -> dict[str, HeldOut]:
    """Metrics of each system on the test segments; the first one is the original."""
    metrics = {name: HeldOut([], []) for name in systems}
    loader = CodesLoader(store, "test", BATCH, FRAMES, seed=0, fixed=True)
    size = next(iter(systems.values())).model.config.codebook_size
    for n in tqdm(range(len(loader) // BATCH), desc="segments", leave=False):
        batch = loader.batch(n)
        sequence, valid = interleave(pattern, batch["codes"], batch["frame_mask"], size)
        inputs = torch.cat([torch.full_like(sequence[..., :1], size), sequence[..., :-1]], -1)  # [b, K, S]
        original = None
        for name, (model, encoder, use_captions) in systems.items():
            logits = model(inputs, encoder.encode([caption * use_captions for caption in batch["captions"]]))
            log_p = logits[..., :size].log_softmax(-1)
            original = log_p if original is None else original
            kl = divergence(log_p, original).masked_fill(~valid, 0)  # [b, K, S]
            for item in range(len(inputs)):
                rows, n_codes = slice(item, item + 1), valid[item].sum(-1)  # [K]
                plain, _ = token_losses(logits[rows], sequence[rows], valid[rows], size, 0.0)
                metrics[name].cross_entropy.append(float((plain / n_codes).mean()))
                metrics[name].kl.append(float((kl[item].sum(-1) / n_codes).mean()))
    return metrics


def compare(system: HeldOut, base: HeldOut) -> dict[str, float]:
    """Means, and the difference of the cross-entropy from that of `base`, paired by segment, with half of its 95 %
    interval."""
    difference = np.array(system.cross_entropy) - np.array(base.cross_entropy)
    return {
        "cross_entropy": float(np.mean(system.cross_entropy)),
        "difference": float(difference.mean()),
        "half_95": float(1.96 * difference.std(ddof=1) / len(difference) ** 0.5),
        "kl": float(np.mean(system.kl)),
    }


def encoder_size(encoder: TextEncoder, folder: Path | None) -> dict[str, int]:
    """Parameters, bytes of the weights on disk, and size of the vocabulary."""
    parameters = sum(parameter.numel() for parameter in encoder.model.parameters())
    files = [] if folder is None else list(folder.glob("*.safetensors"))
    stored = sum(file.stat().st_size for file in files) or 4 * parameters
    return {
        "parameters": parameters,
        "bytes": stored,
        "vocabulary": encoder.tokenizer.backend_tokenizer.get_vocab_size(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--teacher", default="tiny_lm", help="the language model with the original encoder")
    parser.add_argument("--regressed", type=Path, required=True, help="model exported before the joint phase")
    parser.add_argument("--joint", type=Path, required=True, help="model exported after the joint phase")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/text_students.json"))
    parser.add_argument("--rounds", type=int, default=61)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store = open_store(arguments.store)
    folders = arguments.teacher, arguments.regressed, arguments.joint
    teacher, regressed, joint = (MusicPipeline.from_pretrained(folder, "cpu") for folder in folders)
    original, student = teacher.text_encoder, joint.text_encoder
    captions = sorted({text for row in store.indices("test") for text in store.captions(int(row))})
    cases = {"student": partial(student.encode, [CAPTION]), "original": partial(original.encode, [CAPTION])}
    times = paired(cases, arguments.rounds, "text")

    systems = {
        "original": System(teacher.model, original),
        "student": System(regressed.model, regressed.text_encoder),
        "student, joint": System(joint.model, student),
        "original encoder, joint language model": System(joint.model, original),
        "no caption": System(teacher.model, original, use_captions=False),
    }
    metrics = held_out(systems, teacher.pattern, store)
    results = {
        "sizes": {
            "original": encoder_size(original, None),
            "student": encoder_size(student, arguments.joint / "text_encoder"),
        },
        "regression": {
            name: regression_error(teacher, pipe.text_encoder, captions)
            for name, pipe in (("regressed", regressed), ("joint", joint))
        },
        "captions": len(captions),
        "one_caption": summary(times, "student"),
        "segments": len(metrics["original"].kl),
        "held_out": {name: compare(system, metrics["original"]) for name, system in metrics.items()},
    }
    document = {"environment": environment(), "results": results}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
