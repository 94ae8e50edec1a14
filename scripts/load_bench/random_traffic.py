"""SGLang's own benchmark, ``sglang.bench_serving``, with random token ids."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEEDS_DATASETS = "sglang.bench_serving needs the package datasets, which is not installed: pip install datasets"


def is_available() -> bool:
    """Whether the benchmark can be imported: of SGLang's dependencies it needs one that servers do not."""
    return importlib.util.find_spec("datasets") is not None


@dataclass(frozen=True)
class RandomTraffic:
    """Requests that share nothing and are as long as asked for, in tokens.

    Parameters
    ----------
    max_concurrency
        Requests under way at once; None for all.
    """

    num_prompts: int
    input_len: int
    output_len: int
    seed: int
    max_concurrency: int | None = None

    def command(self, url: str, model: str, output: Path) -> list[str]:
        """The benchmark's command line; it appends a line of JSON to ``output``."""
        command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", url]
        command += [
            "--model",
            model,
            "--dataset-name",
            "random-ids",
            "--tokenize-prompt",
            "--random-range-ratio",
            "1.0",
        ]
        command += ["--num-prompts", str(self.num_prompts), "--random-input-len", str(self.input_len)]
        command += ["--random-output-len", str(self.output_len), "--seed", str(self.seed), "--flush-cache"]
        if self.max_concurrency:
            command += ["--max-concurrency", str(self.max_concurrency)]
        return [*command, "--cache-report", "--disable-tqdm", "--output-file", str(output)]

    def run(self, url: str, model: str) -> dict[str, Any]:
        """The benchmark's results.

        Raises
        ------
        RuntimeError
            The benchmark failed; the message ends with what it printed.
        """
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "traffic.jsonl"
            command = self.command(url, model, output)
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode or not output.exists():
                raise RuntimeError(f"{' '.join(command)} failed:\n{(result.stdout + result.stderr)[-4000:]}")
            return json.loads(output.read_text().splitlines()[-1])
