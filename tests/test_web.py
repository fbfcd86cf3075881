"""The HTTP API of `ssmttm web`: answers, errors, limits, the queue, the token, uploads."""

import base64
import io
import json
import threading
import time

import numpy as np
import pytest
import soundfile
from small_web import ADDRESS, PROMPT, RATE, SinePipeline, SineSession, pitch, wait_until
from starlette.testclient import TestClient

from ssmttm.errors import UserError
from ssmttm.generation.request import Sampling
from ssmttm.web.app import create_app
from ssmttm.web.limits import Limits

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def pipe():
    return SinePipeline()


@pytest.fixture
def server(pipe):
    app = create_app({"sine": pipe}, Limits(duration=20, clip_seconds=2, clip_bytes=200_000, waiting=3, per_client=6))
    with TestClient(app, ADDRESS) as client:
        client.service = app.state.service
        yield client
        pipe.may_go_on.set()


def wav_file(seconds=1.0, rate=RATE, format="WAV"):
    file = io.BytesIO()
    soundfile.write(file, 0.5 * np.sin(np.arange(round(seconds * rate)) * 0.1), rate, format=format)
    return file.getvalue()


@pytest.mark.parametrize("format", ["wav", "flac"])
def test_generate_gives_a_file_and_its_sidecar(server, format):
    answer = server.post("/v1/generate", json={"prompt": PROMPT, "duration": 1.3, "seed": 5, "format": format})
    assert answer.status_code == 200 and answer.headers["content-type"] == f"audio/{format}"
    assert answer.headers["content-disposition"].endswith(f"a-waltz-on-a-harp.{format}")
    samples, rate = soundfile.read(io.BytesIO(answer.content))
    assert (len(samples), rate) == (round(1.3 * RATE), RATE)
    assert pitch(samples) == pytest.approx(20 * len(PROMPT), abs=2)
    sidecar = json.loads(answer.headers["x-sidecar"])
    assert sidecar["prompt"] == PROMPT and sidecar["seed"] == 5 and sidecar["guidance_scale"] == 3.0
    assert sidecar["training_data_licences"] == {"CC0-1.0": 1}


def test_settings_that_are_not_given_are_the_models(server, pipe):
    pipe.sampling_defaults = Sampling(temperature=0.7, top_p=0.8, guidance_scale=2.0)
    described = server.get("/v1/models").json()["data"][0]
    assert (described["guidance_scale"], described["temperature"]) == (2.0, 0.7)
    for given, temperature in (({}, 0.7), ({"temperature": None}, 0.7), ({"temperature": 1.2}, 1.2)):
        answer = server.post("/v1/generate", json={"prompt": PROMPT, "duration": 0.5, "response": "json", **given})
        expected = {"temperature": temperature, "top_p": 0.8, "guidance_scale": 2.0}
        assert expected.items() <= pipe.opened[-1].items() and expected.items() <= answer.json()["sidecar"].items()


def test_generate_as_json(server):
    body = {"prompt": "音楽", "duration": 0.5, "response": "json"}
    answer = server.post("/v1/generate", json=body).json()
    samples, _ = soundfile.read(io.BytesIO(base64.b64decode(answer["audio"])))
    assert len(samples) == RATE / 2 and answer["sidecar"]["prompt"] == "音楽"
    assert 0 <= answer["sidecar"]["seed"] < 2**32 and "controls" not in answer["sidecar"]


def test_sidecar_of_a_clip_has_the_controls_that_were_drawn(server, monkeypatch):
    monkeypatch.setattr(SineSession, "drawn_bpm", True)
    answer = server.post("/v1/generate", json={"prompt": "a" * 9, "duration": 0.1, "response": "json"}).json()
    assert answer["sidecar"]["controls"] == {"bpm": 90.0, "drawn": ["bpm"]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": "  "}, "prompt 1 is empty"),
        ({"prompt": "x" * 2001}, "2001 characters"),
        ({"prompt": "x", "duration": 21}, "at most 20 s"),
        ({"prompt": "x", "duration": 0}, "above 0"),
        ({"prompt": "x", "seed": -1}, "seed must be in"),
        ({"prompt": "x", "guidance": 4}, "guidance"),
        ({"prompt": "x", "temperature": 0}, "temperature must be above 0"),
        ({"prompt": "x", "format": "aiff"}, "format"),
        ({"prompt": "x", "model": "other"}, "choose from sine"),
        ({"prompt": "x", "continue_from": "no-such-clip"}, "upload it again"),
        ({"prompt": "impossible"}, "this model cannot do that"),
    ],
)
def test_a_mistake_is_told_in_one_line(server, body, words):
    answer = server.post("/v1/generate", json=body)
    assert answer.status_code == 422 and words in answer.json()["error"] and "\n" not in answer.json()["error"]


