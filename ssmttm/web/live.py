"""The protocol of the WebSocket /v1/stream: one listener.

The client sends JSON messages (`ssmttm.web.schema.MESSAGES`). The server sends

- {"type": "queued", "position": n}: waiting, n-th in the queue;
- {"type": "started", "epoch", "recording", "model", "seed", "sample_rate", "channels", "position"}: a part of the music
  begins at this time, after `start` and after `resume`; what follows belongs to it;
- binary frames: 16-bit little-endian samples, interleaved;
- {"type": "changed", "position", ...}: a change is heard from this time on; like `started`, it has `controls` if the
  model draws tempo, key and metre from the prompt;
- {"type": "moment", "moment": id, "position"}: a kept moment;
- {"type": "recording_full", "position"}: later music is not kept for download;
- {"type": "finished" | "stopped", "position"}: the end of the music;
- {"type": "refused", "message"}: a message was not possible, and the music goes on;
- {"type": "error", "message"}: the music ended because of an error.
"""

import asyncio
import json
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmttm.errors import UserError
from ssmttm.web import schema
from ssmttm.web.generations import AudioChunk, Event, Moment, StreamGeneration
from ssmttm.web.recording import Recording
from ssmttm.web.scheduler import Busy
from ssmttm.web.service import Plan, Service

if TYPE_CHECKING:
    from fastapi import WebSocket

    from ssmttm.generation.streaming.session import StreamSession

_MAX_UNSENT = 100  # events


@dataclass(frozen=True)
class _Piece:
    """What one `start` message asked for, with its recording."""

    plan: Plan
    recording: Recording
    key: str


