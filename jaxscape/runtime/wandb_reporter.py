"""Reports to Weights & Biases: a run of the project `jaxscape`, with its files in the run's directory.

wandb's own environment variables are obeyed: with `WANDB_MODE=offline` nothing leaves the machine.
"""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.extras import import_extra
from jaxscape.runtime.files import checksum, write_whole

PROJECT, FOLDER, ID = "jaxscape", "wandb", "id.txt"


class WandbReporter:
    """Logs the numbers of each step, and the run's configuration."""

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: wandb is not installed, or no one is logged in.
        """
        wandb = import_extra("wandb", "wandb")
        try:
            self._run = wandb.init(
                project=PROJECT,
                name=directory.resolve().name,
                id=_run_id(directory, config),
                resume="allow",
                dir=directory,
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
            )
        except wandb.Error as error:
            raise UserError(
                f"wandb cannot be used ({reason(error)}): run 'wandb login', or set WANDB_MODE=offline."
            ) from error

    def log(self, step: int, numbers: Mapping[str, int | float]) -> None:
        """Log numbers by name."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Send what is left, and end wandb's run."""
        self._run.finish()


def _run_id(directory: Path, config: Mapping[str, Any]) -> str:
    """The id of the run at Weights & Biases: a random part, which the directory keeps, and a checksum of the
    configuration.

    A resumed run has the same id and goes on there. A run that extends another one gets a new id, because its steps
    begin at 1 again.
    """
    path = directory / FOLDER / ID
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_whole(path, secrets.token_hex(8))
    return f"{path.read_text(encoding='utf-8').strip()}-{checksum(json.dumps(config, sort_keys=True))[:8]}"
