"""/metrics, read by Prometheus' own parser: its figures are those of the requests that were made."""

from pathlib import Path

import httpx
import pytest
from serving import Served, serving, write_run
from test_serving import FOREVER, LETTERS, asked, until

pytest.importorskip("gradio")
prometheus = pytest.importorskip("prometheus_client.parser")
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    write_run(folder / "endless", LETTERS)
    return folder


def measured(served: Served, **how) -> dict:
    """Each sample's value by its name and the values of its labels."""
    answer = httpx.get(f"{served.url}/metrics", trust_env=False, **how)
    assert answer.status_code == 200 and answer.headers["Content-Type"].startswith("text/plain; version=")
    families = prometheus.text_string_to_metric_families(answer.text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def post(served: Served, **more) -> httpx.Response:
    return httpx.post(served.url + COMPLETIONS, json=asked(**more), trust_env=False, timeout=60)


def test_figures_add_up(folder):
    with serving("--out_dir=endless", "--max_batch=20", f"--max_tokens={FOREVER}", cwd=folder) as served:
        before = measured(served)
        assert all(before[f"weigpt_{name}",] == 0 for name in ("generated_tokens_total", "jobs_running", "batch_rows"))
        for _ in range(3):
            assert post(served).status_code == 200  # 3 tokens are read, 20 written
        assert post(served, prompt=["abcd", "efgha"], max_tokens=10, stream=True).status_code == 200
        assert post(served, max_tokens=0).status_code == 200
        assert post(served, max_tokens=1).status_code == 200
        assert post(served, n=21).status_code == 400
        assert httpx.get(f"{served.url}/nowhere/at/all", trust_env=False).status_code == 404
        found = measured(served)
        assert found["weigpt_generated_tokens_total",] == 3 * 20 + 2 * 10 + 1
        assert found["weigpt_http_requests_total", COMPLETIONS, "200"] == 6
        assert found["weigpt_http_requests_total", COMPLETIONS, "400"] == 1
        assert found["weigpt_http_requests_total", "other", "404"] == 1
        assert found["weigpt_http_requests_total", "other", "200"] == 1  # of /metrics itself, before
        assert {name[1] for name in found if name[0] == "weigpt_http_requests_total"} == {COMPLETIONS, "other"}
        counts = {name: found[f"weigpt_{name}_seconds_count",] for name in ("request", "queue", "first_token")}
        assert counts == {"request": 5, "queue": 6, "first_token": 5}  # of no token there is no first
        assert found["weigpt_next_token_seconds_count",] == 4  # nor of one a second
        sums = [found[f"weigpt_{name}_seconds_sum",] for name in ("queue", "first_token", "request")]
        assert 0 < sums[0] <= sums[1] <= sums[2] and found["weigpt_next_token_seconds_sum",] > 0
        assert found["weigpt_request_seconds_bucket", "+Inf"] == 5  # what was refused at once would only flatter
        assert found["weigpt_batch_max_rows",] == 20
        read = 4 * 3 + 4 + 5  # of a text of no token nothing need be read
        assert found["weigpt_prompt_tokens_total",] in (read, read + 3)


def test_what_runs_and_waits_is_told_while_it_does(folder):
    with serving("--out_dir=endless", f"--max_tokens={FOREVER}", cwd=folder) as served:
        body, open_now = asked(max_tokens=FOREVER, n=16, stream=True), []
        with httpx.Client(trust_env=False, timeout=60) as client:
            for _ in range(3):
                open_now.append(
                    client.send(client.build_request("POST", served.url + COMPLETIONS, json=body), stream=True)
                )
            until(lambda: measured(served)["weigpt_jobs_waiting",] == 2, "two wait for the one that fills the batch")
            found = measured(served)
            assert found["weigpt_jobs_running",] == 1 and found["weigpt_batch_rows",] == 16
            more = measured(served)["weigpt_generated_tokens_total",]
            until(lambda: measured(served)["weigpt_generated_tokens_total",] > more, "tokens are not told as they come")
            for answer in open_now:
                answer.close()
            until(lambda: measured(served).get(("weigpt_http_requests_total", COMPLETIONS, "499")) == 3, "hung up")
        found = measured(served)
        assert not any(found[f"weigpt_{name}",] for name in ("jobs_waiting", "jobs_running", "batch_rows"))
        assert ("weigpt_http_requests_total", COMPLETIONS, "200") not in found


def test_where_there_is_a_key_it_is_asked_for(folder):
    with serving("--out_dir=endless", "--api_key=SECRET", cwd=folder) as served:
        for headers in ({}, {"Authorization": "Bearer SECRE"}, {"Authorization": "Bearer SECRET1"}):
            answer = httpx.get(f"{served.url}/metrics", headers=headers, trust_env=False)
            assert answer.status_code == 401 and "weigpt_" not in answer.text
        found = measured(served, headers={"Authorization": "Bearer SECRET"})
        assert found["weigpt_http_requests_total", "other", "401"] == 3
