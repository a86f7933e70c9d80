"""serve.py from its start to its end: who hangs up, who is still answered, what it says."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from conftest import run_script
from serving import Served, serving, write_run

from generate import Sampling, continuations
from serve import folder_of, is_this_machine
from tokenizer import CharTokenizer

pytest.importorskip("gradio")
if sys.platform == "win32":
    pytest.skip("POSIX signals", allow_module_level=True)

LETTERS = CharTokenizer("abcdefgh", byte_fallback=False, end_of_text=False)
FOREVER = 10**6  # tokens: hours
CLIENT = httpx.Client(trust_env=False, timeout=120)
IDLE = {"status": "ok", "running": 0, "rows": 0, "waiting": 0, "open": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with endless/, a model whose texts never end by themselves."""
    folder = tmp_path_factory.mktemp("served")
    write_run(folder / "endless", LETTERS)
    return folder


def asked(**more) -> dict:
    return {"model": "endless", "prompt": "abc", "max_tokens": 20, "seed": 1} | more


def post(served: Served, **more) -> httpx.Response:
    return CLIENT.post(f"{served.url}/v1/completions", json=asked(**more))


def text(served: Served, **more) -> str:
    answer = post(served, **more)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def until(condition, what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def events(body: str) -> list[str]:
    """The data of a stream of events, the last of which must be [DONE]."""
    *data, last = re.findall(r"data: (.*)\n\n", body)
    assert last == "[DONE]"
    return data


# hanging up


async def hang_up(port: int, number: int) -> bytes:
    """One client of many, who leaves in one way or another; what it read of its answer."""
    rng = random.Random(number)
    way = rng.choice(["whole", "at once", "reset", "in the queue", "mid-stream", "mid-stream", "mid-request"])
    more = {"max_tokens": 5} if way == "whole" else {"max_tokens": FOREVER, "n": rng.choice([1, 4])}
    body = json.dumps(asked(**more, stream=way == "mid-stream" or rng.random() < 0.5 and way != "whole")).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode())
    writer.write(body[: len(body) // 2] if way == "mid-request" else body)
    await writer.drain()
    read = b""
    if way == "whole":
        read = await reader.read()
    elif way == "mid-stream":
        read = await reader.readuntil(b"data: ")
    elif way == "in the queue":
        await asyncio.sleep(rng.random())
    elif way == "reset":
        await asyncio.sleep(rng.random() / 10)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.close()
    return read


async def many(port: int, clients: int) -> list[bytes]:
    async with asyncio.timeout(60):
        return await asyncio.gather(*(hang_up(port, number) for number in range(clients)))


def state_of(process, key: str) -> int:
    return int(re.search(rf"^{key}:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text(), re.M)[1])


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc to read threads and memory from")
def test_two_hundred_who_hang_up_leave_nothing_behind(folder):
    options = ["--host=localhost", "--max_waiting=300", f"--max_tokens={FOREVER}", "--out_dir=endless"]
    with serving(*options, cwd=folder) as served:
        port = int(served.url.rpartition(":")[2])
        before = text(served)
        measured = []
        for _ in range(3):
            answers = asyncio.run(many(port, 200))
            until(lambda: served.health() == IDLE, "something of those who left still runs or waits")
            whole = [answer for answer in answers if b"finish_reason" in answer]
            assert len(whole) > 10 and all(b"200 OK" in answer and before[:5].encode() in answer for answer in whole)
            assert sum(answer.endswith(b"data: ") for answer in answers) > 30
            assert text(served) == before
            measured.append([state_of(served.process, key) for key in ("Threads", "VmRSS")])
        _, first, second = measured
        assert second[0] < first[0] + 10, f"threads: {measured}"
        assert second[1] - first[1] < 8 * 1024, f"KiB of memory: {measured}"
        assert not any("warning" in line or "Traceback" in line for line in served.said)


def test_a_runs_log_is_looked_for_where_its_checkpoint_lies():
    for init_from, folder in (("resume", "out-x"), ("runs/a/ckpt.pt", "runs/a"), ("runs/a", "runs/a")):
        assert folder_of(SimpleNamespace(init_from=init_from, out_dir="out-x")) == Path(folder)


# limits


def test_requests_that_are_too_large_are_refused(folder):
    limits = ["--max_batch=3", "--max_samples=2", "--max_tokens=30", "--max_prompt=10", "--max_body=2000"]
    with serving("--out_dir=endless", *limits, cwd=folder) as served:
        for prompt in ("a" * 10, [1] * 10, ["a" * 10, "b"]):
            assert post(served, prompt=prompt).status_code == 200
        for prompt in ("a" * 11, [1] * 11, ["a", "b" * 11]):
            error = post(served, prompt=prompt).json()["error"]
            assert error["message"] == "the prompt has 11 tokens: at most 10 here" and error["param"] == "prompt"
        assert post(served, n=3).status_code == post(served, max_tokens=31).status_code == 400
        body = json.dumps(asked()).encode()
        for size in (2000, 2001):
            padded = body + b" " * (size - len(body))
            for content in (padded, iter([padded[:1000], padded[1000:]])):  # told beforehand, and in chunks
                head = {"Content-Type": "application/json"}
                answer = CLIENT.post(f"{served.url}/v1/completions", content=content, headers=head)
                assert answer.status_code == (200 if size == 2000 else 413), answer.text
        assert "at most 2,000 bytes" in answer.json()["error"]["message"]
        assert served.health() == IDLE


def connected(served: Served, sent: bytes, **options: int) -> socket.socket:
    """A client that has sent so much. Its options are those of its socket."""
    client = socket.socket()
    for name, value in options.items():
        client.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    client.settimeout(60)
    client.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
    client.sendall(sent)
    return client


def request(body: bytes, size: int | None = None) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {size or len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + body


def read_all(client: socket.socket, drip: bytes = b"") -> bytes:
    """What comes until the server closes the connection, to which a byte is sent now and then."""
    read, client_timeout = b"", 0.1 if drip else 60
    client.settimeout(client_timeout)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            got = client.recv(2**16)
            if not got:
                return read
            read += got
        except TimeoutError:
            client.sendall(drip)
        except ConnectionError:
            return read
    raise AssertionError("the connection stays open")


def test_who_sends_slowly_is_let_go(folder):
    with serving("--out_dir=endless", "--body_timeout=1", "--max_body=2000", cwd=folder) as served:
        body = json.dumps(asked(max_tokens=1)).encode()
        for drip in (b"", b" "):
            answer = read_all(connected(served, request(body, 1900)), drip)
            assert answer.startswith(b"HTTP/1.1 408 ") and b"connection: close" in answer.lower()
            assert b"not sent within 1 s" in answer and b"Traceback" not in answer
        assert read_all(connected(served, b"")) == b""
        assert read_all(connected(served, b"GET /health HTTP/1.1\r\nX: "), b"x") in (b"", b"x")
        refused = read_all(connected(served, request(b"", 10**9)), b" " * 100)  # who sends on after the answer
        assert refused.startswith(b"HTTP/1.1 413 ")
        client = connected(served, request(body))  # one connection, and time between its requests
        for _ in range(3):
            answer = b""
            while not answer.endswith(b"}}"):  # its head and its body may come apart
                assert (piece := client.recv(2**16)), answer
                answer += piece
            assert b" 200 OK" in answer
            time.sleep(0.6)
            client.sendall(request(body))
        client.close()
        assert post(served, max_tokens=1000).status_code == 200
        assert served.health() == IDLE and not any("Traceback" in line for line in served.said)


def test_a_request_that_takes_too_long_is_broken_off(folder):
    more = ["--timeout=1.5", f"--max_tokens={FOREVER}", "--max_waiting=9"]
    with serving("--out_dir=endless", *more, cwd=folder) as served:
        before = text(served)
        for streaming in (False, True):
            answers = []

            def ask(answers=answers, streaming=streaming) -> None:
                answers.append(post(served, max_tokens=FOREVER, n=16, stream=streaming))

            asking = [threading.Thread(target=ask) for _ in range(3)]  # one runs, the others wait
            for thread in asking:
                thread.start()
            for thread in asking:
                thread.join(60)
            assert len(answers) == 3
            for answer in answers:
                *parts, error = events(answer.text) if streaming else [answer.text]
                assert answer.status_code == (200 if streaming else 504)
                error = json.loads(error)["error"]
                assert error["code"] == "timeout" and error["type"] == "server_error"
                assert "within 1.5 s" in error["message"]
                assert all("choices" in json.loads(part) for part in parts)
            written = [len(answer.text) > 5000 for answer in answers]
            assert sum(written) == streaming  # the one that ran
            until(lambda: served.health() == IDLE, "something of what was broken off still runs or waits")
            assert text(served) == before
        assert not any("Traceback" in line for line in served.said)


@pytest.fixture(scope="module")
def wide(folder) -> dict:
    """A request to wide/ whose answer is larger than what the system takes from a server on its way to a client."""
    write_run(folder / "wide", LETTERS, block_size=4096)
    return asked(model="wide", prompt="abcdefgh" * 500, n=8, echo=True, logprobs=5, max_tokens=FOREVER)


def test_a_reader_who_does_not_read_is_let_go(folder, wide):
    with serving("--out_dir=wide", "--timeout=10", f"--max_tokens={FOREVER}", cwd=folder) as served:
        client = connected(served, request(json.dumps(wide | {"stream": True}).encode()), SO_RCVBUF=4096)
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
        until(lambda: served.health()["open"] == 1, "it was not accepted")
        until(lambda: served.health() == IDLE, "a stream that nobody reads goes on", seconds=60)
        told = 'weigpt_http_requests_total{path="/v1/completions",status="504"} 1.0'
        until(lambda: told in CLIENT.get(f"{served.url}/metrics").text, "the request has not ended")
        assert not any("Exception" in line or "Traceback" in line or "ERROR" in line for line in served.said)
        assert b"[DONE]" not in read_all(client)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux alone drops such connections")
def test_a_whole_answer_that_is_not_read_is_dropped(folder, wide):
    with serving("--out_dir=wide", "--timeout=10", cwd=folder) as served:
        body = json.dumps(wide | {"max_tokens": 1}).encode()
        client = connected(served, request(body), SO_RCVBUF=4096)
        sockets = Path(f"/proc/{served.process.pid}/fd")

        def connections() -> int:
            return sum(os.readlink(each).startswith("socket:") for each in sockets.iterdir() if each.exists())

        head = client.recv(200)
        assert head.startswith(b"HTTP/1.1 200 OK")
        size, with_it = int(re.search(rb"content-length: (\d+)", head)[1]), connections()
        assert size > 5e6  # more than Linux takes from a process for a client on its way
        until(lambda: connections() < with_it, "the connection stays open", seconds=120)
        assert len(read_all(client)) < size


def test_sixty_four_clients_are_answered_or_told_to_come_again(folder):
    options = ["--max_batch=4", "--max_samples=2", "--max_waiting=16"]
    with serving("--out_dir=endless", *options, cwd=folder) as served:
        expected = [text(served, seed=seed, max_tokens=60) for seed in range(8)]
        met, stop = [], time.monotonic() + 4

        def ask(number: int) -> None:
            with httpx.Client(trust_env=False, timeout=60) as client:
                while time.monotonic() < stop:
                    seed, stream = number % 8, number % 2 == 0
                    body = asked(seed=seed, max_tokens=60, stream=stream)
                    answer = client.post(f"{served.url}/v1/completions", json=body)
                    met.append(answer.status_code)
                    if answer.status_code == 200:
                        parts = map(json.loads, events(answer.text)) if stream else [answer.json()]
                        found = "".join(choice["text"] for part in parts for choice in part["choices"])
                        assert found == expected[seed]
                    else:
                        assert int(answer.headers["Retry-After"]) > 0
                        time.sleep(0.1)

        failed = []

        def asking(number: int) -> None:
            try:
                ask(number)
            except Exception as error:
                failed.append(repr(error))

        threads = [threading.Thread(target=asking, args=(number,)) for number in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failed and set(met) == {200, 429}
        until(lambda: served.health() == IDLE, "something still runs or waits")
        assert not any("Traceback" in line for line in served.said)


# ending


def test_what_was_accepted_is_finished_after_sigterm(folder):
    with serving("--out_dir=endless", "--grace=120", cwd=folder) as served:
        expected = [text(served, seed=seed, max_tokens=400) for seed in range(8)]
        answers: dict[int, httpx.Response] = {}

        def ask(seed: int) -> None:
            answers[seed] = post(served, seed=seed, max_tokens=400, stream=seed % 2 == 0)

        asking = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
        for thread in asking:
            thread.start()
        until(lambda: served.health()["open"] == 8, "not all were accepted")
        served.process.send_signal(signal.SIGTERM)
        until(lambda: served.health()["status"] == "closing", "SIGTERM was not heard")
        refused = 0
        while served.process.poll() is None:
            try:
                late = post(served)
            except httpx.TransportError:  # it is gone, or nearly
                continue
            assert late.status_code == 503 and late.json()["error"]["code"] == "closing"
            assert int(late.headers["Retry-After"]) > 0
            refused += 1
            time.sleep(0.05)
        for thread in asking:
            thread.join(60)
        assert served.process.wait(60) == 0 and refused
        for seed, answer in answers.items():
            assert answer.status_code == 200
            if seed % 2:
                (choice,) = answer.json()["choices"]
                assert (choice["text"], choice["finish_reason"]) == (expected[seed], "length")
            else:
                choices = [json.loads(event)["choices"][0] for event in events(answer.text)]
                assert "".join(choice["text"] for choice in choices) == expected[seed]
                assert choices[-1]["finish_reason"] == "length"
        assert len(answers) == 8 and "finishing 8 requests, in 120 s at most" in "".join(served.said)
        assert not any("Traceback" in line or "warning" in line for line in served.said)


def test_after_the_grace_those_who_still_wait_are_told(folder):
    with serving("--out_dir=endless", "--grace=0.5", f"--max_tokens={FOREVER}", cwd=folder) as served:
        answers = {}

        def ask(stream: bool, number: int) -> None:
            answers[stream, number] = post(served, max_tokens=FOREVER, stream=stream)

        asking = [threading.Thread(target=ask, args=(stream, n)) for stream in (True, False) for n in range(2)]
        for thread in asking:
            thread.start()
        until(lambda: served.health()["open"] == 4, "not all were accepted")
        assert served.end(signal.SIGTERM, timeout=60) == 0
        for thread in asking:
            thread.join(60)
        assert len(answers) == 4
        for (stream, _), answer in answers.items():
            assert answer.status_code == (200 if stream else 503)
            error = json.loads(events(answer.text)[-1]) if stream else answer.json()
            assert error["error"]["code"] == "closing" and "shut down" in error["error"]["message"]
            assert stream or int(answer.headers["Retry-After"]) > 0
        assert "Traceback" not in "".join(served.said) and "ERROR" not in "".join(served.said)


def test_ctrl_c_is_status_130_and_a_second_one_ends_at_once(folder):
    with serving("--out_dir=endless", cwd=folder) as served:
        assert text(served) and served.end(signal.SIGINT, timeout=60) == 130
        assert served.said[-1] == "interrupted\n" and "finishing" not in "".join(served.said)
    with serving("--out_dir=endless", "--grace=1000", f"--max_tokens={FOREVER}", cwd=folder) as served:
        asking = asked(max_tokens=FOREVER, stream=True)
        with CLIENT.stream("POST", f"{served.url}/v1/completions", json=asking) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            served.process.send_signal(signal.SIGINT)
            until(lambda: "finishing 1 request" in "".join(served.said), "it did not say that it waits")
            assert served.process.poll() is None
            assert served.end(signal.SIGINT, timeout=60) == 130
        assert "Traceback" not in "".join(served.said)


# mistakes


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--port=99999"], "expected 0 .* to 65535"),
        (["--port=-1"], "expected 0 .* to 65535"),
        (["--host=192.0.2.1"], "choose another --port or --host"),  # nobody's
        (["--host=a..b"], "choose another --port or --host"),
        (["--api_key=a b"], "without spaces"),
        (["--api_key=钥匙"], "of ASCII"),
        (["--max_samples=-1"], "max_samples=-1: expected at least 0"),
        (["--max_tokens=0"], "max_tokens=0: expected at least 1"),
        (["--max_waiting=-1"], "max_waiting=-1: expected at least 0"),
        (["--grace=-1"], "grace=-1.0: expected at least 0"),
        (["--max_batch=0"], "max_batch=0: expected at least 1"),
        (["--max_batch=15", "--max_samples=16"], "max_samples=16: expected at most max_batch=15"),
        (["--max_prompt=0"], "max_prompt=0: expected at least 1"),
        (["--max_body=1023"], "max_body=1023: expected at least 1024"),
        (["--timeout=0"], "timeout=0.0: expected seconds, more than 0"),
        (["--body_timeout=-1"], "body_timeout=-1.0: expected seconds, more than 0"),
        (["--out_dir=nowhere"], "no checkpoint in nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_status_2(folder, wrong, told):
    done = run_script("serve.py", "--port=0", *wrong, cwd=folder)
    *overriding, sentence = done.stderr.splitlines()
    assert done.returncode == 2 and len(overriding) <= 1
    assert sentence.startswith("serve.py: ") and re.search(told, sentence), done.stderr


def test_a_port_that_is_taken_is_a_sentence(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_script("serve.py", f"--port={port}", "--out_dir=endless", cwd=folder)
    assert done.returncode == 2 and f"port={port}: Address already in use" in done.stderr.splitlines()[-1]
    assert "choose another --port" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["uvicorn", "fastapi", "gradio", "prometheus_client"])
def test_a_package_that_is_missing_is_a_sentence(folder, tmp_path, package):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module', name={package!r})")
    done = run_script("serve.py", "--port=0", "--out_dir=endless", cwd=folder, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"serve.py: {package} is missing: pip install -r requirements-web.txt"


def test_which_addresses_are_this_machines():
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert is_this_machine(host)
    for host in ("0.0.0.0", "::", "", "192.168.0.1", "example.org"):
        assert not is_this_machine(host)


# what it serves, and to whom


def test_a_hugging_face_folder_speaks_as_its_run_under_the_name_it_is_given(folder):
    model = write_run(folder / "run", LETTERS, act="gelu_tanh")
    done = run_script("extras/export.py", "--out_dir=run", "--dest=exported", cwd=folder)
    assert done.returncode == 0, done.stderr
    (expected,) = continuations(model, LETTERS, ["abc"], Sampling(max_new_tokens=20, seed=1))
    with serving("--init_from=exported", "--name=me/tiny", "--host=0.0.0.0", cwd=folder) as served:
        assert text(served, model="me/tiny") == expected
        models = httpx.get(f"{served.url}/v1/models", trust_env=False).json()["data"]
        for name in ("me/tiny", "me%2Ftiny"):
            assert httpx.get(f"{served.url}/v1/models/{name}", trust_env=False).json() == models[0]
        assert post(served, model="exported").status_code == 404
        (warning,) = [line for line in served.said if "warning" in line]
        assert "host=0.0.0.0" in warning and "--api_key" in warning


AUDIT = """
import sys

def log(event, args):
    if event in {wanted}:
        with open({path!r}, "a") as file:
            print(event, args[1] if event in ("socket.connect", "socket.sendto") else args[0], file=file)

sys.addaudithook(log)
"""


def test_nobody_else_is_addressed(folder, tmp_path):
    """From the start to the end of a server, by Python's own audit events."""
    wanted = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
    (tmp_path / "sitecustomize.py").write_text(AUDIT.format(wanted=wanted, path=str(tmp_path / "log")))
    env = {"PYTHONPATH": str(tmp_path)}
    with serving("--out_dir=endless", "--host=0.0.0.0", "--api_key=K", cwd=folder, env=env) as served:
        with httpx.Client(trust_env=False, headers={"Authorization": "Bearer K"}) as client:
            for path in ("/", "/v1/models", "/health", "/openapi.json", "/nowhere"):
                assert client.get(served.url + path).status_code < 500
            assert client.post(f"{served.url}/v1/completions", json=asked()).status_code == 200
        assert served.end() == 0
        assert not any("warning" in line for line in served.said)  # for there is a key
    addressed = (tmp_path / "log").read_text().splitlines()
    assert "socket.getaddrinfo 0.0.0.0" in addressed  # where it listens
    for line in addressed:
        assert re.fullmatch(r"socket\.\w+ (0\.0\.0\.0|127\.0\.0\.1|localhost|None|\('127\.0\.0\.1', \d+\))", line), line
