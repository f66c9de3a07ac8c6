"""The card of a run: under what it was made, noted in its logs once. Owns its words; not when it is written.

What the environment holds is not on it: that is where people keep secrets.
"""

import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata

import jax

from trainkit._version import __version__

_PACKAGES = ("jax", "flax", "optax", "clu", "numpy")
_SECONDS = 1.0
"""How long git may take."""
_SECRET = re.compile(r"token|secret|passw|credential|api[-_]?key|private[-_]?key", re.IGNORECASE)


def run_card(summary: str) -> str:
    """Returns the card as Markdown: versions, devices, git commit, command line, and what the model is.

    Args:
        summary: the table of the parameters.
    """
    rows = {
        "trainkit": __version__,
        **{name: _version(name) for name in _PACKAGES},
        "python": f"{platform.python_version()} on {platform.platform()}",
        "devices": _devices(),
        "git": _commit(_folder()),
        "command": f"`{_command(sys.argv)}`",
    }
    table = "\n".join(f"| {name} | {words} |" for name, words in rows.items() if words)
    return f"| run | |\n|---|---|\n{table}\n\n```\n{summary}\n```"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _devices() -> str:
    kinds = [device.device_kind for device in jax.devices()]
    counts = [f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)]
    processes = jax.process_count()
    return ", ".join(counts) + (f" on {processes} processes" if processes > 1 else "")


def _folder() -> pathlib.Path:
    """Returns the folder of the program; of an interpreter without one, where it was started."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return pathlib.Path(file).resolve().parent if file else pathlib.Path.cwd()


def _commit(folder: pathlib.Path) -> str:
    """Returns the git commit of `folder`, marked where files differ from it; "" where there is none to be known."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return ""
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit + {None: " (whether modified is not known)", "": ""}.get(changed, " (modified)")


def _git(folder: pathlib.Path, *arguments: str) -> str | None:
    """Returns what git says, None where it is not there, fails or takes too long."""
    # It must neither take a lock that the user's own git wants, nor ask for anything.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None


def _command(arguments: Sequence[str]) -> str:
    """Returns the command line, without the values of options that are named like secrets."""
    said, hidden = [], False
    for argument in arguments:
        name, given, _ = argument.partition("=")
        if hidden and not argument.startswith("-"):
            argument = "***"
        elif given and _SECRET.search(name):
            argument = f"{name}=***"
        hidden = not given and argument.startswith("-") and bool(_SECRET.search(argument))
        said.append(argument)
    # A pipe would end the cell of the table, a backtick the code.
    return shlex.join(said).replace("|", "\\|").replace("`", "'").replace("\n", " ")