class Listener:
    """One WebSocket, from its acceptance to its end."""

    def __init__(self, websocket: "WebSocket", service: Service) -> None:
        self._websocket = websocket
        self._service = service
        self._client = websocket.client.host if websocket.client else ""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._epoch = 0  # of the generation whose events are sent
        self._generation: StreamGeneration | None = None
        self._piece: _Piece | None = None
        self._seed = 0
        self._lead: float | None = None
        self._moments: list[Moment] = []

    async def serve(self) -> None:
        """Serve until the client is gone; then its generation ends, and its recording goes."""
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._service.scheduler.cancel(self._generation)
            self._drop_piece()
            for task in tasks:
                task.cancel()

    async def _read(self) -> None:
        """Handle the client's messages until it disconnects."""
        waiting: asyncio.Task[Any] | None = None
        idle_sent = -1
        try:
            while True:
                waiting = waiting or asyncio.create_task(self._websocket.receive())
                done, _ = await asyncio.wait({waiting}, timeout=self._service.limits.idle_seconds)
                if done:
                    received, waiting = waiting.result(), None
                    if received["type"] == "websocket.disconnect":
                        return
                    self._receive(received.get("text") or "")
                    while self._events.qsize() > _MAX_UNSENT:  # the client sends, but does not read
                        await asyncio.sleep(0.05)
                elif (generation := self._generation) is not None and generation.is_open:
                    if generation.sent == idle_sent:
                        self._end({"type": "error", "message": "nobody listened for a while: press play to start anew"})
                    idle_sent = generation.sent
        finally:
            if waiting is not None:
                waiting.cancel()

    def _receive(self, text: str) -> None:
        """Handle one message; what is wrong with it is told, and the music goes on."""
        try:
            if len(text) > self._service.limits.body_bytes:
                raise UserError(f"the message is larger than {self._service.limits.body_bytes} bytes")
            self._handle(schema.parse_message(_load(text)))
        except (UserError, Busy) as error:
            self._post(self._epoch, {"type": "refused", "message": " ".join(str(error).split())})

    def _handle(self, message: Any) -> None:
        """Raises UserError or Busy if the message is not possible now."""
        match message:
            case schema.StartMessage():
                self._start(message)
            case schema.ResumeMessage():
                self._resume(message)
            case schema.StopMessage():
                self._end({"type": "stopped"})
            case schema.PlayedMessage():
                self._played(message)
            case schema.ChangeMessage():
                values = self._checked(message)
                self._playing().change(values)
            case schema.SnapshotMessage():
                self._playing().snapshot()
        self._service.scheduler.wake()

    def _start(self, message: schema.StartMessage) -> None:
        plan = self._service.plan(message)
        recording = Recording(plan.pipe.sample_rate, self._service.limits.duration, plan.sidecar)
        piece = _Piece(plan, recording, secrets.token_urlsafe(9))
        self._lead = _lead(message.lead)
        self._run(piece, plan.seed, plan.open, 0.0)
        self._drop_piece()
        self._moments.clear()
        self._piece = piece
        self._service.recordings[piece.key] = recording

    def _resume(self, message: schema.ResumeMessage) -> None:
        if self._piece is None or not 0 <= message.moment < len(self._moments):
            raise UserError(f"there is no moment {message.moment}: keep one while the music plays")
        moment, piece = self._moments[message.moment], self._piece
        seed = self._seed if message.seed is None else message.seed

        def open_session() -> "StreamSession":
            session = piece.plan.pipe.resume(moment.snapshot, seed=message.seed)
            piece.recording.branch = moment.branch.copy()
            if message.seed is not None:
                piece.recording.branch.history.append({"position": moment.position, "seed": seed})
            return session

        self._run(piece, seed, open_session, moment.position)

    def _run(self, piece: _Piece, seed: int, open_session: "Callable[[], StreamSession]", position: float) -> None:
        """Start a generation in place of the present one. Raises Busy if there is no room; the present one goes on
        then."""
        post = partial(self._post_from_worker, self._epoch + 1)
        generation = StreamGeneration(self._client, open_session, piece.recording, post, position, self._lead)
        self._service.scheduler.submit(generation, replaces=self._generation)
        self._epoch += 1
        self._generation, self._seed = generation, seed

    def _played(self, message: schema.PlayedMessage) -> None:
        self._lead = self._lead if message.lead is None else _lead(message.lead)
        if self._generation is not None and message.epoch == self._epoch and math.isfinite(message.seconds):
            self._generation.played, self._generation.lead = message.seconds, self._lead

    def _checked(self, message: schema.ChangeMessage) -> dict[str, Any]:
        """The changed values, if they are in range."""
        values = message.values()
        if not values:
            raise UserError("the change changes nothing: give prompt, guidance_scale, temperature or bpm")
        schema.MusicRequest(**{"prompt": "music", **values}).check(self._service.limits)
        return values

    def _playing(self) -> StreamGeneration:
        if self._generation is None:
            raise UserError("no music is playing: start it first")
        return self._generation

    def _end(self, message: dict[str, Any]) -> None:
        """End the present generation and tell it."""
        generation = self._playing()
        self._service.scheduler.cancel(generation)
        self._generation = None
        self._epoch += 1
        self._post(self._epoch, {**message, "position": generation.position})

    def _drop_piece(self) -> None:
        if self._piece is not None:
            self._service.recordings.pop(self._piece.key, None)

    def _post(self, epoch: int, event: Event) -> None:
        self._events.put_nowait((epoch, event))

    def _post_from_worker(self, epoch: int, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._post, epoch, event)

    async def _write(self) -> None:
        """Send events as fast as the client takes them."""
        from starlette.websockets import WebSocketDisconnect

        try:
            while True:
                epoch, event = await self._events.get()
                if epoch == self._epoch:
                    await self._send(event)
        except WebSocketDisconnect:
            return

    async def _send(self, event: Event) -> None:
        if isinstance(event, AudioChunk):
            generation = self._generation
            await self._websocket.send_bytes(event.pcm)
            if generation is not None:
                generation.sent += event.n_samples
                self._service.scheduler.wake()
            return
        if isinstance(event, Moment):
            event = self._keep(event)
        elif event["type"] == "started" and self._piece is not None:
            plan = self._piece.plan
            event = {
                **event, "epoch": self._epoch, "recording": self._piece.key, "model": plan.model, "seed": self._seed,
                "sample_rate": plan.pipe.sample_rate,
            }  # fmt: skip
        elif event["type"] in ("finished", "error"):
            self._generation = None
        await self._websocket.send_text(json.dumps(event))

    def _keep(self, moment: Moment) -> dict[str, Any]:
        """Keep a moment if there is room."""
        if len(self._moments) >= (most := self._service.limits.moments):
            return {"type": "refused", "message": f"at most {most} moments are kept: start anew to clear them"}
        self._moments.append(moment)
        return {"type": "moment", "moment": len(self._moments) - 1, "position": moment.position}


def _load(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("the message is not JSON") from error


def _lead(seconds: float | None) -> float | None:
    """A lead that is possible: at least a chunk or two, at most a minute."""
    return None if seconds is None or not math.isfinite(seconds) else min(max(seconds, 0.3), 60.0)
