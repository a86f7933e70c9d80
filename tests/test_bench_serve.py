"""bench.py serve as users run it, at a size where its figures say nothing about speed."""

import json
import sys
from math import inf

import pytest
from conftest import run_script
from serving import write_run
from test_bench import TINY_BENCH

from bench_serve import compared, percentile
from tokenizer import CharTokenizer

pytest.importorskip("gradio")
pytest.importorskip("prometheus_client")
QUICK = [*TINY_BENCH, "--max_seconds=2", "--max_new_tokens=30"]


def test_serving_is_measured_with_each_number_of_clients_in_turns(tmp_path):
    asked = ["serve", *QUICK, "--clients=1,5", "--num_rounds=2", "--hang_ups=10", "--json"]
    done = run_script("bench.py", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)  # and nothing else is printed
    assert list(figures["clients"]) == ["1", "5"]
    for number, found in figures["clients"].items():
        assert found["errors"] == {} and found["refused"] == 0
        assert len(found["tokens_per_second_of_rounds"]) == 2 and min(found["tokens_per_second_of_rounds"]) > 0
        assert found["finished_tokens"] == 30 * found["finished"] > 0  # these texts end by their length alone
        # the server's own count is what the clients got, but for what was under way at both ends of two turns
        assert abs(found["tokens"] - found["finished_tokens"]) <= 2 * 2 * int(number) * 30
        assert 0 < found["first_token_seconds"] <= found["first_token_seconds_95"]
        assert found["memory_growth_kib"] == [None, None]  # too short to tell
    assert figures["clients"]["1"]["ratio"] == 1 and figures["clients"]["5"]["ratio"] > 0
    assert figures["greedy"] == {"texts": 8, "differ": 0, "ties": 0}
    left = figures["hang_ups"]
    assert (left["clients"], left["errors"], left["idle"]) == (10, 0, True)
    if sys.platform == "linux":
        assert left["before"]["threads"] >= 3 and left["before"]["memory_kib"] > 10_000
    assert figures["config"]["what"] == "serve" and figures["torch"]


def test_a_run_is_served_with_more_options_and_refusals_are_counted(tmp_path):
    letters = CharTokenizer("abcdefgh", byte_fallback=False, end_of_text=True)  # whose texts end by themselves, too
    write_run(tmp_path / "run", letters)
    options = "--serve_options=--max_waiting=0 --max_batch=1 --max_samples=1"
    asked = ["serve", *QUICK, "--init_from=run", "--clients=4", "--num_rounds=1", options]
    done = run_script("bench.py", *asked, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["clients"]["4"]
    assert found["refused"] > 0 and found["finished"] > 0 and found["errors"] == {}
    assert found["finished_tokens"] < 30 * found["finished"]
    done = run_script("bench.py", *asked, cwd=tmp_path)
    assert done.returncode == 0 and "4 clients, median of 1 rounds" in done.stdout, done.stderr
    assert "greedy texts in the company of 4 clients: 0 of 8 differ" in done.stdout


def test_texts_that_differ_are_told_by_how_near_the_tokens_were_where_they_part():
    def told(tokens: str, *top: dict) -> dict:
        return {"tokens": list(tokens), "top_logprobs": list(top)}

    near, far = {"b": -1.0, "c": -1.00005}, {"b": -1.0, "c": -1.5}
    alone = [told("ab", {"a": -1.0}, near), told("ab", {"a": -1.0}, far), told("ab", {"a": -1.0}, far)]
    company = [told("ac", {"a": -1.0}, near), told("ac", {"a": -1.0}, near), told("ab", {"a": -1.0}, far)]
    assert compared(alone, company) == {"texts": 3, "differ": 2, "ties": 1}
    other = [told("ad", {"a": -1.0}, near)]  # by a token that was not among the likeliest
    assert compared(alone[:1], other) == {"texts": 1, "differ": 1, "ties": 0}


def test_the_value_that_so_many_do_not_exceed():
    assert percentile([], 0.5) is None and percentile([3.0], 0.95) == 3.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0 and percentile(list(range(1, 101)), 0.95) == 95
    assert percentile([inf, 0.0], 1.0) == inf


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--clients=1,x"], "whole numbers between commas"),
        (["--clients=0"], "clients=0"),
        (["--hang_ups=-1"], "hang_ups=-1"),
        (["--init_from=./nowhere"], "no folder ./nowhere"),
        (["--vocab_size=1000001"], "2 to a million"),
        (["--serve_options=--max_batch=0"], "max_batch=0: expected at least 1"),
        (["--serve_options=--nothing=1"], "unknown key --nothing"),
    ],
)
def test_mistakes_are_sentences(wrong, words, tmp_path):
    done = run_script("bench.py", "serve", *QUICK, *wrong, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
