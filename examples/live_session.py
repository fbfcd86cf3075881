"""An endless stream whose words change while it plays, and variations of one of its moments, as WAV files.

python examples/live_session.py
"""

import torch

from ssmttm import MusicPipeline, audio


def main() -> None:
    pipe = MusicPipeline.from_pretrained()
    session = pipe.session("a slow waltz on a music box", seed=1)
    chunks = [session.next_chunk() for _ in range(8)]  # about 4 s
    moment = session.snapshot()
    session.change(prompt="fast energetic drum and bass", guidance_scale=4.0)
    chunks += [session.next_chunk() for _ in range(8)]
    audio.write("changed.wav", torch.cat([chunk for chunk in chunks if chunk is not None], -1), pipe.sample_rate)
    for seed in range(3):
        fork = pipe.resume(moment, seed=seed)
        parts = [fork.next_chunk() for _ in range(8)]
        audio.write(f"fork-{seed}.wav", torch.cat([part for part in parts if part is not None], -1), pipe.sample_rate)


if __name__ == "__main__":
    main()
