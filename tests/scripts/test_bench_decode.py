"""scripts/bench_decode.py as far as it goes without a GPU: arguments, arithmetic, output, and its checks of results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import bench_decode
from decode_bench import checks, cuda, report, timing
from decode_bench.methods import DENSE_METHODS, Batch, Spark
from decode_bench.settings import STANDARD_SETTINGS, Heads, Setting, Shape, copies_that_fit, num_copies

SCRIPT = Path(bench_decode.__file__)
HEADS = Heads(4, 2, 64)
LLAMA = Heads(32, 8, 128)
MISSING = {"flashinfer_fp8": "ImportError: no flashinfer", "triton": cuda.DOES_NOT_FIT}


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_without_a_gpu_the_cpu_is_timed_as_ever(no_gpu):
    args = bench_decode.parse_arguments([])
    assert (args.device, args.settings, args.seconds) == ("cpu", [Setting()], 2.0)
    assert (args.seq_lens, args.batches) == ([512, 1024, 2048, 4096, 8192, 16384], [1, 4])
    assert (args.num_qo_heads, args.num_kv_heads, args.head_dim, args.layers) == (8, 2, 128, 32)


def test_with_a_gpu_the_standard_settings_are_timed_on_llamas_shape(gpu):
    args = bench_decode.parse_arguments([])
    assert (args.device, args.num_qo_heads, args.num_kv_heads, args.head_dim) == ("cuda", 32, 8, 128)
    assert args.settings == list(STANDARD_SETTINGS)
    assert [setting.value_dtype for setting in args.settings] == ["int4", "int3", "bfloat16"]
    assert min(args.seq_lens) == 1024 and max(args.seq_lens) == 131072 and max(args.batches) == 64


def test_a_setting_takes_the_place_of_the_standard_ones(gpu):
    args = bench_decode.parse_arguments(["--restore-bits", "2.5"])
    assert args.settings == [Setting(restore_bits=2.5)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "cuda"], "--device cuda: PyTorch finds no GPU here; use --device cpu"),
        (["--plot", "x.png"], "--plot draws the times of --device cuda only"),
        (["--num-qo-heads", "9"], "--num-qo-heads 9 must be a positive multiple of --num-kv-heads 2"),
        (["--batches", "0"], "--batches must be positive, got 0"),
        (["--key-ratio", "0.999"], "0.999"),
    ],
)
def test_refusals(no_gpu, capsys, argv, message):
    with pytest.raises(SystemExit) as exit:
        bench_decode.parse_arguments(argv)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_is_timed(gpu, monkeypatch, capsys):
    monkeypatch.setattr(report, "can_plot", lambda: False)
    with pytest.raises(SystemExit):
        bench_decode.parse_arguments(["--plot", "x.png"])
    assert "--plot needs matplotlib, which is not installed" in capsys.readouterr().err


def test_bytes_per_token_are_those_of_the_rows():
    assert [setting.bytes_per_token(LLAMA) for setting in STANDARD_SETTINGS] == [8 * 136, 8 * 104, 8 * 320]
    assert Setting(key_ratio=0, value_dtype="bfloat16").bytes_per_token(LLAMA) == 8 * 512


def test_as_many_copies_as_push_a_layer_out_of_l2():
    assert num_copies(layer_bytes=1000, l2_bytes=500) == 3
    assert num_copies(layer_bytes=10, l2_bytes=500) == 201
    # A layer that is much larger than the cache: still another one in between.
    assert num_copies(layer_bytes=10**9, l2_bytes=500) == 2


def test_shapes_that_do_not_fit_have_no_copies():
    shape, l2_bytes, h100 = Shape(64, 131072), 50 << 20, 79 << 30
    assert copies_that_fit(shape, 8 * 512, l2_bytes, h100) == 0
    assert copies_that_fit(shape, 8 * 160, l2_bytes, h100) == 2
    assert copies_that_fit(Shape(1, 1024), 8 * 160, l2_bytes, h100) == num_copies(1025 * 8 * 160, l2_bytes)


def test_repetitions_stay_within_bounds():
    assert timing.repetitions(one_ms=2.0, seconds=0.1) == 50
    assert timing.repetitions(one_ms=0.0, seconds=0.1) == timing.MOST_TIMES
    assert timing.repetitions(one_ms=500.0, seconds=0.1) == timing.FEWEST_TIMES


def _row(batch: int = 4, seq_len: int = 1024, setting: Setting = STANDARD_SETTINGS[0], **dense) -> dict:
    times = {"spark_ms": 0.02, "spark_eager_ms": 0.1, "copy_ms": 0.015}
    dense = {"flashinfer_bf16": 0.03, "flashinfer_fp8": None, "triton": None} | dense
    return cuda.row(Shape(batch, seq_len), setting, times, dense, MISSING)


def test_a_row_compares_with_flashinfer_or_else_triton_or_else_nothing():
    assert (_row()["ratio"], _row()["dense_kernel"]) == (pytest.approx(1.5), "flashinfer_bf16")
    assert _row()["roofline"] == pytest.approx(0.75)
    triton = _row(flashinfer_bf16=None, triton=0.04)
    assert (triton["ratio"], triton["dense_ms"], triton["dense_kernel"]) == (pytest.approx(2.0), 0.04, "triton")
    assert _row(flashinfer_bf16=None)["ratio"] is None


def _printed(table) -> str:
    console = Console(width=250, record=True, file=open(os.devnull, "w"))
    console.print(table)
    return console.export_text()


def test_the_decode_table_says_why_a_column_is_empty():
    text = _printed(report.decode_table([_row(), _row(seq_len=8192)]))
    line = next(line for line in text.splitlines() if "8,192" in line)
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == [
        *("4", "8,192", "ratio 0.96, 3 bits, int4 values", "20.0", "100.0", "15.0", "75%", "30.0", "-", "-", "1.50")
    ]
    assert "flashinfer_fp8: ImportError: no flashinfer" in text and "triton: does not fit the memory" in text


def test_the_prefill_table():
    row = {"chunk": 8192, "prefix": 0, "setting": "x", "write_ms": 0.1, "extend_ms": 1.0, "store_ms": 0.01}
    row |= {"dense_ms": None, "linear_ms": 5.0, "overhead": None, "missing": {"flashinfer_bf16": "not there"}}
    text = _printed(report.prefill_table([row, row | {"dense_ms": 0.9, "overhead": 0.0321, "missing": {}}]))
    assert "+3.2%" in text and "900.0" in text and "flashinfer_bf16: not there" in text


def test_json_has_the_settings_in_each_row(tmp_path):
    report.write_json(tmp_path / "x.json", [_row(), _row(batch=1)], {"gpu": "H100"})
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [(row["batch"], row["gpu"]) for row in rows] == [(4, "H100"), (1, "H100")]
    assert {"seq_len", "batch", "spark_ms", "dense_ms", "ratio"} <= rows[0].keys()


def test_plot(tmp_path):
    rows = [_row(b, n, setting) for b in (1, 4) for n in (1024, 8192) for setting in STANDARD_SETTINGS]
    report.plot(tmp_path / "x.svg", rows, "H100")
    drawn = (tmp_path / "x.svg").read_text()
    assert drawn.startswith("<?xml") and len(drawn) > 10_000


def test_cpu_rows(no_gpu, tmp_path, capsys):
    argv = "--seq-lens 64 --batches 2 --layers 2 --seconds 0.01 --json".split()
    assert bench_decode.main([*argv, str(tmp_path / "x.json")]) == 0
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert list(row)[:5] == ["seq_len", "batch", "spark_ms", "dense_ms", "ratio"]
    assert (row["seq_len"], row["batch"]) == (64, 2) and row["ratio"] == row["dense_ms"] / row["spark_ms"]
    assert set(row) - {"seq_len", "batch", "spark_ms", "dense_ms", "ratio"} == {
        *("cpu", "threads", "packages", "key_format", "value_dtype", "heads")
    }


def _batch() -> Batch:
    return Batch([9, 1, 70], HEADS, torch.device("cpu"), torch.float32)


def test_wrong_rows_end_the_run(monkeypatch):
    write = checks.reference.write_rows

    def wrong(q, k, *rest, **keywords):
        write(q, k + 1e-2, *rest, **keywords)

    monkeypatch.setattr(checks.reference, "write_rows", wrong)
    with pytest.raises(checks.WrongResult, match=r"write, ratio 0.96, 3 bits, int4 values, keys: \d+ of 80 tokens"):
        checks.check_rows(_batch(), Setting())


def test_wrong_numbers_end_the_run():
    x = torch.randn(50)
    checks._close("x", x, x * 1.001, 1e-2)
    for wrong in (x * 1.1, x.clone().fill_(torch.nan)):
        with pytest.raises(checks.WrongResult, match="decode: the root mean square error"):
            checks._close("decode", wrong, x, 1e-2)
    with pytest.raises(checks.WrongResult, match="lse"):
        checks._near("lse", x + 0.1, x)


def test_a_dense_kernel_that_fails_is_left_out_and_one_that_is_wrong_ends_the_run(monkeypatch):
    class Wrong:
        def __init__(self, batch, dtype, cache):
            self.q = batch.q

        def run(self, copy):
            return self.q

    monkeypatch.setattr(checks, "check_rows", lambda batch, setting: None)
    monkeypatch.setitem(DENSE_METHODS, "triton", (lambda *_, **__: 1 / 0, torch.float32))
    logged = []
    missing = checks.check_all(HEADS, [Setting()], torch.device("cpu"), (3, 4), logged.append)
    assert missing["triton"] == "ZeroDivisionError: division by zero"
    assert "triton: not there: ZeroDivisionError: division by zero" in logged
    monkeypatch.setitem(DENSE_METHODS, "triton", (Wrong, torch.float32))
    with pytest.raises(checks.WrongResult, match="triton, request of 3 tokens"):
        checks.check_all(HEADS, [Setting()], torch.device("cpu"), (3, 4), logged.append)


def test_rows_for_timing_repeat_their_content_to_the_end(monkeypatch):
    monkeypatch.setattr("decode_bench.methods._CONTENT_TOKENS", 16)
    monkeypatch.setattr("decode_bench.methods.sk.SparkBatchDecodeWrapper", lambda *_, **__: _Planned())
    first, second = Spark(_batch(), Setting(), copies=2).layers
    assert torch.equal(first.keys[64:80], first.keys[:16]) and first.keys[80:].any() and first.values.any()
    assert torch.equal(first.keys, second.keys) and first.keys.data_ptr() != second.keys.data_ptr()


class _Planned:
    def plan(self, *args) -> None:
        pass


def test_the_checks_run_the_triton_kernels_under_the_interpreter():
    """Rows, and SGLang's Triton kernel with the arguments it is timed with."""
    argv = "--device cpu --check-only --num-qo-heads 2 --num-kv-heads 1 --head-dim 64".split()
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *argv], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "int4 values: write, decode and extend equal the reference" in result.stdout
    assert "triton: decode equals the reference" in result.stdout


def test_the_gpus_drivers_under_the_interpreter():
    drivers = Path(__file__).parent / "interpreted" / "bench_drivers.py"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(drivers)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