@pytest.mark.parametrize("content", [b"not json", b"[" * 50_000, b'{"prompt": "x", "duration": NaN}', b"\xff\xfe"])
def test_a_body_that_is_no_json_is_refused(server, content):
    answer = server.post("/v1/generate", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and answer.json()["error"]


def test_a_bug_ends_one_generation_only(server, caplog):
    answer = server.post("/v1/generate", json={"prompt": "a bug"})
    assert answer.status_code == 500 and "its log says why" in answer.json()["error"] and "planted" in caplog.text
    assert server.post("/v1/generate", json={"prompt": PROMPT, "duration": 0.1}).status_code == 200


def test_models_status_and_pages(server):
    [model] = server.get("/v1/models").json()["data"]
    assert model["id"] == "sine" and model["sample_rate"] == RATE and model["controls"] == []
    status = server.get("/v1/status").json()
    assert (status["active"], status["waiting"]) == (0, 0) and status["limits"]["duration"] == 20
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/v1/generate", "/v1/clips", "/v1/models", "/v1/status"} <= set(paths)
    for path in ("/", "/docs"):
        page = server.get(path)
        assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
        assert "http://" not in page.text and "https://" not in page.text and "<script>" not in page.text


def in_background(server, prompt, answers, duration=1.0):
    def ask():
        answers.append(server.post("/v1/generate", json={"prompt": prompt, "duration": duration}))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_generations_take_turns_and_the_queue_is_bounded(server, pipe):
    pipe.may_go_on.clear()
    answers = []
    threads = []
    for prompt in ("a", "b", "c", "d", "e", "f"):  # four open, two wait
        threads.append(in_background(server, prompt, answers))
        wait_until(lambda: sum(server.service.scheduler.counts()) == len(threads))
    assert server.service.scheduler.counts() == (4, 2)
    refused = server.post("/v1/generate", json={"prompt": "g"})
    assert refused.status_code == 429 and "6 generations" in refused.json()["error"]
    assert refused.headers["retry-after"]
    pipe.may_go_on.set()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 6
    turns = "".join(pipe.turns).lstrip("a")  # a was alone at first
    assert all(sorted(turns[i : i + 4]) == list("abcd") for i in range(8)), turns


def test_a_flood_is_refused_at_once(pipe):
    app = create_app({"sine": pipe}, Limits(active=1, waiting=2, per_client=100))
    pipe.may_go_on.clear()
    with TestClient(app, ADDRESS) as server:
        server.service = app.state.service
        threads = []
        for _ in range(3):
            threads.append(in_background(server, PROMPT, []))
            wait_until(lambda: sum(server.service.scheduler.counts()) == len(threads))
        start = time.monotonic()
        answers = [server.post("/v1/generate", json={"prompt": PROMPT}) for _ in range(200)]
        assert {answer.status_code for answer in answers} == {503}
        assert "the queue is full" in answers[0].json()["error"] and time.monotonic() - start < 5
        pipe.may_go_on.set()
        for thread in threads:
            thread.join()
        assert server.service.scheduler.counts() == (0, 0)


def test_upload_and_continue(server, pipe):
    clip = server.post("/v1/clips", files={"file": ("../my loop.wav", wav_file(1.5, 16_000))}).json()
    assert clip["name"] == "my loop.wav" and clip["seconds"] == 1.5
    body = {"prompt": PROMPT, "duration": 0.5, "continue_from": clip["id"], "response": "json"}
    answer = server.post("/v1/generate", json=body).json()
    wav, rate = pipe.opened[0]["continue_from"]
    assert (wav.shape[-1], rate) == (1.5 * RATE, RATE) and float(wav.abs().max()) > 0.4
    assert answer["sidecar"]["continue_from"] == "my loop.wav"


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"no audio at all, but text\n" * 20, 422, "song.wav cannot be read as audio"),
        (b"", 422, "song.wav is empty"),
        (wav_file(2.0)[:9000], 422, "song.wav is truncated"),
        (wav_file(1.0, 1000)[:44], 422, "song.wav"),
        (b"RIFF" + b"\0" * 300_000, 413, "larger than 0.204 MB"),
    ],
)
def test_an_upload_that_is_no_clip_is_refused(server, content, status, words):
    answer = server.post("/v1/clips", files={"file": ("song.wav", content)})
    assert answer.status_code == status and words in answer.json()["error"]
    assert "/tmp" not in answer.json()["error"]


