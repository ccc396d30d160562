"""Virtual environments of the peers that are not installed beside fedcil."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

REQUIREMENTS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "pfl": (None, ("pfl==0.6.0",)),
    "fedlab": (None, ("fedlab==1.3.0",)),
    "blazefl": (
        "3.12",
        ("blazefl[contrib,reproducibility]==2.0.3", "torch==2.13.0", "torchvision==0.28.0", "pillow", "psutil"),
    ),
}
"""Python version and what pip installs. None: the running interpreter, whose torch the environment then sees."""


def environment(name: str, root: Path) -> Path | None:
    """The python of ``root/name``, which is made if need be, or None and a printed reason."""
    version, requirements = REQUIREMENTS[name]
    folder = root / name
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists():
        return python
    base = interpreter(version)
    if base is None:
        print(f"{name} is not measured: it needs python{version}, which is not found")
        return None
    try:
        _run(base, "-m", "venv", "--clear", str(folder))
        if version is None:
            share_packages(python)
        _run(python, "-m", "pip", "install", "--quiet", *requirements)
    except subprocess.CalledProcessError as error:
        print(f"{name} is not measured: {' '.join(error.cmd)} failed: {error.stderr.strip()[-500:]}")
        return None
    ready.touch()
    return python


def interpreter(version: str | None) -> Path | None:
    if version is None:
        return Path(sys.executable)
    found = shutil.which(f"python{version}")
    installed = sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/python{version}"))
    for python in [Path(found), *installed] if found else installed:
        if subprocess.run([python, "--version"], check=False, capture_output=True).returncode == 0:  # not a bare shim
            return python
    return None


def share_packages(python: Path) -> None:
    """The running interpreter's packages, after the environment's own; pip changes none outside its environment."""
    packages = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(packages) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return done.stdout
