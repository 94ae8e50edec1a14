"""SGLang's server with faults that can be switched on: ``FAULT_FILE`` names a file, and the file a fault.

Each changes something in one of `PERIOD` calls, as a real bug might.
"""

import itertools
import os
import runpy

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

PERIOD = 5
_calls = itertools.count()


def is_due(fault: str) -> bool:
    try:
        with open(os.environ["FAULT_FILE"]) as file:
            if file.read() != fault or next(_calls) % PERIOD:
                return False
    except FileNotFoundError:
        return False
    print(f"FAULT: {fault}", flush=True)
    return True


def read_other_rows(slots, req_to_token, req_pool_indices, lengths, kv_indptr, out):
    """The last rows of the first request are those of the last request in the batch."""
    if len(lengths) > 1 and is_due("another request's rows"):
        end, other_end = int(lengths[0]), int(lengths[-1])
        count = min(end, other_end) // 2
        slots[end - count : end] = req_to_token[req_pool_indices[-1], other_end - count : other_end]


def skip_a_row(slots, req_to_token, req_pool_indices, lengths, kv_indptr, out):
    """The first request's third row is that of its second token."""
    if int(lengths[0]) > 2 and is_due("a repeated row"):
        slots[2] = slots[1]


def write_elsewhere(writer, slots, *args, **kwargs):
    """Rows of a batch go to the slots of their neighbours."""
    if len(slots) > 1 and is_due("rows in wrong slots"):
        return (writer, slots.roll(1), *args), kwargs


def lose_a_slot(allocator, free_index):
    """Of the slots that are given back, one is forgotten."""
    if len(free_index) > 1 and is_due("a leaked slot"):
        return (allocator, free_index[1:]), {}


HOOKS = (
    ("sglang_spark.attention.backend.fill_slots", read_other_rows, HookType.AFTER),
    ("sglang_spark.attention.backend.fill_slots", skip_a_row, HookType.AFTER),
    ("spark_kernels.SparkBatchWriteWrapper.plan", write_elsewhere, HookType.BEFORE),
    ("sglang.srt.mem_cache.allocator.TokenToKVPoolAllocator.free", lose_a_slot, HookType.BEFORE),
)
for target, replacement, kind in HOOKS:
    HookRegistry.register(target, replacement, kind)

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
