"""Several processes that compute one run together: how they join, share decisions, and end.

Each process runs the same program on its own devices, and JAX's distributed runtime connects them. Whatever could
differ between processes, such as the contents of a disk or the speed of a machine, the first process decides for all
of them. Only the first process writes files, apart from checkpoints and weights, of which each process writes its part.
"""

import ctypes
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxscape.runtime.children import run_child
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.preemption import SUPERVISED
from jaxscape.runtime.streams import flush_streams

HEARTBEAT_SECONDS = 20  # a process that is silent for this long is taken for dead by the others
# The environment variables in which a launcher tells each process how many it has started.
_SLURM_SIZE, _OPEN_MPI_SIZE = "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"


class _Membership(NamedTuple):
    """This process's place among the processes of a run. JAX detects each attribute that is None.

    Attributes:
        coordinator: HOST:PORT of the first process.
        process_id: number of this process, counted from 0.
        local_devices: indices of the machine's GPUs that this process uses.
    """

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    local_devices: list[int] | None = None


def join_processes(coordinator: str | None, num_processes: int | None, process_id: int | None, detect: bool) -> None:
    """Join the other processes of this run, if there are any. Must be called before JAX computes anything.

    Arguments:
        coordinator: HOST:PORT of the first process. The next two arguments must be given with it, unless Open MPI
            started the processes.
        num_processes: the number of processes.
        process_id: the number of this process, counted from 0.
        detect: let JAX find the other processes by itself, as on a TPU pod. Processes that SLURM or Open MPI started
            find one another without it.

    Raises:
        UserError: the arguments are incomplete or wrong, or the other processes cannot be found.
    """
    membership = _Membership(coordinator, num_processes, process_id)
    if _launched_by(_OPEN_MPI_SIZE) and num_processes is None and process_id is None:
        membership = _open_mpi_membership(coordinator)
    _check(membership)
    if membership.coordinator is None and not detect and not _launched_by(_SLURM_SIZE):
        return
    if os.environ.get(SUPERVISED) is None:
        sys.exit(_supervise())
    _die_with_supervisor()
    _initialize(membership)


def _launched_by(size_variable: str) -> bool:
    """Whether the launcher that sets this variable started more than one process."""
    return os.environ.get(size_variable, "1") != "1"


def _open_mpi_membership(coordinator: str | None) -> _Membership:
    """The membership that Open MPI's environment variables describe. They do not name the coordinator, which must be
    given. Each process uses one GPU."""
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is None:
        raise UserError("Open MPI does not say where its first process is: give --coordinator HOST:PORT.")
    names = (_OPEN_MPI_SIZE, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    size, rank, local_rank = (int(os.environ[name]) for name in names)
    return _Membership(coordinator, size, rank, [local_rank])


def _check(membership: _Membership) -> None:
    """Raise a `UserError` if the membership is incomplete or contradicts itself."""
    coordinator, num_processes, process_id, _ = membership
    if coordinator is None and num_processes is None and process_id is None:
        return
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError("Give --coordinator, --num-processes and --process-id together, or none of them.")
    port = re.fullmatch(r"\S+:(\d{1,5})", coordinator)
    if port is None or not 1 <= int(port[1]) < 2**16:
        raise UserError(f"Cannot parse the coordinator {coordinator!r}: give HOST:PORT of the first process.")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process-id {process_id} is not one of {num_processes} processes, which count from 0.")


def _initialize(membership: _Membership) -> None:
    """Connect JAX's distributed runtime."""
    jax.config.update("jax_enable_preemption_service", False)  # the service would catch SIGTERM and not end the process
    try:
        jax.distributed.initialize(
            *membership,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"The other processes cannot be found ({reason(error)}): give --coordinator, --num-processes and "
            f"--process-id."
        ) from error


def is_first() -> bool:
    """Whether this is the first process, which decides and writes."""
    return jax.process_index() == 0


def from_first(decide: Callable[[], Any]) -> Any:
    """The result of `decide`, which only the first process calls, in all processes.

    Arguments:
        decide: returns a value that can be written as JSON. If it raises a `UserError`, all processes raise it.
    """
    if jax.process_count() == 1:
        return decide()
    message: dict[str, Any] = {}
    if is_first():
        try:
            message = {"value": decide()}
        except UserError as error:
            message = {"error": str(error)}
    text = json.dumps(message).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    content = np.zeros(length, np.uint8)
    content[:] = np.frombuffer(text, np.uint8) if is_first() else 0
    message = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes())
    if "error" in message:
        raise UserError(message["error"])
    return message["value"]


def is_visible_to_all(path: Path) -> bool:
    """Whether every process sees a file that the first process has written."""
    if jax.process_count() == 1:
        return path.exists()
    from_first(lambda: None)  # waits until the first process has written the file
    return bool(np.all(multihost_utils.process_allgather(np.bool_(path.exists()))))


def gathered(tree: Any) -> Any:
    """The tree with full arrays on every host, gathered if each process holds a part of them."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)


def exit_if_joined(code: int) -> None:
    """End this process at once if it has joined others; they notice and end too. A normal exit would wait for them."""
    if jax.distributed.is_initialized():  # unlike jax.process_count(), this initialises no device
        flush_streams()
        os._exit(code)


def _supervise() -> int:
    """Run this program again in a child process and return its exit code.

    If another process of the run dies, JAX's runtime aborts the child; the supervisor then says why.
    """
    code = run_child([sys.executable, *sys.orig_argv[1:]], {SUPERVISED: str(os.getpid())})
    if code == -signal.SIGABRT:
        sys.stderr.write(
            "jaxscape: another process of this run has ended, so this one had to end too. Finished work is kept: run "
            "the same commands again, or one of them without the other processes, to resume.\n"
        )
        return 2
    return code if code >= 0 else 128 - code


def _die_with_supervisor() -> None:
    """Have the kernel kill this process when its supervisor ends. This works on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[SUPERVISED]):  # the supervisor ended before the call
            os._exit(1)
