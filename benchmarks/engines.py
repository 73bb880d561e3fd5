"""A sweep on a real SLURM or Ray on this machine, interrupted at random, against the same sweep without interruption.

    python benchmarks/engines.py slurm FILE.yaml --out runs/engines          # needs slurmctld, slurmd and munged
    python benchmarks/engines.py ray FILE.yaml --out runs/engines            # needs pip install "ray[default]"

The cluster is made for this run, without any setting of the system, and removed at the end. The sweep is submitted with
the file of `launch/`, two tasks at a time. Then tasks are interrupted at random moments, each time in a random way: a
task gets SIGTERM; SLURM takes its place away (`scontrol requeue`), or Ray's worker is killed; a node is lost with all
that runs there. At the end `--table` merges the shards, the same scans run without shards and without
interruption, and the files of each scan are compared byte by byte.

The weights are materialised unless the sweep's file names their form: with the planner's choice, which depends on the
speed of the moment, the bytes would not need to be equal.
"""

import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
import yaml

from jaxscape.cli.main import run_program
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.help import shown
from jaxscape.runtime.streams import write_line

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
PYTHON = "[^ ]*python[^ ]* "  # how the command line of a task begins, and not that of a launcher
SWEEP = (sys.executable, "-m", "jaxscape", "sweep")
SLURM_CONF = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={directory}/munge.socket,cred_expire=10
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
ReturnToService=2
SchedulerParameters=sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
TaskPlugin=task/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Engine:
    """A sweep on a cluster.

    Attributes:
        is_running: returns whether the sweep has tasks that are not finished.
        interruptions: the ways to interrupt a task, each a function of the task's number.
    """

    is_running: Callable[[], bool]
    interruptions: Mapping[str, Callable[[int], object]]


@dataclass(frozen=True)
class EnginesBenchmark:
    """Interrupt a sweep on a local cluster at random, and compare its runs with those of an unbroken sweep."""

    engine: Annotated[Literal["slurm", "ray"], tyro.conf.Positional]
    """The engine."""
    file: Annotated[Path, tyro.conf.Positional, shown(metavar="FILE")]
    """The sweep's YAML file."""
    out: Path = Path("runs/engines")
    """The directory of both sweeps."""
    interruptions: int = 20
    """How often a task is interrupted."""
    seconds: float = 60.0
    """Mean time between two interruptions."""
    seed: int = 0
    """Seed of what is interrupted, when and how."""

    def run(self) -> None:
        out, whole = self.out.resolve() / self.engine, self.out.resolve() / "unbroken"
        file, whole_file = out / "sweep.yaml", whole / "sweep.yaml"
        settings = yaml.safe_load(self.file.read_text())
        settings["scan"] = {"form": "materialised"} | settings.get("scan", {})
        write_yaml(file, settings)
        write_yaml(whole_file, settings | {"shards": 1})
        start, done = {"slurm": on_slurm, "ray": on_ray}[self.engine], Counter[str]()
        began = time.monotonic()

        def say(text: str) -> None:
            write_line(f"{time.monotonic() - began:5.0f} s: {text}")

        with start(file, out) as engine:
            say("the cluster is set up, and the sweep is submitted")
            wait_for(lambda: bool(running_tasks(out)) or not engine.is_running())
            say("the first task runs")
            choose = random.Random(self.seed)
            while engine.is_running():
                time.sleep(choose.uniform(0, 2 * self.seconds) if done.total() < self.interruptions else 5)
                tasks = running_tasks(out)
                if tasks and done.total() < self.interruptions:
                    task, name = choose.choice(tasks), choose.choice(sorted(engine.interruptions))
                    engine.interruptions[name](task)
                    done[name] += 1
                    say(f"task {task}: {name}")
        say(f"the sweep is done; interruptions: {dict(done)}")
        subprocess.run([*SWEEP, file, "--out", out, "--table"], check=True)
        subprocess.run([*SWEEP, whole_file, "--out", whole], check=True)
        compare(out, whole)


