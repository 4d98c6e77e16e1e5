"""The project as it is sent to a cluster: one zip of the files that git tracks, and the packages that they need."""

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
"""Largest file that Ray's dashboard accepts."""
PROJECT = Path(__file__).resolve().parent.parent
CONSTRAINTS = "constraints.txt"
ADDED = "submitted"
"""Folder in the job's copy of the project, for files that are sent in addition to the tracked ones."""
TOKENS = f"{ADDED}/tokens.json"
LARGEST_SHOWN = 5
"""Number of folders and of files that the error about a too large package names."""
_EPOCH = (1980, 1, 1, 0, 0, 0)


class PackageError(ValueError):
    """The project cannot be sent to a cluster; the message says what was expected, what was found and what to do."""


def tracked_files(project: Path) -> list[str]:
    """Return the sorted paths, relative to the project's folder, of the files that git tracks and that exist.

    Raises:
        PackageError: the folder is not a git checkout.
    """
    listed = _git(project, "ls-files", "-z", "--cached", "--deduplicate")
    return sorted(name for name in listed.split("\0") if name and (project / name).is_file())


def describe_version(project: Path) -> str:
    """Return the commit's short hash, followed by `-dirty` if tracked files differ from it."""
    return _git(project, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").strip()


def write_package(target: Path, project: Path, names: Iterable[str], added: Mapping[str, bytes]) -> None:
    """Write files of a project into one zip.

    Equal content gives equal bytes, so that Ray sends and unpacks the same content only once.

    Args:
        names: paths relative to `project`.
        added: name -> content of files that are not in the project.
    Raises:
        PackageError: the zip is larger than Ray accepts.
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
    """Return the lines of a requirements file: the project's dependencies at the versions of its constraints file."""
    described = tomllib.loads((project / "pyproject.toml").read_text())
    digest = hashlib.sha256((project / CONSTRAINTS).read_bytes()).hexdigest()
    return [
        # Ray makes a new environment when these lines change, but it does not read the constraints file. The hash makes
        # the lines change with the file.
        f"# {CONSTRAINTS} {digest}",
        f"--constraint ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{CONSTRAINTS}",
        *described["project"]["dependencies"],
    ]


def _git(project: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(project), *arguments], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise PackageError(
            "A submitted job consists of the files that git tracks, but the command 'git' was not found. Install git."
        ) from None
    except subprocess.CalledProcessError as error:
        raise PackageError(
            f"A submitted job consists of the files that git tracks, but git reports about '{project}': "
            f"{error.stderr.strip()}. Submit from a checkout of the project (git clone, pip install --editable)."
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
        f"The zip of the files that git tracks has {_mib(found)}, {_mib(found - LIMIT_BYTES)} more than the "
        f"{_mib(LIMIT_BYTES)} that Ray's Jobs API accepts. Largest folders, compressed: "
        f"{', '.join(f'{name} {_mib(size)}' for name, size in folders.most_common(LARGEST_SHOWN))}; largest files: "
        f"{', '.join(f'{name} {_mib(sizes[name])}' for name in largest)}. Put data where the nodes can read it, name "
        "its URI in the spec (s3://bucket/table), and remove the files from git (git rm --cached)."
    )


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
