"""Self-contained HTML pages from the jinja2 templates in `templates/`: styles, charts and audio are inside the file.

write_page("demo/index.html", "demo.html", title="Demo", prompts=prompts)
"""

import base64
import re
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from ssmttm import audio
from ssmttm.files import write_text

_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MEDIA_TYPES = {"mp3": "audio/mpeg", "flac": "audio/flac", "wav": "audio/wav"}


def write_page(path: str | Path, template: str, **context: Any) -> Path:
    """Render a template and write the page, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(Path(path), render(template, **context))
    return Path(path)


def render(template: str, **context: Any) -> str:
    """The HTML of a template of `templates/`. Every value is escaped, and its control characters are replaced."""
    return _environment().get_template(template).render(**context)


def printable(text: str) -> str:
    """Replace characters that no font shows, or that reverse the direction of the text after them."""
    return _CONTROL_CHARACTERS.sub("\ufffd", text)


def embed_audio(wav: Tensor, sample_rate: int, format: str = "mp3") -> str:
    """A data URI of audio as mp3, flac or wav. wav [S] or [channels, S].

    Raises:
        UserError: the audio is empty, or holds NaN or infinity.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = audio.write(Path(folder) / f"audio.{format}", wav, sample_rate)
        return data_uri(_MEDIA_TYPES[format], file.read_bytes())


def data_uri(media_type: str, data: bytes) -> str:
    """Bytes as a `data:` address."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


@lru_cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalize(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
