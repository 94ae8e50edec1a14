"""What a user could pick instead of SparK, one method per file, simulated on a model's real keys and values.

To add a method: a file with a dataclass derived from `base.Method`, its paper's link in the docstring; what it
changes (`keys`, `values` or `kept_tokens`); its bytes; a line in `METHODS`; the tests in
``tests/accuracy/test_baselines.py`` then cover it.
"""

from __future__ import annotations

from baselines.authors import AuthorsRestoration
from baselines.base import Method
from baselines.fp8 import Fp8
from baselines.integers import Integers
from baselines.mustafar import Mustafar
from baselines.snapkv import SnapKV
from baselines.spark import Spark
from baselines.streaming_llm import StreamingLLM
from baselines.think import ThinK
from baselines.value_pruning import ValuePruning
from baselines.variants import (
    Calibrated,
    CalibratedIntegers,
    ChannelStatistics,
    DenseLayer,
    DenseTokens,
    SaliencyVariant,
)
from baselines.zero_fill import ZeroFill

RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9)
# Shares of tokens that take as many bytes as spark's default with bf16, fp8 and int4 values.
EVICTION_SHARES = (344 / 512, 216 / 512, 160 / 512)

METHODS: tuple[Method, ...] = (
    Method(),
    *(Spark(ratio=ratio, restore_bits=bits) for bits in (2, 1, 0) for ratio in RATIOS),
    *(Spark(ratio=ratio, value_dtype=dtype) for dtype in ("fp8_e4m3", "int4") for ratio in (0.5, 0.8, 0.9)),
    *(ZeroFill(ratio=ratio) for ratio in RATIOS),
    *(AuthorsRestoration(ratio=ratio) for ratio in RATIOS),
    *(ThinK(ratio=ratio) for ratio in RATIOS),
    *(Mustafar(ratio=ratio) for ratio in RATIOS),
    *(Mustafar(ratio=ratio, prune_values=True) for ratio in (0.5, 0.7)),
    *(StreamingLLM(share=share) for share in EVICTION_SHARES),
    *(SnapKV(share=share) for share in EVICTION_SHARES),
    Fp8(),
    Fp8(of_values=False),
    Fp8(of_keys=False),
    *(
        Integers(bits=bits, group=group, of_keys=of_keys, of_values=of_values)
        for bits, group in ((8, 128), (4, 128), (4, 32), (3, 32), (2, 32))
        for of_keys, of_values in ((True, False), (False, True), (True, True))
    ),
    *(
        ValuePruning(ratio=ratio, with_variance=with_variance, restore_bits=bits)
        for ratio in (0.5, 0.8)
        for with_variance, bits in ((False, 0), (True, 0), (False, 1), (False, 2))
    ),
)


def decision_variants(statistics: ChannelStatistics) -> tuple[Method, ...]:
    """What the defaults are decided by, at ratio 0.8; calibrated ones with these statistics."""
    layers = len(statistics.mean)
    return (
        *(SaliencyVariant(ratio=0.8, saliency=name) for name in ("magnitude", "paper", "all queries")),
        *(DenseTokens(ratio=0.8, recent=recent) for recent in (32, 128)),
        DenseTokens(ratio=0.8, sinks=4),
        *(DenseLayer(ratio=0.8, dense_layers=(layer,), num_layers=layers) for layer in range(layers)),
        *calibrated_variants(statistics),
    )


def calibrated_variants(statistics: ChannelStatistics) -> tuple[Method, ...]:
    """What a calibration file could buy, for rows at ratio 0.8 and for plain int4."""
    rows = [
        Calibrated(ratio=0.8, restore_bits=bits, statistics=statistics, prior=prior)
        for bits in (2, 1)
        for prior in (False, True)
    ]
    return *rows, *(CalibratedIntegers(bits=4, group=group, statistics=statistics) for group in (128, 32))
