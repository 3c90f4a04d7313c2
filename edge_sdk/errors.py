"""The one exception family of Edgewise.

Every error that a user can cause or mend is an `EdgewiseError`: it says which file, field or device is meant,
what was found, what was expected and what to do. The command line prints it as one line on standard error and
ends with the class's `exit_code`; nothing else about the class is public.

Exit codes of every `edgewise` command: 0 done; 1 an error of ours (a traceback follows: please report it);
2 wrong arguments; 3 bad input (file, bundle, job, sample, message); 4 something is missing on this machine
(a package, a broker, disk space, a free port); 5 a check refused the result (a gradient proof, a signature);
130 interrupted.
"""

from __future__ import annotations


class EdgewiseError(Exception):
    """Something that the reader of the message can mend."""

    exit_code: int = 3


class BundleError(EdgewiseError):
    """A bundle cannot be opened or trusted."""


class SignatureError(BundleError):
    """A bundle is not signed by the release key that the reader pins."""

    exit_code = 5


class SampleError(EdgewiseError):
    """A sample does not fit the bundle's declared inputs, or holds numbers that are not finite."""


class TaskError(EdgewiseError):
    """A task cannot be run by this device with this bundle."""


class UpdateError(EdgewiseError):
    """The body of an update is not what its program and the tensor table say it must be.

    `reason` is a short code for journals and counters: `malformed`, `wrong_start`, `wrong_tensors`, `wrong_shape`,
    `wrong_encoding`, `not_finite`.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class TensorsError(EdgewiseError):
    """A file of named tensors is malformed."""


class KeyFileError(EdgewiseError):
    """A key file is missing, unreadable or of another kind."""


class StorageError(EdgewiseError):
    """A store on disk cannot be read or written, for instance because the disk is full."""

    exit_code = 4


class LinkError(EdgewiseError):
    """The broker cannot be reached or refuses us."""

    exit_code = 4


class MissingDependency(EdgewiseError):
    """An optional package or program is not installed."""

    exit_code = 4
