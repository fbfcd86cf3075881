"""The WebSocket of `ssmttm web`: streams, changes, moments, the queue, disconnection, bad messages."""

import asyncio
import io
import json
import time
from contextlib import suppress

import numpy as np
import pytest
import soundfile
from small_web import ADDRESS, RATE, SinePipeline, SineSession, pitch, wait_until
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from ssmttm.web import live
from ssmttm.web.app import create_app
from ssmttm.web.limits import Limits

pytestmark = pytest.mark.timeout(30)
LOW, HIGH = "a" * 10, "b" * 40  # 200 Hz, 800 Hz


@pytest.fixture
def pipe():
    return SinePipeline()


@pytest.fixture
def server(pipe):
    app = create_app({"sine": pipe}, Limits(duration=20, active=2, waiting=2, moments=2, idle_seconds=0.5))
    with TestClient(app, ADDRESS) as client:
        client.service = app.state.service
        yield client
        pipe.may_go_on.set()


class Listener:
    """A client of the stream."""

    def __init__(self, socket):
        self.socket = socket
        self.messages = []
        self.samples = np.empty(0)

    def send(self, type, **values):
        self.socket.send_text(json.dumps({"type": type, **values}))

    def start(self, prompt=LOW, **values):
        self.send("start", prompt=prompt, **values)

    def receive(self):
        """The next message; None for audio."""
        message = self.socket.receive()
        if message["type"] == "websocket.close":
            raise WebSocketDisconnect(message["code"])
        if message.get("bytes") is not None:
            self.samples = np.append(self.samples, np.frombuffer(message["bytes"], "<i2") / 32768)
            return None
        self.messages.append(json.loads(message["text"]))
        return self.messages[-1]

    def until(self, type):
        """The next message of a type; audio and other messages before it are kept."""
        while True:
            message = self.receive()
            if message is not None and message["type"] == type:
                return message

    def hear(self, seconds):
        """The next samples."""
        self.samples = np.empty(0)
        while len(self.samples) < seconds * RATE:
            self.receive()
        return self.samples


def connect(server):
    return server.websocket_connect("/v1/stream", headers={"host": "127.0.0.1:8000"})


def test_a_stream_is_heard_to_its_end_and_can_be_downloaded(server):
    with connect(server) as socket:
        listener = Listener(socket)
        listener.start(duration=1.1, seed=1)
        started = listener.until("started")
        assert started["sample_rate"] == RATE and started["channels"] == 1 and started["seed"] == 1
        assert listener.until("finished")["position"] == pytest.approx(1.1)
        assert len(listener.samples) == round(1.1 * RATE) and pitch(listener.samples) == pytest.approx(200, abs=2)
        for suffix in ("wav", "flac"):
            answer = server.get(f"/v1/recordings/{started['recording']}.{suffix}")
            samples, _ = soundfile.read(io.BytesIO(answer.content))
            assert np.array_equal(samples, listener.samples)
        sidecar = server.get(f"/v1/recordings/{started['recording']}.json").json()
        assert sidecar["prompt"] == LOW and sidecar["seed"] == 1 and sidecar["duration"] == pytest.approx(1.1)
        assert server.get(f"/v1/recordings/{started['recording']}.exe").status_code == 404
    assert server.get(f"/v1/recordings/{started['recording']}.wav").status_code == 404  # gone with its page


def test_controls_that_were_drawn_are_told_and_told_again_with_new_words(server, monkeypatch):
    monkeypatch.setattr(SineSession, "drawn_bpm", True)
    with connect(server) as socket:
        listener = Listener(socket)
        listener.start(lead=0.3)
        started = listener.until("started")
        assert started["controls"] == {"bpm": 100.0, "drawn": ["bpm"]}
        listener.send("change", prompt=HIGH)
        assert listener.until("changed")["controls"]["bpm"] == 400.0
        sidecar = server.get(f"/v1/recordings/{started['recording']}.json").json()
        assert sidecar["controls"]["bpm"] == 100.0
        assert [entry["controls"]["bpm"] for entry in sidecar["history"]] == [400.0]


def test_words_change_while_it_plays_within_the_lead(server, pipe):
    with connect(server) as socket:
        listener = Listener(socket)
        listener.start(lead=0.5)
        epoch = listener.until("started")["epoch"]
        listener.hear(0.5)
        time.sleep(0.1)
        assert len(pipe.turns) == 2  # no more than the lead is generated
        listener.send("change", prompt=HIGH)
        assert listener.until("changed")["position"] == 0.5
        listener.send("played", epoch=epoch, seconds=0.5)
        assert pitch(listener.hear(0.5)) == pytest.approx(800, abs=3)
        listener.send("change", bpm=100)
        assert "not trained with bpm" in listener.until("refused")["message"]
        listener.send("played", epoch=epoch, seconds=1.0)
        assert pitch(listener.hear(0.5)) == pytest.approx(800, abs=3)  # and the music goes on


