"""Errors whose message is written for the person who can fix them."""


class ConfigError(ValueError):
    """A parameter, or a combination of parameters, that cannot run."""


class GpuMemoryError(RuntimeError):
    """A GPU without room for the model, or for a batch that was halved already."""