def write_yaml(path: Path, settings: object) -> None:
    """Write a YAML file, with the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings))


def compare(merged: Path, whole: Path) -> None:
    """Compare each scan's files of two sweeps byte by byte. Exit with code 1 if any differ."""
    scans = sorted(path.parent for path in whole.glob("*/config.json"))
    files = [path.relative_to(whole) for scan in scans for path in sorted(scan.iterdir()) if path.is_file()]
    different = [f for f in files if not (merged / f).exists() or (merged / f).read_bytes() != (whole / f).read_bytes()]
    for path in different:
        write_line(f"different: {path}")
    write_line(f"{len(scans)} scans, {len(files)} files: {len(files) - len(different)} are equal byte for byte.")
    sys.exit(bool(different or not scans))


@contextmanager
def on_slurm(file: Path, out: Path) -> Iterator[Engine]:
    """The sweep as a job array of a SLURM of its own."""
    with local_slurm() as slurm:
        script, host = str(LAUNCH / "slurm.sbatch"), socket.gethostname().split(".")[0]
        log = f"--output={out}/%x-%A_%a.log"
        job = slurm(
            "sbatch", "--parsable", f"--array=1-{count_tasks(file)}", "--time=8:00:00", log, script, file, "--out", out
        )

        def lose_node(_: int) -> None:
            # A node that comes back runs nothing. SLURM drains a node that still runs a job which starts there again.
            for processes in ("^slurmstepd: ", f"{out} --run "):
                subprocess.run(["pkill", "--signal", "KILL", "--full", processes])
            slurm("scontrol", "update", f"nodename={host}", "state=down", "reason=lost")
            slurm("scontrol", "update", f"nodename={host}", "state=resume", check=False)  # it may be back already

        yield Engine(
            lambda: bool(slurm("squeue", "--noheader")),
            {
                "SIGTERM": lambda task: signal_task(out, task),
                "scontrol requeue": lambda task: slurm("scontrol", "requeue", f"{job}_{task}", check=False),
                "node lost": lose_node,
            },
        )


@contextmanager
def local_slurm(programs: Path = Path(sys.executable).parent) -> Iterator[Callable[..., str]]:
    """A SLURM with one node of two CPUs, which is this machine. Yields a function that runs a command of SLURM's
    clients and returns what it prints. No file outside a temporary directory is read or written, and any user may
    start it. A job that is requeued starts again when the credentials of its last start have expired, which takes ten
    seconds here and else two minutes.

    Arguments:
        programs: the directory in which jobs find `jaxscape`.

    Raises:
        UserError: SLURM is not installed.
    """
    daemons = [shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("munged", "slurmctld", "slurmd")]
    if None in daemons:
        raise UserError("SLURM is not installed: run apt-get install slurm-wlm munge.")
    munged, slurmctld, slurmd = map(str, daemons)
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        for folder in ("state", "spool"):
            (directory / folder).mkdir()
        configuration = SLURM_CONF.format(
            host=socket.gethostname().split(".")[0],
            controller_port=free_port(),
            node_port=free_port(),
            user=getpass.getuser(),
            directory=directory,
        )
        (directory / "slurm.conf").write_text(configuration)
        (directory / "munge.key").touch(mode=0o600)
        (directory / "munge.key").write_bytes(os.urandom(1024))
        environment = os.environ | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": f"{programs}:{os.environ['PATH']}",
        }
        own = [f"--{key}={directory}/munge.{end}" for key, end in (("socket", "socket"), ("key-file", "key"))]
        own += [f"--{key}={directory}/munged.{key}" for key in ("pid-file", "log-file", "seed-file")]

        def client(*command: object, check: bool = True) -> str:
            text = list(map(str, command))
            result = subprocess.run(text, env=environment, stdout=subprocess.PIPE, text=True, check=check)
            return result.stdout.strip()

        def start(*command: str) -> subprocess.Popen[bytes]:
            # They write log files.
            return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        processes = [start(munged, "--foreground", "--force", *own)]
        try:
            wait_for(lambda: (directory / "munge.socket").exists())
            processes += [start(daemon, "-D") for daemon in (slurmctld, slurmd)]
            wait_for(lambda: client("sinfo", "--noheader", "--states=idle", "--format=%D", check=False) == "1")
            try:
                yield client
            finally:
                client("scancel", "--user", str(os.getuid()), check=False)
                wait_for(lambda: not client("squeue", "--noheader", check=False))
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait()


