"""What differs between SGLang releases: one module per difference, chosen here by what the release has.

Nothing else in the package asks which SGLang is installed. Importing this package refuses a release that lacks
something SparK hooks into, so it is imported before anything of SGLang that may be missing.

Attributes
----------
arguments
    The argument record and its resolution: `record_arguments` (0.5.20 on), `pipeline_arguments` (0.5.19),
    `dataclass_arguments` (0.5.14 on) or `handwritten_arguments`.
settings
    Where a scheduler process reads settings: `published_settings` (0.5.18 on) or `argument_settings`.
pools
    Who builds the pools: `configured_pools` (0.5.16 on) or `runner_pools`.
backend
    What an attention backend implements for CUDA graphs: `capturing_backend` (0.5.14 on) or `eager_backend`.
stats
    What a scheduler counts: `scheduler_stats` (0.5.14 on) or `older_stats`.
kv_indices
    SGLang's kernel that lists slots, wherever it is.
ABSENT_SETTINGS
    Names of settings that SparK refuses and this release does not have.
TARGETS
    All that is needed of this release besides what is hooked, which is in `plugin.HOOKS`.
"""

from __future__ import annotations

from importlib.metadata import version

from sglang_spark.adapters import kv_indices
from sglang_spark.adapters.targets import COMMON, check_release, exists

RELEASE = version("sglang")

# Before the choice: an adapter may only be imported where there is something to adapt.
check_release(RELEASE, COMMON)

if exists("sglang.srt.arg_groups.resolution_hooks"):
    from sglang_spark.adapters import record_arguments as arguments
elif exists("sglang.srt.arg_groups.pipeline"):
    from sglang_spark.adapters import pipeline_arguments as arguments
elif exists("sglang.srt.arg_groups"):
    from sglang_spark.adapters import dataclass_arguments as arguments
else:
    from sglang_spark.adapters import handwritten_arguments as arguments

if arguments.HAS_NAMESPACES:
    from sglang_spark.adapters import published_settings as settings
else:
    from sglang_spark.adapters import argument_settings as settings

if exists("sglang.srt.model_executor.model_runner_kv_cache_mixin"):
    from sglang_spark.adapters import runner_pools as pools
else:
    from sglang_spark.adapters import configured_pools as pools

if exists("sglang.srt.runtime_context"):
    from sglang_spark.adapters import capturing_backend as backend
    from sglang_spark.adapters import scheduler_stats as stats
else:
    from sglang_spark.adapters import eager_backend as backend
    from sglang_spark.adapters import older_stats as stats

ABSENT_SETTINGS = pools.ABSENT_SETTINGS | backend.ABSENT_SETTINGS
_CHOSEN = (arguments, settings, pools, backend, stats, kv_indices)
TARGETS = (*COMMON, *(target for adapter in _CHOSEN for target in adapter.TARGETS))

# Again: modules of this package import what these name.
check_release(RELEASE, TARGETS)

__all__ = [
    "ABSENT_SETTINGS",
    "RELEASE",
    "TARGETS",
    "arguments",
    "backend",
    "kv_indices",
    "pools",
    "settings",
    "stats",
]
