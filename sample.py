"""Prompts in, audio out: `python sample.py "a slow waltz in D minor on a music box" --out waltz.wav`."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmttm import threads
from ssmttm.cli.flags import check_renamed_flags
from ssmttm.errors import UserError, run_cli

if TYPE_CHECKING:
    from ssmttm import MusicPipeline
    from ssmttm.generation.request import Request

EXAMPLES = """examples:
  python sample.py "a slow waltz in D minor on a music box" --duration 10 --out waltz.wav
  python sample.py "fast drum and bass" "calm solo piano" --seed 7 --out outputs/
  python sample.py --prompts-file prompts.txt --checkpoint runs/lm --guidance 4 --format mp3 --out outputs/
  python sample.py "a slow waltz" --at 5 "driving techno" --negative "vocals" --duration 12 --out change.wav
  python sample.py "strings" --continue waltz.wav --duration 8 --out longer.wav
  python sample.py "a flute" --continue waltz.wav --repaint 5:8 --out repaired.wav
  python sample.py "fast drum and bass" --duration 60 --stream - | ffplay -
Each audio file has a sidecar of the same name (.json): prompt, seed, settings, model, licences of its training data."""

# Of flags that some others have no use for: these refuse them if they are given.
DEFAULTS = {"duration": 10.0, "max_duration": 600.0, "batch_size": 4, "out": "outputs"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Generate music from text prompts.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="description of the music; one clip per prompt")
    add("--prompts-file", type=Path, metavar="F", help="more prompts, one per line; # begins a comment line")
    add("--negative", metavar="TEXT", help="what to lead away from, such as vocals; acts through guidance")
    add("--at", nargs=2, action="append", default=[], metavar=("SECONDS", "PROMPT"),
        help="other words from there on; may be given several times")  # fmt: skip
    add("--checkpoint", metavar="DIR", help="run, checkpoint or exported folder, or hub id (default: embedded)")
    add("--second-stage", metavar="DIR", help="second stage of a two-stage model, if not in the model's folder")
    add("--adapter", action="append", default=[], metavar="DIR[:STRENGTH]",
        help="LoRA or DoRA of the model, at a strength (default: 1); several add up")  # fmt: skip
    add("--diffusion-steps", type=int, metavar="N", help="sampling steps of the second stage (default: the model's)")
    add("--bpm", type=float, metavar="N", help="beats per minute, for a model trained with tempo; tempo, key and metre "
        "that are not given are drawn from the prompt if the model predicts them")  # fmt: skip
    add("--key", metavar="KEY", help="such as 'D minor', for a model trained with key")
    add("--metre", metavar="METRE", help="such as 3/4, for a model trained with metre")
    add("--melody", type=Path, metavar="FILE", help="audio whose melody to follow, for a model trained with melody")
    add("--continue", dest="continue_from", type=Path, metavar="FILE", help="audio to go on from: the output is this "
        "clip and then the new music")  # fmt: skip
    add("--repaint", metavar="A:B", help="generate these seconds of the --continue FILE again, and keep the rest")
    add("--codec", metavar="DIR", help="the model's codec, if not found by its name")
    add("--text-encoder", metavar="DIR", help="the model's text encoder, if not found by its name")
    add("--duration", type=float, metavar="S", help="seconds of new music per clip (default: 10)")
    add("--bars", type=float, metavar="N", help="the duration in bars at --bpm, of 4 beats unless there is a --metre")
    add("--max-duration", type=float, metavar="S", help="longest duration accepted (default: 600)")
    add("--loop", action="store_true", help="the end of a clip leads into its start")
    add("--seed", type=int, default=0, metavar="N", help="clip i, from 0, uses seed N + i (default: 0)")
    add("--guidance", type=float, help="classifier-free guidance scale; 1: none (default: the model's, mostly 3)")
    add("--temperature", type=float, help="below 1 sharper, above 1 more random (default: the model's, mostly 1)")
    add("--top-k", type=int, help="sample among the K most likely codes; 0: all (default: the model's, mostly 250)")
    add("--top-p", type=float, help="sample among the most likely codes of this mass (default: the model's, mostly 1)")
    add("--min-p", type=float, help="drop codes below this fraction of the most likely one's probability (default: the "
        "model's, mostly 0)")  # fmt: skip
    add("--engine", default="auto", help="of the language model's steps: auto, fused, ort or torch (default: auto)")
    add("--weights", default="fp32", help="format that the steps read: fp32, bf16 or int8 (default: fp32)")
    add("--batch-size", type=int, metavar="N", help="clips generated together (default: 4)")
    add("--format", help="of files in a folder: wav, flac, ogg or mp3; of a stream: wav or pcm, 16-bit samples without "
        "a header (default: wav)")  # fmt: skip
    add("--out", metavar="PATH", help="a .wav, .flac, .ogg or .mp3 file, which is overwritten, or a folder, where "
        "names come from the prompts and nothing is overwritten (default: outputs)")  # fmt: skip
    add("--stream", metavar="-", help="write the audio to standard output (-) while it is generated")
    add("--play", action="store_true", help="play the audio while it is generated (needs the package sounddevice)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    check_renamed_flags(argv)
    args = parse(argv)
    from ssmttm.generation.request import (
        Request,
        Sampling,
        bars_duration,
        parse_adapter,
        parse_region,
        parse_schedule,
        read_prompts,
    )  # fmt: skip

    prompts = args.prompts + (read_prompts(args.prompts_file) if args.prompts_file else [])
    for name in ("batch_size", "diffusion_steps"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    _check_combination(args, prompts)
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    length = {"duration": args.duration}
    if args.bars is not None:
        args.duration, length = bars_duration(args.bars, args.bpm, args.metre), {"bars": args.bars}
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    given = {name: value for name, value in (given | {"guidance_scale": args.guidance}).items() if value is not None}
    request = Request.create(
        prompts, args.duration, args.seed, Sampling(**given), args.max_duration, args.bpm,
        negative_prompts=args.negative, key=args.key, metre=args.metre, schedule=parse_schedule(args.at),
    )  # fmt: skip
    region = None if args.repaint is None else parse_region(args.repaint)

    from ssmttm import MusicPipeline, audio
    from ssmttm.generation.output import OutputPath
    from ssmttm.generation.progress import Progress

    live = args.play or args.stream is not None
    out = None if live else OutputPath(args.out, len(prompts), args.format)
    threads.use_threads_for_sampling()
    pipe = MusicPipeline.from_pretrained(
        args.checkpoint, codec=args.codec, text_encoder=args.text_encoder, second_stage=args.second_stage
    )
    threads.use_threads_for_sampling(sum(parameter.numel() for parameter in pipe.model.parameters()))
    pipe.max_duration = args.max_duration
    for adapter in args.adapter:
        pipe.load_adapter(*parse_adapter(adapter))
    settings = asdict(pipe.sampling(**given)) | {"engine": args.engine, "weights": args.weights}
    controls = {
        "bpm": args.bpm, "key": args.key, "metre": args.metre, "diffusion_steps": args.diffusion_steps,
    }  # fmt: skip
    options = settings | {name: value for name, value in controls.items() if value is not None}
    if region is None:
        options |= {**length, "schedule": request.schedule, "continue_from": args.continue_from}
    melody = None if args.melody is None else audio.read_music(args.melody, pipe.sample_rate)[0]
    if live:
        return _play(args, pipe, request, options | {"melody": melody})
    assert out is not None
    if region is not None:
        options = {"clip": args.continue_from, "region": region, "negative_prompt": args.negative} | options
        output = pipe.repaint(prompts[0], seed=args.seed, **options)
        path = _save(out, output, 0, prompts[0], args.seed, options)
        print(f"{path}  {output.audios.shape[-1] / output.sample_rate:.2f} s")
        return 0
    with Progress(len(prompts) * args.duration) as progress:
        for batch in request.batches(args.batch_size):
            output = pipe(
                batch.prompts, seeds=batch.seeds, negative_prompts=batch.negative_prompts, melody=melody,
                loop=args.loop, progress=progress.advance, **options,
            )  # fmt: skip
            speed = progress.throughput()
            more = {"negative_prompt": args.negative, "loop": args.loop, "melody": args.melody and args.melody.name}
            more["duration"] = args.duration
            for item, (prompt, seed) in enumerate(zip(batch.prompts, batch.seeds, strict=True)):
                path = _save(out, output, item, str(prompt), seed, options | more)
                seconds = output.audios.shape[-1] / output.sample_rate
                progress.print(f"{path}  {seconds:.2f} s  {speed:.2f}x real time")
    return 0


def _save(out: Any, output: Any, item: int, prompt: str, seed: int, options: dict[str, Any]) -> Path:
    """Write a clip and its sidecar, which has the names of the files and leaves out what was not requested."""
    from ssmttm.generation.output import sidecar

    entries = {name: value for name, value in options.items() if value is not None and value is not False}
    entries |= {name: entries[name].name for name in ("continue_from", "clip") if name in entries}
    if not entries.get("schedule"):
        entries.pop("schedule", None)
    content = sidecar(prompt, seed, entries | {"sample_rate": output.sample_rate}, output.metadata_of(item))
    return out.save(prompt, output.audios[item], output.sample_rate, content)


def _play(args: argparse.Namespace, pipe: "MusicPipeline", request: "Request", options: dict[str, Any]) -> int:
    from ssmttm.audio import live

    session = pipe.session(request.prompts[0], seed=args.seed, negative_prompt=args.negative, **options)
    if args.play:
        live.play(session, session.sample_rate, session.channels)
    else:
        live.write_stream(sys.stdout.buffer, session, session.sample_rate, session.channels, args.format or "wav")
    return 0


def _check_combination(args: argparse.Namespace, prompts: list[str]) -> None:
    """Raises UserError for flags that do not go together."""
    live = args.play or args.stream is not None
    if args.bars is not None and args.duration is not None:
        raise UserError("--bars and --duration are two lengths: give one of them")
    if args.stream not in (None, "-"):
        raise UserError(f"--stream takes - (standard output), got {args.stream}: write a file with --out")
    if args.stream is not None and args.format not in (None, "wav", "pcm"):
        raise UserError(f"a stream is wav or pcm, got --format {args.format}")
    if args.play and args.stream is not None:
        raise UserError("--play and --stream are two ways out: give one of them")
    if live and (args.loop or args.repaint):
        raise UserError("--loop and --repaint need the whole clip: leave out --stream and --play")
    if (live or args.repaint) and len(prompts) != 1:
        raise UserError(f"--stream, --play and --repaint take one prompt, got {len(prompts)}")
    if args.repaint and args.continue_from is None:
        raise UserError("--repaint generates a part of a clip again: name it with --continue FILE")
    if args.repaint and (args.loop or args.at or args.melody or args.metre):
        raise UserError("--repaint goes with no --loop, --at, --melody or --metre: leave them out")
    if args.repaint and any(value is not None for value in (args.bars, args.duration, args.max_duration)):
        raise UserError("--repaint keeps the length of the clip: leave out --duration, --bars and --max-duration")
    if (live or args.repaint) and args.batch_size is not None:
        raise UserError("--stream, --play and --repaint make one clip: leave out --batch-size")
    if live and args.out is not None:
        raise UserError(f"--out {args.out} and {'--play' if args.play else '--stream'} are two ways out: give one")
    if args.play and args.format is not None:
        raise UserError(f"--play writes no file: leave out --format {args.format}")


if __name__ == "__main__":
    with threads.spin_when_alone():
        sys.exit(run_cli(main))
