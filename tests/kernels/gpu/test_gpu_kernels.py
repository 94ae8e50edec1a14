"""The GPU kernels on the PTX machine: what Triton compiles them to runs on CPU tensors.

Each file has a process of its own, whose Triton compiles for the machine and makes no machine code.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("path", sorted((HERE / "cases").glob("gpu_*.py")), ids=lambda path: path.stem)
def test_kernels(path):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "on_machine", str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
