"""Each patch of ``patches/sglang/`` applies to the release it is named after, and what it adds works there."""

from __future__ import annotations

import compileall
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PATCHES = sorted((Path(__file__).resolve().parents[2] / "patches" / "sglang").glob("*.patch"))
ROOT = PATCHES[0].parents[2]
CPU_HOST, SGL_KERNEL = ROOT / "patches" / "cpu_host", ROOT / "patches" / "sgl_kernel"
MODEL = ROOT / "examples" / "recall-model"
TIMEOUT_S = 300

PLUGIN = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

class Recorder:
    def __init__(self):
        self.value = "replaced"

def register():
    HookRegistry.register("target.plain", lambda original, x: original(x) + 1, HookType.AROUND)
    HookRegistry.register("target.Thing.method", lambda result, self, x: result * 10, HookType.AFTER)
    HookRegistry.register("target.Thing.static", lambda x: ((x + 5,), {}), HookType.BEFORE)
    HookRegistry.register("target.Old", Recorder, HookType.REPLACE)
    HookRegistry.register("target.missing", lambda original: None, HookType.AROUND)
"""

TARGET = """
def plain(x):
    return x

class Old:
    value = "old"

class Thing:
    def method(self, x):
        return x

    @staticmethod
    def static(x):
        return x
"""

USE = """
import target
from target import plain as imported_before
import sglang.launch_server
from sglang.srt.plugins import load_plugins
load_plugins()
load_plugins()
print(sglang.__file__)
print("SAW", target.plain(1), imported_before(1), target.Thing().method(2), target.Thing.static(3), target.Old().value)
"""

RESOLVE = """
import sys
import sglang
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
from sglang_spark import plugin
print(sglang.__file__)
plugin.check_installed()
print("PROBLEMS", [problem for target in plugin.TARGETS if (problem := target.problem())])
arguments = ["--model-path", sys.argv[1], "--kv-compress", "spark"]
print("BACKEND", prepare_server_args(arguments).attention_backend)
try:
    prepare_server_args([*arguments, "--attention-backend", "triton"])
except ValueError as refusal:
    print("REFUSED", refusal)
"""


@pytest.fixture(scope="module", params=PATCHES, ids=lambda patch: patch.stem)
def patched(request, tmp_path_factory):
    """Folder with the released package, patched."""
    folder = tmp_path_factory.mktemp("patched", numbered=False) / f"sglang-{request.param.stem}"
    folder.mkdir()
    wheel = _download(request.param.stem, folder)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    result = subprocess.run(
        ["patch", "-p1", "--fuzz=0", "-i", str(request.param)], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "offset" not in result.stdout, result.stdout
    return folder


def _download(release: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*command, "--dest", str(folder), f"sglang=={release}"], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if result.returncode == 0:
        (wheel,) = folder.glob("sglang-*.whl")
        return wheel
    if re.search(r"NewConnectionError|ConnectTimeout|ReadTimeout|NameResolutionError|ProxyError", result.stderr):
        pytest.skip(f"the package registry cannot be reached: {result.stderr.strip().splitlines()[-1]}")
    pytest.fail(result.stderr)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_says_why(patch):
    header = patch.read_text().partition("\n--- ")[0]
    assert "Why:" in header and "What it does not do:" in header and "patch -p1" in header


def test_changed_files_compile(patched):
    changed = ["launch_server.py", "cli/serve.py", "srt/managers/scheduler.py", "srt/entrypoints/engine.py"]
    assert all(compileall.compile_file(patched / "sglang" / name, quiet=1) for name in changed)


def test_plugins_run_once_and_change_their_targets(patched, tmp_path):
    """In a process that imports the launcher: the scheduler and Engine need this release's CUDA kernels to import."""
    (tmp_path / "target.py").write_text(TARGET)
    (tmp_path / "some_plugin.py").write_text(PLUGIN)
    metadata = tmp_path / "some_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\nsome = some_plugin:register\n")
    path = os.pathsep.join(map(str, (patched, tmp_path, CPU_HOST)))
    env = {**os.environ, "PYTHONPATH": path, "SGLANG_PLUGINS": "some"}
    result = subprocess.run(
        [sys.executable, "-c", USE], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert str(patched) in result.stdout
    assert "SAW 2 2 20 8 replaced" in result.stdout
    assert "Could not hook target.missing" in result.stderr


def test_sglang_spark_is_at_home_in_the_patched_release(patched, tmp_path):
    """Up to a scheduler's own checks; scripts/check_versions.py serves with it."""
    env = {**os.environ, "SGLANG_PLUGINS": "spark,cpu_host"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (patched, CPU_HOST, SGL_KERNEL, env.get("PYTHONPATH", ""))))
    command = [sys.executable, "-c", RESOLVE, str(MODEL)]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.returncode == 0, result.stderr[-3000:]
    assert str(patched) in result.stdout
    assert "PROBLEMS []" in result.stdout
    assert "BACKEND spark" in result.stdout
    assert "REFUSED --kv-compress spark is not possible with" in result.stdout
    assert "--attention-backend=triton" in result.stdout