def test_an_upload_that_unpacks_to_much_more_is_refused_at_its_limit(server, monkeypatch):
    """Ten minutes of silence in a FLAC of some kB."""
    bomb = io.BytesIO()
    soundfile.write(bomb, np.zeros(600 * 48_000, np.int16), 48_000, format="FLAC")
    assert len(bomb.getvalue()) < 200_000
    decoded = []
    read_segments = __import__("ssmttm").audio.read_segments

    def counted(*arguments):
        for segment in read_segments(*arguments):
            decoded.append(segment.shape[-1])
            yield segment

    monkeypatch.setattr("ssmttm.web.clips.audio.read_segments", counted, raising=False)
    answer = server.post("/v1/clips", files={"file": ("bomb.flac", bomb.getvalue())})
    assert answer.status_code == 422 and "bomb.flac is longer than 2 s" in answer.json()["error"]
    assert sum(decoded) < 10 * RATE


def test_an_endless_upload_is_refused_while_it_is_read(server):
    sent = []

    def endless():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        for _ in range(10_000):
            sent.append(1)
            yield b"\0" * 10_000

    answer = server.post("/v1/clips", content=endless(), headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 413 and answer.headers["connection"] == "close"


def test_only_the_newest_clips_are_kept(pipe):
    from ssmttm.web.clips import Clips

    clips = Clips(Limits(clips=2))
    keys = [clips.add(io.BytesIO(wav_file(0.1)), "a.wav", RATE)[0] for _ in range(3)]
    assert clips.get(keys[1]).seconds == pytest.approx(0.1)
    with pytest.raises(UserError, match="upload it again"):
        clips.get(keys[0])


def test_the_token_is_needed_everywhere(pipe):
    app = create_app({"sine": pipe}, token="secret-token", host="0.0.0.0")
    with TestClient(app, "http://music.example:9000", follow_redirects=False) as server:
        for path in ("/", "/v1/models", "/docs", "/static/app.js", "/openapi.json", "/?token=wrong"):
            assert server.get(path).status_code == 401, path
        assert server.get("/v1/models", headers={"authorization": "Bearer secret-token"}).status_code == 200
        assert server.get("/v1/models", headers={"authorization": "Bearer secret-tokenx"}).status_code == 401
        opened = server.get("/?token=secret-token")
        assert opened.status_code == 303 and opened.headers["location"] == "/"
        assert "HttpOnly" in opened.headers["set-cookie"] and "SameSite=Strict" in opened.headers["set-cookie"]
        assert server.get("/").status_code == 200  # by the cookie


def test_other_web_pages_may_not_use_the_server(server):
    body = {"prompt": PROMPT, "duration": 0.1}
    assert server.post("/v1/generate", json=body, headers={"origin": ADDRESS}).status_code == 200
    for origin in ("http://evil.example", "http://127.0.0.1:9999", "null"):
        answer = server.post("/v1/generate", json=body, headers={"origin": origin})
        assert answer.status_code == 403 and origin in answer.json()["error"]
    rebound = server.get("/v1/models", headers={"host": "evil.example:8000"})
    assert rebound.status_code == 403 and "evil.example" in rebound.json()["error"]
    assert server.get("/v1/models", headers={"host": "[::1"}).status_code == 403
