"""Measure the engine on one GPU, at the shapes of large models with random weights.

Run it from the repository's root; it takes some twenty minutes with all parts:

    python benchmarks/gpu.py                         # every case, each in a process of its own
    python benchmarks/gpu.py --cases 8b-80 8b-512    # some of them
    python benchmarks/gpu.py --reference             # beside Hugging Face generate, which needs PyTorch with CUDA
    python benchmarks/gpu.py --profile               # also which kernels a decode step runs
    python benchmarks/gpu.py --loading               # also how long loading takes; writes up to 16 GB to a local disk
    python benchmarks/gpu.py --cases --forms 8b-quarter   # the forms at 1 to 21 points, and the planner's choice
    python benchmarks/gpu.py --cases --finetuning 1b      # full finetuning

A case is a number of points of a line, the same prompts at each, and a number of new tokens, in bfloat16. The floor of
a decode step is the time to read the weights and the filled cache slots once at the card's datasheet bandwidth. Each
case is measured twice: the first process compiles its programs, the second finds them in JAX's cache.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_parts import Case

from jaxscape.cli.main import run_program
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.streams import write_line

CASES = {
    "tiny": Case("tiny", prompts=8, new_tokens=16),
    "135m-80": Case("135m"),
    "1b-80": Case("1b"),
    "1b-factorised": Case("1b", form="factorised"),
    "8b-80": Case("8b"),
    "8b-512": Case("8b", new_tokens=512, points=1),
    "8b-256": Case("8b", prompts=256, points=2),
    "8b-factorised": Case("8b", form="factorised"),
}


@dataclass(frozen=True)
class Benchmark:
    """Measure the engine on one GPU."""

    cases: tuple[str, ...] = tuple(name for name in CASES if name != "tiny")
    """The cases to measure."""
    loading: bool = False
    """Also measure how long a model takes to load from a local disk."""
    dtype: str = "bfloat16"
    """The dtype of weights and activations."""
    reference: bool = False
    """Also measure Hugging Face generate with a compiled static cache."""
    profile: bool = False
    """Also write which kernels a decode step runs."""
    forms: tuple[str, ...] = ()
    """The shapes at which the forms are compared."""
    finetuning: tuple[str, ...] = ()
    """The shapes for which full finetuning is measured."""
    once: bool = False
    """Measure each case in one process only, which compiles."""

    def run(self) -> None:
        unknown = sorted(set(self.cases) - set(CASES))
        if unknown:
            raise UserError(f"There is no case {unknown[0]!r}; choose {', '.join(CASES)}.")
        results = []
        for name in self.cases:
            result = self._in_process("engine", CASES[name])
            if not self.once:
                again = self._in_process("engine", CASES[name])
                result |= {"second_start_s": again["first_point_s"]}
            if self.reference:
                result |= self._in_process("reference", CASES[name])
            if self.loading:
                result |= self._in_process("loading", CASES[name])
            results.append({"case": name} | result)
            write_line(json.dumps(results[-1]))
        if results:
            write_table(results)
        for part in ("forms", "finetuning"):
            for shape in getattr(self, part):
                write_line(json.dumps({"part": part, "shape": shape} | self._in_process(part, Case(shape))))

    def _in_process(self, part: str, case: Case) -> dict[str, Any]:
        """The result of a part of `gpu_parts` for a case."""
        call = f"gpu_parts.{part}(json.loads(sys.argv[1]), sys.argv[2], bool(sys.argv[3]))"
        path = str(Path(__file__).parent)
        code = f"import json, sys; sys.path.insert(0, {path!r}); import gpu_parts; print(json.dumps({call}))"
        arguments = [json.dumps(asdict(case)), self.dtype, "1" if self.profile else ""]
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
        last = ""
        for line in process.stdout or ():  # each line is written when it comes, because a case takes minutes
            if last:
                write_line(last)
            last = line.rstrip("\n")
        if process.wait():
            raise UserError(f"The part {part!r} of the case {case} failed with exit code {process.returncode}.")
        result: dict[str, Any] = json.loads(last)
        return result


def write_table(results: Sequence[dict[str, Any]]) -> None:
    """Write the results as a Markdown table."""
    columns = {
        "case": "case",
        "rows": "rows",
        "step_ms": "decode step, ms",
        "of_floor": "share of the floor",
        "tokens_per_s": "scan, tokens/s",
        "generate_tokens_per_s": "generate, tokens/s",
        "load_s": "load, s",
        "direction_s": "direction, s",
        "first_point_s": "first point, s",
        "second_start_s": "second start, s",
        "peak_gb": "peak, GB",
    }
    used = [name for name in columns if any(name in result for result in results)]

    def cell(value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"

    write_line("| " + " | ".join(columns[name] for name in used) + " |")
    write_line("| " + " | ".join("---" for _ in used) + " |")
    for result in results:
        write_line("| " + " | ".join(cell(result.get(name, "")) for name in used) + " |")


if __name__ == "__main__":
    run_program(Benchmark)
