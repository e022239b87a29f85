"""What a command does before it imports anything else, so that it ends cleanly from the start.

`python -m infer.sample` imports the package `infer` first, and that calls `begin`. PyTorch then
takes seconds to load, in which Ctrl-C must not print where in PyTorch it came.
"""

import errno
import io
import os
import signal
import sys

TYPE_CHECKING = False  # typing takes time to load, and Ctrl-C may come in it
if TYPE_CHECKING:
    from typing import TextIO

STOPPING = (signal.SIGINT, signal.SIGTERM)


def begin() -> None:
    """Make the process ready; once, before PyTorch is imported."""
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` and `&` ask for
            signal.signal(number, end_at_once)
    read_as_utf8()
    keep_streams()
    name_user()


def end_at_once(number: int, frame: object) -> None:
    """End the process with what shells report after a signal; nothing is at work yet."""
    os._exit(128 + number)


def interrupt_from_now_on() -> None:
    """Turn Ctrl-C and SIGTERM into a KeyboardInterrupt, so that work is ended in order."""
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def read_as_utf8() -> None:
    """Start again in UTF-8 mode where the locale knows ASCII only (LANG=C with PYTHONUTF8=0).

    Prompts and file names would arrive as escapes otherwise, which no file could then hold.
    """
    if sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode and sys.executable:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def keep_streams() -> None:
    """Open closed streams to nowhere, and let stdout and stderr outlive their readers.

    Without that, the next file that is opened takes the number of a closed stream, and whatever is
    printed lands in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number is free
    sys.stdout = lasting(sys.stdout, 1)
    sys.stderr = lasting(sys.stderr, 2)


def name_user() -> None:
    """Give a user without an entry in the system's list a name; PyTorch's compiler asks for one."""
    import getpass

    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # the last on Windows
        os.environ["USER"] = str(os.getuid()) if hasattr(os, "getuid") else "user"


def lasting(stream: "TextIO | None", number: int) -> "TextIO":
    """The stream of a number, as a `LastingStream`."""
    if stream is None:
        stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if type(stream) is not io.TextIOWrapper:
        return stream  # of a test or of a notebook
    buffered, through, encoding = stream.line_buffering, stream.write_through, stream.encoding
    # What the encoding lacks is printed as an escape, not refused.
    return LastingStream(stream.detach(), encoding, "backslashreplace", None, buffered, through)


class LastingStream(io.TextIOWrapper):
    """A text stream that drops what is written after its reader has gone, as with `| head -1`."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Lead the stream nowhere from now on, if its reader is gone; a full disk is an error."""
        if error.errno not in (errno.EPIPE, errno.EIO, errno.ECONNRESET):
            error.filename = "the output"
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
