"""An endless stream whose words change while it plays, and variations of one of its moments, as WAV files.

python examples/live_session.py
"""

import torch

from ssmttm import MusicPipeline, audio
from ssmttm.generation.streaming.session import StreamSession


def play(session: StreamSession, seconds: float) -> torch.Tensor:
    """The next chunks of a stream, at least so many seconds: [channels, samples]."""
    end, parts = session.position + seconds, list[torch.Tensor]()
    while session.position < end and (chunk := session.next_chunk()) is not None:
        parts.append(chunk)
    return torch.cat(parts, -1)


def main() -> None:
    pipe = MusicPipeline.from_pretrained()
    session = pipe.session("a slow waltz on a music box", seed=1)
    before = play(session, 4.0)
    moment = session.snapshot()
    session.change(prompt="fast energetic drum and bass", guidance_scale=4.0)
    audio.write("changed.wav", torch.cat([before, play(session, 4.0)], -1), pipe.sample_rate)
    for seed in range(3):
        audio.write(f"fork-{seed}.wav", play(pipe.resume(moment, seed=seed), 4.0), pipe.sample_rate)


if __name__ == "__main__":
    main()
