"""A minute of tests/torture.py, which can run for longer by hand."""

import re
import sys

import pytest
from conftest import run_script

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills processes and fills disks in Linux's ways")


def counts_of(*settings: str, cwd) -> dict[str, int]:
    # a temporary folder of its own, not pytest's, which a process that gave up root's rights could not enter
    done = run_script("tests/torture.py", *settings, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "promises broken: 0" in done.stdout
    counts = {what: int(n) for n, what in re.findall(r"^ +(\d+)  (.+)$", done.stdout, re.MULTILINE)}
    assert counts["runs moved from 1 to 2 to 4 to 1 processes"] == 1
    assert any(what.startswith("full disks") for what in counts), done.stdout
    return counts


def test_a_minute_of_torture_loses_nothing(tmp_path):
    counts = counts_of("--minutes=1", cwd=tmp_path)
    assert counts["kills"] >= 5 and counts["kills inside a save"] >= 1, counts
    assert sum(n for what, n in counts.items() if what.startswith("damaged files")) == 100


def test_nor_does_a_sharded_run(tmp_path):
    counts = counts_of(
        "--processes=2", "--parallel=fsdp", "--iterations=100", "--kills=4", "--damaged=40", cwd=tmp_path
    )
    assert counts["kills"] >= 4, counts
    assert sum(n for what, n in counts.items() if what.startswith("damaged files")) == 40
