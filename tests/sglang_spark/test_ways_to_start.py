"""Where SGLang loads no plugins: its modules run through ours, and a patch for ``sglang serve --help``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import sglang

PATCH = Path(__file__).parents[2] / "patches" / "sglang" / "serve_help.patch"


SERVE_HELP = """
import sys
import sglang
sglang.__path__.insert(0, sys.argv[1])
from sglang.cli.serve import serve
serve(None, ["--help"])
"""


def test_a_module_that_loads_no_plugins_runs_with_them(tmp_path):
    (tmp_path / "module.py").write_text(
        "import sys\nfrom sglang.srt.server_args import prepare_server_args\n"
        "if __name__ == '__main__':\n    print(sys.argv[0], prepare_server_args(sys.argv[1:]).kv_compress)\n"
    )
    flags = ("--model-path", "model", "--device", "cpu", "--kv-compress", "spark")
    run = [sys.executable, "-m", "sglang_spark", "module", *flags]
    result = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.split()[-2:] == [str(tmp_path / "module.py"), "spark"], result.stderr


def test_without_a_module_it_says_what_it_does():
    result = subprocess.run([sys.executable, "-m", "sglang_spark"], capture_output=True, text=True)
    assert result.returncode != 0 and "python -m sglang_spark MODULE" in result.stderr


def test_with_the_patch_serve_help_lists_the_flags(tmp_path):
    package = Path(sglang.__file__).parent
    shutil.copytree(package / "cli", tmp_path / "sglang" / "cli")
    with PATCH.open() as patch:
        subprocess.run(["patch", "-p1", "--fuzz=0"], stdin=patch, cwd=tmp_path, check=True, capture_output=True)
    run = [sys.executable, "-c", SERVE_HELP, str(tmp_path / "sglang")]
    result = subprocess.run(run, capture_output=True, text=True)
    assert "--kv-compress" in result.stdout, result.stderr
