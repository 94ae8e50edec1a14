#!/usr/bin/env python3
"""Create or update the virtual environment that `make demo` and `make test` run in.

With an NVIDIA GPU the environment is the ordinary ``sglang``. Without an accelerator SGLang's own dependencies
(CUDA libraries and kernels) neither install nor matter, so the packages of ``requirements/cpu.txt`` and the plugin
``patches/cpu_host`` take their place. Running it again is safe and, when nothing has changed, instant.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sglang_spark.releases import MAIN  # noqa: E402

# On CPUs for every release: what each pins is for its CUDA kernels.
TORCH = "torch==2.13.0"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
IMPORT_CHECK = "import torch, numba, triton, spark_kernels, sglang_spark.plugin"


class SetupError(Exception):
    """A reason to stop, in one sentence."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment is")
    parser.add_argument("--sglang", default=MAIN, metavar="RELEASE", help="SGLang's release (default: %(default)s)")
    options = parser.parse_args()
    try:
        setup(options.venv.absolute(), options.sglang)
    except SetupError as error:
        print(f"setup failed: {error}", file=sys.stderr)
        return 1
    return 0


def setup(venv: Path, release: str = MAIN) -> None:
    """Bring ``venv`` to the state this checkout asks for, with a release of SGLang."""
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        raise SetupError(
            f"Python {sys.version_info[0]}.{sys.version_info[1]} is not supported; run `make PYTHON=python3.11` with "
            f"a Python from {'.'.join(map(str, OLDEST_PYTHON))} to {'.'.join(map(str, NEWEST_PYTHON))}"
        )
    steps = gpu_steps(release) if shutil.which("nvidia-smi") else cpu_steps(release)
    stamp = venv / "sglang-spark.stamp"
    state = fingerprint(steps)
    if stamp.exists() and stamp.read_text() == state:
        return
    stamp.unlink(missing_ok=True)
    if not (venv / "bin" / "python").exists():
        announce(0, len(steps), f"creating {venv.name} with Python {sys.version.split()[0]}")
        create(venv)
    for number, (what, arguments) in enumerate(steps, start=1):
        announce(number, len(steps), what)
        install(venv, what, arguments)
    check_imports(venv)
    stamp.write_text(state)


def cpu_steps(release: str) -> list[tuple[str, list[str]]]:
    """What to install without an accelerator, in order: torch first, or other packages pull its CUDA build."""
    sglang = f"sglang=={release}"
    return [
        (f"{TORCH} (a few minutes the first time)", [TORCH]),
        ("packages SGLang needs to serve text", cpu_requirements(release)),
        (f"{sglang} without its CUDA dependencies", ["--no-deps", sglang]),
        (
            "what SGLang needs on a host without an accelerator",
            ["--no-deps", str(ROOT / "patches" / "cpu_host")],
        ),
        ("sglang-spark", ["--no-deps", "--editable", str(ROOT)]),
    ]


def cpu_requirements(release: str) -> list[str]:
    """The packages of ``requirements/cpu.txt``, each as ``cpu-RELEASE.txt`` has it if it is there."""
    requirements = {}
    for name in ("cpu.txt", f"cpu-{release}.txt"):
        file = ROOT / "requirements" / name
        for line in file.read_text().split() if file.exists() else ():
            requirements[re.match(r"[\w.-]+", line).group().lower()] = line
    return list(requirements.values())


def gpu_steps(release: str) -> list[tuple[str, list[str]]]:
    """What to install with an NVIDIA GPU."""
    sglang = f"sglang=={release}"
    return [
        (f"{sglang} (several GB the first time)", [sglang]),
        ("sglang-spark", ["--editable", f"{ROOT}[demo,test]"]),
    ]


def fingerprint(steps: list[tuple[str, list[str]]]) -> str:
    """Changes when what is to be installed does."""
    sources = [ROOT / "pyproject.toml"]
    sources += [ROOT / "patches" / "cpu_host" / "pyproject.toml", *sorted((ROOT / "patches" / "cpu_host").glob("*.py"))]
    digest = hashlib.sha256(repr((sys.version, steps)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()


def create(venv: Path) -> None:
    result = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
    if result.returncode != 0:
        raise SetupError(
            f"`{sys.executable} -m venv` could not create {venv}: {last_line(result.stdout + result.stderr)} "
            "(on Debian and Ubuntu, install the package python3-venv)"
        )


def install(venv: Path, what: str, arguments: list[str]) -> None:
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", *arguments]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
    if result.returncode != 0:
        print(result.stderr, file=sys.stderr)
        reason = errors[0] if errors else last_line(result.stderr)
        raise SetupError(f"installing {what} failed: {reason} (`pip install {' '.join(arguments)}`)")


def check_imports(venv: Path) -> None:
    result = subprocess.run([str(venv / "bin" / "python"), "-c", IMPORT_CHECK], capture_output=True, text=True)
    if result.returncode != 0:
        raise SetupError(f"the installed packages do not work together: {last_line(result.stderr)}")


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


_START = time.monotonic()


def announce(step: int, steps: int, what: str) -> None:
    print(f"[{step}/{steps}] {what}  ({time.monotonic() - _START:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
