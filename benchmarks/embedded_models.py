"""The embedded models against true music, the codec and each other, on held-out prompts of a built-in store.

    python -m data_prep builtin --hours 5 --seed 18001 --codec none --text none --out data/held_out
    python -m benchmarks.embedded_models sweep STORE MODEL --out runs/sweep --guidance 1 2 3 5
    python -m benchmarks.embedded_models measure data/held_out --out runs/models --models old=tiny_lm new=FOLDER
    python -m benchmarks.embedded_models structure data/held_out --out runs/models --models new=FOLDER
    python -m benchmarks.embedded_models page data/held_out --out runs/models --models old=tiny_lm new=FOLDER

`measure`: prompt adherence beside the rate of the classifiers on true and decoded music, FAD and KAD against other
held-out music, and the music metrics beside those of decoded true music. `sweep`, on prompts of the validation split,
chooses guidance, temperature, top-k and top-p. `structure` compares clips of 30 s with whole pieces. `page` writes one
HTML page with its audio beside it. MODEL is a folder or an embedded name, NAME=MODEL@3 sets the guidance scale and
NAME=MODEL@3,0.9 the top-p, too. A second run uses the clips, embeddings and measurements of the first; the results are
in OUT/WHAT.json and OUT/WHAT.md.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.evaluation_set import (
    RIGHT,
    Prompt,
    caption_prompts,
    decoded_clips,
    measure,
    model_clips,
    paraphrase_prompts,
    reference_files,
    right,
    true_clips,
)
from benchmarks.paired import environment
from ssmttm import audio
from ssmttm.audio import features
from ssmttm.codecs import load_codec
from ssmttm.data.store import Store, open_store
from ssmttm.errors import UserError, run_cli
from ssmttm.evaluation.attributes.accuracy import annotations_of
from ssmttm.evaluation.attributes.classifiers import AttributeClassifiers
from ssmttm.evaluation.embedders import load_embedder
from ssmttm.evaluation.metrics.compute import set_distances
from ssmttm.evaluation.music import tempo
from ssmttm.evaluation.music.comparison import comparison_table, differences
from ssmttm.evaluation.music.music_metrics import FolderMetrics
from ssmttm.evaluation.music.structure import Structure, structure
from ssmttm.evaluation.protocol.embed_files import embed_clips
from ssmttm.evaluation.protocol.generate import Decoding
from ssmttm.files import write_text
from ssmttm.generation.output import write_with_sidecar
from ssmttm.generation.pipeline import MusicPipeline
from ssmttm.reports import charts
from ssmttm.reports.page import write_page
from ssmttm.reports.tables import Rows, Section, markdown_report

SECONDS = 10.0  # of every clip but those of `structure`
LONG, MIDDLE = 30.0, (5.0, 35.0)  # seconds of a clip of `structure`; the excerpt that whole pieces are compared with
WHOLE, EXCERPTS, DECODED = "whole pieces", "excerpts of the middle", "whole pieces, codec"
STRUCTURE = ("boundaries per 10 s", "novelty", "start_level", "end_level", "last_onset", "final_tonic")
SWEPT = ("beat_variation", "key_clarity", "bar_similarity")  # music metrics in the table of `sweep`
LIKE_AN_END = 0.05  # of the excerpts of the middle are taken for an end


class Run:
    """What the commands share: the store, the prompts, the folder, and the models by name."""

    def __init__(self, arguments: argparse.Namespace, split: str) -> None:
        self.store: Store = open_store(arguments.store)
        self.out: Path = arguments.out
        self.seed: int = arguments.seed
        self.split = split
        self.prompts = caption_prompts(self.store, split, arguments.prompts, arguments.seed)
        self.codec_name: str = arguments.codec
        self.models = dict(parse_model(word) for word in arguments.models)

    def base(self, seconds: float = SECONDS) -> dict[str, list[Path]]:
        """The true music of the prompts, and the same through the codec."""
        true = true_clips(self.store, self.prompts, seconds, self.out / "audio/true")
        decoded = decoded_clips(true, load_codec(self.codec_name), seconds, self.out / "audio/codec")
        return {"true music": true, "codec": decoded}

    def decoding(self, pipe: MusicPipeline, changes: Mapping[str, float], seconds: float = SECONDS) -> Decoding:
        """The sampling settings of a model, by default those of a call."""
        return Decoding.of(pipe, seconds, 1_000_003 * self.seed % 2**31, **changes)

    def write(self, name: str, document: dict[str, Any], sections: Sequence[Section]) -> None:
        """OUT/NAME.json and OUT/NAME.md; the tables are printed, too."""
        common = {
            "store": self.store.fingerprint,
            "split": self.split,
            "prompts": len(self.prompts),
            "seed": self.seed,
            "environment": environment(),
        }
        text = markdown_report(name, sections)
        write_text(self.out / f"{name}.json", json.dumps(common | document, indent=1, ensure_ascii=False) + "\n")
        write_text(self.out / f"{name}.md", text)
        print(f"{text}\n{self.out / f'{name}.json'}")


def parse_model(word: str) -> tuple[str, tuple[str, dict[str, float]]]:
    """NAME=MODEL, NAME=MODEL@GUIDANCE or NAME=MODEL@GUIDANCE,TOP_P -> name, (model, sampling settings)."""
    name, equals, model = word.partition("=")
    model, at, values = model.partition("@")
    if not (name and equals and model) or name in ("true", "codec"):
        raise UserError(f"--models must be NAME=MODEL, the name neither true nor codec, got {word}")
    try:
        numbers = [float(value) for value in values.split(",")] if at else []
        return name, (model, dict(zip(("guidance_scale", "top_p")[: len(numbers)], numbers, strict=True)))
    except ValueError as error:
        raise UserError(f"--models: {values!r} in {word} is no guidance scale and no GUIDANCE,TOP_P") from error


def measure_models(arguments: argparse.Namespace) -> None:
    """Adherence, distances and music metrics of all models, true music and the codec."""
    run = Run(arguments, arguments.split)
    free = paraphrase_prompts(run.store, run.prompts, arguments.paraphrases, run.seed) if arguments.paraphrases else []
    references = reference_files(run.store, run.split, run.prompts, arguments.references)
    systems, free_clips, sampling = run.base(), {}, {}
    for name, (model, settings) in run.models.items():
        pipe = MusicPipeline.from_pretrained(model)
        decoding = run.decoding(pipe, settings)
        sampling[name] = {"model": pipe.metadata["model"], **decoding.settings()}
        systems[name] = model_clips(pipe, run.prompts, decoding, run.out / f"audio/{name}")
        if free:
            free_clips[name] = model_clips(pipe, free, decoding, run.out / f"audio/{name}-paraphrases")
        del pipe
    classifiers, embedder = AttributeClassifiers.from_pretrained(), load_embedder("tiny")
    cache, music, results = run.out / "measured", {}, {}
    against = embed_clips(embedder, references, SECONDS, run.out / "embeddings")
    for name, paths in systems.items():
        found = measure(paths, SECONDS, classifiers, cache)
        music[name] = found.music
        vectors = embed_clips(embedder, paths, SECONDS, run.out / "embeddings")
        distances = {title: interval._asdict() for title, interval, _ in set_distances(vectors, against)}
        results[name] = {"right": right(run.prompts, found.predicted), "distances": distances}
        if name in free_clips:
            results[name]["paraphrases"] = right(free, measure(free_clips[name], SECONDS, classifiers, cache).predicted)
    compared = {name: {k: asdict(v) for k, v in differences(music["codec"], folder).items()}
                for name, folder in music.items()}  # fmt: skip
    document = {
        "seconds": SECONDS,
        "references": len(references),
        "classifiers": classifiers.fingerprint,
        "embedder": embedder.fingerprint,
        "sampling": sampling,
        "systems": results,
        "music": {"summary": {name: folder.summary() for name, folder in music.items()}, "differences": compared},
        "clips": [asdict(prompt) for prompt in [*run.prompts, *free]],
    }
    run.write("measure", document, report(results, music, len(run.prompts), len(free), len(references)))


def report(
    results: dict[str, Any], music: dict[str, FolderMetrics], n: int, n_free: int, n_references: int
) -> list[Section]:
    """The tables of `measure`."""
    titles = ["lead's family", "tempo class", "mode", "key", "FAD", "KAD"]
    rows = [["", *titles]]
    for name, found in results.items():
        distances = [f"{found['distances'][d]['value']:.{p}f}" for d, p in (("fad", 0), ("kad", 2))]
        rows.append([name, *rates(found["right"]), *distances])
    text = (
        f"{n} held-out captions; the first two rows are the classifiers' own rate. "
        f"FAD and KAD against {n_references} segments of other pieces."
    )
    sections = [Section("Prompt adherence and distance", text, rows)]
    if n_free:
        rows = [
            ["", *titles[:4]],
            *([name, *rates(f["paraphrases"])] for name, f in results.items() if "paraphrases" in f),
        ]
        sections.append(
            Section("Free-form prompts", f"{n_free} prompts of templates that no training caption has.", rows)
        )
    text = "Means; relative difference from decoded true music, and Wasserstein distance in its standard deviations."
    sections.append(Section("Music, not notes", text, comparison_table("codec", music)))
    return sections


def rates(found: dict[str, dict[str, float]]) -> list[str]:
    """A cell for each attribute: the rate and its interval."""
    cells = [found.get(name) for name in RIGHT]
    return [f"{100 * c['rate']:.0f} % ({100 * c['low']:.0f} to {100 * c['high']:.0f})" if c else "" for c in cells]


def sweep(arguments: argparse.Namespace) -> None:
    """Adherence, KAD and music metrics by guidance scale, temperature, top-k and top-p, on the validation split."""
    arguments.models = [f"model={arguments.model}"]
    run = Run(arguments, "valid")
    references = reference_files(run.store, "valid", run.prompts, arguments.references)
    pipe, classifiers = MusicPipeline.from_pretrained(arguments.model), AttributeClassifiers.from_pretrained()
    embedder, cache = load_embedder("tiny"), run.out / "embeddings"
    decoded = measure(run.base()["codec"], SECONDS, classifiers, run.out / "measured").music
    against = embed_clips(embedder, references, SECONDS, cache)
    attributes = ["lead's family", "tempo class", "mode", "key"]
    rows = [["guidance", "temperature", "top-k", "top-p", *attributes, "mean of three", "KAD", *SWEPT]]
    found = []
    grid = list(product(arguments.guidance, arguments.temperature, arguments.top_k, arguments.top_p))
    for guidance, temperature, top_k, top_p in tqdm(grid, desc="sweep", unit="setting"):
        settings = {"guidance_scale": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        decoding = run.decoding(pipe, settings)
        folder = run.out / f"audio/g{guidance:g}-t{temperature:g}-k{top_k}-p{top_p:g}"
        paths = model_clips(pipe, run.prompts, decoding, folder)
        measured = measure(paths, SECONDS, classifiers, run.out / "measured")
        accuracy = right(run.prompts, measured.predicted)
        vectors = embed_clips(embedder, paths, SECONDS, cache)
        kad = next(interval.value for name, interval, _ in set_distances(vectors, against) if name == "kad")
        mean = float(np.mean([accuracy[name]["rate"] for name in RIGHT[:3]]))
        change = differences(decoded, measured.music)
        found.append({**settings, "right": accuracy, "mean": mean, "kad": kad,
                      "music": {name: asdict(value) for name, value in change.items()}})  # fmt: skip
        musical = [f"{100 * change[name].relative:+.0f} %" for name in SWEPT]
        values = [f"{value:g}" for value in (guidance, temperature, top_k, top_p)]
        rows.append([*values, *rates(accuracy), f"{100 * mean:.1f} %", f"{kad:.2f}", *musical])
        run.write("sweep", {"model": pipe.metadata["model"], "settings": found}, [Section("Sampling", rows=rows)])


def measure_structure(arguments: argparse.Namespace) -> None:
    """Sections, beginnings and ends of clips of 30 s beside whole true pieces and excerpts of their middle."""
    run = Run(arguments, arguments.split)
    systems: dict[str, list[Structure]] = {name: [] for name in (WHOLE, EXCERPTS, DECODED)}
    codec = load_codec(run.codec_name)
    pieces = [whole_piece(run.store, prompt, run.out / "audio/pieces") for prompt in run.prompts]
    decoded = decoded_clips(pieces, codec, 60.0, run.out / "audio/pieces-codec")
    for path, through in zip(tqdm(pieces, desc="structure of true pieces", unit="piece"), decoded, strict=True):
        wav, rate = audio.read(path)
        systems[WHOLE].append(structure(wav, rate))
        middle = wav[:, round(MIDDLE[0] * rate) : round(MIDDLE[1] * rate)]
        systems[EXCERPTS].append(structure(middle, rate))
        systems[DECODED].append(structure(*audio.read(through)))
    lengths = dict.fromkeys(systems, 0.0) | {WHOLE: 40.0, DECODED: 40.0}
    lengths[EXCERPTS] = MIDDLE[1] - MIDDLE[0]
    for name, (model, settings) in run.models.items():
        pipe = MusicPipeline.from_pretrained(model)
        decoding = run.decoding(pipe, settings, LONG)
        paths = model_clips(pipe, run.prompts, decoding, run.out / f"audio/{name}-{LONG:g}s")
        systems[name] = [structure(*audio.read(path)) for path in tqdm(paths, desc=f"structure of {name}", unit="clip")]
        lengths[name] = LONG
    rows, found = structure_table(systems, lengths)
    text = (
        f"Means. Like an end: last onset longer ago, or level lower, than in {100 - 100 * LIKE_AN_END:.0f} % "
        "of the excerpts of the middle; like a start: the level of the first 2 s is lower."
    )
    run.write("structure", {"systems": found}, [Section("Structure", text, rows)])


def structure_table(systems: dict[str, list[Structure]], seconds: dict[str, float]) -> tuple[Rows, dict[str, Any]]:
    """Means of each measure, and the share of clips that begin and end unlike excerpts of the middle."""
    middle = systems[EXCERPTS]
    latest = np.quantile([one.last_onset for one in middle], 1 - LIKE_AN_END)
    quietest = np.quantile([one.end_level for one in middle], LIKE_AN_END)
    softest = np.quantile([one.start_level for one in middle], LIKE_AN_END)
    rows, found = [["", *STRUCTURE, "like a start", "like an end"]], {}
    for name, clips in systems.items():
        ends = np.mean([one.last_onset > latest or one.end_level < quietest for one in clips])
        starts = np.mean([one.start_level < softest for one in clips])
        per_ten = np.mean([len(one.boundaries) for one in clips]) / seconds[name] * 10
        means = [float(np.mean([getattr(one, field) for one in clips])) for field in STRUCTURE[1:]]
        values = dict(zip(STRUCTURE, [float(per_ten), *means], strict=True))
        found[name] = {**values, "like a start": float(starts), "like an end": float(ends),
                       "clips": [asdict(one) for one in clips]}  # fmt: skip
        rows.append(
            [name, *(f"{value:.2f}" for value in values.values()), f"{100 * starts:.0f} %", f"{100 * ends:.0f} %"]
        )
    return rows, found


def whole_piece(store: Store, prompt: Prompt, folder: Path) -> Path:
    """All segments of the prompt's piece in a row, as WAV."""
    path = folder / f"{prompt.name}.wav"
    if not path.is_file():
        tracks = store.manifest["track"].to_pylist()
        rows = [row for row, track in enumerate(tracks) if track == tracks[prompt.row]]
        rows.sort(key=lambda row: annotations_of(store, row)["segment"])
        parts = [audio.read(store.audio_path(row)) for row in rows]
        write_with_sidecar(path, torch.cat([wav for wav, _ in parts], 1), parts[0][1], {"prompt": prompt.caption})
    return path


