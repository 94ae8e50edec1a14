"""The flags as validated settings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from spark_kernels.formats import Integers, KeyFormat, Numbers, Pruned, ValueFormat

DEFAULT_KEY_RATIO = 0.96
DEFAULT_VALUE_DTYPE = "int4"
VALUE_DTYPES = ("auto", DEFAULT_VALUE_DTYPE, "int3")

_LAYER_OR_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class SparkConfig:
    """What SparK was asked to do, checked against the model it is asked for.

    Parameters
    ----------
    key_ratio
        Share of key channels that are not kept exactly; 0 stores whole keys.
    restore_bits
        Bits per channel, on average, that restore them.
    dense_layers
        Global ids of the layers that store whole keys, ascending.
    value_dtype
        ``"int4"``, ``"int3"``, or ``"auto"`` for the dtype that a dense cache would have.
    """

    key_ratio: float
    restore_bits: float
    dense_layers: tuple[int, ...]
    value_dtype: str

    @classmethod
    def of(cls, args: Any, model_config: Any) -> SparkConfig:
        """`from_args` for a model; one of looped layers caches each layer once per loop, with ids of their own."""
        return cls.from_args(args, head_dim=model_config.head_dim, num_layers=model_config.num_attention_layers)

    @classmethod
    def from_args(cls, args: Any, *, head_dim: int, num_layers: int) -> SparkConfig:
        """Read ``spark_*`` from a server-argument record or a namespace of one.

        Raises
        ------
        ValueError
            A flag is outside its range for this model; the message names the flag, its value and the range.
        """
        bits = args.spark_restore_bits
        config = cls(
            key_ratio=_number("--spark-key-ratio", args.spark_key_ratio),
            restore_bits=default_restore_bits(head_dim) if bits is None else _number("--spark-restore-bits", bits),
            dense_layers=parse_layers(args.spark_dense_layers, num_layers),
            value_dtype=args.spark_value_dtype,
        )
        # The command line has checked it, keywords of sgl.Engine have not been.
        if config.value_dtype not in VALUE_DTYPES:
            raise ValueError(f"--spark-value-dtype={config.value_dtype}: use one of {', '.join(VALUE_DTYPES)}")
        try:
            config.pruned_format(head_dim, torch.bfloat16)
        except ValueError as error:
            raise ValueError(_in_terms_of_flags(str(error))) from None
        return config

    def pruned_format(self, head_dim: int, number_dtype: torch.dtype) -> KeyFormat:
        """How the layers outside ``dense_layers`` store a key of ``head_dim`` channels."""
        if self.key_ratio == 0:
            return Numbers(head_dim, number_dtype)
        return Pruned.from_ratio(head_dim, self.key_ratio, self.restore_bits)

    def key_format(self, layer_id: int, head_dim: int, number_dtype: torch.dtype) -> KeyFormat:
        """How layer ``layer_id`` (global) stores a key; ``number_dtype`` is the model's dtype."""
        if layer_id in self.dense_layers:
            return Numbers(head_dim, number_dtype)
        return self.pruned_format(head_dim, number_dtype)

    def value_format(self, head_dim: int, auto_dtype: torch.dtype) -> ValueFormat:
        """How every layer stores a value of ``head_dim`` channels; ``auto_dtype`` is what ``"auto"`` stands for."""
        if self.value_dtype == "auto":
            return Numbers(head_dim, auto_dtype)
        return Integers(head_dim, int(self.value_dtype.removeprefix("int")))


def default_restore_bits(head_dim: int) -> float:
    """What no flag means: with fewer channels each weighs more, and so do the bytes that do not depend on them."""
    return 3 if head_dim >= 128 else 4


def _number(flag: str, value: Any) -> float:
    """A number, which may have come as text: keywords of ``sgl.Engine`` have whatever type they have."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{flag}={value!r}: is not a number") from None


def parse_layers(layers: Any, num_layers: int) -> tuple[int, ...]:
    """Layer ids from numbers and ranges: ``'0,1,30-31'``, or a number or a list of such, as YAML and Python have them.

    Raises
    ------
    ValueError
        They do not parse, or name a layer that a model of ``num_layers`` layers does not have.
    """
    text = ",".join(map(str, layers)) if isinstance(layers, (list, tuple)) else str(layers)
    return _parse_layers(text, num_layers)


def _parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    layers: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _LAYER_OR_RANGE.fullmatch(part)
        if match is None:
            raise ValueError(
                f"--spark-dense-layers={text!r}: {part!r} is neither a layer number nor a range such as 30-31"
            )
        first = int(match[1])
        last = int(match[2] or first)
        if last < first:
            raise ValueError(f"--spark-dense-layers={text!r}: the range {part!r} runs backwards")
        if last >= num_layers:
            raise ValueError(
                f"--spark-dense-layers={text!r}: layer {last} does not exist, "
                f"the model has layers 0 to {num_layers - 1}"
            )
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def _in_terms_of_flags(message: str) -> str:
    return message.replace("key_ratio", "--spark-key-ratio").replace("restore_bits", "--spark-restore-bits")
