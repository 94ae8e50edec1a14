"""What differs between SGLang releases: one module per difference, chosen here by what the release has.

Nothing else in the package asks which SGLang is installed. Importing this package refuses a release that lacks
something SparK hooks into, so it is imported before anything of SGLang that may be missing.

Attributes
----------
arguments
    The argument record and its resolution: `record_arguments` (0.5.20 on), `pipeline_arguments` (0.5.19) or
    `dataclass_arguments`.
settings
    Where a scheduler process reads settings: `published_settings` (0.5.18 on) or `argument_settings`.
pools
    Who builds the pools: `configured_pools` (0.5.16 on) or `runner_pools`.
kv_indices
    SGLang's kernel that lists slots, wherever it is.
TARGETS
    All that is needed of this release besides what is hooked, which is in `plugin.HOOKS`.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from sglang_spark.adapters import kv_indices
from sglang_spark.adapters.targets import COMMON, check_release

RELEASE = version("sglang")

# Before the choice: an adapter may only be imported where there is something to adapt.
check_release(RELEASE, COMMON)

if find_spec("sglang.srt.arg_groups.resolution_hooks") is not None:
    from sglang_spark.adapters import record_arguments as arguments
elif find_spec("sglang.srt.arg_groups.pipeline") is not None:
    from sglang_spark.adapters import pipeline_arguments as arguments
else:
    from sglang_spark.adapters import dataclass_arguments as arguments

if arguments.HAS_NAMESPACES:
    from sglang_spark.adapters import published_settings as settings
else:
    from sglang_spark.adapters import argument_settings as settings

if find_spec("sglang.srt.mem_cache.kv_cache_configurator") is not None:
    from sglang_spark.adapters import configured_pools as pools
else:
    from sglang_spark.adapters import runner_pools as pools

TARGETS = (*COMMON, *arguments.TARGETS, *settings.TARGETS, *pools.TARGETS, *kv_indices.TARGETS)

# Again: modules of this package import what these name.
check_release(RELEASE, TARGETS)

__all__ = ["RELEASE", "TARGETS", "arguments", "kv_indices", "pools", "settings"]
