"""Errors that a user can act on: one line that names the problem and the remedy.

The command line prints these without a traceback and exits with ``exit_code``.
"""


class GlowKernelsError(Exception):
    """Base of every error that glow_kernels raises on purpose for a user to read."""

    exit_code = 1


class UsageError(GlowKernelsError, ValueError):
    """An option, or a combination of options, that is not valid."""

    exit_code = 2


class DataError(GlowKernelsError):
    """Data that cannot be read or does not fit the model."""


class CheckpointError(GlowKernelsError):
    """A checkpoint or run folder that cannot be read or written."""


class TrainingError(GlowKernelsError):
    """Training cannot continue."""


class BackendUnavailableError(GlowKernelsError, RuntimeError):
    """A backend was requested by name but cannot run here."""


class MissingDependencyError(GlowKernelsError, ImportError):
    """An optional package is needed but not installed."""


class RegressionError(GlowKernelsError):
    """A benchmark became slower, or its results became wrong."""


def one_line(error: BaseException) -> str:
    """The message of another library's error on one line, to be quoted in a message of this package."""
    return " ".join(str(error).split()) or type(error).__name__


def in_brief(error: BaseException) -> str:
    """The type of an error and the first line of its message, if any; compilers add many more lines."""
    name, message = type(error).__name__, str(error).strip()
    return f"{name}: {message.splitlines()[0][:200]}" if message else name
