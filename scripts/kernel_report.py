#!/usr/bin/env python3
"""What the GPU kernels cost, counted in their machine code: no GPU needed.

Each kernel is compiled by Triton for the GPUs asked for and disassembled by the tools in Triton's wheel. For decode
attention, warp-instructions per (token, KV head) are ``instructions of the loop over tokens * warps / tokens per
iteration``, and so for dense attention of a chunk, per block of queries. The write kernel is counted along its usual
path: the search of a threshold takes SEARCH_ROUNDS, and branches round ties, numbers that are not finite and slow paths
of divisions are taken. Other kernels are counted whole per program, each loop once: prepare_queries is per (request,
KV head), merge_splits per (request, query head), its bytes per split, and plan_splits per 8 splits. These are static
counts, not times: cache misses, conflicts and waiting are not in them.

The bound is what follows for a token of a KV head on one SM: it cannot take fewer clocks than its bytes need at the
GPU's memory bandwidth, nor than its instructions need at IPC per clock.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from machine_code import MachineCode
from spark_kernels import Integers, Numbers, Pruned
from spark_kernels.formats import UNIT_STEPS, KeyFormat, ValueFormat
from spark_kernels.gpu import decode, dense, merge, plan, queries, restore, write
from spark_kernels.gpu.rows import IntegersLayout, PrunedLayout
from spark_kernels.reference import hadamard_scales

# Warp-instructions a clock that one SM of these GPUs can be expected to issue, of 4.
IPC = 2.5
# Rounds in which a warp of the write kernel finds its four rows' thresholds: 12.5 to 13.2 with the recall model's keys,
# 10.3 to 13.5 with random keys that have channels of several sizes.
SEARCH_ROUNDS = 14
NUM_KV_HEADS = 8
PLANNED_REQUESTS = 64
KEY_RATIO = 0.96
# Bytes a clock per SM: memory bandwidth / SMs / boost clock of A100 80 GB SXM, H100 SXM and B200.
BANDWIDTH = {80: 2.04e12 / 108 / 1.41e9, 90: 3.35e12 / 132 / 1.755e9, 100: 8.0e12 / 148 / 1.965e9}
# The same of dense bfloat16 products: 312, 989 and 2,250 TFLOP/s.
FLOPS_PER_CLOCK = {80: 312e12 / 108 / 1.41e9, 90: 989e12 / 132 / 1.755e9, 100: 2250e12 / 148 / 1.965e9}
# Weights of a layer of Llama-3.1-8B: projections of queries, keys and values, and outputs, and the MLP.
LLAMA_LAYER_WEIGHTS = 4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336
GPU_NAMES = {80: "A100", 90: "H100", 100: "B200"}
# In these tables uint8 values are float8 read as bits.
TRITON_TYPES = {"bfloat16": "*bf16", "float8": "*fp8e4nv", "float8 as bits": "*u8", "int4": "*u8", "int3": "*u8"}


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time arguments; ``restore_bits`` None stands for bfloat16 keys."""

    kernel: str
    head_dim: int = 128
    group: int = 4
    restore_bits: float | None = 3
    value_dtype: str = "int4"


@dataclass(frozen=True)
class Cost:
    """One row of the report. Bytes are those of the rows; a kernel's other reads are shared by many tokens."""

    kernel: str
    head_dim: int
    group: int
    restore_bits: float | None
    value_dtype: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    warp_instr_per_token_head: float
    bytes_per_token_head: int

    @property
    def clocks(self) -> tuple[float, float]:
        """Least clocks of one SM per (token, KV head): for the bytes, for the instructions."""
        return self.bytes_per_token_head / BANDWIDTH[self.arch], self.warp_instr_per_token_head / IPC


def prefill_share(write: Cost, chunk: int = 8192) -> float:
    """Clocks that the write kernel's instructions take, of those that a chunk's products do at the GPU's peak.

    Of one layer of Llama-3.1-8B: its matrix products, and causal attention of the chunk to itself (32 query heads).
    """
    flops = 2 * LLAMA_LAYER_WEIGHTS + 4 * 32 * write.head_dim * (chunk + 1) / 2
    return NUM_KV_HEADS * write.clocks[1] / (flops / FLOPS_PER_CLOCK[write.arch])


VARIANTS = (
    Variant("decode", restore_bits=None, value_dtype="bfloat16"),
    Variant("decode"),
    Variant("decode", value_dtype="bfloat16"),
    Variant("decode", value_dtype="float8"),
    Variant("decode", value_dtype="int3"),
    Variant("decode", restore_bits=4),
    Variant("decode", restore_bits=2, value_dtype="int3"),
    Variant("decode", group=8),
    Variant("decode", group=16),
    Variant("decode", head_dim=64, restore_bits=4),
    Variant("decode", head_dim=256),
    Variant("write"),
    Variant("write", restore_bits=2, value_dtype="int3"),
    Variant("write", value_dtype="bfloat16"),
    Variant("write_decode"),
    Variant("restore_keys"),
    Variant("prepare_queries"),
    Variant("merge_splits", restore_bits=None),
    Variant("plan_splits", restore_bits=None),
    Variant("dense", restore_bits=None),
)
# Kernels counted by their loop over tokens; the others are counted whole.
LOOPS = ("decode", "dense")
# Kernels counted along their usual path.
WRITES = ("write", "write_decode")


