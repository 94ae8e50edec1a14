#!/usr/bin/env python3
"""Accuracy of compressed KV caches; ``--help`` lists the commands, ``docs/accuracy.md`` shows what came out."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "examples")]

from accuracy.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
