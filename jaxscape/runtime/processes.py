"""Several processes that compute one run together: how they find each other, agree, and end.

Each runs the same program on its own devices; JAX's distributed runtime connects them. What may differ between them,
such as what is on a disk or how fast a machine is, the first one decides for all. It alone writes.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxscape.runtime.errors import UserError

HEARTBEAT_SECONDS = 20  # how long a process may be silent until the others take it for dead
_SUPERVISED = "JAXSCAPE_SUPERVISED"
# Launchers say in the environment how many processes they started; SLURM also where the first one is.
_SLURM, _OPEN_MPI = "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"


def start(coordinator: str | None, num_processes: int | None, process_id: int | None, detect: bool) -> None:
    """Join the other processes of this run, if it has several; before JAX computes anything.

    Arguments:
        coordinator: HOST:PORT of the first process; with it, the number of processes and this one's are needed, unless
            Open MPI started them.
        detect: find out from the machine, as on a TPU pod. SLURM's and Open MPI's environments are found anyway.

    Raises:
        UserError: the others cannot be found, or what was given is not enough.
    """
    devices = None
    if os.environ.get(_OPEN_MPI, "1") != "1" and num_processes is None and process_id is None:
        coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        if coordinator is None:
            raise UserError("Open MPI does not say where its first process is: give --coordinator HOST:PORT.")
        names = (_OPEN_MPI, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
        num_processes, process_id, local = (int(os.environ[name]) for name in names)
        devices = [local]  # of the machine's GPUs
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given) and None in given:
        raise UserError("Give --coordinator, --num-processes and --process-id together, or none of them.")
    if coordinator is None and not detect and os.environ.get(_SLURM, "1") == "1":
        return
    if coordinator is not None:
        port = re.fullmatch(r"\S+:(\d{1,5})", coordinator)
        if port is None or not 1 <= int(port[1]) < 2**16:
            raise UserError(f"The coordinator {coordinator!r} is none: give the first process's HOST:PORT.")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise UserError(f"The process {process_id} is not one of {num_processes}, which count from 0.")
    if os.environ.get(_SUPERVISED) is None:
        sys.exit(_supervise())
    _die_with_supervisor()
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM, and go on
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            devices,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"The other processes cannot be found ({error}); give --coordinator, --num-processes and --process-id."
        ) from error


def is_first() -> bool:
    """Whether this process is the one that decides and writes."""
    return jax.process_index() == 0


def from_first(decide: Callable[[], Any]) -> Any:
    """What `decide` gives in the first process, where alone it is called, in all of them; a `UserError` too.

    The value must be such as JSON holds.
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


def is_there_for_all(path: Path) -> bool:
    """Whether each process sees a file that the first one has written."""
    if jax.process_count() == 1:
        return path.exists()
    from_first(lambda: None)  # it has, when the others go on
    return bool(np.all(multihost_utils.process_allgather(np.bool_(path.exists()))))


def gathered(tree: Any) -> Any:
    """The arrays of a tree as a whole, where each process holds a part of them."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)


def leave(code: int) -> None:
    """End this process at once if there are others, which JAX would wait for: they notice, and end too."""
    if jax.distributed.is_initialized():  # which starts no device
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _supervise() -> int:
    """Run this program again in a process of its own, and say in a sentence why it ended, if another one died: JAX's
    runtime then aborts without asking."""
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]], env=os.environ | {_SUPERVISED: str(os.getpid())}, process_group=0
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: child.send_signal(number))
    code = child.wait()
    if code == -signal.SIGABRT:
        sys.stderr.write(
            "jaxscape: another process of this run has ended, and so this one had to; what was finished is kept, and "
            "the same commands, or one without the other processes, go on from there.\n"
        )
        return 2
    return code if code >= 0 else 128 - code


def _die_with_supervisor() -> None:
    """Have the kernel end this process when the one that supervises it is gone (Linux; elsewhere it goes on)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[_SUPERVISED]):  # it went before that
            os._exit(1)
