"""A server with the canary: silent through ordinary traffic, and down with the reason once a row was changed."""

from __future__ import annotations

import sys
import time

import pytest
import traffic
from servers import COMMON_FLAGS

from local_server import LocalServer

DEADLINE_S = 60

# Run by every process of the server: when the file appears, one bit of one cached row changes before the next batch
# that reads it.
LAUNCH_WITH_A_VANDAL = """
import os, runpy
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

def change_a_bit(backend, forward_batch):
    if os.path.exists(TRIGGER) and forward_batch.forward_mode.is_decode():
        slot = backend.req_to_token[forward_batch.req_pool_indices[0], 5]
        backend.pool.k_buffer[2][slot, 1, 17] ^= 4

TRIGGER = os.environ["VANDAL_TRIGGER"]
HookRegistry.register("sglang_spark.canary.CanaryBackend.init_forward_metadata", change_a_bit, HookType.BEFORE)
if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
"""


def test_a_changed_row_stops_the_server(tmp_path):
    trigger, script = tmp_path / "trigger", tmp_path / "launch.py"
    script.write_text(LAUNCH_WITH_A_VANDAL)
    # A small pool, so that slots are written again by others.
    flags = (*COMMON_FLAGS, "--max-total-tokens", "2048", "--chunked-prefill-size", "256", "--kv-compress", "spark")
    env = {"SGLANG_SPARK_CANARY": "1", "VANDAL_TRIGGER": str(trigger)}
    with LocalServer(*flags, env=env, launcher=(sys.executable, str(script))) as server:
        for conversation in (traffic.shared_prefix, traffic.chat, traffic.more_than_the_pool, traffic.concurrent):
            conversation(server)
        assert "RowChanged" not in server.log()
        trigger.touch()
        with pytest.raises((OSError, RuntimeError)):
            server.generate("the code for red falcon is", max_new_tokens=16)
        deadline = time.monotonic() + DEADLINE_S
        while server.is_running() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not server.is_running()
        server.log_line(r"RowChanged: layer 2 reads rows that changed since their write: slots \d+")
