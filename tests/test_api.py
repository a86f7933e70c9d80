"""The API as its users meet it: OpenAI's own client, and requests that no client would send."""

import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from conftest import ROOT, TINY_ARGS, run_script
from serving import serving, write_run

import checkpoint
from api import Speaker
from generate import Token
from tokenizer import CharTokenizer, GPT2Tokenizer

openai = pytest.importorskip("openai")

SECRET = "one-that-nobody-may-see-7b1f"
KEYS = "object", "created", "model", "id"
needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="no GPT-2 vocabulary: TIKTOKEN_CACHE_DIR is not set"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with out/, a tiny model of the embedded stories, and gpt2/, one of GPT-2's vocabulary that babbles."""
    folder = tmp_path_factory.mktemp("api")
    assert run_script("data/chinese/prepare.py", "--dest=d", cwd=folder).returncode == 0
    done = run_script("train.py", *TINY_ARGS, "--dataset=d", "--max_iters=30", cwd=folder)
    assert done.returncode == 0, done.stderr
    write_run(folder / "gpt2", GPT2Tokenizer())
    write_run(folder / "endless", CharTokenizer("abcdefgh", byte_fallback=False, end_of_text=False))
    return folder


@pytest.fixture(scope="module")
def url(folder) -> str:
    with serving("--out_dir=out", cwd=folder, env={"WEIGPT_TEST_SECRET": SECRET}) as served:
        yield served.url
        assert served.health() == {"status": "ok", "running": 0, "rows": 0, "waiting": 0, "open": 0}
        assert "Traceback" not in "".join(served.said)


@pytest.fixture(scope="module")
def gpt2_url(folder) -> str:
    with serving("--out_dir=gpt2", cwd=folder) as served:
        yield served.url


def client_of(url: str, key: str = "x"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=httpx.Client(trust_env=False))


@pytest.fixture(scope="module")
def client(url):
    return client_of(url)


@pytest.fixture(scope="module")
def gpt2(gpt2_url):
    return client_of(gpt2_url)


@pytest.fixture(scope="module")
def opened(folder) -> dict:
    """The models and tokenizers behind the servers, by name."""
    found = {}
    for name in ("out", "gpt2"):
        _, state = checkpoint.best(str(folder / name))
        found[name] = checkpoint.model_of(state, name).eval(), checkpoint.tokenizer_of(state, name)
    return found


def complete(client, prompt="小白兔", model="out", **asked):
    return client.completions.create(model=model, prompt=prompt, **{"seed": 1, "max_tokens": 20} | asked)


def texts(completion) -> list[str]:
    assert [choice.index for choice in completion.choices] == list(range(len(completion.choices)))
    return [choice.text for choice in completion.choices]


def told_of(chunks) -> list[dict]:
    """What the chunks of a stream come to, a choice each: its text, its log-probabilities and why it ended."""
    found = {}
    for chunk in chunks:
        for choice in chunk.choices:
            one = found.setdefault(choice.index, {"text": "", "logprobs": None, "finish_reason": None})
            assert one["finish_reason"] is None, "a choice goes on after its end"
            one["text"] += choice.text
            one["finish_reason"] = choice.finish_reason
            if choice.logprobs is not None:
                one["logprobs"] = one["logprobs"] or {key: [] for key in choice.logprobs.model_dump()}
                for key, values in choice.logprobs.model_dump().items():
                    one["logprobs"][key] += values
    return [found[index] for index in sorted(found)]


# the client


