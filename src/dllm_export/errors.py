"""Every error that dllm-export raises on purpose.

DllmExportError           exit 1   base: one or two lines with what, got, expected and the remedy
|- UsageError             exit 2   an argument, a prompt or an option is wrong
|- CheckpointError        exit 2   the model directory cannot be exported as it is
|- MismatchError          exit 3   two computations that must agree do not
|  `- OverflowedError     exit 3   a computation left the range of its number type
|- IncompatibleError      exit 4   a provider, library, format version or device does not fit, or refuses
|- IntegrityError         exit 5   a file is not what its manifest says
|- ResourceError          exit 6   disk, memory or device memory ran out
`- StrategyError          exit 7   a cache policy or decoding rule broke its contract
"""

from __future__ import annotations


class DllmExportError(Exception):
    """Base of all errors raised on purpose; `str(error)` is what the user reads."""

    exit_code = 1


class UsageError(DllmExportError, ValueError):
    """A wrong argument, prompt or option."""

    exit_code = 2


class CheckpointError(DllmExportError):
    """A model directory that cannot be exported as it is."""

    exit_code = 2


class MismatchError(DllmExportError):
    """Two computations that must agree do not."""

    exit_code = 3


class OverflowedError(MismatchError):
    """A computation that left the range of its number type."""


class IncompatibleError(DllmExportError):
    """A provider, library, format version or device that does not fit, or that refuses what it is given."""

    exit_code = 4


class IntegrityError(DllmExportError):
    """A file that is not what its manifest says."""

    exit_code = 5


class ResourceError(DllmExportError):
    """Disk, memory or device memory ran out."""

    exit_code = 6


class StrategyError(DllmExportError):
    """A cache policy or decoding rule that failed, or that asked for what cannot be run."""

    exit_code = 7