@contextmanager
def on_ray(file: Path, out: Path) -> Iterator[Engine]:
    """The sweep as a job of a Ray of its own, with a node of two CPUs beside the head."""
    with local_ray() as (ray, lose_node), tempfile.TemporaryDirectory() as name:
        for path in (file, LAUNCH / "ray_sweep.py"):
            shutil.copy(path, name)
        command = ("python", "ray_sweep.py", file.name, "--out", out)
        job = ray("job", "submit", "--no-wait", "--submission-id=sweep", f"--working-dir={name}", "--", *command)
        write_line(job)

        yield Engine(
            lambda: bool(re.search("PENDING|RUNNING", ray("job", "status", "sweep"))),
            {
                "SIGTERM": lambda task: signal_task(out, task),
                "worker killed": lambda task: kill_parent(out, task),
                "node lost": lambda _: lose_node(),
            },
        )
        write_line(ray("job", "logs", "sweep"))


@contextmanager
def local_ray() -> Iterator[tuple[Callable[..., str], Callable[[], None]]]:
    """A Ray whose head runs no tasks, with one node of two CPUs, which is also this machine. Yields a function that
    runs `ray` and returns what it prints, and one that loses the node, with all that runs there, and starts another.

    Raises:
        UserError: Ray is not installed.
    """
    program = shutil.which("ray", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        raise UserError('Ray is not installed: run pip install "ray[default]".')
    head, dashboard = free_port(), free_port()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # where the job finds `python`
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # it would kill tasks when other programs fill the memory
    }
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:

        def start(*arguments: str) -> subprocess.Popen[bytes]:
            # All processes of a node are in its session.
            return subprocess.Popen(
                [program, "start", "--block", *arguments],
                env=environment,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

        def start_node() -> subprocess.Popen[bytes]:
            return start(f"--address=127.0.0.1:{head}", "--num-cpus=2")

        def client(*command: object) -> str:
            result = subprocess.run(
                [program, *map(str, command)], env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            return result.stdout.strip()

        def lose_node() -> None:
            kill_session(nodes.pop())
            nodes.append(start_node())

        ports = (f"--port={head}", f"--dashboard-port={dashboard}")
        nodes = [start("--head", "--num-cpus=0", *ports, f"--temp-dir={directory}")]
        try:
            wait_for(lambda: answers(dashboard))
            nodes.append(start_node())
            yield client, lose_node
        finally:
            for node in reversed(nodes):
                kill_session(node)


def count_tasks(file: Path) -> int:
    """The number of tasks of a sweep."""
    return len(subprocess.run([*SWEEP, file, "--list"], check=True, stdout=subprocess.PIPE).stdout.splitlines())


def running_tasks(out: Path) -> list[int]:
    """The numbers of the tasks of a sweep that run now."""
    processes = subprocess.run(["pgrep", "--full", "--list-full", f"^{PYTHON}.*{out} --run"], stdout=subprocess.PIPE)
    return [int(line.split()[-1]) for line in processes.stdout.splitlines()]


def process_of(out: Path, task: int) -> int | None:
    """The id of the process that runs a task; None if it has ended."""
    found = subprocess.run(["pgrep", "--full", f"^{PYTHON}.*{out} --run {task}$"], stdout=subprocess.PIPE)
    return int(found.stdout) if found.stdout else None


def signal_task(out: Path, task: int) -> None:
    """Send SIGTERM to a task."""
    process = process_of(out, task)
    if process is not None:
        os.kill(process, signal.SIGTERM)


def kill_parent(out: Path, task: int) -> None:
    """Kill the process that has started a task."""
    process = process_of(out, task)
    if process is not None:
        os.kill(int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1]), signal.SIGKILL)


def kill_session(leader: subprocess.Popen[bytes]) -> None:
    """Kill all processes of a session at once, as when a machine loses its power."""
    subprocess.run(["pkill", "--signal", "KILL", "--session", str(leader.pid)])
    leader.wait()


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def answers(port: int) -> bool:
    """Whether a server of this machine accepts connections at a port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    """Wait until a condition holds.

    Raises:
        UserError: it does not in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise UserError(f"The local cluster did not answer for {seconds:.0f} s.")
        time.sleep(0.2)


if __name__ == "__main__":
    run_program(EnginesBenchmark)
