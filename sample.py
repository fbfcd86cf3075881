"""Prompts in, audio out: `python sample.py "a slow waltz in D minor on a music box" --out waltz.wav`."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from ssmttm.errors import UserError, run_cli

EXAMPLES = """examples:
  python sample.py "a slow waltz in D minor on a music box" --duration 10 --out waltz.wav
  python sample.py "fast drum and bass" "calm solo piano" --seed 7 --out pieces/
  python sample.py --prompts-file prompts.txt --checkpoint runs/lm --guidance 4 --format mp3 --out pieces/
Beside each file stands a .json of the same name: prompt, seed, settings, model, licences of its training data."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make music from descriptions in words.", epilog=EXAMPLES)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what the music should be; one piece a prompt")
    add("--prompts-file", type=Path, metavar="F", help="more prompts, one a line; # begins a comment line")
    add(
        "--checkpoint",
        metavar="DIR",
        help="run, checkpoint or exported folder, or hub id (default: embedded)",
    )
    add("--second-stage", metavar="DIR", help="second stage of a model of two, if it is not in the model's own folder")
    add("--diffusion-steps", type=int, metavar="N", help="sampler steps of the second stage (default: the model's own)")
    add("--tempo", type=float, metavar="BPM", help="beats a minute, for a model trained with it")
    add("--melody", type=Path, metavar="FILE", help="audio whose melody to take up, for a model trained with it")
    add("--codec", metavar="DIR", help="where the model's codec is, if not found by its name")
    add("--text-encoder", metavar="DIR", help="where the model's text encoder is, if not found by its name")
    add("--duration", type=float, default=10.0, metavar="S", help="seconds a piece (default: 10)")
    add("--max-duration", type=float, default=600.0, metavar="S", help="refuse longer ones (default: 600)")
    add("--seed", type=int, default=0, metavar="N", help="piece i, counted from 0, uses seed N + i (default: 0)")
    add("--guidance", type=float, help="how closely to follow the prompt; 1: as trained (default: mostly 3)")
    add("--temperature", type=float, default=1.0, help="below 1 is safer, above 1 wilder (default: 1)")
    add("--top-k", type=int, default=250, help="draw among the K likeliest codes; 0: all (default: 250)")
    add("--top-p", type=float, default=1.0, help="draw among the likeliest codes of this probability (default: 1)")
    add("--batch-size", type=int, default=4, metavar="N", help="pieces made at a time (default: 4)")
    add("--format", default="wav", help="of files in a folder: wav, flac, ogg or mp3 (default: wav)")
    add("--out", default="outputs", metavar="PATH", help="a .wav, .flac, .ogg or .mp3 file, which is overwritten, or a "
        "folder, where names come from the prompts and nothing is overwritten (default: outputs)")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from ssmttm.generation.request import Request, Sampling, read_prompts

    prompts = args.prompts + (read_prompts(args.prompts_file) if args.prompts_file else [])
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}: give 1 or more")
    if args.diffusion_steps is not None and args.diffusion_steps < 1:
        raise UserError(f"--diffusion-steps is {args.diffusion_steps}: give 1 or more")
    guidance = {} if args.guidance is None else {"guidance_scale": args.guidance}
    sampling = Sampling(args.temperature, args.top_k, args.top_p, **guidance)
    asked = Request.checked(prompts, args.duration, args.seed, sampling, args.max_duration)

    from ssmttm import MusicPipeline, audio
    from ssmttm.generation.output import OutputPath, sidecar_path
    from ssmttm.generation.progress import Progress

    destination = OutputPath(args.out, len(prompts), args.format)
    pipe = MusicPipeline.from_pretrained(
        args.checkpoint, codec=args.codec, text_encoder=args.text_encoder, second_stage=args.second_stage
    )
    if args.diffusion_steps is not None:
        pipe.set_diffusion_steps(args.diffusion_steps)
    pipe.max_duration = args.max_duration
    settings = {"duration": args.duration, **asdict(sampling), "guidance_scale": pipe.guidance_scale, **guidance}
    told = {"tempo": args.tempo, "melody": args.melody and args.melody.name}
    told = {name: value for name, value in told.items() if value is not None}
    controls = {"tempo": args.tempo, "melody": None}
    if args.melody is not None:
        controls["melody"] = audio.read(args.melody, pipe.sample_rate)[0]
    with Progress(len(prompts) * args.duration) as progress:
        for batch in asked.batches(args.batch_size):
            made = pipe(batch.prompts, seeds=batch.seeds, progress=progress.advance, **settings, **controls)
            speed = progress.lap()
            for prompt, seed, wav in zip(batch.prompts, batch.seeds, made.audios, strict=True):
                record = sidecar_path(prompt, seed, settings | told | {"sample_rate": made.sample_rate}, pipe.facts)
                path = destination.save(prompt, wav, made.sample_rate, record)
                progress.say(f"{path}  {wav.shape[-1] / made.sample_rate:.2f} s  {speed:.2f}x real time")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
