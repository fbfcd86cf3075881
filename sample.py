"""Prompts in, audio out: `python sample.py "a slow waltz in D minor on a music box" --out waltz.wav`."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from ssmttm.cli.flags import check_renamed_flags
from ssmttm.errors import UserError, run_cli

EXAMPLES = """examples:
  python sample.py "a slow waltz in D minor on a music box" --duration 10 --out waltz.wav
  python sample.py "fast drum and bass" "calm solo piano" --seed 7 --out outputs/
  python sample.py --prompts-file prompts.txt --checkpoint runs/lm --guidance 4 --format mp3 --out outputs/
Each audio file has a sidecar of the same name (.json): prompt, seed, settings, model, licences of its training data."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Generate music from text prompts.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="description of the music; one clip per prompt")
    add("--prompts-file", type=Path, metavar="F", help="more prompts, one per line; # begins a comment line")
    add("--checkpoint", metavar="DIR", help="run, checkpoint or exported folder, or hub id (default: embedded)")
    add("--second-stage", metavar="DIR", help="second stage of a two-stage model, if not in the model's folder")
    add("--diffusion-steps", type=int, metavar="N", help="sampling steps of the second stage (default: the model's)")
    add("--bpm", type=float, metavar="N", help="beats per minute, for a model trained with tempo")
    add("--melody", type=Path, metavar="FILE", help="audio whose melody to follow, for a model trained with melody")
    add("--codec", metavar="DIR", help="the model's codec, if not found by its name")
    add("--text-encoder", metavar="DIR", help="the model's text encoder, if not found by its name")
    add("--duration", type=float, default=10.0, metavar="S", help="seconds per clip (default: 10)")
    add("--max-duration", type=float, default=600.0, metavar="S", help="longest duration accepted (default: 600)")
    add("--seed", type=int, default=0, metavar="N", help="clip i, from 0, uses seed N + i (default: 0)")
    add("--guidance", type=float, help="classifier-free guidance scale; 1: none (default: the model's, mostly 3)")
    add("--temperature", type=float, default=1.0, help="below 1 sharper, above 1 more random (default: 1)")
    add("--top-k", type=int, default=250, help="sample among the K most likely codes; 0: all (default: 250)")
    add("--top-p", type=float, default=1.0, help="sample among the most likely codes of this mass (default: 1)")
    add("--batch-size", type=int, default=4, metavar="N", help="clips generated together (default: 4)")
    add("--format", default="wav", help="of files in a folder: wav, flac, ogg or mp3 (default: wav)")
    add("--out", default="outputs", metavar="PATH", help="a .wav, .flac, .ogg or .mp3 file, which is overwritten, or a "
        "folder, where names come from the prompts and nothing is overwritten (default: outputs)")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    check_renamed_flags(argv)
    args = parse(argv)
    from ssmttm.generation.request import Request, Sampling, read_prompts

    prompts = args.prompts + (read_prompts(args.prompts_file) if args.prompts_file else [])
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.diffusion_steps is not None and args.diffusion_steps < 1:
        raise UserError(f"--diffusion-steps must be at least 1, got {args.diffusion_steps}")
    guidance = {} if args.guidance is None else {"guidance_scale": args.guidance}
    sampling = Sampling(args.temperature, args.top_k, args.top_p, **guidance)
    request = Request.create(prompts, args.duration, args.seed, sampling, args.max_duration, args.bpm)

    from ssmttm import MusicPipeline, audio
    from ssmttm.generation.output import OutputPath, sidecar
    from ssmttm.generation.progress import Progress

    out = OutputPath(args.out, len(prompts), args.format)
    pipe = MusicPipeline.from_pretrained(
        args.checkpoint, codec=args.codec, text_encoder=args.text_encoder, second_stage=args.second_stage
    )
    pipe.max_duration = args.max_duration
    settings = {"duration": args.duration, **asdict(sampling), "guidance_scale": pipe.guidance_scale, **guidance}
    melody = None if args.melody is None else audio.read_music(args.melody, pipe.sample_rate)[0]
    controls = {"bpm": args.bpm, "melody": args.melody and args.melody.name}
    controls = {name: value for name, value in controls.items() if value is not None}
    with Progress(len(prompts) * args.duration) as progress:
        for batch in request.batches(args.batch_size):
            output = pipe(
                batch.prompts, seeds=batch.seeds, bpm=args.bpm, melody=melody,
                diffusion_steps=args.diffusion_steps, progress=progress.advance, **settings,
            )  # fmt: skip
            speed = progress.throughput()
            for prompt, seed, wav in zip(batch.prompts, batch.seeds, output.audios, strict=True):
                entries = settings | controls | {"sample_rate": output.sample_rate}
                path = out.save(prompt, wav, output.sample_rate, sidecar(prompt, seed, entries, output.metadata))
                progress.print(f"{path}  {wav.shape[-1] / output.sample_rate:.2f} s  {speed:.2f}x real time")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
