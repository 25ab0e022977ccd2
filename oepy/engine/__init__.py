"""Every opportunistic decision, as one pure machine: `Engine.handle(input, now) -> actions`."""

from oepy.engine.core import Engine, EngineSettings

__all__ = ["Engine", "EngineSettings"]
