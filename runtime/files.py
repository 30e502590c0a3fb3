"""Files that appear whole or not at all. Left out: what stands in them."""

import os
import tempfile
from pathlib import Path

from runtime.errors import ConfigurationError


def write_file(file: Path, text: str, *, secret: bool = False, is_new: bool = False) -> None:
    """In place of what stood there, at once: whoever reads meanwhile gets the one or the other.

    `secret`: its owner's alone. `is_new`: unless something stands there, which may be the only copy of another key.
    Raises `ConfigurationError`.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
                opened.write(text)
                opened.flush()
                os.fsync(opened.fileno())
            Path(temporary).chmod(0o600 if secret else 0o644)
            if is_new:
                os.link(temporary, file)
            else:
                Path(temporary).replace(file)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error.strerror or error}") from error
