"""The command `python -m data_prep`: a corpus on disk in, a store out."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from ssmttm.errors import UserError, run_cli

_ABOUT = """\
Make a store: the folder that training and evaluation read (manifest, audio, codes, caption embeddings).

sources
  builtin   music that this program composes and renders itself: any amount, no download, CC0-1.0, exact captions
  folder    your own audio files, with an optional captions.csv
  pack      a store that exists already: encode its audio with another codec or embed its captions anew

examples
  python -m data_prep builtin --hours 2 --out stores/builtin
  python -m data_prep folder --root music/ --out stores/mine --licence CC-BY-4.0
  python -m data_prep pack --root stores/mine --out stores/mine-dac --codec checkpoints/dac

A run that was stopped goes on when the same command is given again; what was finished is used as it is.
"""

_FOLDER = """\
Audio files under --root, in any folder depth and any format that libsndfile reads (wav, flac, ogg, mp3, aiff ...), are
mixed down to mono, resampled, and cut into segments. Captions and licences come from ROOT/captions.csv, UTF-8, with
the columns path (relative to ROOT), caption, licence, title, author, source_url; all but path may be left out, and
several lines of one path give it several captions. A licence is an SPDX identifier, a Creative Commons name with its
version, or a link. A file that names no licence is refused unless --licence gives one. Files that cannot be used go to
OUT/rejected.csv with the reason; the others go on. OUT/ATTRIBUTION.csv names every work, author and licence.
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and run a source. Raises UserError for anything the user can mend."""
    arguments = _parser().parse_args(argv)
    if arguments.workers < 1:
        raise UserError(f"--workers must be at least 1, not {arguments.workers}")
    from data_prep.pack import pick_device, summary
    from ssmttm.text.encoders import load_text_encoder

    device = pick_device(arguments.device)
    codec = None
    if arguments.codec != "none":
        from ssmttm.codecs import load_codec

        codec = load_codec(arguments.codec).to(device)
    text = None if arguments.text == "none" else load_text_encoder(arguments.text).to(device)
    store = _SOURCES[arguments.source](arguments, codec, text, device)
    print(summary(store))
    return 0


def _builtin(arguments: argparse.Namespace, codec: Any, text: Any, device: str) -> Any:
    from data_prep.builtin import produce
    from data_prep.builtin.composer import VERSION
    from data_prep.builtin.corpus import SAMPLE_RATE
    from data_prep.pack import claim_for, hours_bar, pack

    hours = arguments.hours
    if not (math.isfinite(hours) and hours > 0):
        raise UserError(f"--hours must be above 0, not {hours:g}")
    source = {"name": "builtin", "version": VERSION, "hours": hours, "seed": arguments.seed}
    claim_for(arguments.out, source, codec, device)
    rows = []
    with hours_bar("music", hours) as advance:
        for row in produce(hours, arguments.seed, arguments.out, arguments.workers):
            rows.append(row)
            advance(row["duration"])
    return pack(rows, arguments.out, source, SAMPLE_RATE, codec, text, device)


def _folder(arguments: argparse.Namespace, codec: Any, text: Any, device: str) -> Any:
    from data_prep import folder
    from data_prep.pack import claim_for, pack

    if not 1.0 <= arguments.segment <= 3600.0:
        raise UserError(f"--segment must be between 1 and 3600 seconds, not {arguments.segment:g}")
    rate = arguments.sample_rate or (codec.sample_rate if codec else 24_000)
    if not 1_000 <= rate <= 192_000:
        raise UserError(f"--sample-rate must be between 1000 and 192000 Hz, not {rate}")
    cut = folder.Cut(rate, arguments.segment, min(3.0, arguments.segment))
    folder.check(arguments.root, arguments.out)
    claim_for(arguments.out, cut.source(), codec, device)
    rows = folder.produce(arguments.root, arguments.out, cut, arguments.licence, arguments.policy, arguments.workers)
    return pack(rows, arguments.out, cut.source(), rate, codec, text, device)


def _pack(arguments: argparse.Namespace, codec: Any, text: Any, device: str) -> Any:
    from data_prep.pack import repack

    return repack(arguments.root, arguments.out, codec, text, device)


_SOURCES = {"builtin": _builtin, "folder": _folder, "pack": _pack}


def _parser() -> argparse.ArgumentParser:
    from data_prep.licences import POLICIES

    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m data_prep", description=_ABOUT, formatter_class=plain)
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    shared = argparse.ArgumentParser(add_help=False)
    option = shared.add_argument
    option("--codec", default="tiny", help="tiny (embedded), a codec's folder or hub name, or none: audio only")
    option("--text", default="minilm", help="minilm (embedded), a T5's name or folder, or none")
    option("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where codec and text encoder run")
    option("--workers", type=int, default=1, metavar="N", help="processes that make or cut audio")

    builtin = sources.add_parser("builtin", parents=[shared], help="music composed and rendered here, CC0-1.0")
    option = builtin.add_argument
    option("--hours", type=float, required=True, metavar="H", help="at least this much audio")
    option("--seed", type=int, default=0, metavar="S", help="another seed, other music")
    option("--out", type=Path, required=True, metavar="DIR", help="the store")

    folder = sources.add_parser(
        "folder", parents=[shared], help="your audio files", description=_FOLDER, formatter_class=plain
    )
    option = folder.add_argument
    option("--root", type=Path, required=True, metavar="DIR", help="where the audio files are")
    option("--out", type=Path, required=True, metavar="STORE", help="the store")
    option("--segment", type=float, default=20.0, metavar="SECONDS", help="length of a segment; tails from 3 s stay")
    option("--licence", metavar="SPDX", help="of files for which captions.csv names none, such as CC-BY-4.0")
    policies = "; ".join(f"{name}: {what}" for name, what in POLICIES.items())
    option("--policy", default="research-nc", choices=list(POLICIES), help=f"licences let in. {policies}")
    option("--sample-rate", type=int, metavar="HZ", help="of the stored audio; default: the codec's, else 24000")

    pack = sources.add_parser("pack", parents=[shared], help="an existing store, encoded or embedded anew")
    option = pack.add_argument
    option("--root", type=Path, required=True, metavar="STORE", help="a store with audio")
    option("--out", type=Path, metavar="STORE", help="the new store; default: --root itself gets the codes")
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