def page(arguments: argparse.Namespace) -> None:
    """One HTML page: prompts, players, spectrograms with bar lines, and what was measured, from OUT/measure.json."""
    run = Run(arguments, arguments.split)
    systems = run.base()
    for name, (model, settings) in run.models.items():
        pipe = MusicPipeline.from_pretrained(model)
        systems[name] = model_clips(pipe, run.prompts, run.decoding(pipe, settings), run.out / f"audio/{name}")
    file = run.out / "measure.json"
    if not file.is_file():
        raise UserError(f"{file} is missing: run `measure` with the same store, folder and models first")
    classifiers, target = AttributeClassifiers.from_pretrained(), arguments.page
    predicted = {name: measure(paths, SECONDS, classifiers, run.out / "measured") for name, paths in systems.items()}
    examples = []
    for i in spread(run.prompts, arguments.examples):
        prompt, clips = run.prompts[i], []
        for name, paths in systems.items():
            wav, rate = audio.read(paths[i])
            sound = audio.write(target.parent / "audio" / f"{prompt.name}-{name.replace(' ', '-')}.mp3", wav, rate)
            found = predicted[name].predicted[i]
            clips.append({
                "system": name,
                "audio": f"audio/{sound.name}",
                "spectrogram": charts.spectrogram(wav, rate, bars_of(run.store, prompt, name, paths[i])),
                "predicted": {"lead": found["family"], "tempo": f"{found['bpm']:.0f} bpm ({found['tempo_class']})",
                              "key": f"{found['key']} {found['mode']}"},
            })  # fmt: skip
        examples.append({"prompt": prompt.caption, "clips": clips})
    results = json.loads(file.read_text())
    n, n_clips = results["prompts"], len(results["clips"])
    music = {name: found.music for name, found in predicted.items()}
    sections = report(results["systems"], music, n, n_clips - n, results["references"])
    write_page(target, "models.html", title="Models against true music", examples=examples, sections=sections)
    print(target)