def measure(variant: Variant, arch: int) -> Cost:
    """Compile ``variant`` for sm_``arch`` and count."""
    if arch < 89 and variant.value_dtype == "float8":
        variant = Variant(**(asdict(variant) | {"value_dtype": "float8 as bits"}))
    key_format: KeyFormat = Numbers(variant.head_dim, torch.bfloat16)
    if variant.restore_bits is not None:
        key_format = Pruned.from_ratio(variant.head_dim, KEY_RATIO, variant.restore_bits)
    value_format = _value_format(variant)
    kernel, types, constants, num_warps, tokens, fusion = _arguments(variant, key_format, value_format)
    registers = decode.REGISTERS[variant.head_dim] if variant.kernel == "decode" else None
    compiled = _compile(kernel, types, constants, arch, num_warps, fusion, registers)
    code = MachineCode.of(compiled.asm["cubin"])
    if variant.kernel in LOOPS:
        count = code.loop_length()
    elif variant.kernel in WRITES:
        count = code.usual_length(SEARCH_ROUNDS)
    else:
        count = len(code.instructions)
    size = key_format.row_bytes
    if variant.kernel in ("decode", "dense", *WRITES):
        size += value_format.row_bytes
    elif variant.kernel == "merge_splits":
        size = 4 * (variant.head_dim + 1)
    elif variant.kernel == "plan_splits":
        size = 0
    elif variant.kernel == "prepare_queries":
        size = (4 * variant.head_dim + 16) * constants["COLUMNS"]
    return Cost(
        **asdict(variant),
        arch=arch,
        registers=code.registers,
        spill_bytes=code.spill_bytes,
        shared_bytes=compiled.metadata.shared,
        warp_instr_per_token_head=round(count * num_warps / tokens, 1),
        bytes_per_token_head=size,
    )


def _value_format(variant: Variant) -> ValueFormat:
    if variant.value_dtype.startswith("int"):
        return Integers(variant.head_dim, int(variant.value_dtype[3:]))
    return Numbers(variant.head_dim, torch.bfloat16 if variant.value_dtype == "bfloat16" else torch.float8_e4m3fn)


def _arguments(variant: Variant, key_format: KeyFormat, value_format: ValueFormat) -> tuple:
    """Kernel, types of its pointers, compile-time arguments, warps, tokens per iteration, fused multiplications."""
    values = TRITON_TYPES[variant.value_dtype]
    layout = PrunedLayout.of(key_format)
    scales = hadamard_scales(value_format.block) if isinstance(value_format, Integers) else (0.0, 0.0)
    heads = {"NUM_KV_HEADS": NUM_KV_HEADS}
    if variant.kernel == "decode":
        types = {"keys_ptr": "*u8" if layout else "*bf16", "values_ptr": values}
        constants = heads | decode.variant(key_format, value_format, variant.group) | {"HAS_SOFT_CAP": False}
        return decode._decode_split, types, constants, decode.NUM_WARPS, decode.BLOCK_N, True
    if variant.kernel in WRITES:
        share = write.lanes_share(variant.head_dim, is_decode=variant.kernel == "write_decode")
        constants = heads | share
        constants |= {
            "GROUP": variant.group,
            "HEAD_DIM": variant.head_dim,
            "V_HEAD_DIM": variant.head_dim,
            "LAYOUT": layout,
            "V_LAYOUT": IntegersLayout.of(value_format),
            "HAS_SQUARES": variant.kernel == "write",
            "V_SCALED": False,
            "V_LIMIT": 448.0 if variant.value_dtype.startswith("float8") else 0.0,
            "V_FORWARD": scales[0],
            "V_UNIT_STEP": UNIT_STEPS[value_format.bits] if isinstance(value_format, Integers) else 0.0,
        }
        types = {"keys_ptr": "*u8", "values_ptr": "*u8" if variant.value_dtype.startswith("float8") else values}
        return write._write_rows, types, constants, 1, share["ROWS"], False
    if variant.kernel == "restore_keys":
        constants = heads | {
            "LAYOUT": layout,
            "KEPT_BLOCK": triton.next_power_of_2(key_format.kept_channels),
            "BLOCK_TOKENS": restore.BLOCK_TOKENS,
        }
        return restore._restore_keys, {"rows_ptr": "*u8", "out_ptr": "*bf16"}, constants, 4, restore.BLOCK_TOKENS, False
    if variant.kernel == "merge_splits":
        constants = {"NUM_QO_HEADS": NUM_KV_HEADS * variant.group, "V_HEAD_DIM": variant.head_dim}
        constants |= {"BACK": scales[1], "SPLITS": merge._BLOCK_SPLITS}
        return merge._merge_splits, {"out_ptr": "*bf16"}, constants, 4, 1, True
    if variant.kernel == "plan_splits":
        constants = {"SHORTEST_SPLIT": plan._SHORTEST_SPLIT, "SPLIT_STEP": plan._SPLIT_STEP}
        constants |= {"CANDIDATES": plan._CANDIDATES, "SPLIT_COST": plan._SPLIT_COST}
        constants |= {"BATCH_BLOCK": PLANNED_REQUESTS, "SPLIT_BLOCK": plan._SPLITS_PER_PROGRAM}
        types = dict.fromkeys(("split_request_ptr", "split_start_ptr", "split_stop_ptr"), "*i32")
        return plan._plan_splits, types, constants, 4, 1, True
    if variant.kernel == "dense":
        block_m, block_n, num_warps = dense._BLOCKS[variant.head_dim]
        constants = heads | {"GROUP": variant.group, "HEAD_DIM": variant.head_dim, "V_HEAD_DIM": variant.head_dim}
        constants |= {"CAUSAL": True, "HAS_SOFT_CAP": False, "BATCH_BLOCK": 1, "BLOCK_M": block_m, "BLOCK_N": block_n}
        return dense._ragged_attention, {"out_ptr": "*bf16"}, constants, num_warps, block_n, True
    constants = heads | {"GROUP": variant.group, "COLUMNS": queries.num_columns(variant.group), "LAYOUT": layout}
    return queries._prepare_queries, {}, constants, 4, 1, True


