"""The routes of the server: the page, the HTTP API, the WebSocket."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ssmttm import __version__
from ssmttm.errors import UserError
from ssmttm.generation.output import slug
from ssmttm.web.access import Access
from ssmttm.web.generations import ClipGeneration
from ssmttm.web.limits import CLIPS_PATH, BodyLimit, Limits
from ssmttm.web.live import Listener
from ssmttm.web.recording import encode
from ssmttm.web.scheduler import Busy
from ssmttm.web.schema import AudioFormat, GenerateRequest, one_line
from ssmttm.web.service import Service

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ssmttm.generation.pipeline import MusicPipeline
    from ssmttm.models.controls import SupportsControls

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "ogg": "audio/ogg"}
# The page loads nothing from elsewhere: it works without a network, and no other code runs in it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; connect-src 'self' ws: wss:",
    "X-Content-Type-Options": "nosniff",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    422: {"description": "A value is not possible"},
    429: {"description": "This address has too many generations under way"},
    503: {"description": "The queue is full"},
}


def create_app(
    pipelines: "Mapping[str, MusicPipeline]", limits: Limits | None = None, token: str | None = None,
    host: str = "127.0.0.1",
) -> "FastAPI":  # fmt: skip
    """The server as an ASGI application.

    Args:
        pipelines: by name; the first is the default.
        token: needed by every request; None: none, and only local names of the server are answered.
        host: the address it is bound to.
    """
    from fastapi import FastAPI, HTTPException, Request, UploadFile, WebSocket
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse, Response
    from fastapi.staticfiles import StaticFiles
    from starlette.exceptions import HTTPException as StarletteHTTPException

    limits = limits or Limits()
    service = Service(pipelines, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="ssmttm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Text-to-music models with state-space backbones. Streams: the WebSocket /v1/stream.",
    )  # fmt: skip
    app.state.service = service
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(Access, token=token, host=host)
    decoding = asyncio.Semaphore(1)  # one upload is decoded at a time

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        return JSONResponse({"error": " ".join(str(error).split())}, 422)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        return JSONResponse({"error": str(error)}, error.status, {"Retry-After": "10"})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse({"error": one_line(error.errors())}, 422)

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers=_HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(STATIC / "docs.html", headers=_HEADERS)

    app.mount("/static", StaticFiles(directory=STATIC), "static")

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The models, the default first."""
        return {"object": "list", "data": [_describe(name, pipe) for name, pipe in service.pipelines.items()]}

    @app.get("/v1/status")
    async def status() -> dict[str, Any]:
        """Generations under way, the queue, and the limits."""
        active, waiting = service.scheduler.counts()
        return {"active": active, "waiting": waiting, "limits": asdict(limits)}

    @app.post(
        "/v1/generate", response_class=Response,
        responses={200: {"content": {kind: {} for kind in (*MEDIA_TYPES.values(), "application/json")}}, **_ERRORS},
    )  # fmt: skip
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """A whole clip. Closing the connection ends its generation."""
        body.duration = 10.0 if body.duration is None else body.duration
        plan = service.plan(body)
        generation = ClipGeneration(_client(request), plan.open)
        service.scheduler.submit(generation)
        gone = asyncio.create_task(_disconnected(request))
        try:
            ends: tuple[asyncio.Future[Any], ...] = (generation.audio, gone)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            service.scheduler.cancel(generation)
        if not generation.audio.done():
            return Response(status_code=499)  # nobody reads it
        content = await asyncio.to_thread(_encode, generation.audio.result(), plan.pipe.sample_rate, body.format)
        sidecar = plan.sidecar | ({"controls": generation.controls} if generation.controls else {})
        if body.response == "json":
            return JSONResponse({"audio": base64.b64encode(content).decode(), "sidecar": sidecar})
        headers = {"X-Sidecar": json.dumps(sidecar), **_attachment(slug(body.prompt), body.format)}
        return Response(content, media_type=MEDIA_TYPES[body.format], headers=headers)

    @app.post(CLIPS_PATH, responses={413: {"description": "The file is too large"}, 422: _ERRORS[422]})
    async def upload_clip(file: UploadFile, model: str | None = None) -> dict[str, Any]:
        """Upload an audio file to go on from: its id is for `continue_from`."""
        sample_rate = service.pipelines[service.model_name(model)].sample_rate
        async with decoding:
            add = partial(service.clips.add, file.file, file.filename or "clip", sample_rate)
            key, clip = await asyncio.to_thread(add)
        return {"id": key, "name": clip.name, "seconds": round(clip.seconds, 3)}

    @app.get("/v1/recordings/{key}.{suffix}", response_class=Response)
    async def download(key: str, suffix: AudioFormat | str) -> Response:
        """What was heard of an open stream so far, as wav, flac, mp3 or ogg; or its sidecar, as json."""
        recording = service.recordings.get(key)
        if recording is None or suffix not in (*MEDIA_TYPES, "json"):
            raise HTTPException(404, "there is no such recording: it is kept while the page is open")
        content = recording.sidecar()
        name = slug(content["prompt"])
        if suffix == "json":
            return JSONResponse(content, headers=_attachment(name, suffix))
        if not content["duration"]:
            raise HTTPException(404, "the recording is empty: play some music first")
        encoded = await asyncio.to_thread(lambda: encode(recording.read(), recording.sample_rate, suffix))
        return Response(encoded, media_type=MEDIA_TYPES[suffix], headers=_attachment(name, suffix))

    @app.websocket("/v1/stream")
    async def stream(websocket: WebSocket) -> None:
        await websocket.accept()
        await Listener(websocket, service).serve()

    return app


def _describe(name: str, pipe: "MusicPipeline") -> dict[str, Any]:
    """What a client needs to know of a model."""
    stages: list[SupportsControls] = [pipe.model.config]
    if pipe.second_stage is not None:
        stages.append(pipe.second_stage.model.config)
    controls = ["bpm"] if any(config.tempo for config in stages) else []
    return {
        "id": name, "object": "model", "sample_rate": pipe.sample_rate, "guidance_scale": pipe.guidance_scale,
        "temperature": pipe.sampling_defaults.temperature, "controls": controls,
        "training_data_licences": pipe.metadata.get("training_data_licences"),
    }  # fmt: skip


def _client(request: Any) -> str:
    return request.client.host if request.client else ""


async def _disconnected(request: Any) -> None:
    """Return once the client of an HTTP request is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _encode(samples: np.ndarray, sample_rate: int, suffix: str) -> bytes:
    return encode(torch.from_numpy(samples.T.copy()), sample_rate, suffix)


def _attachment(name: str, suffix: str) -> dict[str, str]:
    """A header with a file name; of other scripts as RFC 5987 has it."""
    from urllib.parse import quote

    return {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(f'{name}.{suffix}')}"}
