"""The GPU kernels under Triton's interpreter, on CPU tensors.

Triton decides when it is imported whether it interprets, so these tests have a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "interpreted").glob("gpu_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