# Types of arguments that are the same in all variants; other scalars are int32.
TYPES = {
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*bf16"),
    **dict.fromkeys(("slots_ptr", "indices_ptr", "squares_of_ptr", "order_ptr", "position_ptr"), "*i32"),
    **dict.fromkeys(("split_request_ptr", "split_start_ptr", "split_stop_ptr"), "*i32"),
    **dict.fromkeys(("out_ptr", "lse_ptr", "scalars_ptr", "squares_ptr"), "*fp32"),
    **dict.fromkeys(("score_scale", "soft_cap", "v_scale"), "fp32"),
    **dict.fromkeys(("split_out_ptr", "split_lse_ptr"), "*fp32"),
    **dict.fromkeys(("centre_ptr", "inverse_step_ptr", "unit_ptr", "inverse_unit_ptr"), "*fp32"),
    **dict.fromkeys(("request_splits_ptr", "kv_indptr_ptr", "qo_indptr_ptr"), "*i32"),
    "tables_ptr": "*fp16",
    "out_scale": "fp32",
}


def _compile(kernel, types: dict[str, str], constants: dict, arch: int, num_warps: int, fusion: bool, registers):
    types = TYPES | types
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    # PyTorch's tensors start at multiples of 16 bytes, their heads are multiples of 16 channels: Triton finds both.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or "_stride_" in name
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {
        "num_warps": num_warps,
        "num_stages": 2 if kernel is dense._ragged_attention else 1,
        "enable_fp_fusion": fusion,
        "maxnreg": registers,
    }
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _table(costs: list[Cost]) -> Table:
    table = Table(title=f"Static cost; least clocks of an SM at {IPC} instructions a clock")
    for name in ("kernel", "D", "group", "bits", "values", "GPU"):
        table.add_column(name, no_wrap=True)
    for name in ("regs", "spill B", "shared B", "instr", "bytes", "clk: bytes", "clk: instr"):
        table.add_column(name, justify="right")
    for cost in costs:
        bits = "-" if cost.restore_bits is None else f"{cost.restore_bits:g}"
        numbers = (cost.registers, cost.spill_bytes, cost.shared_bytes, cost.warp_instr_per_token_head)
        clocks = (f"{clock:.1f}" for clock in cost.clocks)
        table.add_row(
            *(cost.kernel, str(cost.head_dim), str(cost.group), bits, cost.value_dtype, GPU_NAMES[cost.arch]),
            *map(str, numbers),
            str(cost.bytes_per_token_head),
            *clocks,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(BANDWIDTH), default=sorted(BANDWIDTH))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    costs = []
    for arch in arguments.arch:
        for variant in VARIANTS:
            console.log(f"compiling {variant} for sm_{arch}")
            costs.append(measure(variant, arch))
    console.print(_table(costs))
    for cost in costs:
        if cost.kernel == "write":
            share = f"{prefill_share(cost):.1%} of a chunk's products"
            console.print(f"write, {cost.restore_bits} bits, {cost.value_dtype}, {GPU_NAMES[cost.arch]}: {share}")
    if arguments.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"versions": versions, "rows": [asdict(c) for c in costs]}, indent=1))


if __name__ == "__main__":
    main()
