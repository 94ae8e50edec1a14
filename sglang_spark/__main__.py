"""``python -m sglang_spark MODULE ...``: run a module of SGLang that does not load plugins by itself, with them.

python -m sglang_spark sglang.benchmark.offline_throughput --model-path ... --kv-compress spark
"""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    """Run the module that the command line names, as ``python -m`` does."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
