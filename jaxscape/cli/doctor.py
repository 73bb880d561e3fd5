"""`jaxscape doctor`: say what is installed, which devices are found, and what is missing."""

import json
from dataclasses import dataclass

from jaxscape.runtime.streams import write_line
from jaxscape.runtime.texts import printable


@dataclass(frozen=True)
class Doctor:
    """Say what is installed, which devices are found, and what is missing, to be pasted into a bug report.

    It loads no model, downloads nothing and writes nothing, and its exit code is 0 whatever it finds.

    Examples:
      # After an installation, or for a bug report
      jaxscape doctor
      # Into a file
      jaxscape doctor > doctor.txt
      # For a script
      jaxscape doctor --json
    """

    json: bool = False
    """Write JSON instead of lines."""

    def run(self) -> None:
        from jaxscape.runtime.doctor import examine

        found = examine()
        if self.json:
            write_line(json.dumps(found, ensure_ascii=False))
            return
        for section, lines in found.items():
            write_line(section)
            for name, value in lines.items():
                write_line(printable(f"  {name:17} {value}".rstrip()))
