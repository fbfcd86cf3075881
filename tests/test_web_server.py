"""The server of `ssmttm web` over real sockets: disconnection, slow and greedy clients, floods, a taken port."""

import io
import json
import re
import shlex
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
from small_web import PROMPT, RATE, SinePipeline, wait_until
from web_server import run_server
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from ssmttm import MusicPipeline
from ssmttm.cli.main import main
from ssmttm.errors import UserError
from ssmttm.web.limits import Limits
from ssmttm.web.serve import address_of, bind, is_loopback

pytestmark = pytest.mark.timeout(30)
DOCUMENTATION = (Path(__file__).parent.parent / "docs" / "web.md").read_text()


@pytest.fixture(scope="module")
def running():
    pipe = SinePipeline()
    limits = Limits(waiting=4, per_client=100, body_seconds=0.5, clip_bytes=1_000_000)
    with run_server({"sine": pipe}, limits) as (port, service):
        yield pipe, port, service
        pipe.may_go_on.set()


def post(port, body, path="/v1/generate", headers=""):
    """An open connection that has sent a request."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    length = f"Content-Length: {len(body)}\r\n" if "length" not in headers.lower() else ""
    kind = "" if "content-type" in headers.lower() else "Content-Type: application/json\r\n"
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{kind}{length}{headers}\r\n"
    connection.sendall(head.encode() + body)
    return connection


def answer(connection):
    """Status and body of an answer; the connection is closed."""
    with connection:
        parts = list(iter(lambda: connection.recv(65536), b""))
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_the_embedded_model_gives_what_the_pipeline_gives():
    pipe = MusicPipeline.from_pretrained()
    expected = pipe(PROMPT, duration=0.7, seeds=3).audios[0, 0].numpy()
    with run_server({"tiny_lm": pipe}) as (port, _):
        request = {"prompt": PROMPT, "duration": 0.7, "seed": 3}
        status, content = answer(post(port, json.dumps(request).encode(), headers="Connection: close\r\n"))
        clip, rate = soundfile.read(io.BytesIO(content))
        assert status == 200 and rate == pipe.sample_rate
        assert clip == pytest.approx(expected, abs=0.6 / 32768)  # rounded to 16 bit
        with connect(f"ws://127.0.0.1:{port}/v1/stream") as stream:
            stream.send(json.dumps({"type": "start", **request}))
            received = list(iter(stream.recv, json.dumps({"type": "finished", "position": 0.7})))
        pcm = np.frombuffer(b"".join(part for part in received if isinstance(part, bytes)), "<i2")
        assert np.array_equal(pcm / 32768, clip)


def test_a_client_that_leaves_ends_its_generation(running):
    pipe, port, service = running
    pipe.pace = 0.01
    connection = post(port, json.dumps({"prompt": PROMPT, "duration": 600}).encode())  # 24 s to the end
    wait_until(lambda: len(pipe.turns) > 3)
    assert service.scheduler.counts() == (1, 0)
    connection.close()
    wait_until(lambda: service.scheduler.counts() == (0, 0))
    pipe.pace = 0.0


def test_a_client_that_does_not_read_stops_its_stream_not_the_others(running):
    pipe, port, service = running
    address = f"ws://127.0.0.1:{port}/v1/stream"
    with connect(address, max_queue=1, close_timeout=0.1) as deaf, connect(address) as good:
        deaf.send(json.dumps({"type": "start", "prompt": "deaf"}))
        wait_until(lambda: pipe.turns.count("deaf") > 20)
        n_turns = -1
        while n_turns != (n_turns := pipe.turns.count("deaf")):
            time.sleep(0.2)
        good.send(json.dumps({"type": "start", "prompt": "good", "duration": 2}))
        received = [good.recv(5)]
        while isinstance(received[-1], bytes) or "finished" not in received[-1]:
            received.append(good.recv(5))
        assert sum(len(data) for data in received if isinstance(data, bytes)) == 2 * RATE * 2
        assert pipe.turns.count("deaf") == n_turns
    wait_until(lambda: service.scheduler.counts() == (0, 0))


def test_a_server_that_stops_tells_its_clients_and_ends_at_once():
    pipe = SinePipeline()
    pipe.pace = 0.01
    with run_server({"sine": pipe}) as (port, service):
        stream = connect(f"ws://127.0.0.1:{port}/v1/stream", close_timeout=0.1).__enter__()
        stream.send(json.dumps({"type": "start", "prompt": PROMPT, "lead": 0.5}))
        connection = post(
            port, json.dumps({"prompt": PROMPT, "duration": 600}).encode(), headers="Connection: close\r\n"
        )
        wait_until(lambda: service.scheduler.counts() == (2, 0))
        start = time.monotonic()
    assert time.monotonic() - start < 4
    status, text = answer(connection)
    assert status == 503 and json.loads(text)["error"] == "the server stops"
    messages = []
    with suppress(ConnectionClosed):
        while True:
            messages.append(stream.recv())
    assert json.loads(messages[-1]) == {"type": "error", "message": "the server stops"}


def test_a_flood_of_connections_is_answered(running):
    pipe, port, service = running
    pipe.may_go_on.clear()
    body = json.dumps({"prompt": PROMPT, "duration": 0.2}).encode()
    connections = [post(port, body, headers="Connection: close\r\n") for _ in range(200)]
    wait_until(lambda: sum(service.scheduler.counts()) == 8)
    pipe.may_go_on.set()
    statuses = [answer(connection)[0] for connection in connections]
    assert statuses.count(200) >= 8 and set(statuses) == {200, 503}
    wait_until(lambda: service.scheduler.counts() == (0, 0))


def test_a_huge_upload_is_cut_off(running):
    _, port, _ = running
    declared = post(port, b"", "/v1/clips", f"Content-Length: {10**9}\r\n")
    status, text = answer(declared)
    assert status == 413 and "larger than 1 MB" in json.loads(text)["error"]
    boundary = "Content-Type: multipart/form-data; boundary=x\r\nTransfer-Encoding: chunked\r\nX-No-Length: 1\r\n"
    endless = post(port, b"", "/v1/clips", boundary)
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + b"\0" * 100_000
    sent = 0
    try:
        while sent < 10**8:
            endless.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            sent += len(part)
    except OSError:  # the server has closed the connection
        pass
    assert sent < 2 * 10**7


def test_a_body_that_stops_arriving_is_given_up(running):
    _, port, _ = running
    connection = post(port, b'{"prompt": "a wal', headers="Content-Length: 200\r\n")
    start = time.monotonic()
    status, text = answer(connection)
    assert status == 408 and "stopped arriving" in json.loads(text)["error"] and time.monotonic() - start < 5


def test_a_taken_port_is_told_in_one_line():
    with bind("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of 127.0.0.1 is taken, by another server: choose another"):
            main(["web", "--port", str(port)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "--port must be in"),
        (["--host", "no such host"], "not an address of this computer"),
        (["--token", "short"], "at least 8 characters"),
        (["--max-active", "0"], "--max-active must be at least 1"),
        (["--max-duration", "nan"], "--max-duration must be in"),
        (["--port", "0", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, words):
    with pytest.raises(UserError, match=words):
        main(["web", *arguments])


def test_the_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("ssmttm.web.serve.find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(UserError, match=r"needs uvicorn: pip install 'ssmttm\[web\]'"):
        main(["web", "--port", "0"])


def test_addresses():
    assert is_loopback("127.0.0.1") and is_loopback("::1") and not is_loopback("0.0.0.0")
    with bind("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert address_of(listening, "127.0.0.1", None) == f"http://127.0.0.1:{port}/"
        assert address_of(listening, "::1", "secret") == f"http://[::1]:{port}/?token=secret"
    with bind("0.0.0.0", 0) as listening:
        assert "0.0.0.0" not in address_of(listening, "0.0.0.0", "secret")


def test_only_this_computer_is_served_without_a_token(monkeypatch, capsys):
    """Bound elsewhere, a random token is made, printed and needed."""
    served = {}

    class Stopped:
        def run(self, sockets):
            raise KeyboardInterrupt

    def make_server(app, limits):
        served["app"] = app
        return Stopped()

    monkeypatch.setattr("ssmttm.web.serve.make_server", make_server)
    monkeypatch.setattr(MusicPipeline, "from_pretrained", lambda model: SinePipeline(model or "sine"))
    assert main(["web", "--port", "0"]) == 0
    assert "token" not in capsys.readouterr().out
    assert main(["web", "--port", "0", "--host", "0.0.0.0"]) == 0
    assert "/?token=" in capsys.readouterr().out
    served["app"].state.service.close()
    with pytest.raises(UserError, match="two models are called sine"):
        main(["web", "--port", "0", "sine", "sine"])


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_commands_of_the_documentation_run(running, tmp_path):
    _, port, _ = running
    commands = re.findall(r"^curl .*$", DOCUMENTATION, re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command.replace(":8000", f":{port}"))
        done = subprocess.run([*words, "--silent", "--fail"], cwd=tmp_path, capture_output=True, timeout=10)
        assert done.returncode == 0, (command, done.stdout)
    assert soundfile.info(tmp_path / "waltz.wav").duration == 5 and soundfile.info(tmp_path / "jig.flac").duration == 10
    assert json.loads((tmp_path / "jig.json").read_text())["sidecar"]["prompt"] == "a fast jig"


def test_python_example_of_the_documentation_runs(running, tmp_path, monkeypatch):
    _, port, _ = running
    monkeypatch.chdir(tmp_path)
    [example] = re.findall(r"```python\n(.*?)```", DOCUMENTATION, re.DOTALL)
    exec(compile(example.replace(":8000", f":{port}"), "web.md", "exec"), {})
    assert (tmp_path / "waltz.pcm").stat().st_size == 5 * RATE * 2
