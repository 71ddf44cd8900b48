"""The host scripts: the repository's folder `launch/`, which a wheel carries inside of the package."""

from pathlib import Path


def script(name: str) -> Path:
    """Returns the path of a host script: inside the package in a wheel, beside it in a checkout."""
    here = Path(__file__).resolve()
    inside = here.parent / "scripts" / name
    return inside if inside.is_file() else here.parents[2] / "launch" / name
