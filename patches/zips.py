"""Uncompressed zip files that others may have written: packages of cascades, and what `torch.save` writes."""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from patches.quoting import quoted, shortened

_ENCRYPTED = 1
"""Bit of a member's flags."""


_START = b"PK\x03\x04"
"""The first bytes of a zip file."""


class ZipError(ValueError):
    """A zip file is damaged, compressed or encrypted. The message says what was found."""


def is_zip(path: str | os.PathLike[str]) -> bool:
    """Return whether a file begins as a zip file does.

    Raises:
        OSError: there is no such file, or it is a folder, a pipe or a device, or it cannot be read.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is no file")
    with open(path, "rb") as file:
        return file.read(len(_START)) == _START


@contextmanager
def open_stored(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """Open a zip file whose members are neither compressed nor encrypted, so that they are no larger than the file.

    Raises:
        ZipError: the file is not such a zip file, or two members have one name.
    """
    try:
        package = zipfile.ZipFile(path)
    except Exception as error:  # the parser raises what its parts raise: a dozen kinds for damaged files
        raise ZipError(f"no whole zip file ({shortened(error)})") from error
    with package:
        names = package.namelist()
        for member in package.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
                raise ZipError(f"member {quoted(member.filename)}, which is compressed or encrypted")
        if len(set(names)) < len(names):
            raise ZipError("two members of one name")
        if sum(member.file_size for member in package.infolist()) > os.path.getsize(path):
            raise ZipError("members that are larger than the file")
        yield package


def read_member(package: zipfile.ZipFile, name: str) -> bytes:
    """Return the bytes of one member, after checking its checksum.

    Raises:
        ZipError: there is no such member, or it is damaged.
    """
    try:
        return package.read(name)
    except Exception as error:  # see `open_stored`
        raise ZipError(f"no whole {quoted(name)} in it ({shortened(error)})") from error
