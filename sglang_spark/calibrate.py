"""Write the calibration of a model to a file: ``python -m sglang_spark.calibrate --model-path M -o FILE``.

It starts the model as a server starts it, with all flags of ``sglang.launch_server`` (``--tp-size``, ``--quantization``
and so on), and stops it when the statistics are saved. Servers read the file with ``--spark-calibration FILE``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_spark.calibrate",
        description="Measure the statistics of a model's keys and save them for --spark-calibration.",
        epilog="All flags of python -m sglang.launch_server are accepted too, such as --tp-size or --quantization.",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="file to write (safetensors)")
    parser.add_argument("--model-path", required=True, help="the model")
    options, server_flags = parser.parse_known_args(argv)
    if not options.output.parent.is_dir():
        parser.error(f"-o {options.output}: there is no folder {options.output.parent}")
    calibrate(options.model_path, options.output, server_flags)
    print(f"Wrote {options.output}; serve with --kv-compress spark --spark-calibration {options.output}")
    return 0


def calibrate(model_path: str, output: Path, server_flags: list[str]) -> None:
    """Start a server of the model, let it save its calibration to ``output``, and stop it.

    Raises
    ------
    RuntimeError
        The server did not save one. Its log says why.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import prepare_server_args

    from sglang_spark.calibration_forward import OUTPUT_VARIABLE

    flags = ["--model-path", model_path, "--disable-cuda-graph", "--skip-server-warmup", *server_flags]
    flags += ["--kv-compress", "spark", "--spark-calibration", "auto"]
    unfinished = output.absolute().with_name(f"{output.name}.new")
    unfinished.unlink(missing_ok=True)
    os.environ[OUTPUT_VARIABLE] = str(unfinished)
    try:
        Engine(server_args=prepare_server_args(flags)).shutdown()
        if not unfinished.exists():
            raise RuntimeError(f"{model_path} did not save a calibration")
        unfinished.replace(output)
    finally:
        del os.environ[OUTPUT_VARIABLE]
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
