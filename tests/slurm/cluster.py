"""A real Slurm of several virtual nodes on this machine, started and stopped by the tests. Needs root."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.launcher.conftest import ENVIRONMENT

ROOT = Path(__file__).parents[2]
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
NODES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
"""The nodes' names are their addresses, which nobody needs to look up: all are this machine."""

# Two partitions over the same nodes: a job in `urgent` preempts one in `normal`, which is first told to stop.
# The timeouts are short, and a requeued job waits for cred_expire before it starts again.
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=8
SlurmctldTimeout=8
MessageTimeout=5
KillWait=25
MinJobAge=600
ReturnToService=2
{nodes}
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr={name} Port={port} CPUs=16 RealMemory=64000 Gres=gpu:8"


class Cluster:
    """The daemons, and the commands that a user types."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        # Its GPUs are files: the jobs ask for CPUs.
        self.environment |= ENVIRONMENT | {"SLURM_CONF": str(folder / "slurm.conf"), "DS_ACCELERATOR": "cpu"}

    def start(self) -> None:
        host = os.uname().nodename.split(".")[0]
        first, *ports = free_ports(1 + len(NODES))
        nodes = "\n".join(NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports, strict=True))
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, host=host, port=first, nodes=nodes))
        for gpu in range(8):
            (self.folder / f"gpu{gpu}").touch()
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/gpu[0-7]\n")
        (self.folder / "state").mkdir()
        self._start_munge()
        self._start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self.idle() == set(NODES), 30, "idle nodes")

    def start_node(self, node: str) -> None:
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon: for Slurm the node is gone."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def stop(self) -> None:
        """End every job, then every daemon."""
        if "slurmctld" in self._daemons:
            self.run("scancel", "--user=root", check=False)
            self.wait(lambda: not self.run("squeue", "--noheader", check=False), 60, "jobs that end")
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: object, check: bool = True, **environment: str) -> str:
        """Type a command at the repository's root. Returns what it printed."""
        done = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return (done.stdout + done.stderr).strip()

    def idle(self) -> set[str]:
        return set(self.run("sinfo", "-h", "-N", "-p", "normal", "-t", "idle", "-o", "%N", check=False).split())

    def job(self, job: str) -> dict[str, str]:
        """What scontrol says of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    @staticmethod
    def wait(until: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s"
            time.sleep(0.1)

    def _start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._start("munged", "munged", "--foreground", "--force", f"--seed-file={self.folder / 'seed'}", *options)
        self.wait(lambda: (self.folder / "munge.socket").exists(), 10, "munged")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