def spread(prompts: Sequence[Prompt], n: int) -> list[int]:
    """Positions of n prompts: the first of each family of the lead, then the others in their order."""
    first = {prompt.expected["family"]: i for i, prompt in reversed(list(enumerate(prompts)))}
    fresh = sorted(first.values())
    return [*fresh, *(i for i in range(len(prompts)) if i not in fresh)][:n]


def bars_of(store: Store, prompt: Prompt, system: str, path: Path) -> list[float]:
    """Bar lines: annotated for true music and the codec; for a model tracked, at tempo and metre of the true piece."""
    truth = annotations_of(store, prompt.row)
    if system in ("true music", "codec"):
        return [time for time in truth["bars"] if time < SECONDS]
    wav, _ = audio.read(path, features.SAMPLE_RATE)
    beats_a_bar = {"4/4": 4, "3/4": 3, "6/8": 2}[truth["metre"]]
    onsets = features.onset_strength(features.rms_normalise(wav))[0]
    return tempo.bar_lines(onsets, truth["bpm"], beats_a_bar).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    added = {}
    for name, run, n in (("measure", measure_models, 200), ("sweep", sweep, 60), ("structure", measure_structure, 40),
                         ("page", page, 200)):  # fmt: skip
        command = added[name] = commands.add_parser(name, help=run.__doc__)
        command.add_argument("store", type=Path)
        command.add_argument("--out", type=Path, required=True, help="folder of clips, measurements and results")
        command.add_argument(
            "--prompts", type=int, default=n, help="prompts, each of another piece (default: %(default)s)"
        )
        command.add_argument("--seed", type=int, default=0, help="of the choice of prompts and of sampling")
        command.add_argument("--codec", default="tiny", help="of the row `codec` (default: %(default)s)")
        command.set_defaults(run=run)
    for name in ("measure", "structure", "page"):
        settings = "NAME=MODEL@GUIDANCE,TOP_P"
        added[name].add_argument("--models", nargs="+", default=[], metavar="NAME=MODEL", help=settings)
        added[name].add_argument("--split", default="all", help="train, valid, test or all (default: %(default)s)")
    for name in ("measure", "sweep"):
        added[name].add_argument("--references", type=int, default=400, help="segments for FAD and KAD")
    added["measure"].add_argument(
        "--paraphrases", type=int, default=100, help="free-form prompts (default: %(default)s)"
    )
    added["sweep"].add_argument("model")
    added["sweep"].add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    added["sweep"].add_argument("--temperature", type=float, nargs="+", default=[1.0])
    added["sweep"].add_argument("--top-k", type=int, nargs="+", default=[250])
    added["sweep"].add_argument("--top-p", type=float, nargs="+", default=[1.0])
    added["page"].add_argument("--page", type=Path, default=Path("demo/models.html"), help="default: %(default)s")
    added["page"].add_argument("--examples", type=int, default=6, help="prompts on the page (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
