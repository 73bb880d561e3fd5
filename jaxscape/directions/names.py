"""What the name of a direction says without the direction. Importing this module does not import jax."""

CONTROL = "control"
"""The kind of a random control, see `jaxscape.directions.control.Control`."""


def is_control_name(name: object) -> bool:
    """Whether a direction's name, or what identifies it in a run, is that of a random control."""
    return str(name).startswith(f"{CONTROL}:")
