"""Errors whose message is written for the person who can fix them."""


class Spoken(Exception):
    """An error that says all in its message, so that a notebook shows it without the traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]  # IPython asks for it


class ConfigError(Spoken, ValueError):
    """A parameter, or a combination of parameters, that cannot run."""


class GpuMemoryError(Spoken, RuntimeError):
    """A GPU without room for the model, or for a batch that was halved already."""
