"""Starting servers: what is refused exits with the reason, and without the flag the plugin changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import traffic
from servers import COMMON_FLAGS, running

from local_server import RECALL_MODEL, LocalServer, ServerFailed

FLAGS = (*COMMON_FLAGS, "--max-total-tokens", "4096")
TIMEOUT_S = 420

# The launcher has the plugin, and every process it starts has not.
LOSE_THE_PLUGIN_IN_CHILDREN = """
import os, runpy, sys
from sglang.srt.plugins import load_plugins
load_plugins()
os.environ["SGLANG_PLUGINS"] = "cpu_host"
if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
"""

ENGINE = """
import sys
import sglang as sgl
if __name__ == "__main__":
    with sgl.Engine(model_path=sys.argv[1], max_total_tokens=2048, log_level="info", **eval(sys.argv[2])) as engine:
        print("ANSWER", engine.generate(sys.argv[3], {"temperature": 0, "max_new_tokens": 24})["text"])
"""


def test_a_refused_launch_exits_with_the_reason():
    with pytest.raises(ServerFailed, match="exited with status 1") as failure:
        with LocalServer(*FLAGS, "--kv-compress", "spark", "--attention-backend", "torch_native"):
            pass
    assert "--attention-backend=torch_native: only SparK's own attention backend" in str(failure.value)


def test_a_scheduler_without_the_plugin_does_not_serve(tmp_path):
    script = tmp_path / "launch.py"
    script.write_text(LOSE_THE_PLUGIN_IN_CHILDREN)
    server = LocalServer(*FLAGS, "--kv-compress", "spark")
    result = subprocess.run(
        [sys.executable, str(script), *server.command[3:]], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "Invalid attention backend: spark" in output, output[-3000:]
    assert "The server is fired up" not in output


def test_without_the_flag_the_plugin_changes_nothing():
    loaded = LocalServer(*FLAGS)
    absent = LocalServer(*FLAGS, env={"SGLANG_PLUGINS": "cpu_host"})
    with running(loaded, absent):
        assert loaded.info().keys() == absent.info().keys()
        with_plugin, without = (_settings(server) for server in (loaded, absent))
        assert with_plugin == without
        assert traffic.shared_prefix(loaded) == traffic.shared_prefix(absent)
        assert "SparK" not in loaded.log()


def test_engine_takes_the_flags_as_keywords(tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    item = traffic.make_items("single_needle", seed=31, count=1, target_tokens=300)[0]

    def run(keywords: dict) -> subprocess.CompletedProcess:
        command = [sys.executable, str(script), str(RECALL_MODEL), repr(keywords), item.plain_prompt()]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=os.environ)

    served = run({"kv_compress": "spark", "spark_key_ratio": 0.7})
    assert served.returncode == 0, served.stderr[-3000:]
    assert item.turns[0].is_correct(served.stdout.partition("ANSWER")[2])
    assert "SparK KV cache" in served.stdout + served.stderr
    refused = run({"kv_compress": "spark", "spark_key_ratio": 0.995})
    assert refused.returncode != 0
    assert "--spark-key-ratio=0.995" in refused.stderr


def test_the_offline_engine_example():
    command = [sys.executable, str(RECALL_MODEL.parent / "offline_engine.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.returncode == 0, result.stderr[-3000:]
    for item in traffic.make_items("single_needle", seed=12, count=4, target_tokens=400):
        turn = item.turns[0]
        answer = result.stdout.partition(turn.question)[2].strip().partition("\n")[0]
        assert turn.is_correct(answer), result.stdout


def _settings(server: LocalServer) -> dict:
    """What the server resolved from its arguments; not what it measured since."""
    from sglang.srt.arg_groups.arg_utils import record_fields
    from sglang.srt.server_args import ServerArgs

    info = server.info()
    return {field.name: info.get(field.name) for field in record_fields(ServerArgs) if field.name != "port"}
