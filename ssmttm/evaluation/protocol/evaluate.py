"""`ssmttm evaluate`: a protocol from its prompts to its figures. Each stage goes on where it was stopped.

    OUT/audio/          what was generated, a wav and its record a prompt
    OUT/heard/          what the embedders made of every file
    OUT/figures.json    every figure with its fingerprint; written last
    OUT/report.md       the same to read
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from ssmttm import config as configs
from ssmttm.audio import WRITERS
from ssmttm.data.store import Store, open_store
from ssmttm.errors import UserError
from ssmttm.evaluation.attributes.adherence import AdherenceReport, measure_adherence
from ssmttm.evaluation.embedders import load_embedder
from ssmttm.evaluation.embedders.base import Embedder, JointEmbedder
from ssmttm.evaluation.metrics.compute import Clip, score
from ssmttm.evaluation.metrics.distances import FEW as FEW_FOR_FRECHET
from ssmttm.evaluation.metrics.metric import Metric, markdown, table
from ssmttm.evaluation.music.music_metrics import FolderMeasures, measure_files, unlike_rates
from ssmttm.evaluation.protocol.balanced_prompts import Prompt, balanced_prompts
from ssmttm.evaluation.protocol.embed_files import readable
from ssmttm.evaluation.protocol.generate import Decoding, generate
from ssmttm.evaluation.protocol.prompt_lists import ListedPrompt, read_prompt_list
from ssmttm.files import write_text
from ssmttm.generation.output import read_sidecar, slug
from ssmttm.generation.pipeline import MusicPipeline

FEW = 20  # clips under which no distribution is worth a figure
_LISTED = 5  # names of each kind in a note
_SETTINGS = ("duration", "guidance_scale", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Task:
    """What a protocol asks for.

    Attributes:
        prompts: with the true audio of each, where there is some.
        references: the set of real music that what is generated is compared with.
        store, truths: of the built-in corpus, else None and empty.
    """

    prompts: list[ListedPrompt]
    references: list[Path]
    store: Store | None = None
    truths: Sequence[Prompt] = ()


def evaluate(settings: DictConfig) -> dict[str, Any]:
    """Generate, or take finished audio, and measure all that the protocol asks for.

    Args:
        settings: configs/eval.yaml, composed.

    Returns:
        What figures.json holds.

    Raises:
        UserError: no prompts, no model, too few clips, or files that cannot be used.
    """
    protocol, out = settings.eval, Path(settings.out)
    task = _task(settings)
    embedders = [load_embedder(name, protocol.weights[name]) for name in protocol.embedders]
    paired = [prompt.reference for prompt in task.prompts if prompt.reference is not None]
    true, bad_true = readable(list(dict.fromkeys([*task.references, *paired])), protocol.seconds)
    references = [path for path in task.references if str(path) not in bad_true]
    _check(task, references, embedders, protocol.seconds)
    if settings.audio:
        pieces, unmatched = match_audio(Path(settings.audio), task.prompts)
        facts = {"model": str(settings.audio), **_shared_settings(list(pieces.values()))}
    else:
        pipeline = MusicPipeline.from_pretrained(settings.checkpoint, second_stage=settings.second_stage)
        decoding = _decoding(settings, pipeline)
        named = [(prompt.name, prompt.caption) for prompt in task.prompts]
        made = generate(pipeline, named, decoding, out / "audio", settings.batch)
        pieces, unmatched = dict(zip((name for name, _ in named), made, strict=True)), []
        facts = {"model": pipeline.facts["model"], **decoding.settings(), "seed": settings.seed}
    good, bad = readable(list(pieces.values()), protocol.seconds)
    usable = set(good)
    clips = _clips(task, {name: path for name, path in pieces.items() if path in usable}, set(true))
    if len(clips) < FEW:
        raise UserError(f"{len(clips)} clips of {len(task.prompts)} prompts can be scored, fewer than {FEW}: give more")
    notes = _notes(task, pieces, unmatched, {**bad, **bad_true})
    if references and min(len(clips), len(references)) < FEW_FOR_FRECHET:
        numbers = f"{len(clips)} clips and {len(references)} references"
        notes.append(f"{numbers} are few: fad is too large, to be compared only with that of the same numbers")
    if settings.audio and settings.adherence and task.store is not None:
        notes.append("adherence to the prompts is measured of what is generated here, not of finished audio")
    decoded = {name: value for name, value in facts.items() if name != "model"}
    metrics, floor = [], []
    for embedder in embedders:
        metrics += score(clips, references, embedder, protocol.seconds, decoded, out / "embeddings")
        if all(clip.reference for clip in clips):
            music = [Clip(clip.reference, clip.caption) for clip in clips]
            floor += score(music, references, embedder, protocol.seconds, {"decoding": "none"}, out / "embeddings")
    measured = {"model": [clip.path for clip in clips], "true music": references} if settings.measures else {}
    measures = {name: measure_files(paths) for name, paths in measured.items() if paths}
    adherence = None
    if settings.adherence and task.store is not None and not settings.audio:
        by_name = dict(zip((prompt.name for prompt in task.prompts), task.truths, strict=True))
        kept = {clip.path.stem: clip.path for clip in clips}
        told = {"model": facts["model"]["name"], "weights": facts["model"]["weights_sha256"][:16], **decoded}
        adherence = measure_adherence(
            task.store, [by_name[n] for n in kept], list(kept.values()), pipeline.codec, told, settings.seed
        )
    document = _document(settings, facts, metrics, floor, measures, adherence, notes)
    write_text(out / "report.md", report(document, adherence))
    write_text(out / "figures.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return document


def match_audio(folder: Path, prompts: Sequence[ListedPrompt]) -> tuple[dict[str, Path], list[str]]:
    """Finished audio files by the name of the prompt that each belongs to: by its own name, or by its record's prompt.

    Returns:
        The pieces, and the files that belong to no prompt.

    Raises:
        UserError: the folder holds no audio, or none of these prompts.
    """
    files = sorted(path for path in folder.glob("**/*") if path.suffix.lower() in WRITERS) if folder.is_dir() else []
    if not files:
        raise UserError(f"there is no audio in {folder}: give a folder of {', '.join(WRITERS)} files")
    names, captions = {prompt.name for prompt in prompts}, {prompt.caption: prompt.name for prompt in prompts}
    pieces: dict[str, Path] = {}
    unmatched = []
    for path in files:
        stem = slug(path.stem, longest=120)
        name = stem if stem in names else captions.get(read_sidecar(path).get("prompt", ""))
        if name is None or name in pieces:
            unmatched.append(str(path))
        else:
            pieces[name] = path
    if not pieces:
        raise UserError(f"none of the {len(files)} files in {folder} belongs to a prompt: name them as the prompts are")
    return pieces, unmatched


def report(document: Mapping[str, Any], adherence: AdherenceReport | None) -> str:
    """The figures as Markdown."""
    metrics = [Metric(**metric) for metric in document["metrics"]]
    floor = {metric["name"]: metric["value"] for metric in document["true_music"]}
    titles, values = table({"model": metrics})
    true = [f"{floor[metric.name]:.4g}" if metric.name in floor else "" for metric in metrics]
    rows = [["", "model (95 % interval)", "true music"], *map(list, zip(titles[1:], values[1:], true, strict=True))]
    model = document["model"]
    name = model if isinstance(model, str) else f"{model['name']} (weights {model['weights_sha256'][:16]})"
    parts = [f"# {document['protocol']}", f"Model: {name}.", markdown(rows)]
    if published := document["published"]:
        names = sorted({name for metrics in published.values() for name in metrics})
        listed = [[system, *(str(found.get(name, "")) for name in names)] for system, found in published.items()]
        source = document["source_of_published"]
        parts.append(f"As published, not measured here ({source}):\n\n{markdown([['', *names], *listed])}")
    if adherence is not None:
        parts.append(f"## Does it follow its prompts?\n\n{adherence.table()}")
    if measures := document["measures"]:
        summaries = {whose: found["summary"] for whose, found in measures.items()}
        lines = [["mean over clips (95 % interval)", *summaries]]
        for name in summaries["model"]:
            told = [summary.get(name) for summary in summaries.values()]
            lines.append([name, *((t and f"{t['mean']:.4g} ({t['low']:.4g} to {t['high']:.4g})") or "" for t in told)])
        parts.append(f"## Musical measures\n\n{markdown(lines)}")
    parts.append("\n".join(f"- {note}" for note in document["notes"]))
    parts.append(f"Measured with: {json.dumps(document['metrics'][0]['fingerprint'], ensure_ascii=False)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _task(settings: DictConfig) -> Task:
    protocol = settings.eval
    n = settings.n or protocol.n
    if protocol.source == "builtin":
        if settings.store is None:
            raise UserError("store is not set: give store=DIR, a store of `python -m data_prep builtin`")
        store = open_store(settings.store)
        truths = balanced_prompts(store, n, settings.seed)
        ids = store.ids(np.array([truth.row for truth in truths]))
        names = [f"{i:04d}-{slug(name)}" for i, name in enumerate(ids)]
        asked = {truth.row for truth in truths}
        listed = [
            ListedPrompt(name, truth.caption, store.audio_path(truth.row))
            for name, truth in zip(names, truths, strict=True)
        ]
        held_out = np.concatenate([store.indices("valid"), store.indices("test")]).tolist()
        return Task(listed, [store.audio_path(row) for row in held_out if row not in asked], store, truths)
    if protocol.source != "table":
        raise UserError(f"no protocol is named: give eval=NAME, one of {', '.join(configs.names('eval'))}")
    if settings.prompts is None:
        raise UserError(f"eval={protocol.name} needs prompts=FILE, the benchmark's own table of captions")
    listed = read_prompt_list(
        settings.prompts, protocol.name_of, protocol.caption, protocol.keep, settings.references, list(protocol.audio)
    )
    if n and n < len(listed):
        order = np.random.default_rng(settings.seed).permutation(len(listed))[:n]
        listed = [listed[i] for i in sorted(order)]
    return Task(listed, list(dict.fromkeys(p.reference for p in listed if p.reference is not None)))


def _check(task: Task, references: Sequence[Path], embedders: Sequence[Embedder], seconds: float) -> None:
    """Raises UserError for what could not be scored, before anything is generated."""
    if len(task.prompts) < FEW:
        raise UserError(f"{len(task.prompts)} prompts are fewer than {FEW}, too few for any distance: give more")
    for embedder in embedders:
        if embedder.seconds > seconds:
            raise UserError(f"{embedder.name} hears {embedder.seconds:g} s at a time: give as much (eval.seconds)")
    if len(references) == 1:
        raise UserError(f"one reference, {references[0]}, has no distribution: give some hundreds, or none")
    if not references and not any(isinstance(embedder, JointEmbedder) for embedder in embedders):
        raise UserError("no true audio can be read, and no embedder reads captions: give references=DIR, or tiny")


def _decoding(settings: DictConfig, pipeline: MusicPipeline) -> Decoding:
    return Decoding(
        duration=float(settings.eval.seconds),
        guidance_scale=pipeline.guidance_scale if settings.guidance is None else float(settings.guidance),
        temperature=float(settings.temperature),
        top_k=settings.top_k,
        top_p=float(settings.top_p),
        first_seed=settings.seed * 1_000_003 % 2**31,
    )


def _clips(task: Task, pieces: Mapping[str, Path], references: set[Path]) -> list[Clip]:
    return [
        Clip(pieces[p.name], p.caption, p.reference if p.reference in references else None)
        for p in task.prompts
        if p.name in pieces
    ]


def _shared_settings(paths: Sequence[Path]) -> dict[str, Any]:
    """The decoding of finished audio, as far as all its records agree on it."""
    records = [read_sidecar(path) for path in paths]
    return {
        name: records[0].get(name, "unknown") if all(r.get(name) == records[0].get(name) for r in records) else "mixed"
        for name in _SETTINGS
    }


def _notes(task: Task, pieces: Mapping[str, Path], unmatched: Sequence[str], bad: Mapping[str, str]) -> list[str]:
    """What a reader of the figures must know: what is missing, and what was left out."""
    silent = [prompt.name for prompt in task.prompts if prompt.name not in pieces]
    alone = [prompt.name for prompt in task.prompts if prompt.reference is None]
    told = {
        "prompts without audio": silent,
        "audio without a prompt": list(unmatched),
        "prompts without reference audio": alone,
        "left out": [f"{path}: {reason}" for path, reason in bad.items()],
    }
    return [
        f"{len(items)} {what}: {'; '.join(items[:_LISTED])}{' ...' * (len(items) > _LISTED)}"
        for what, items in told.items()
        if items
    ]


def _document(
    settings: DictConfig,
    facts: Mapping[str, Any],
    metrics: Sequence[Metric],
    floor: Sequence[Metric],
    measures: Mapping[str, FolderMeasures],
    adherence: AdherenceReport | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    protocol = settings.eval
    return {
        "protocol": protocol.name,
        "model": facts["model"],
        "metrics": [metric.document() for metric in metrics],
        "true_music": [metric.document() for metric in floor],
        "published": OmegaConf.to_container(protocol.published),
        "source_of_published": protocol.source_of_published,
        "measures": {whose: found.document() for whose, found in measures.items()},
        "adherence": adherence.document() if adherence else None,
        "notes": [
            *notes,
            *(f"{whose}: {note}" for whose, found in measures.items() for note in found.notes()),
            *unlike_rates(measures),
        ],
    }

