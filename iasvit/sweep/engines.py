"""The engines by name."""

from __future__ import annotations

from iasvit.errors import IasvitError
from iasvit.sweep.engine import Engine

ENGINES = ("local", "ray")


def make_engine(name: str, address: str | None = None) -> Engine:
    """An engine by name.

    Args:
        name: "local" for this machine, or "ray".
        address: of a running Ray cluster; None for the one that RAY_ADDRESS names or that runs on this machine, else
            for one that is started here and ended with the sweep.

    Raises:
        IasvitError: there is no such engine, or the address cannot be reached.
    """
    if name not in ENGINES:
        raise IasvitError(f"--engine {name} is not known; there are {', '.join(ENGINES)}")
    if name == "local":
        from iasvit.sweep.local import LocalEngine

        if address is not None:
            raise IasvitError("--address does not go with --engine local; --engine ray takes it")
        return LocalEngine()
    from iasvit.sweep.ray_engine import RayEngine

    return RayEngine(address)
