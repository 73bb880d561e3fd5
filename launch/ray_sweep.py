"""A sweep on a Ray cluster: each Ray task runs one task of `jaxscape sweep`.

    ray job submit --working-dir . -- python launch/ray_sweep.py FILE.yaml --out DIRECTORY_OR_URL --num-gpus 1

A task that was told to stop (exit code 75), or whose node was lost, is started again and goes on where it was. A task
that fails is not, and does not stop the others.
"""

import argparse
import subprocess
import sys

import ray

TRY_AGAIN = 75  # the exit code of a task that was told to stop before its end


class StoppedEarly(Exception):
    """A task was told to stop before its end."""


# The kernel ends the task when its Ray worker ends, so that it never meets the task that Ray starts in its place.
@ray.remote(max_retries=-1, retry_exceptions=[StoppedEarly])
def run_task(command: list[str]) -> int:
    """Run a command and return its exit code, as Ray's task."""
    code = subprocess.run(["setpriv", "--pdeathsig", "KILL", *command]).returncode
    if code == TRY_AGAIN:
        raise StoppedEarly
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the sweep's YAML file, in the working directory")
    parser.add_argument(
        "--out", required=True, help="the sweep's directory: a URL, or an absolute path that all nodes share"
    )
    parser.add_argument("--num-cpus", type=float, default=1, help="CPUs of each task")
    parser.add_argument("--num-gpus", type=float, default=0, help="GPUs of each task")
    parser.add_argument("--num-tpus", type=float, default=0, help="TPU chips of each task")
    options = parser.parse_args()
    if "://" not in options.out and not options.out.startswith("/"):
        parser.error(
            f"--out {options.out} is relative to a node's own copy of the files: give a URL or an absolute path"
        )

    sweep = [sys.executable, "-m", "jaxscape", "sweep", options.file, "--out", options.out]
    count = len(subprocess.run([*sweep, "--list"], check=True, stdout=subprocess.PIPE).stdout.splitlines())
    ray.init()
    chips = {"TPU": options.num_tpus} if options.num_tpus else None
    task = run_task.options(num_cpus=options.num_cpus, num_gpus=options.num_gpus, resources=chips)
    codes = ray.get([task.remote([*sweep, "--run", str(number)]) for number in range(1, count + 1)])
    # `--status` could fail here: Ray may delete the job's working directory after a node was lost.
    sys.stdout.write(f"{count} tasks: {codes.count(0)} done, {count - codes.count(0)} failed\n")
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
