"""Import of MusicGen (arXiv 2306.05284) from transformers' MusicgenForConditionalGeneration, and export to it.

The decoder is a TokenLM tensor by tensor. Its null condition has no token: transformers multiplies the text by a mask
of zeros, and keys and values without biases are then zero ("no_tokens" in `ssmttm.text.null_condition`).
"""

from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ssmttm.codecs import load_codec
from ssmttm.errors import UserError, first_line
from ssmttm.export.importers.card import imported_card, imported_config
from ssmttm.export.importers.names import load_renamed, renamed_views
from ssmttm.files import new_folder
from ssmttm.generation.pipeline import MusicPipeline
from ssmttm.hub import split_revision
from ssmttm.model_folder import CODEC, TEXT_ENCODER, write_model_folder
from ssmttm.models.token_lm import TokenLM, TokenLMConfig
from ssmttm.patterns import get_pattern
from ssmttm.text.encoders import load_text_encoder, quiet_transformers

SHAPE: dict[str, Any] = {
    "layers": "attention", "block": "simba", "mlp_bias": False, "attention_bias": False,
    "conditioning": "cross_attention", "text_norm": False, "positions": "sinusoidal", "norm": "layer",
    "layer_scale": None, "final_norm": True, "predict_special": False, "chroma": False, "tempo": False,
}  # fmt: skip
LANGUAGE_MODEL = ("decoder.", "enc_to_dec_proj.")  # its tensors in a MusicgenForConditionalGeneration
DECODER = "decoder.model.decoder"
TABLE = {
    r"embedding\.weight": rf"{DECODER}.embed_tokens.{{k}}.weight", r"heads\.weight": r"decoder.lm_heads.{k}.weight",
    r"text\.linear\.(.*)": r"enc_to_dec_proj.\1", r"norm\.(.*)": rf"{DECODER}.layer_norm.\1",
    r"blocks\.(\d+)\.sublayers\.0\.norm\.(.*)": rf"{DECODER}.layers.\1.self_attn_layer_norm.\2",
    r"blocks\.(\d+)\.sublayers\.0\.inner\.(.*)": rf"{DECODER}.layers.\1.self_attn.\2",
    r"blocks\.(\d+)\.sublayers\.1\.norm\.(.*)": rf"{DECODER}.layers.\1.encoder_attn_layer_norm.\2",
    r"blocks\.(\d+)\.sublayers\.1\.inner\.(.*)": rf"{DECODER}.layers.\1.encoder_attn.\2",
    r"blocks\.(\d+)\.sublayers\.2\.norm\.(.*)": rf"{DECODER}.layers.\1.final_layer_norm.\2",
    r"blocks\.(\d+)\.sublayers\.2\.inner\.fc1\.(.*)": rf"{DECODER}.layers.\1.fc1.\2",
    r"blocks\.(\d+)\.sublayers\.2\.inner\.fc2\.(.*)": rf"{DECODER}.layers.\1.fc2.\2",
}  # fmt: skip


def import_musicgen(source: str | Path, out: str | Path) -> Path:
    """Write a model folder that includes the codec and the text encoder. Raises UserError if there is no such model,
    weights are missing, or a TokenLM does not support it (stereo, melody).

    Args:
        source: a folder or a hub name, such as facebook/musicgen-small; safetensors, or tensors in a .bin.
        out: a new folder.
    """
    source, out = str(source), Path(out)
    musicgen, tokenizer = _load(source)
    model = from_musicgen(musicgen, source)
    with new_folder(out) as folder:
        musicgen.audio_encoder.save_pretrained(folder / CODEC)
        musicgen.text_encoder.save_pretrained(folder / TEXT_ENCODER)
        tokenizer.save_pretrained(folder / TEXT_ENCODER)
        codec = f"./{CODEC}", load_codec(folder / CODEC)
        text = f"./{TEXT_ENCODER}", load_text_encoder(folder / TEXT_ENCODER)
        card = imported_card(out.name, Path(source).name, model, codec, text, "no_tokens")
        write_model_folder(folder, model.state_dict(), imported_config(model, "delay"), card)
    return out


def from_musicgen(musicgen: Any, source: str = "this MusicGen") -> TokenLM:
    """The language model of a MusicgenForConditionalGeneration, in eval mode. Raises UserError as `import_musicgen`."""
    decoder = musicgen.config.decoder
    for key, value in {"audio_channels": 1, "activation_function": "gelu", "pad_token_id": decoder.vocab_size}.items():
        found = getattr(decoder, key)
        if found != value:
            raise UserError(f"{source}: {key} must be {value!r}, as in mono MusicGen models, got {found!r}")
    config = TokenLMConfig(
        n_codebooks=decoder.num_codebooks, codebook_size=decoder.vocab_size, d_model=decoder.hidden_size,
        n_layers=decoder.num_hidden_layers, n_heads=decoder.num_attention_heads,
        mlp_ratio=decoder.ffn_dim / decoder.hidden_size, text_dim=musicgen.config.text_encoder.hidden_size,
        dropout=decoder.dropout, **SHAPE,
    )  # fmt: skip
    model = TokenLM(config)
    tensors = {name: value for name, value in musicgen.state_dict().items() if name.startswith(LANGUAGE_MODEL)}
    load_renamed(model, TABLE, tensors, source)
    return model.eval()


