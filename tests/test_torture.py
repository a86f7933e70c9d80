"""A minute of tests/torture.py, which can run for longer by hand."""

import re
import sys

import pytest
from conftest import run_script


@pytest.mark.skipif(sys.platform != "linux", reason="kills processes and fills disks in Linux's ways")
def test_a_minute_of_torture_loses_nothing(tmp_path):
    # a temporary folder of its own, not pytest's, which a process that gave up root's rights could not enter
    done = run_script("tests/torture.py", "--minutes=1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {what: int(n) for n, what in re.findall(r"^ +(\d+)  (.+)$", done.stdout, re.MULTILINE)}
    assert counts["kills"] >= 5 and counts["kills inside a save"] >= 1, done.stdout
    assert sum(n for what, n in counts.items() if what.startswith("damaged files")) == 100
    assert counts["runs moved from 1 to 2 to 4 to 1 processes"] == 1
    assert any(what.startswith("full disks") for what in counts) and "promises broken: 0" in done.stdout
