"""A Slurm of the tests' own on this machine: two nodes of one core each, nothing outside its folder.

What it cannot show: other machines, network file systems, GPUs, memory limits, accounting.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
_START_S = 60.0
PATIENCE_S = 180.0
"""Longest wait for anything: the machine may have much else to do."""

_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has run out: 2 min by default.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
# A lost node stays lost until the test brings it back.
ReturnToService=0
KillWait={kill_wait_s}
MinJobAge=600
{nodes}
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why there can be no Slurm here; None if there can."""
    absent = [name for name in _PROGRAMS if _program(name) is None]
    if absent:
        return f"needs Slurm (apt-get install slurmctld slurmd slurm-client munge): no {absent[0]}"
    if os.geteuid() != 0:
        return "needs root: slurmd starts jobs for other users"
    return None


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def wait_until(
    condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S, every_s: float = 0.2
) -> None:
    """Wait for something, and fail with its name if it does not come."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"waited {timeout_s:.0f} s in vain until {what}"
        time.sleep(every_s)


class Slurm:
    """A running controller and its nodes."""

    def __init__(self, folder: Path, nodes: tuple[str, ...]) -> None:
        self.folder = folder
        self.nodes = nodes
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, stdin: str | None = None) -> str:
        """Run one of Slurm's commands and return what it prints."""
        done = subprocess.run(
            command, env=self.environment, input=stdin, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, script: str, *options: str) -> str:
        """Submit a batch script; return the job's number."""
        return self.run("sbatch", "--parsable", *options, stdin=script)

    def states(self) -> dict[str, str]:
        """Return job -> state, of all jobs that the controller remembers; array tasks as `1_0`."""
        lines = self.run("squeue", "--noheader", "--array", "--states=all", "--format=%i %T")
        return dict(line.split() for line in lines.splitlines())

    def running(self) -> list[str]:
        """Return the numbers of running jobs."""
        return sorted(job for job, state in self.states().items() if state == "RUNNING")

    def detail(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` knows of a job."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def cancel_all(self) -> None:
        """End all jobs, and wait until their processes are gone and the nodes are up."""
        user = pwd.getpwuid(os.geteuid()).pw_name
        wait_until(lambda: self._is_clean(user), "all jobs are gone")

    def lose(self, node: str) -> None:
        """Make a node fail: Slurm kills its jobs, and requeues them elsewhere if it may."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def bring_back(self, node: str) -> None:
        """Make a lost node available again."""
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def _is_clean(self, user: str) -> bool:
        subprocess.run(["scancel", f"--user={user}"], env=self.environment, capture_output=True)
        for node in self.nodes:
            if "down" in self.run("sinfo", "--noheader", f"--nodes={node}", "--format=%t"):
                self.bring_back(node)
        states = self.run("sinfo", "--noheader", "--Node", "--format=%t").split()
        return set(states) == {"idle"} and not self.run("squeue", "--noheader")


@contextmanager
def one_machine_slurm(n_nodes: int = 2, kill_wait_s: int = 20) -> Iterator[Slurm]:
    """Start a Slurm and end it again, with every process of it."""
    with ExitStack() as stack:
        # Not below pytest's folder: the name of a socket may have 107 characters.
        folder = Path(tempfile.mkdtemp(prefix="emocache-slurm-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o755)
        slurm = Slurm(folder, tuple(f"n{i}" for i in range(1, n_nodes + 1)))
        stack.callback(_kill_users_of, slurm.environment["SLURM_CONF"])
        _configure(slurm, kill_wait_s)
        munge = [
            "munged", "--foreground", "--force", f"--key-file={folder}/munge.key",
            f"--socket={folder}/munge.sock", f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
        ]  # fmt: skip
        stack.enter_context(_daemon(munge, slurm))
        wait_until((folder / "munge.sock").exists, "munged listens", _START_S)
        stack.enter_context(_daemon(["slurmctld", "-D"], slurm))
        for node in slurm.nodes:
            stack.enter_context(_daemon(["slurmd", "-D", "-N", node], slurm))
        wait_until(lambda: _all_idle(slurm), "all nodes are idle", _START_S)
        yield slurm
        with suppress(AssertionError, subprocess.TimeoutExpired):
            slurm.cancel_all()


def _configure(slurm: Slurm, kill_wait_s: int) -> None:
    folder, host = slurm.folder, socket.gethostname().partition(".")[0]
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (folder / "state").mkdir()
    port, *ports = _free_ports(1 + len(slurm.nodes))
    nodes = []
    for name, node_port in zip(slurm.nodes, ports, strict=True):
        (folder / f"spool-{name}").mkdir()
        nodes.append(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=1 RealMemory=4000"
        )
    user = pwd.getpwuid(os.geteuid()).pw_name
    conf = _CONF.format(
        host=host, port=port, user=user, folder=folder, nodes="\n".join(nodes),
        kill_wait_s=kill_wait_s,
    )  # fmt: skip
    (folder / "slurm.conf").write_text(conf)


def _free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _all_idle(slurm: Slurm) -> bool:
    found = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%t"],
        env=slurm.environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return found.stdout.split() == ["idle"] * len(slurm.nodes)


@contextmanager
def _daemon(command: list[str], slurm: Slurm) -> Iterator[None]:
    """Run a daemon in the foreground of its own session, so that a Ctrl-C in the terminal passes it."""
    program = _program(command[0])
    assert program is not None
    with (slurm.folder / f"{'-'.join(command)[:40].replace('/', '_')}.log").open("wb") as log:
        process = subprocess.Popen(
            [program, *command[1:]],
            env=slurm.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _kill_users_of(conf: str) -> None:
    """Kill what is left of the jobs: every process that was started under this configuration."""
    wanted = f"SLURM_CONF={conf}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)


@pytest.fixture(scope="session")
def slurm_server() -> Iterator[Slurm]:
    """A Slurm for all tests of this process."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with one_machine_slurm() as slurm:
        yield slurm


@pytest.fixture
def slurm(slurm_server: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """The Slurm with idle nodes and an empty queue, for this process's own commands too."""
    environment: Mapping[str, str] = slurm_server.environment
    monkeypatch.setenv("SLURM_CONF", environment["SLURM_CONF"])
    slurm_server.cancel_all()
    yield slurm_server
    slurm_server.cancel_all()
