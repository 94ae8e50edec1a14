"""The same memory for every server's KV cache, as so many tokens for each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from load_bench.servers import SERVERS
from local_server import LocalServer

MIB = 1 << 20


@dataclass(frozen=True)
class Capacity:
    """What one process of a server can cache.

    Parameters
    ----------
    tokens
        Of whole pages, in the memory that was asked about.
    bytes_per_token
        All layers and KV heads.
    """

    tokens: int
    bytes_per_token: int


class BudgetMissed(RuntimeError):
    """A server's cache does not take the memory it was given."""


def capacities(names: Sequence[str], model: str, flags: Sequence[str], budget_mib: float) -> dict[str, Capacity]:
    """The capacity of each of the servers ``names`` in ``budget_mib`` MiB, as ``sglang_spark.doctor`` computes it.

    Raises
    ------
    RuntimeError
        A server would be refused; the message is the doctor's.
    """

    # The doctor always looks at a compressed server, and says what dense ones would store besides.
    settings = {name: SERVERS["spark" if name.startswith("dense") else name] for name in names}
    distinct = list(dict.fromkeys(settings.values()))
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda setting: _diagnose(model, [*flags, *setting], budget_mib), distinct)
        found = dict(zip(distinct, answers, strict=True))
    return {name: _capacity(name, found[setting]) for name, setting in settings.items()}


def _capacity(name: str, found: dict) -> Capacity:
    cache = name.replace("-", "_") if name.startswith("dense") else "spark"
    return Capacity(found["tokens"][cache], found["bytes_per_token"][cache])


def _diagnose(model: str, flags: Sequence[str], budget_mib: float) -> dict:
    command = [sys.executable, "-m", "sglang_spark.doctor", "--model-path", model, "--mem", repr(budget_mib / 1024)]
    result = subprocess.run([*command, "--json", *flags], capture_output=True, text=True)
    if result.returncode:
        said = json.loads(result.stdout)["model"]["refusal"] if result.stdout.startswith("{") else result.stderr
        raise RuntimeError(f"{' '.join(command)} {' '.join(flags)}: {said}")
    return json.loads(result.stdout)["model"]


def pool_bytes(server: LocalServer, capacity: Capacity, budget_mib: float) -> int:
    """Bytes of the buffers that a running server with ``--enable-metrics`` has allocated for its cache.

    Raises
    ------
    BudgetMissed
        They differ from the budget by more than the page that SGLang adds for padding, or hold fewer tokens.
    """
    info = server.info()
    allocated = round(server.metrics()["sglang:kv_cache_memory_usage_gb"] * (1 << 30))
    page = info["page_size"] * capacity.bytes_per_token
    if info["max_total_num_tokens"] != capacity.tokens or abs(allocated - budget_mib * MIB) > page:
        raise BudgetMissed(
            f"asked for {capacity.tokens} tokens in {budget_mib:g} MiB, the server has {info['max_total_num_tokens']} "
            f"in {allocated / MIB:.3f} MiB; is there so much free memory?"
        )
    return allocated