def test_a_change_before_the_first_chunk(server, pipe):
    pipe.may_go_on.clear()
    with connect(server) as socket:
        listener = Listener(socket)
        listener.start(LOW, lead=0.5)
        listener.send("change", prompt=HIGH)
        listener.send("dance")
        listener.until("refused")  # so the change has arrived
        pipe.may_go_on.set()
        assert listener.until("changed")["position"] == 0
        assert pitch(listener.hear(0.5)) == pytest.approx(800, abs=3) and LOW not in pipe.turns


def test_many_changes_at_once_are_one_change(server, pipe):
    pipe.may_go_on.clear()
    with connect(server) as socket:
        listener = Listener(socket)
        listener.start(LOW, lead=0.5)
        for number in range(1, 41):
            listener.send("change", prompt="b" * number)
        for _ in range(8):
            listener.send("snapshot")
            listener.send("change", prompt="c")
        assert "too many messages" in listener.until("refused")["message"]
        pipe.may_go_on.set()
        assert listener.until("changed")["prompt"] == HIGH


def test_back_to_a_moment_as_it_was_or_differently(server, pipe):
    with connect(server) as socket:
        listener = Listener(socket)
        listener.start(LOW, seed=0, lead=0.5)
        started = listener.until("started")
        quiet = np.abs(listener.hear(0.5)).max()
        listener.send("snapshot")
        moment = listener.until("moment")
        assert moment["position"] == 0.5
        listener.send("change", prompt=HIGH)
        listener.until("changed")
        listener.send("played", epoch=started["epoch"], seconds=0.5)
        assert pitch(listener.hear(0.5)) == pytest.approx(800, abs=3)
        n_turns = len(pipe.turns)
        listener.send("resume", moment=moment["moment"])
        again = listener.until("started")
        assert again["position"] == 0.5 and again["seed"] == 0
        listener.send("played", epoch=started["epoch"], seconds=9.0)  # late, of what is no longer heard
        as_it_was = listener.hear(0.5)
        assert pitch(as_it_was) == pytest.approx(200, abs=3) and np.abs(as_it_was).max() == pytest.approx(quiet)
        time.sleep(0.05)
        assert len(pipe.turns) == n_turns + 2
        listener.send("resume", moment=moment["moment"], seed=1)
        assert listener.until("started")["seed"] == 1
        loud = listener.hear(0.5)
        assert np.abs(loud).max() > 2 * quiet
        listener.send("stop")
        assert listener.until("stopped")["position"] == 1.0
        content = server.get(f"/v1/recordings/{started['recording']}.wav").content
        heard, _ = soundfile.read(io.BytesIO(content))  # what led here, without the other branches
        assert len(heard) == RATE and np.array_equal(heard[RATE // 2 :], loud)
        sidecar = server.get(f"/v1/recordings/{started['recording']}.json").json()
        assert sidecar["history"] == [{"position": 0.5, "seed": 1}]
        listener.send("resume", moment=moment["moment"])  # also after the end
        assert listener.until("started")["position"] == 0.5


def test_moments_are_bounded(server):
    with connect(server) as socket:
        listener = Listener(socket)
        listener.start(lead=0.5)
        for _ in range(2):
            listener.send("snapshot")
            listener.until("moment")
        listener.send("snapshot")
        assert "at most 2 moments" in listener.until("refused")["message"]
        listener.send("resume", moment=7)
        assert "no moment 7" in listener.until("refused")["message"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no json", "not JSON"),
        ("[" * 10_000, "not JSON"),
        ("[]", "type among"),
        ('{"type": "dance"}', "type among"),
        ('{"type": ["start"]}', "type among"),
        ('{"type": "start"}', "prompt: Field required"),
        ('{"type": "start", "prompt": ""}', "prompt 1 is empty"),
        ('{"type": "start", "prompt": "x", "speed": 2}', "speed"),
        ('{"type": "start", "prompt": "x", "duration": 1e9}', "at most 20 s"),
        ('{"type": "change", "prompt": "x"}', "start it first"),
        ('{"type": "change"}', "changes nothing"),
        ('{"type": "snapshot"}', "start it first"),
        ('{"type": "stop"}', "start it first"),
        ('{"type": "played", "epoch": 0}', "seconds: Field required"),
        ('{"type": "start", "prompt": "' + "x" * 70_000 + '"}', "larger than 65536 bytes"),
    ],
)
def test_a_bad_message_is_refused_in_one_line(server, text, words):
    with connect(server) as socket:
        socket.send_text(text)
        answer = socket.receive_json()
        assert answer["type"] == "refused" and words in answer["message"] and "\n" not in answer["message"]
        Listener(socket).start(duration=0.1)
        assert socket.receive_json()["type"] == "started"


def test_a_client_that_sends_and_does_not_read_is_not_read_either(server):
    """Else the answers to its messages would fill the memory."""

    class Deaf:
        client = None
        n_read = 0

        async def receive(self):
            self.n_read += 1
            return {"type": "websocket.receive", "text": "no json"}

        async def send_text(self, text):
            await asyncio.Event().wait()

    async def listen():
        deaf = Deaf()
        with suppress(TimeoutError):
            await asyncio.wait_for(live.Listener(deaf, server.service).serve(), 0.3)
        return deaf.n_read

    assert 1 < asyncio.run(listen()) < 200


def test_errors_of_the_model_end_the_music_with_a_message(server):
    with connect(server) as socket:
        listener = Listener(socket)
        for prompt, words in (("impossible", "cannot do that"), ("a bug", "its log says why")):
            listener.start(prompt)
            assert words in listener.until("error")["message"]
        listener.start(duration=0.1)
        listener.until("finished")


def test_the_queue_tells_each_listener_its_place(server, pipe):
    pipe.may_go_on.clear()
    with connect(server) as a, connect(server) as b, connect(server) as c, connect(server) as d:
        listeners = [Listener(socket) for socket in (a, b, c, d)]
        for number, listener in enumerate(listeners):
            listener.start(prompt="x" * (5 + number), lead=0.5)
            wait_until(lambda n=number + 1: sum(server.service.scheduler.counts()) == n)
        assert [listener.until("queued")["position"] for listener in listeners[2:]] == [1, 2]
        with connect(server) as e:
            Listener(e).start()
            assert "the queue is full" in e.receive_json()["message"]
        pipe.may_go_on.set()
        listeners[0].until("started")
        listeners[0].send("stop")
        listeners[2].until("started")
        assert listeners[3].until("queued")["position"] == 1
        listeners[3].send("stop")  # one that waits may leave too
        listeners[3].until("stopped")
        wait_until(lambda: server.service.scheduler.counts() == (2, 0))


def test_a_closed_page_ends_its_generation(server, pipe):
    with connect(server) as socket:
        listener = Listener(socket)
        listener.start()
        listener.hear(1.0)
    wait_until(lambda: server.service.scheduler.counts() == (0, 0))
    turns = len(pipe.turns)
    time.sleep(0.1)
    assert len(pipe.turns) <= turns + 1 and not server.service.recordings


def test_a_listener_that_is_not_there_gives_its_place(server, pipe):
    """It reports nothing played for `idle_seconds`, as a page whose computer sleeps."""
    with connect(server) as socket:
        listener = Listener(socket)
        listener.start(lead=0.5)
        assert "nobody listened" in listener.until("error")["message"]
        assert server.service.scheduler.counts() == (0, 0)


def test_a_new_start_replaces_the_music(server):
    with connect(server) as socket:
        listener = Listener(socket)
        listener.start(LOW, lead=0.5)
        first = listener.until("started")
        listener.start(HIGH, lead=0.5)
        second = listener.until("started")
        assert second["epoch"] > first["epoch"] and second["recording"] != first["recording"]
        assert pitch(listener.hear(0.5)) == pytest.approx(800, abs=3)
        assert server.service.scheduler.counts() == (1, 0) and list(server.service.recordings) == [second["recording"]]


def test_the_recording_stops_at_its_limit_and_the_music_goes_on(pipe):
    app = create_app({"sine": pipe}, Limits(duration=0.6))
    with TestClient(app, ADDRESS) as server, connect(server) as socket:
        listener = Listener(socket)
        listener.start()
        started = listener.until("started")
        listener.until("recording_full")
        listener.hear(2.0)
        content = server.get(f"/v1/recordings/{started['recording']}.wav").content
        assert len(soundfile.read(io.BytesIO(content))[0]) <= 0.6 * RATE


def test_streams_of_other_web_pages_and_without_the_token_are_refused(server, pipe):
    for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}):
        with pytest.raises(WebSocketDisconnect), server.websocket_connect("/v1/stream", headers=headers):
            pass
    app = create_app({"sine": pipe}, token="secret-token")
    with TestClient(app, ADDRESS) as guarded:
        with pytest.raises(WebSocketDisconnect), connect(guarded):
            pass
        with guarded.websocket_connect("/v1/stream?token=secret-token") as socket:
            Listener(socket).start(duration=0.1)
            assert socket.receive_json()["type"] == "started"
