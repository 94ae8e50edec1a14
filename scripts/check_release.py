#!/usr/bin/env python3
"""Build the wheel and the source distribution, and check that what is installed from them serves.

The wheel is built from the unpacked source distribution, as ``python -m build`` does, by the build backend of this
interpreter's environment; no network is used. It is then installed in an empty virtual environment that sees SGLang
and the other dependencies of this interpreter but not this checkout, where SGLang has to discover the plugin and the
doctor has to find that the bundled model fits.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"sglang_spark": ROOT / "sglang_spark", "spark_kernels": ROOT / "kernels" / "spark_kernels"}
NOT_SOURCES = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "*.safetensors", "shared", "node_modules"
)
BUILD_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
BUILD_WHEEL = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
DISCOVER = """
import sglang_spark, spark_kernels, sys
from importlib.metadata import entry_points
from sglang.srt.plugins import load_plugins
for module in (sglang_spark, spark_kernels):
    assert module.__file__.startswith(sys.prefix), f"{module.__name__} comes from {module.__file__}"
(entry,) = entry_points(group="sglang.srt.plugins", name="spark")
assert entry.value == "sglang_spark.plugin:register", entry
load_plugins()
from sglang_spark.plugin import check_installed
check_installed()
"""


class ReleaseError(Exception):
    """What is wrong with the release, in one sentence."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="keep the wheel and the source distribution in this folder")
    output = parser.parse_args().output
    try:
        with tempfile.TemporaryDirectory(prefix="sglang-spark-release-") as folder:
            sdist, wheel = build(Path(folder))
            check_contents(sdist, wheel)
            check_installation(wheel, Path(folder) / "venv")
            if output is not None:
                output.mkdir(parents=True, exist_ok=True)
                for artifact in (sdist, wheel):
                    shutil.copy(artifact, output)
    except ReleaseError as error:
        print(f"not releasable: {error}", file=sys.stderr)
        return 1
    print(f"{sdist.name} and {wheel.name} install, and SGLang finds the plugin")
    return 0


def build(folder: Path) -> tuple[Path, Path]:
    """The source distribution of this checkout, and the wheel of that source distribution."""
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_SOURCES)
    output = folder / "dist"
    output.mkdir()
    sdist = output / _run([sys.executable, "-c", BUILD_SDIST, str(output)], cwd=folder / "checkout")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return sdist, output / _run([sys.executable, "-c", BUILD_WHEEL, str(output)], cwd=source)


def check_contents(sdist: Path, wheel: Path) -> None:
    """Every module of the packages, nothing else, and metadata that agree with the sources.

    Raises
    ------
    ReleaseError
        Names what is missing, superfluous or in disagreement.
    """
    expected = {
        f"{package}/{path.relative_to(folder)}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_file,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_file).decode())
        entry_points = archive.read(metadata_file.replace("METADATA", "entry_points.txt")).decode()
    in_packages = {name for name in names if ".dist-info/" not in name}
    for problem, found in (("lacks", expected - in_packages), ("should not have", in_packages - expected)):
        if found:
            raise ReleaseError(f"the wheel {problem} {', '.join(sorted(found))}")
    if "[sglang.srt.plugins]\nspark = sglang_spark.plugin:register" not in entry_points:
        raise ReleaseError(f"the wheel's entry points are {entry_points!r}")
    with tarfile.open(sdist) as archive:
        top = {name.partition("/")[2] for name in archive.getnames()}
    if missing := {"LICENSE", "README.md", "pyproject.toml"} - top:
        raise ReleaseError(f"the source distribution lacks {', '.join(sorted(missing))}")
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    if metadata["Version"] != latest:
        raise ReleaseError(f"the version is {metadata['Version']}, the latest in CHANGELOG.md is {latest}")


def check_installation(wheel: Path, venv: Path) -> None:
    """Install the wheel in an empty environment and let SGLang and the doctor find it."""
    _run([sys.executable, "-m", "venv", "--without-pip", str(venv)])
    python = str(venv / "bin" / "python")
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    _run([sys.executable, "-m", "pip", "--python", python, *install])
    # Dependencies come from this environment. A folder named in a .pth file comes last on the path, and its own .pth
    # files, by which an editable install would be found, are not read.
    (site_packages,) = venv.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run([python, "-c", DISCOVER], cwd=venv)
    model = ROOT / "examples" / "recall-model"
    _run([python, "-m", "sglang_spark.doctor", "--model-path", str(model), "--json"], cwd=venv)


def _run(command: list[str], cwd: Path | None = None) -> str:
    """The last line that a command prints, outside of this checkout's import paths."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if result.returncode != 0:
        raise ReleaseError(f"`{' '.join(command)}` failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return result.stdout.strip().rpartition("\n")[2]


if __name__ == "__main__":
    sys.exit(main())
