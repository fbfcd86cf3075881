"""True music as a codec or a VAE decodes it, written once: what a model of it can reach at best."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ssmttm import audio
from ssmttm.codecs import Autoencoder, Codec, encoder_of
from ssmttm.evaluation.attributes.accuracy import reconstruct_with_codec
from ssmttm.generation.output import read_sidecar, write_with_sidecar


def decoded_files(paths: Sequence[Path], codec: Autoencoder, seconds: float, folder: Path) -> list[Path]:
    """Encode and decode the first `seconds` of each file; existing results of the same codec are kept.

    Returns:
        FOLDER/NAME.wav for each file, in their order, at the codec's rate; the sidecar names the codec, and the prompt
        if the file's own sidecar does.
    """
    written = []
    encoder: Autoencoder | None = None
    for path in tqdm(paths, desc=f"decoding true music ({codec.name})", unit="clip"):
        target = folder / f"{path.stem}.wav"
        metadata = {"file": target.name, "source": path.name, "seconds": seconds, "codec": codec.fingerprint}
        metadata |= {"prompt": prompt} if (prompt := read_sidecar(path).get("prompt")) else {}
        if not (target.is_file() and read_sidecar(target) == metadata):
            encoder = encoder or (encoder_of(codec) if isinstance(codec, Codec) else codec)
            wav = audio.read(path, codec.sample_rate)[0][:, : round(seconds * codec.sample_rate)]
            decoded = reconstruct_with_codec(codec, wav, codec.sample_rate, encoder)
            write_with_sidecar(target, decoded.clamp(-1, 1), codec.sample_rate, metadata)
        written.append(target)
    return written