def test_models_are_listed_and_retrieved(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("out", "model") and model.created > 1_700_000_000
    assert client.models.retrieve("out") == model
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4")
    assert error.value.code == "model_not_found" and "'out'" in error.value.message


def test_a_completion_has_openais_shape(client, opened):
    done = complete(client)
    assert done.object == "text_completion" and done.model == "out" and done.id.startswith("cmpl-")
    (choice,) = done.choices
    assert choice.text and choice.logprobs is None and choice.finish_reason == "length"
    assert done.usage.model_dump(exclude_none=True) == {"prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23}
    assert complete(client).id != done.id
    assert len(opened["out"][1].encode(complete(client, max_tokens=None).choices[0].text)) == 16


def test_seeds_repeat_and_without_one_texts_differ(client):
    assert texts(complete(client)) == texts(complete(client)) != texts(complete(client, seed=2))
    free = {texts(complete(client, seed=openai.omit))[0] for _ in range(4)}
    assert len(free) == 4
    assert texts(complete(client, seed=-(2**63))) != texts(complete(client, seed=2**63 - 1))


def test_temperature_0_is_the_likeliest_whatever_the_seed(client, opened):
    model, tokenizer = opened["out"]
    ids = tokenizer.encode("小白兔").tolist()
    for _ in range(12):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    for seed in (1, 2):
        done = complete(client, temperature=0, max_tokens=12, seed=seed, extra_body={"top_k": 5, "min_p": 0.1})
        assert texts(done) == [tokenizer.decode(ids[3:])]
    assert texts(complete(client, top_p=0, max_tokens=12)) == texts(done)  # the likeliest alone has that much
    assert texts(complete(client, max_tokens=12, extra_body={"top_k": 1})) == texts(done)
    assert texts(complete(client, max_tokens=12, extra_body={"min_p": 1})) == texts(done)
    penalized = complete(client, temperature=0, max_tokens=12, extra_body={"repetition_penalty": 5})
    assert len(set(texts(penalized)[0])) > len(set(texts(done)[0]))


def test_several_choices_and_several_prompts(client):
    one, three = complete(client), complete(client, n=3)
    assert len(set(texts(three))) == 3 and texts(three)[0] == texts(one)[0]
    assert three.usage.prompt_tokens == 3 and three.usage.completion_tokens == 60
    prompts = ["小白兔", "有一天，", "小白兔"]
    several = complete(client, prompt=prompts, n=2, echo=True)
    assert len(texts(several)) == 6 and len(set(texts(several))) == 6
    assert all(text.startswith(prompts[k // 2]) for k, text in enumerate(texts(several)))
    assert texts(several)[0] == "小白兔" + texts(one)[0]
    assert several.usage.prompt_tokens == 3 + 4 + 3 and several.usage.completion_tokens == 120


def test_prompts_may_be_token_ids(client, opened):
    tokenizer = opened["out"][1]
    ids = [tokenizer.encode(text).tolist() for text in ("小白兔", "有一天，")]
    assert texts(complete(client, prompt=ids[0])) == texts(complete(client))
    by_ids = complete(client, prompt=ids, n=2, echo=True)
    assert texts(by_ids) == texts(complete(client, prompt=["小白兔", "有一天，"], n=2, echo=True))


def test_no_prompt_begins_a_new_text(client, opened):
    end = opened["out"][1].end_of_text
    begun = texts(complete(client, prompt=""))
    assert begun == texts(complete(client, prompt=None)) == texts(complete(client, prompt=[end]))
    assert texts(complete(client, prompt="", echo=True)) == begun
    told = complete(client, prompt="", echo=True, logprobs=1).choices[0]
    assert told.text == begun[0] and "".join(told.logprobs.tokens) == told.text


STREAMED = [
    {},
    {"n": 2},
    {"n": 2, "logprobs": 3},
    {"n": 2, "logprobs": 2, "echo": True},
    {"prompt": ["小白兔", "有一天，"], "n": 2, "logprobs": 0, "echo": True, "max_tokens": 40},
    {"max_tokens": 0, "echo": True, "logprobs": 1},
    {"max_tokens": 200, "n": 4, "temperature": 2, "logprobs": 1},
    {"stop": ["，", "。"], "n": 4, "logprobs": 1, "max_tokens": 100},
]


@pytest.mark.parametrize("asked", STREAMED, ids=str)
def test_a_stream_comes_to_the_whole(client, asked):
    chunks = list(complete(client, **asked, stream=True))
    whole = complete(client, **asked)
    expected = [choice.model_dump(exclude={"index"}) for choice in whole.choices]
    assert told_of(chunks) == expected
    assert len(chunks) >= len(expected) and all(chunk.usage is None for chunk in chunks)
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].id.startswith("cmpl-")
    assert {chunk.model for chunk in chunks} == {"out"} and {chunk.object for chunk in chunks} == {"text_completion"}


def test_a_stream_comes_while_it_is_written(client, url):
    chunks = iter(complete(client, stream=True, max_tokens=2000, seed=2))
    pieces = [next(chunks).choices[0].text]
    assert httpx.get(f"{url}/health", trust_env=False).json()["running"] == 1
    pieces += [chunk.choices[0].text for chunk in chunks]
    assert len(pieces) >= 5 and len(pieces[0]) < len("".join(pieces)) / 4


def test_a_stream_tells_what_was_used_where_it_is_asked_to(client):
    asked = {"n": 2, "max_tokens": 7}
    *chunks, last = complete(client, **asked, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == complete(client, **asked).usage
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    quiet = list(complete(client, **asked, stream=True, stream_options={"include_usage": False}))
    assert all(chunk.choices for chunk in quiet)


@pytest.mark.parametrize("kind", ["out", pytest.param("gpt2", marks=needs_gpt2)])
def test_what_stops_a_text_is_not_part_of_it_and_never_shown(client, request, kind):
    asked_of, prompt = (client, "小白兔") if kind == "out" else (request.getfixturevalue("gpt2"), "One day")
    asked = {"client": asked_of, "model": kind, "prompt": prompt, "max_tokens": 60}
    (unstopped,) = complete(**asked).choices
    free = unstopped.text
    assert len(free) >= 50
    for at, length in ((10, 1), (10, 2), (20, 5), (31, 12), (40, 3)):
        stop = free[at : at + length]
        for stops in (stop, ["never met", free[45:50], stop]):
            done = complete(**asked, stop=stops)
            expected = free[
                : min(found for s in ([stops] if isinstance(stops, str) else stops) if (found := free.find(s)) >= 0)
            ]
            assert (done.choices[0].text, done.choices[0].finish_reason) == (expected, "stop"), stops
            shown = ""
            for chunk in complete(**asked, stop=stops, stream=True):
                shown += chunk.choices[0].text
                assert expected.startswith(shown), "a part of what stops it was shown"
            assert shown == expected and chunk.choices[0].finish_reason == "stop"
    for stops in ([], [free[10:12] + "\0"], "never met", [free[-2:] + "x"]):  # what only looks like it is not lost
        done = complete(**asked, stop=stops)
        assert done.choices == [unstopped]
        assert told_of(complete(**asked, stop=stops, stream=True))[0]["text"] == free


def test_the_end_of_text_ends_a_text(client):
    done = complete(client, n=16, max_tokens=1000, logprobs=3)
    ended = [choice for choice in done.choices if choice.finish_reason == "stop"]
    assert len({len(choice.text) for choice in ended}) > 3, "this seed has too few to tell"
    for choice in done.choices:
        assert "<|" not in choice.text
        check_offsets(choice)
    tokens = [len(choice.logprobs.tokens) for choice in done.choices]
    at_least = sum(tokens) + len(ended)  # the end of each is a token, too
    assert at_least <= done.usage.completion_tokens <= at_least + 2 * len(ended)  # and what was half a character then


# log-probabilities


def spelled(raw: bytes) -> str:
    """As OpenAI writes a token."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def check_logprobs(model, tokenizer, context: list[int], told, alternatives: int, first: bool) -> list[int]:
    """Holds what was told of each token against the model, read anew at each; the tokens' ids. `first`: the first one
    has nothing before it."""
    names: dict[str, list[int]] = {}
    for id in range(tokenizer.vocab_size):
        names.setdefault(spelled(tokenizer.decode_bytes([id])), []).append(id)
    ids = list(context)
    for at, (name, logprob, top) in enumerate(zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True)):
        if first and at == 0:
            assert logprob is None and top is None
            ids.append(names[name][0])
            continue
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0][0, -1].double().log_softmax(-1)
        fitting = [id for id in names[name] if expected[id].item() == pytest.approx(logprob, abs=1e-3)]
        assert fitting, (at, name, logprob)
        likeliest = expected.topk(alternatives)
        of_name: dict[str, float] = {}  # two tokens may be written alike, as a letter and its byte: the likelier
        for id, value in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True):
            of_name.setdefault(spelled(tokenizer.decode_bytes([id])), value)
        assert top == pytest.approx(of_name | {name: logprob}, abs=1e-3) and top[name] == logprob
        ids.append(fitting[0])
    return ids[len(context) :]


def check_offsets(choice) -> None:
    """Each token stands in the text where it is said to; of a character in parts each part is at the character."""
    offsets, tokens = choice.logprobs.text_offset, choice.logprobs.tokens
    assert offsets == sorted(offsets) and len(offsets) == len(tokens)
    for at, token in zip(offsets, tokens, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[at : at + len(token)] == token
        elif at < len(choice.text):  # else the text ends inside a character, which is not shown
            begins = int(token[len("bytes:\\x") :][:2], 16)
            assert choice.text[at] == chr(begins) if begins < 128 else not choice.text[at].isascii()


@pytest.mark.parametrize("kind", ["out", pytest.param("gpt2", marks=needs_gpt2)])
@pytest.mark.parametrize("alternatives", [0, 1, 5])
def test_log_probabilities_are_the_models_own(client, request, opened, kind, alternatives):
    model, tokenizer = opened[kind]
    asked_of, prompt = (client, "小白兔a") if kind == "out" else (request.getfixturevalue("gpt2"), "小白 rabbits")
    ids = tokenizer.encode(prompt).tolist()
    for sampling in ({}, {"temperature": 0.5, "extra_body": {"top_k": 3, "repetition_penalty": 2}}):
        asked = {"model": kind, "prompt": prompt, "max_tokens": 32 - len(ids), "logprobs": alternatives, "n": 2}
        for choice in complete(asked_of, **asked, **sampling).choices:
            written = check_logprobs(model, tokenizer, ids, choice.logprobs, alternatives, first=False)
            assert len(written) == 32 - len(ids)
            check_offsets(choice)
            assert tokenizer.decode(written).startswith(choice.text)
        for choice in complete(asked_of, **asked, **sampling, echo=True).choices:
            assert choice.text.startswith(prompt)
            read = check_logprobs(model, tokenizer, [], choice.logprobs, alternatives, first=True)
            assert read[1 : len(ids)] == ids[1:] and len(read) == 32
            check_offsets(choice)


@needs_gpt2
def test_half_characters_are_written_as_bytes(gpt2, opened):
    tokenizer = opened["gpt2"][1]
    ids = tokenizer.encode("a兔b").tolist()
    told = complete(gpt2, model="gpt2", prompt="a兔b", echo=True, logprobs=0, max_tokens=0).choices[0]
    assert told.text == "a兔b" and told.finish_reason == "length"
    assert told.logprobs.tokens == [spelled(tokenizer.decode_bytes([id])) for id in ids]
    assert told.logprobs.tokens[1].startswith("bytes:\\xe5") and len(ids) > 3
    assert told.logprobs.text_offset == [0, *[1] * (len(ids) - 2), 2]
    half = complete(gpt2, model="gpt2", prompt=ids[:2], echo=True, logprobs=0, max_tokens=20).choices[0]
    assert half.text.startswith("a\ufffd")
    check_offsets(half)
    long = complete(gpt2, model="gpt2", prompt="a", logprobs=0, max_tokens=500, temperature=2).choices[0]
    assert sum(token.startswith("bytes:") for token in long.logprobs.tokens) >= 3, "this seed has too few to tell"
    check_offsets(long)


def test_of_two_tokens_that_are_written_alike_the_likelier_is_told():
    tokenizer = CharTokenizer("ab", byte_fallback=True, end_of_text=True)
    letter, b, byte = 0, 1, 2 + ord("a")
    assert tokenizer.decode_bytes([letter]) == tokenizer.decode_bytes([byte]) == b"a"
    token = Token(b, -3.0, ((letter, -0.1), (byte, -2.5)))
    told = Speaker(0, tokenizer, True).say("b", [token])["logprobs"]
    assert told["top_logprobs"] == [{"a": -0.1, "b": -3.0}]


def test_a_prompt_alone_is_scored(client, opened):
    prompt = "有一天，小白兔a\n"
    done = complete(client, prompt=prompt, echo=True, logprobs=2, max_tokens=0)
    (choice,) = done.choices
    assert (choice.text, choice.finish_reason) == (prompt, "length") and done.usage.completion_tokens == 0
    assert choice.logprobs.tokens == list(prompt) and choice.logprobs.text_offset == list(range(len(prompt)))
    check_logprobs(*opened["out"], [], choice.logprobs, 2, first=True)
    assert texts(complete(client, prompt=prompt, echo=True, max_tokens=0)) == [prompt]
    assert texts(complete(client, prompt=prompt, max_tokens=0)) == [""]


def test_what_ends_a_text_has_no_log_probability(client):
    free = complete(client, max_tokens=40).choices[0].text
    (choice,) = complete(client, max_tokens=40, stop=free[12:15], logprobs=0).choices
    at = free.index(free[12:15])
    assert choice.text == free[:at] == "".join(choice.logprobs.tokens)


# errors


def test_mistakes_are_openais_errors(client):
    for wrong, param, code in (
        ({"temperature": 3}, "temperature", None),
        ({"logprobs": 6}, "logprobs", None),
        ({"max_tokens": 2049}, "max_tokens", None),
        ({"n": 17}, "n", None),
        ({"prompt": ["小"] * 9, "n": 2}, "n", None),
        ({"best_of": 2}, "best_of", None),
        ({"suffix": "x"}, "suffix", None),
        ({"logit_bias": {"1": 5}}, "logit_bias", None),
        ({"presence_penalty": 1}, "presence_penalty", None),
        ({"frequency_penalty": -1}, "frequency_penalty", None),
        ({"stop": ["a"] * 5}, "stop", None),
        ({"stop": [""]}, None, None),
        ({"prompt": []}, "prompt", None),
        ({"prompt": [[]]}, "prompt", None),
        ({"prompt": [10**6]}, "prompt", None),
        ({"extra_body": {"top_kk": 5}}, "top_kk", None),
        ({"prompt": "小" * 33}, "prompt", "context_length_exceeded"),
        ({"prompt": ["小", "小" * 33]}, "prompt", "context_length_exceeded"),
        ({"prompt": [5] * 33}, "prompt", "context_length_exceeded"),
    ):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as error:
                complete(client, **wrong, stream=stream)
            assert (error.value.param, error.value.code) == (param, code), (wrong, error.value)
            assert error.value.type == "invalid_request_error" and error.value.message
    complete(client, suffix="", logit_bias={}, presence_penalty=0, frequency_penalty=0, best_of=1, user="me")
    complete(client, prompt="小" * 32, max_tokens=40)  # a text may be longer than the context
    with pytest.raises(openai.NotFoundError) as error:
        complete(client, model="gpt-4")
    assert error.value.code == "model_not_found"


def test_a_key_is_asked_for_where_there_is_one(folder):
    with serving("--out_dir=endless", f"--api_key={SECRET}", cwd=folder) as served:
        for wrong in ("x", SECRET[:-1], SECRET + "x", SECRET.upper()):
            client = client_of(served.url, wrong)
            for ask in (client.models.list, lambda c=client: complete(c, prompt="a", model="endless")):
                with pytest.raises(openai.AuthenticationError) as error:
                    ask()
                assert error.value.code == "invalid_api_key" and SECRET not in str(error.value)
        wrong = [SECRET.encode(), b"Basic eDp4", b"Bearer", b"Bearer \xe9", "Bearer 钥匙".encode(), b"\xff"]
        wrong += [f"Bearer {SECRET}é".encode(), f"Bearer {SECRET[:-1]}".encode() + b"\xe9"]
        for headers in ({}, *({"Authorization": each} for each in wrong)):
            for path in ("/v1/models", "/v1/completions", "/v1/nowhere", "/metrics"):
                method = "POST" if path.endswith("completions") else "GET"
                answer = httpx.request(method, served.url + path, headers=headers, trust_env=False)
                if path == "/v1/nowhere":  # whose absence is no secret
                    assert answer.status_code == 404
                    continue
                assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer", (path, headers)
                assert "Bearer" in answer.json()["error"]["message"] and SECRET[:-1] not in answer.text
        for password in ("é", "钥匙", "\0", SECRET[:-1], SECRET + "é"):
            answer = httpx.post(f"{served.url}/login", data={"username": "me", "password": password}, trust_env=False)
            assert answer.status_code == 400 and SECRET[:-1] not in answer.text, (password, answer.text)
        answer = httpx.post(f"{served.url}/login", data={"username": "é", "password": SECRET}, trust_env=False)
        assert answer.status_code == 200
        assert "Traceback" not in "".join(served.said) and SECRET not in "".join(served.said)
        assert texts(complete(client_of(served.url, SECRET), prompt="a", model="endless"))[0]
        assert served.health()["status"] == "ok"  # which needs none


@contextmanager
def long_request(url: str):
    """A stream that goes on for as long as the block."""
    with client_of(url) as client:
        chunks = complete(client, prompt="a", model="endless", n=16, max_tokens=10**6, stream=True)
        next(chunks)
        yield
        chunks.close()


def test_a_full_queue_is_told_and_who_waits_is_answered(folder):
    with serving("--out_dir=endless", "--max_waiting=2", "--max_tokens=1000000", cwd=folder) as served:
        client, answers = client_of(served.url), []
        asked = {"prompt": "a", "model": "endless"}
        with long_request(served.url):
            asking = [threading.Thread(target=lambda: answers.append(texts(complete(client, **asked)))) for _ in "ab"]
            for thread in asking:
                thread.start()
            while served.health()["waiting"] < 2:
                time.sleep(0.02)
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError) as error:
                    complete(client, **asked, stream=stream)
                assert error.value.code == "queue_full"
                assert int(error.value.response.headers["Retry-After"]) >= 1
            assert (
                served.health() == {"status": "ok", "running": 1, "rows": 16, "waiting": 2, "open": 3} and not answers
            )
        for thread in asking:
            thread.join(60)
        assert len(answers) == 2 and answers[0] == answers[1] == texts(complete(client, **asked))


def test_a_model_that_diverged_is_told_and_harms_nobody(folder):
    tokenizer = CharTokenizer("ab", byte_fallback=False, end_of_text=False)
    model = write_run(folder / "diverged", tokenizer)
    model.transformer.h[0].mlp.c_fc.weight.data.fill_(float("nan"))
    state = {"model": model.state_dict(), "model_args": model.config.model_args(), "tokenizer": tokenizer.meta()}
    checkpoint.save(folder / "diverged" / "ckpt.pt", state)
    with serving("--out_dir=diverged", cwd=folder) as served:
        client = client_of(served.url)
        for more in ({}, {"echo": True, "logprobs": 1}, {"echo": True, "logprobs": 1, "max_tokens": 0}):
            with pytest.raises(openai.BadRequestError, match="not finite"):
                complete(client, prompt="ab", model="diverged", **more)
            with pytest.raises(openai.APIError, match="not finite"):
                list(complete(client, prompt="ab", model="diverged", **more, stream=True))
        assert texts(complete(client, prompt="ab", model="diverged", echo=True, max_tokens=0)) == ["ab"]
        assert served.health() == {"status": "ok", "running": 0, "rows": 0, "waiting": 0, "open": 0}


# requests that no client sends


def nothing_private(text: str, folder: Path) -> None:
    for private in (str(ROOT), str(folder), sys.prefix, str(Path.home()), "Traceback", 'File "', SECRET):
        assert private not in text


def check_refused(answer: httpx.Response, folder: Path, statuses=(400,)) -> None:
    assert answer.status_code in statuses, (answer.status_code, answer.text[:300])
    assert isinstance(answer.json()["error"]["message"], str) and answer.json()["error"]["message"]
    nothing_private(answer.text, folder)


def posted(url: str, body, **headers) -> httpx.Response:
    headers = {"Content-Type": "application/json"} | {key.replace("_", "-"): value for key, value in headers.items()}
    return httpx.post(f"{url}/v1/completions", content=body, headers=headers, trust_env=False, timeout=60)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\x00",
        b"\xff\xfe\xfd",
        b'{"model": "out", "prompt": "\xff"}',
        b'{"model": "out"',
        b'{"model": "out"} {}',
        b"{'model': 'out'}",
        b"model=out&prompt=a",
        b"[" * 100_000,
        b'{"model": "out", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"model": "out", "prompt": [' + b"1.5," * 200_000 + b"1]}",
        b'{"model": "out", "prompt": [' + b"[]," * 300_000 + b"[]]}",
        b'{"model": "out", "prompt": [' + b'"a",' * 200_000 + b'"a"]}',
        b'{"model": "out", "prompt": [' + b"[[]]," * 200_000 + b"[]]}",
        b'{"model": "out", "prompt": ["a", 1]}',
        b'{"model": "out", "prompt": "\\ud800"}',
        b'{"model": "out", "stop": "\\udfff", "prompt": "\\udfff\\ud800"}',
        b'{"model": "out", "\\ud800": 1}',
        b'{"model": "out", "' + b"x" * 500_000 + b'": 1}',
        b'{"prompt": "a"}',
    ],
    ids=lambda body: f"{body[:30]!r}, {len(body)} bytes",
)
def test_a_body_that_is_no_request_is_refused(url, folder, body):
    check_refused(posted(url, body), folder)


NUMBERS = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000, "-" + "9" * 5000, "-1", "1e308", "2e63"]
NUMBERS += ["true", "[]", "{}", '"1"', "[null]"]
WRONG = {
    "model": ["1", "null", "[]", "{}", "true", "NaN"],
    "prompt": ["1", "true", "{}", "[null]", "[[null]]", "[1.5]", "[-1]", "[4294967296]", "[[1, -1]]", "[true]", "NaN"],
    "max_tokens": [*NUMBERS, "1.5", str(2**64)],
    "temperature": NUMBERS,
    "top_p": NUMBERS,
    "n": [*NUMBERS, "0", "1.5", str(2**64)],
    "stop": ["1", "true", "{}", "[1]", "[[]]", '["a", null]'],
    "seed": [n for n in NUMBERS if n != "-1"] + [str(2**63), str(-(2**63) - 1)],
    "logprobs": [*NUMBERS, "1.5"],
    "echo": ["1", '"true"', "[]", "{}"],
    "stream": ["1", '"true"', "[]", "{}"],
    "stream_options": ["1", "true", "[]", '{"include_usage": 1}', '{"include_usage": null}'],
    "top_k": [*NUMBERS, str(2**31), str(2**64)],
    "min_p": NUMBERS,
    "repetition_penalty": [*NUMBERS, "0", "1e-300"],
    "user": ["1", "true", "[]"],
    "best_of": [*NUMBERS, "0"],
    "suffix": ['"x"', "1"],
    "logit_bias": ['{"1": 1}', "[1]", "1"],
    "presence_penalty": NUMBERS,
    "frequency_penalty": NUMBERS,
    "no_such_field": ["1", "null"],
}


@pytest.mark.parametrize("field", WRONG)
def test_fields_of_the_wrong_kind_and_out_of_range_are_refused(url, folder, field):
    with httpx.Client(trust_env=False, headers={"Content-Type": "application/json"}) as client:
        for value in WRONG[field]:
            asked = {"model": '"out"', "prompt": '"a"', field: value}
            body = "{" + ", ".join(f'"{key}": {each}' for key, each in asked.items()) + "}"
            answer = client.post(f"{url}/v1/completions", content=body)
            check_refused(answer, folder, statuses=(400,))
            if value[:4] not in ("9999", "-999"):  # Python's own reader refuses numbers of so many digits
                assert field in answer.json()["error"]["message"], (value[:50], answer.text)


def test_odd_values_that_are_allowed(url, folder):
    for field, value in (
        ("prompt", "\0a\x1b\x7f"),
        ("prompt", "<|endoftext|>"),
        ("prompt", "\ufeff\u2028\U0010ffff"),
        ("stop", "\0"),
        ("stop", "x" * 500_000),
        ("user", "\ud800"),
        ("temperature", 5e-324),
        ("top_p", 5e-324),
        ("min_p", 5e-324),
        ("top_k", 2**31 - 1),
        ("repetition_penalty", 0.1),
        *((field, None) for field in WRONG if field not in ("model", "no_such_field")),
    ):
        answer = posted(url, json.dumps({"model": "out", "prompt": "a", "max_tokens": 3, "echo": True, field: value}))
        assert answer.status_code == 200, (field, value, answer.text)
        assert answer.json()["choices"][0]["finish_reason"] in ("length", "stop")
        if field == "prompt":
            assert answer.json()["choices"][0]["text"].startswith(value or "")


def test_a_body_that_is_too_large_is_refused_before_it_is_read(url, folder):
    body = json.dumps({"model": "out", "prompt": "a" * 2**20}).encode()
    check_refused(posted(url, body), folder, statuses=(413,))
    piece = b" " * 2**16

    def unending():
        yield b'{"model": "out", "prompt": "'
        for _ in range(40):
            yield piece

    check_refused(posted(url, unending()), folder, statuses=(413,))
    answer = posted(url, body[: 2**20], Content_Length=str(2**20))  # as much as may be, and no JSON
    check_refused(answer, folder, statuses=(400,))
    padded = json.dumps({"model": "out", "prompt": "a", "max_tokens": 1}).encode()
    assert posted(url, padded + b" " * (2**20 - len(padded))).status_code == 200


def test_other_kinds_of_content_are_refused(url, folder):
    body = json.dumps({"model": "out", "prompt": "a"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "x", ""):
        check_refused(posted(url, body, Content_Type=kind), folder, statuses=(400, 415))
    check_refused(httpx.post(f"{url}/v1/completions", trust_env=False), folder)
    assert posted(url, body, Content_Type="application/json; charset=utf-8").status_code == 200


def test_wrong_methods_and_unknown_addresses(url, folder):
    allowed = {"/v1/completions": "POST", "/v1/models": "GET", "/v1/models/out": "GET"}
    for path, right in allowed.items():
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"):
            answer = httpx.request(method, url + path, trust_env=False)
            if method == right:
                assert answer.status_code in (200, 400)
            elif method == "HEAD":
                assert answer.status_code == 405
            else:
                check_refused(answer, folder, statuses=(405,))
                assert answer.headers["Allow"] == right
    for path in (
        "/v1",
        "/v1/",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/completions/",
        "/v1/completions/x",
        "/v2",
    ):
        for method in ("GET", "POST", "DELETE"):
            answer = httpx.request(method, url + path, trust_env=False)
            assert answer.status_code in ((404, 405) if path in ("/v1", "/v2") else (404,)), (method, path)
            nothing_private(answer.text, folder)
            if path.startswith("/v1/"):
                check_refused(answer, folder, statuses=(404,))
    for path in (
        "/v1/models/a/b",
        "/v1/models/",
        "/v1/models/%2e%2e%2f",
        "/v1/models/%00%ff",
        "/v1/models/" + "a" * 9000,
    ):
        check_refused(httpx.get(url + path, trust_env=False), folder, statuses=(404,))


# requests that nobody would think of


def test_schemathesis_finds_no_failure(url, folder):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis import checks

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {f"{each.method.upper()} {each.path}" for each in operations} == {
        "GET /health", "GET /v1/models", "GET /v1/models/{model}", "POST /v1/completions"
    }  # fmt: skip
    wanted = [checks.not_a_server_error, checks.CHECKS.get_one("status_code_conformance")]
    wanted += [checks.CHECKS.get_one(name) for name in ("content_type_conformance", "response_schema_conformance")]
    seen: dict[int, int] = {}

    def tried(operation, examples: int, **more) -> None:
        @settings(max_examples=examples, derandomize=True, deadline=None, database=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(case=operation.as_strategy())
        def ask(case):
            if isinstance(case.body, dict):
                case.body |= {"model": "out", **more}  # by another name each one would be a 404
                if isinstance(case.body.get("max_tokens"), int):
                    case.body["max_tokens"] %= 2050
            answer = case.call(timeout=60)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + (operation.method == "post")
            if answer.status_code not in (413, 429):
                case.validate_response(answer, checks=wanted)
            nothing_private(answer.text, folder)

        ask()

    for operation in operations:
        assert "422" not in operation.definition.raw["responses"]  # which is a 400 here
        tried(operation, 70 if operation.method == "post" else 10)
        if operation.method == "post":
            tried(operation, 40, stream=True)
    assert seen[200] >= 5 and seen[400] >= 5, seen
