"""The ways of storing the cache that are measured through real servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import AutoConfig

from accuracy.endpoint import Endpoint
from accuracy.outcomes import DENSE, Label
from local_server import LocalServer

# Large models load for minutes.
START_TIMEOUT_S = 1800.0
VALUE_FLAGS = {
    "bf16": (),
    "fp8_e4m3": ("--kv-cache-dtype", "fp8_e4m3"),
    "int4": ("--spark-value-dtype", "int4"),
}


@dataclass(frozen=True)
class Setting:
    """A label and the command line that makes a server store its cache that way.

    Without compression a channel of K and of V takes `channel_bytes` each.
    """

    label: Label
    flags: tuple[str, ...] = ()
    channel_bytes: int = 2


def spark(key_ratio: float, restore_bits: int, values: str = "bf16") -> Setting:
    flags = ("--kv-compress", "spark", "--spark-key-ratio", str(key_ratio), "--spark-restore-bits", str(restore_bits))
    flags += VALUE_FLAGS[values]
    return Setting(Label("spark", key_ratio, restore_bits, values), flags)


SETTINGS = (
    Setting(DENSE),
    Setting(Label("fp8 keys and values", values="fp8_e4m3"), VALUE_FLAGS["fp8_e4m3"], channel_bytes=1),
    spark(0.8, 2),
    spark(0.8, 2, "fp8_e4m3"),
    spark(0.8, 2, "int4"),
    spark(0.8, 1),
    spark(0.8, 0),
    spark(0.9, 2),
)


@contextmanager
def serve(setting: Setting, model: str, arguments: list[str]) -> Iterator[tuple[Endpoint, float]]:
    """Starts a server; gives its endpoint and its bytes of K + V per token and KV head."""
    with LocalServer(*arguments, *setting.flags, model=model, start_timeout=START_TIMEOUT_S) as server:
        yield Endpoint(server.url), _bytes_per_token_head(server, setting, model)


def _bytes_per_token_head(server: LocalServer, setting: Setting, model: str) -> float:
    config = AutoConfig.from_pretrained(model)
    if setting.label.method != "spark":
        return 2 * setting.channel_bytes * (config.head_dim or config.hidden_size // config.num_attention_heads)
    return server.capacity().bytes_per_token / (config.num_hidden_layers * config.num_key_value_heads)
