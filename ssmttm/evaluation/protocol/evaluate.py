"""`ssmttm evaluate`: run a protocol from its prompts to its metrics. Every stage resumes where it was stopped.

OUT/audio/          generated clips, a wav and its metadata sidecar for each prompt
OUT/codec/          built-in protocol: the prompts' own true music as the codec decodes it
OUT/embeddings/     cached embeddings of all files, and answers about concepts
OUT/metrics.json    all metrics with their fingerprints, and the seconds that each stage of this run took; written last
OUT/report.md       the report; OUT/report.html is the same as a page
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from ssmttm import config as configs
from ssmttm.audio import WRITERS
from ssmttm.data.store import Store, open_store
from ssmttm.errors import UserError
from ssmttm.evaluation.attributes.adherence import AdherenceReport, measure_adherence
from ssmttm.evaluation.embedders import load_embedder
from ssmttm.evaluation.embedders.base import Embedder, JointEmbedder, Scorer
from ssmttm.evaluation.metrics.compute import Clip, compute_metrics
from ssmttm.evaluation.metrics.frechet import FEW_SAMPLES, negative_note
from ssmttm.evaluation.metrics.metric import Metric, table
from ssmttm.evaluation.music.comparison import comparison_table
from ssmttm.evaluation.music.music_metrics import measure_files, sample_rate_notes
from ssmttm.evaluation.protocol.balanced_prompts import Prompt, balanced_prompts
from ssmttm.evaluation.protocol.concept_coverage import ANSWER_TOKENS, concept_coverage
from ssmttm.evaluation.protocol.decoded import decoded_files
from ssmttm.evaluation.protocol.embed_files import embed_clips, readable
from ssmttm.evaluation.protocol.generate import Decoding, generate
from ssmttm.evaluation.protocol.prompt_lists import ListedPrompt, read_prompt_list
from ssmttm.files import file_sha256, write_text
from ssmttm.generation.output import read_sidecar, slug
from ssmttm.generation.pipeline import MusicPipeline
from ssmttm.reports.page import write_page
from ssmttm.reports.tables import Section, markdown_report
from ssmttm.text.captioner import AudioCaptioner, captioner_folder

MIN_CLIPS = 20  # clips for any metric
_LISTED = 5  # names of each kind in a note
_SETTINGS = ("duration", "guidance_scale", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class ProtocolData:
    """Prompts and references of a protocol."""

    prompts: list[ListedPrompt]
    references: list[Path]
    store: Store | None = None  # of the built-in protocol
    labelled: Sequence[Prompt] = ()  # its prompts with true labels
    paired: bool = True  # whether prompts have references of their own


def evaluate(settings: DictConfig) -> dict[str, Any]:
    """Generate clips, or take existing audio, and compute the metrics of a protocol.

    Args:
        settings: configs/eval.yaml, composed.

    Returns:
        The content of metrics.json.
    """
    protocol, out = settings.eval, Path(settings.out)
    seconds: dict[str, float] = {}
    data = _protocol_data(settings)
    if protocol.judge is not None:
        captioner_folder(protocol.judge)  # raises UserError now rather than once the clips are generated
        if not any(prompt.concepts for prompt in data.prompts):
            raise UserError("eval.judge needs prompts with concepts: set eval.concepts, their column in the table")
    with _timed(seconds, "loading"):
        embedders = [load_embedder(name, protocol.weights[name]) for name in protocol.embedders]
    paired = [prompt.reference for prompt in data.prompts if prompt.reference is not None]
    with _timed(seconds, "checking files"):
        usable, rejected = readable(list(dict.fromkeys([*data.references, *paired])), protocol.seconds)
    references = [path for path in data.references if str(path) not in rejected]
    if data.references and not references:
        first = next(iter(rejected.values()))
        raise UserError(f"none of {len(data.references)} references can be used; the first: {first}")
    _check(data, references, embedders, protocol.seconds)
    pipeline = None
    model: Any
    if settings.audio:
        paths, unmatched = match_audio(Path(settings.audio), data.prompts)
        model, decoding = str(settings.audio), _common_settings(list(paths.values()))
    else:
        with _timed(seconds, "loading"):
            pipeline = MusicPipeline.from_pretrained(settings.checkpoint, second_stage=settings.second_stage)
        sampling = _decoding(settings, pipeline)
        named = [(prompt.name, prompt.caption) for prompt in data.prompts]
        with _timed(seconds, "generating"):
            generated = generate(pipeline, named, sampling, out / "audio", settings.batch)
        paths, unmatched = dict(zip((name for name, _ in named), generated, strict=True)), []
        model, decoding = pipeline.metadata["model"], {**sampling.settings(), "seed": settings.seed}
    with _timed(seconds, "checking files"):
        _, bad = readable(list(paths.values()), protocol.seconds)
    skipped = {**bad, **rejected}
    readable_paths = {name: path for name, path in paths.items() if str(path) not in bad}
    clips = _clips(data, readable_paths, set(usable))
    if len(clips) < MIN_CLIPS:
        reason = f"; the first skipped: {next(iter(bad.values()))}" if bad else ""
        got = f"got {len(clips)} of {len(data.prompts)} prompts"
        raise UserError(f"at least {MIN_CLIPS} clips are needed, {got}{reason}")
    notes = [*_notes(data, paths, unmatched, skipped), *_weights_notes(protocol)]
    if references and min(len(clips), len(references)) < FEW_SAMPLES:
        numbers = f"{len(clips)} clips and {len(references)} references"
        notes.append(f"{numbers} are few: fad is biased upwards; compare it only at equal numbers")
    if settings.audio and settings.adherence and data.store is not None:
        notes.append("prompt adherence is measured only on clips generated here, not on existing audio")
    metrics, reference_metrics = [], []
    music = [Clip(clip.reference, clip.caption, concepts=clip.concepts) for clip in clips if clip.reference is not None]
    sets = [("model", metrics, clips, decoding)]
    if len(music) == len(clips):
        sets.append(("reference", reference_metrics, music, {"decoding": "none"}))
    for embedder in embedders:
        with _timed(seconds, "embedding"):
            embedded = [[clip.path for clip in of] for _, _, of, _ in sets]
            if references and not isinstance(embedder, Scorer):
                embedded.insert(1, references)
            for files_of_one in embedded:
                embed_clips(embedder, files_of_one, protocol.seconds, out / "embeddings")
        with _timed(seconds, "metrics"):
            for _, found, of, how in sets:
                found += compute_metrics(of, references, embedder, protocol.seconds, how, out / "embeddings")
    if protocol.judge is not None and not any(clip.concepts for clip in clips):
        notes.append("ccs is left out: all prompts with concepts were skipped")
    elif protocol.judge is not None:
        with _timed(seconds, "judging concepts"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            judge = AudioCaptioner(protocol.judge, device, max_new_tokens=ANSWER_TOKENS)
            for whose, found, of, how in sets:
                metric, found_notes = concept_coverage(of, judge, protocol.seconds, how, out / "embeddings")
                found.append(metric)
                notes += [f"{whose}: {note}" for note in found_notes]
    files = {"model": [clip.path for clip in clips], "reference": references} if settings.music_metrics else {}
    if files and data.store is not None and pipeline is not None:
        own = [clip.reference for clip in clips if clip.reference is not None]
        files["codec"] = decoded_files(own, pipeline.decoder, protocol.seconds, out / "codec")
    notes += [f"{whose}: {note}" for whose, found, _, _ in sets for note in _negative_notes(found)]
    with _timed(seconds, "music metrics"):
        music_metrics = {name: measure_files(paths, protocol.seconds) for name, paths in files.items() if paths}
    adherence = None
    if settings.adherence and data.store is not None and pipeline is not None:
        labelled = dict(zip((prompt.name for prompt in data.prompts), data.labelled, strict=True))
        of_model = {"model": model["name"], "weights": model["weights_sha256"][:16], **decoding}
        kept = [labelled[clip.path.stem] for clip in clips]
        adherence = measure_adherence(
            data.store, kept, [clip.path for clip in clips], pipeline.decoder, of_model, settings.seed
        )
    for name, folder in music_metrics.items():
        notes += [f"{name}: {note}" for note in folder.notes()]
    document = {
        "protocol": protocol.name,
        "model": model,
        "metrics": [asdict(metric) for metric in metrics],
        "reference": [asdict(metric) for metric in reference_metrics],
        "published": OmegaConf.to_container(protocol.published),
        "source_of_published": protocol.source_of_published,
        "music_metrics": {name: folder.document() for name, folder in music_metrics.items()},
        "music_comparison": comparison_table("codec", music_metrics) if "codec" in music_metrics else [],
        "adherence": asdict(adherence) if adherence else None,
        "notes": [*notes, *sample_rate_notes(music_metrics)],
        "skipped": skipped,
        "seconds": seconds,
    }
    sections = report_sections(document, adherence)
    write_text(out / "report.md", markdown_report(protocol.name, sections))
    write_page(out / "report.html", "report.html", title=protocol.name, charts=[], sections=sections)
    write_text(out / "metrics.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return document


def audio_files(folder: Path) -> list[Path]:
    """All audio files below a folder, sorted. Raises UserError if there are none."""
    files = sorted(path for path in folder.glob("**/*") if path.suffix.lower() in WRITERS) if folder.is_dir() else []
    if not files:
        raise UserError(f"no audio in {folder}: give a folder of {', '.join(WRITERS)} files")
    return files


def match_audio(folder: Path, prompts: Sequence[ListedPrompt]) -> tuple[dict[str, Path], list[str]]:
    """Match existing audio files to prompts, by file name or by the prompt in the metadata sidecar.

    Returns:
        The file of each prompt's name, and the files without a prompt.
    """
    files = audio_files(folder)
    names, captions = {prompt.name for prompt in prompts}, {prompt.caption: prompt.name for prompt in prompts}
    matched: dict[str, Path] = {}
    unmatched = []
    for path in files:
        stem = slug(path.stem, longest=120)
        name = stem if stem in names else captions.get(read_sidecar(path).get("prompt", ""))
        if name is None or name in matched:
            unmatched.append(str(path))
        else:
            matched[name] = path
    if not matched:
        raise UserError(f"none of the {len(files)} files in {folder} matches a prompt: name them after the prompts")
    return matched, unmatched


def report_sections(document: Mapping[str, Any], adherence: AdherenceReport | None) -> list[Section]:
    """The results as sections of a report."""
    metrics = [Metric(**metric) for metric in document["metrics"]]
    reference = {metric["name"]: f"{metric['value']:.4g}" for metric in document["reference"]}
    titles, values = table({"model": metrics})
    true = [reference.get(metric.name, "") for metric in metrics]
    rows = [["", "model (95 % interval)", "reference"], *map(list, zip(titles[1:], values[1:], true, strict=True))]
    model = document["model"]
    name = model if isinstance(model, str) else f"{model['name']} (weights {model['weights_sha256'][:16]})"
    sections = [Section(text=f"Model: {name}.", rows=rows)]
    if published := document["published"]:
        names = sorted({name for metrics in published.values() for name in metrics})
        rows = [["", *names]]
        rows += [[system, *(str(found.get(name, "")) for name in names)] for system, found in published.items()]
        source = document["source_of_published"]
        sections.append(Section("Published results", f"As published, not measured here ({source}):", rows))
    if adherence is not None:
        sections.append(adherence.section())
    if music_metrics := document["music_metrics"]:
        summaries = {name: found["summary"] for name, found in music_metrics.items()}
        rows = [["mean over clips (95 % interval)", *summaries]]
        for name in summaries["model"]:
            cells = [summary.get(name) for summary in summaries.values()]
            rows.append([name, *(f"{c['mean']:.4g} ({c['low']:.4g} to {c['high']:.4g})" if c else "" for c in cells)])
        sections.append(Section("Music metrics", rows=rows))
    if comparison := document["music_comparison"]:
        text = "Against true music of the prompts that the codec has decoded; distance in its standard deviations."
        sections.append(Section("Music, not notes", text, comparison))
    settings = f"Settings: {json.dumps(document['metrics'][0]['fingerprint'], ensure_ascii=False)}"
    notes = [f"- {note}" for note in document["notes"]]
    return [*sections, Section("Notes", "\n".join([*notes, "", settings]).strip())]


def _protocol_data(settings: DictConfig) -> ProtocolData:
    protocol = settings.eval
    n = settings.n or protocol.n
    if protocol.source == "builtin":
        return _builtin_data(settings, n)
    if protocol.source != "table":
        raise UserError(f"no protocol selected: set eval=NAME, one of {', '.join(configs.names('eval'))}")
    if settings.prompts is None:
        raise UserError(f"eval={protocol.name} needs prompts=FILE, the benchmark's table of captions")
    concepts = protocol.concepts if protocol.judge is not None else None
    prompts = read_prompt_list(
        settings.prompts, protocol.name_of, protocol.caption, protocol.keep, settings.references,
        list(protocol.audio), concepts,
    )  # fmt: skip
    if n and n < len(prompts):
        chosen = np.random.default_rng(settings.seed).permutation(len(prompts))[:n]
        prompts = [prompts[i] for i in sorted(chosen)]
    if settings.references is not None and not protocol.audio:
        return ProtocolData(prompts, audio_files(Path(settings.references)), paired=False)
    return ProtocolData(prompts, list(dict.fromkeys(p.reference for p in prompts if p.reference is not None)))


def _builtin_data(settings: DictConfig, n: int) -> ProtocolData:
    """Held-out captions of a built-in store; all other held-out segments are the references."""
    if settings.store is None:
        raise UserError("store is not set: give store=DIR, a store of `python -m data_prep builtin`")
    store = open_store(settings.store)
    labelled = balanced_prompts(store, n, settings.seed)
    ids = store.ids(np.array([prompt.row for prompt in labelled]))
    prompts = [
        ListedPrompt(f"{i:04d}-{slug(name)}", prompt.caption, store.audio_path(prompt.row))
        for i, (name, prompt) in enumerate(zip(ids, labelled, strict=True))
    ]
    prompted = {prompt.row for prompt in labelled}
    held_out = np.concatenate([store.indices("valid"), store.indices("test")]).tolist()
    references = [store.audio_path(row) for row in held_out if row not in prompted]
    return ProtocolData(prompts, references, store, labelled)


def _check(data: ProtocolData, references: Sequence[Path], embedders: Sequence[Embedder], seconds: float) -> None:
    """Raise UserError, before anything is generated, if no metric can be computed."""
    if len(data.prompts) < MIN_CLIPS:
        raise UserError(f"at least {MIN_CLIPS} prompts are needed, got {len(data.prompts)}")
    for embedder in embedders:
        if embedder.seconds > seconds:
            raise UserError(f"the window of {embedder.name} is {embedder.seconds:g} s: raise eval.seconds to it")
    if len(references) == 1:
        raise UserError(f"one reference, {references[0]}, has no distribution: give some hundreds, or none")
    if not references and not any(isinstance(embedder, JointEmbedder | Scorer) for embedder in embedders):
        raise UserError("no reference audio, and no embedder of captions: give references=DIR, or the embedder tiny")


def _decoding(settings: DictConfig, pipeline: MusicPipeline) -> Decoding:
    given = {
        "guidance_scale": settings.guidance,
        **{name: settings[name] for name in ("temperature", "top_k", "top_p")},
    }
    return Decoding.of(pipeline, float(settings.eval.seconds), settings.seed * 1_000_003 % 2**31, **given)


def _clips(data: ProtocolData, paths: Mapping[str, Path], references: set[Path]) -> list[Clip]:
    return [
        Clip(paths[p.name], p.caption, p.reference if p.reference in references else None, p.concepts)
        for p in data.prompts
        if p.name in paths
    ]


def _common_settings(paths: Sequence[Path]) -> dict[str, Any]:
    """The sampling settings that all sidecars of existing audio share."""
    sidecars = [read_sidecar(path) for path in paths]
    common = {}
    for name in _SETTINGS:
        first = sidecars[0].get(name)
        same = all(sidecar.get(name) == first for sidecar in sidecars)
        common[name] = sidecars[0].get(name, "unknown") if same else "mixed"
    return common


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of a block to `seconds[stage]`."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def _weights_notes(protocol: DictConfig) -> list[str]:
    """A note on each embedder that has other weights than the published results were measured with."""
    notes = []
    for name, published in protocol.published_weights.items():
        given = Path(protocol.weights[name] or "")
        if not (given.is_file() and file_sha256(given) == published):
            notes.append(f"the published results have other weights of {name} (sha256 {published[:16]}...)")
    return notes


def _negative_notes(metrics: Sequence[Metric]) -> list[str]:
    """A note on each negative FAD-infinity."""
    return [negative_note(m.name, m.value) for m in metrics if m.name.startswith("fad_infinity") and m.value < 0]


def _notes(
    data: ProtocolData, paths: Mapping[str, Path], unmatched: Sequence[str], bad: Mapping[str, str]
) -> list[str]:
    """Notes on missing and skipped files."""
    found = {
        "prompts without audio": [prompt.name for prompt in data.prompts if prompt.name not in paths],
        "audio files without a prompt": list(unmatched),
        "prompts without reference audio": [p.name for p in data.prompts if data.paired and p.reference is None],
        "files skipped": [f"{path}: {reason}" for path, reason in bad.items()],
    }
    return [
        f"{len(items)} {what}: {'; '.join(items[:_LISTED])}{' ...' if len(items) > _LISTED else ''}"
        for what, items in found.items()
        if items
    ]
