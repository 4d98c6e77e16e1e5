"""The project as a cluster gets it: one file of what git tracks, and the packages that belong to it."""

import hashlib
import os
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

MIB = 1024**2
LIMIT_BYTES = 100 * MIB
"""What Ray's dashboard takes in one request."""
PROJECT = Path(__file__).resolve().parent.parent
CONSTRAINTS = "constraints.txt"
ADDED = "submitted"
"""Folder, in the job's copy of the project, of what was added to it."""
TOKENS = f"{ADDED}/tokens.json"
LARGEST_SHOWN = 5
_EPOCH = (1980, 1, 1, 0, 0, 0)


class PackageError(ValueError):
    """The project cannot be sent; the message says what was expected, what was found, what to do."""


def tracked_files(project: Path) -> list[str]:
    """Paths within a project's folder of the files that git tracks and that are there, sorted.

    Raises:
        PackageError: the folder is no git checkout.
    """
    listed = _git(project, "ls-files", "-z", "--cached", "--deduplicate")
    return sorted(name for name in listed.split("\0") if name and (project / name).is_file())


def describe_version(project: Path) -> str:
    """The commit, with a mark if tracked files differ from it."""
    return _git(project, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").strip()


def write_package(target: Path, project: Path, names: Iterable[str], added: Mapping[str, bytes]) -> None:
    """Write files of a project into one zip; equal content gives equal bytes, which Ray sends and unpacks once.

    Args:
        added: name -> content, of files that the project does not have.
    Raises:
        PackageError: it is larger than Ray takes.
    """
    with ZipFile(target, "w", ZIP_DEFLATED) as package:
        for name in names:
            package.writestr(_entry(name, os.access(project / name, os.X_OK)), (project / name).read_bytes())
        for name, content in added.items():
            package.writestr(_entry(name, executable=False), content)
        sizes = {info.filename: info.compress_size for info in package.infolist()}
    found = target.stat().st_size
    if found > LIMIT_BYTES:
        raise PackageError(_too_large(found, sizes))


def pinned_requirements(project: Path) -> list[str]:
    """Lines of a requirements file: what the project depends on, at the versions of its constraints file."""
    described = tomllib.loads((project / "pyproject.toml").read_text())
    digest = hashlib.sha256((project / CONSTRAINTS).read_bytes()).hexdigest()
    return [
        # Ray makes a new environment when these lines change; into the file itself it does not look.
        f"# {CONSTRAINTS} {digest}",
        f"--constraint ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{CONSTRAINTS}",
        *described["project"]["dependencies"],
    ]


def _git(project: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(project), *arguments], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise PackageError("A job is packed from what git tracks, and there is no git here. Install git.") from None
    except subprocess.CalledProcessError as error:
        raise PackageError(
            f"A job is packed from what git tracks, and git says of '{project}': {error.stderr.strip()}. Submit from a "
            "checkout of the project (git clone, pip install --editable)."
        ) from None
    return done.stdout


def _entry(name: str, executable: bool) -> ZipInfo:
    entry = ZipInfo(name, _EPOCH)
    entry.compress_type = ZIP_DEFLATED
    entry.external_attr = (0o755 if executable else 0o644) << 16
    return entry


def _too_large(found: int, sizes: Mapping[str, int]) -> str:
    folders: Counter[str] = Counter()
    for name, size in sizes.items():
        folders[name.partition("/")[0]] += size
    largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:LARGEST_SHOWN]
    return (
        f"The package of what git tracks has {_mib(found)}, {_mib(found - LIMIT_BYTES)} more than the "
        f"{_mib(LIMIT_BYTES)} that Ray's Jobs API takes. Compressed: "
        f"{', '.join(f'{name} {_mib(size)}' for name, size in folders.most_common(LARGEST_SHOWN))}; largest files: "
        f"{', '.join(f'{name} {_mib(sizes[name])}' for name in largest)}. Put data where the nodes read it, name that "
        "URI in the spec (s3://bucket/table), and take the files out of git (git rm --cached)."
    )


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