def to_musicgen(model: TokenLM) -> dict[str, Tensor]:
    """The tensors of a TokenLM under their names in MusicgenForConditionalGeneration. Raises UserError if a setting
    differs from MusicGen's."""
    for key, value in SHAPE.items():
        found = getattr(model.config, key)
        if found != value:
            raise UserError(f"model.{key} must be {value!r}, as in MusicGen, got {found!r}: train model=musicgen_small")
    if model.config.text_dim == model.config.d_model:
        raise UserError("model.text_dim must differ from model.d_model: transformers' MusicGen needs a text projection")
    return renamed_views(model, TABLE)


def export_musicgen(
    folder: str | Path, out: str | Path, codec: str | Path | None = None, text_encoder: str | Path | None = None
) -> Path:
    """Write a language model as a folder for MusicgenForConditionalGeneration.from_pretrained. Raises UserError if
    there is no such model, or its architecture is not MusicGen's.

    The null condition in transformers has no token. An imported model has the same; one trained by ssmttm has the empty
    caption, so its guidance differs there.

    Args:
        folder: a run, a checkpoint or a model folder, with MusicGen's architecture, an EnCodec and a T5.
        out: a new folder.
        codec, text_encoder: as for `MusicPipeline.from_pretrained`.
    """
    from transformers import GenerationConfig, MusicgenForCausalLM, MusicgenForConditionalGeneration

    pipe = MusicPipeline.from_pretrained(folder, "cpu", codec, text_encoder)
    tensors, lm = to_musicgen(pipe.model), pipe.model.config
    parts: list[Any] = [getattr(part, "model", None) for part in (pipe.codec, pipe.text_encoder)]
    kinds = [type(part).__name__ for part in parts]
    if kinds != ["EncodecModel", "T5EncoderModel"] or pipe.pattern != get_pattern("delay", lm.n_codebooks):
        raise UserError(f"{folder} does not have EnCodec, T5 and the delay pattern, as MusicGen does")
    for part in parts:
        part.config._name_or_path = ""  # may be a local path
    decoder = MusicgenForCausalLM(_decoder_config(lm))
    musicgen = MusicgenForConditionalGeneration(audio_encoder=parts[0], text_encoder=parts[1], decoder=decoder)
    musicgen.load_state_dict(musicgen.state_dict() | tensors)
    settings = {name: value for name, value in asdict(pipe.sampling_defaults).items() if name != "min_p" or value}
    special = {f"{name}_token_id": lm.codebook_size for name in ("decoder_start", "pad", "bos")}
    musicgen.generation_config = GenerationConfig(do_sample=True, max_length=1500, **settings, **special)
    with new_folder(Path(out)) as temporary:
        musicgen.save_pretrained(temporary)
        pipe.text_encoder.tokenizer.save_pretrained(temporary)
    return Path(out)


def _load(source: str) -> tuple[Any, Any]:
    """The complete model in float32, and the tokenizer of its text encoder."""
    from transformers import AutoConfig, AutoTokenizer, MusicgenForConditionalGeneration

    name, revision = (source, None) if Path(source).is_dir() else split_revision(source)
    options = {} if revision is None else {"revision": revision}
    try:
        kind = AutoConfig.from_pretrained(name, **options).model_type
        if kind != "musicgen":
            raise UserError(f"{source} is a {kind!r} model: give a MusicGen, such as facebook/musicgen-small")
        with quiet_transformers():
            loaded: Any = MusicgenForConditionalGeneration.from_pretrained(
                name, dtype=torch.float32, weights_only=True, output_loading_info=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        reason = first_line(error)
        raise UserError(f"{source} cannot be loaded ({reason}): give a complete MusicGen of transformers") from error
    musicgen, report = loaded
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"{source} lacks {missing}: give a complete MusicGen of transformers")
    return musicgen, tokenizer


def _decoder_config(lm: TokenLMConfig) -> Any:
    from transformers import MusicgenDecoderConfig

    return MusicgenDecoderConfig(
        vocab_size=lm.codebook_size, num_codebooks=lm.n_codebooks, hidden_size=lm.d_model,
        num_hidden_layers=lm.n_layers, num_attention_heads=lm.n_heads, ffn_dim=round(lm.mlp_ratio * lm.d_model),
        dropout=lm.dropout, pad_token_id=lm.codebook_size, bos_token_id=lm.codebook_size,
    )  # fmt: skip
