"""A small project under git, to be packed by `multitask submit` like the real one."""

import subprocess
from pathlib import Path

FILES = {
    "pyproject.toml": '[project]\nname = "small"\ndependencies = ["one>=1", "two[extra]>=2"]\n',
    "constraints.txt": "one==1.5\ntwo==2.5\n",
    "jobs/demo.yaml": "name: demo\n",
    "data/table/part.bin": "content\n",
}


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=tests", "-c", "user.email=tests@example.org")
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def make_checkout(folder: Path) -> Path:
    """A repository with one commit."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "Start")
    return folder
