"""How a scan is run on this machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """How points are decoded.

    Attributes:
        form: `materialised` makes each point's weights on the device, `streamed` the same from weights in host memory,
            and `factorised` shares weights and directions among the points.
        places: points that decode together.
        rows: the slots of each.
        group: prompts that are inserted together; `rows` is a multiple of it.
        inserts: groups that one program inserts.
        chunk: decode steps between two looks at what was generated.
        ahead: chunks that the device is given before the host has looked at the last one.
        few: the slots that the last rows move to; a multiple of `rows` if there are several places.
    """

    form: str
    places: int
    rows: int
    group: int
    inserts: int = 1
    chunk: int = 4
    ahead: int = 0
    few: int = 1


def make_plan(model, rows, sampling, slots=None, **_):
    n = min(len(rows), slots or 128)
    return Plan("materialised", 1, n, n, few=max(1, n // 4))
