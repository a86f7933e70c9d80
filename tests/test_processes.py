"""Several processes, on CPUs by gloo: what kills one of them, and what becomes of the others and of the run."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY_ARGS
from test_train import RUN, SLOWLY, assert_same_state, figures

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")


class Job:
    """torchrun with train.py, its output in a file."""

    def __init__(self, folder: Path, dataset: Path, *launcher: str, settings=()):
        self.said = folder / f"said{len(list(folder.glob('said*')))}.txt"
        command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "train.py")]
        keys = [*TINY_ARGS, f"--dataset={dataset}", *RUN, *SLOWLY, "--eval_interval=10", *settings]
        with open(self.said, "wb") as file:
            self.process = subprocess.Popen([*command, *keys], cwd=folder, stdout=file, stderr=file)

    def text(self) -> str:
        return self.said.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, words: str) -> None:
        until = time.monotonic() + 120
        while words not in self.text():
            assert self.process.poll() is None and time.monotonic() < until, self.text()
            time.sleep(0.005)

    def pid_of(self, rank: int) -> int:
        """The process of this rank among torchrun's children."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for pid in (task / "children").read_text(encoding="utf-8").split():
                if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    return int(pid)
        raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def two(stories, tmp_path_factory):
    """A run of two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("two")
    job = Job(folder, stories, "--standalone", "--nproc_per_node=2")
    assert job.process.wait(120) == 0, job.text()
    return folder / "out"


def test_a_killed_worker_is_named_and_torchrun_goes_on_by_itself(two, stories, tmp_path):
    settings = ["--init_from=auto", "--save_interval=4"]
    job = Job(tmp_path, stories, "--standalone", "--nproc_per_node=2", "--max_restarts=3", settings=settings)
    job.wait_for("iter 12:")
    os.kill(pid := job.pid_of(1), signal.SIGKILL)
    assert job.process.wait(120) == 0, job.text()
    said = job.text()
    assert f"no sign of life from process 1 (pid {pid}" in said and "resuming from" in said, said
    assert "saved at iteration" in said  # the survivor lost nothing
    assert figures(tmp_path / "out") == figures(two)
    assert_same_state(tmp_path / "out", two)


def test_a_frozen_process_ends_the_job_within_the_time_that_is_set(stories, tmp_path):
    job = Job(tmp_path, stories, "--standalone", "--nproc_per_node=2",
              settings=["--peer_timeout=5", "--max_iters=100000", "--save_interval=1"])  # fmt: skip
    job.wait_for("iter 3:")
    pid = job.pid_of(1)
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    try:
        job.wait_for(f"process 0 gives up: no sign of life from process 1 (pid {pid}")
        assert time.monotonic() - started < 30
    finally:
        os.kill(pid, signal.SIGCONT)
    assert job.process.wait(60) != 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_without_torchrun_the_environment_is_enough(two, stories, tmp_path):
    """As mpirun, srun or a hand sets it: the first process itself keeps the store at which they meet."""
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, ROOT / "train.py", *TINY_ARGS, f"--dataset={stories}", *RUN, "--eval_interval=10"]
    processes = [
        subprocess.Popen(command, cwd=tmp_path, env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert figures(tmp_path / "out") == figures(two)


def test_machines_without_a_shared_disk_are_told_so(two, stories, tmp_path):
    """Each finds a checkpoint under the same name, but not the same one."""
    launcher = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_id=apart", "--rdzv_backend=c10d",
                f"--rdzv_endpoint=127.0.0.1:{free_port()}"]  # fmt: skip
    jobs = []
    for name, file in (("a", "last.pt"), ("b", "last.prev.pt")):
        (tmp_path / name / "out").mkdir(parents=True)
        shutil.copy(two / file, tmp_path / name / "out" / "last.pt")
        jobs.append(Job(tmp_path / name, stories, *launcher, settings=["--init_from=resume", "--max_iters=40"]))
    for job in jobs:
        assert job.process.wait(90) != 0
        assert "not all processes find the same out/last.pt" in job.text(), job.text()


def test_two_machines_meet_by_c10d_and_stop_at_the_same_step(two, stories, tmp_path):
    """Two torchruns on this machine stand for two machines with a shared disk; one of them is told to stop."""
    launcher = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_id=test", "--rdzv_backend=c10d",
                f"--rdzv_endpoint=127.0.0.1:{free_port()}"]  # fmt: skip
    jobs = [Job(tmp_path, stories, *launcher, settings=["--init_from=auto"]) for _ in range(2)]
    master = jobs[0]
    while "iter 9:" not in master.text():
        master = next((job for job in jobs if "tokens per iteration" in job.text()), master)
        assert all(job.process.poll() is None for job in jobs), [job.text() for job in jobs]
        time.sleep(0.01)
    other = jobs[1] if master is jobs[0] else jobs[0]
    other.process.send_signal(signal.SIGTERM)
    for job in jobs:
        assert job.process.wait(240) != 0
    assert "saved at iteration" in master.text(), [job.text() for job in jobs]
    jobs = [Job(tmp_path, stories, *launcher, settings=["--init_from=auto"]) for _ in range(2)]
    assert [job.process.wait(300) for job in jobs] == [0, 0], [job.text() for job in jobs]
    ours, wanted = figures(tmp_path / "out"), figures(two)
    assert [i for i, *_ in ours] == [i for i, *_ in wanted]
    # alone on its machine a process has more threads, which round differently
    assert max(abs(a[1] - b[1]) for a, b in zip(ours, wanted, strict=True)) < 1e-4
