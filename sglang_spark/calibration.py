"""What rows know of a model before they see a token: statistics of its keys and queries, and their file.

A row stores a key less its head's centre, in steps of its channels' deviation, with the channels in an order of
importance. A calibration is where these come from: ``--spark-calibration auto`` measures one at start-up
(`calibration_forward`), ``--spark-calibration PATH`` reads the file that ``python -m sglang_spark.calibrate`` wrote.

A calibration that suits a model badly gives worse rows and never a wrong sum: attention is exact for any centre. It is
fixed for the life of a pool, because a row can only be read with the calibration it was written with. Weight updates
therefore keep it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import pad

from sglang_spark.hybrid import row_layers
from spark_kernels import KeyCalibration

AUTO = "auto"
METADATA = "sglang-spark calibration"
VERSION = 1
STATISTICS = ("centre", "deviation", "query_rms")
_MAKE_IT = "make it with python -m sglang_spark.calibrate"


class Model(NamedTuple):
    """What of a model its calibration depends on. A fine-tuned model is its base: same heads, nearly the same keys."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, model_config: Any) -> Model:
        """From SGLang's ``ModelConfig``; all heads and layers with rows, whatever share of them a process holds.

        A looped model has its layers once per loop. On CPUs SGLang adds heads that do not divide evenly, and notes how
        many there were.
        """
        config = model_config.hf_config
        return cls(
            architecture=config.architectures[0],
            hidden_size=model_config.hidden_size,
            num_layers=len(row_layers(model_config)),
            num_attention_heads=getattr(config, "original_num_attention_heads", model_config.num_attention_heads),
            num_kv_heads=getattr(config, "original_total_num_kv_heads", model_config.get_total_num_kv_heads()),
            head_dim=model_config.head_dim,
            vocab_size=model_config.vocab_size,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of each statistic of the whole model."""
        return self.num_layers, self.num_kv_heads, self.head_dim


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of keys and queries, float32 ``[num_layers, num_kv_heads, head_dim]`` each.

    Parameters
    ----------
    centre
        Mean of the keys, as the cache holds them: after normalisation and rotary embedding.
    deviation
        Their standard deviation.
    query_rms
        Root mean square of the query channels, over the query heads that share the KV head.
    fingerprint
        16 hexadecimal digits of the whole model's statistics. Servers that exchange rows must have the same.
    source
        ``"auto"``, or the path of the file.
    """

    centre: torch.Tensor
    deviation: torch.Tensor
    query_rms: torch.Tensor
    fingerprint: str
    source: str

    @classmethod
    def of(cls, model: Model, *statistics: torch.Tensor, source: str = AUTO) -> Calibration:
        """A calibration of a whole model from its ``STATISTICS``, with the fingerprint they have."""
        statistics = tuple(statistic.float().contiguous() for statistic in statistics)
        digest = hashlib.sha256(json.dumps([METADATA, VERSION, *model]).encode())
        for statistic in statistics:
            digest.update(statistic.numpy().tobytes())
        return cls(*statistics, fingerprint=digest.hexdigest()[:16], source=source)

    def share(self, layers: list[int], heads: range) -> Calibration:
        """The part of a process that holds the layers at these places and these KV heads; with the whole's fingerprint.

        Heads beyond the model's, which SGLang adds to divide them evenly, have statistics of zero.
        """
        parts = {name: getattr(self, name)[layers, heads.start : heads.stop] for name in STATISTICS}
        added = len(heads) - parts["centre"].shape[1]
        return replace(self, **{name: pad(part, (0, 0, 0, added)) for name, part in parts.items()})

    def layer(self, index: int, device: torch.device | str) -> KeyCalibration:
        """What kernels take of the layer at ``index`` of these."""
        statistics = (getattr(self, name)[index].to(device) for name in STATISTICS)
        return KeyCalibration.from_statistics(*statistics)

    def save(self, path: str | Path, model: Model, made_from: str) -> None:
        """Write the calibration of a whole model, in one piece or not at all.

        Parameters
        ----------
        path
            The file: safetensors with the ``STATISTICS`` and one entry of metadata, JSON that says whose they are.
        made_from
            Name of the model, for those who read the file.
        """
        metadata = {"version": VERSION, "fingerprint": self.fingerprint, "made_from": made_from, **model._asdict()}
        unfinished = Path(f"{path}.{os.getpid()}")
        try:
            # One entry, because safetensors writes several in any order.
            entry = {METADATA: json.dumps(metadata)}
            save_file({name: getattr(self, name).contiguous() for name in STATISTICS}, unfinished, entry)
            # safetensors writes it for its owner only; a server may run as somebody else.
            unfinished.chmod(0o644)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, model: Model) -> Calibration:
        """Read the calibration of a whole model.

        Raises
        ------
        ValueError
            There is no such file, it is no calibration or a damaged one, or it is one of another model; the message
            names ``--spark-calibration``, the path and what differs.
        """
        try:
            return cls._read(path, model)
        except (OSError, SafetensorError) as error:
            reason = f"cannot be read ({type(error).__name__}: {error}); {_MAKE_IT}"
        except _Unfit as error:
            reason = str(error)
        raise ValueError(f"--spark-calibration={path}: {reason}")

    @classmethod
    def _read(cls, path: str | Path, model: Model) -> Calibration:
        with safe_open(path, framework="pt") as file:
            entry = (file.metadata() or {}).get(METADATA)
            if entry is None or set(file.keys()) != set(STATISTICS):
                raise _Unfit(f"is not a calibration; {_MAKE_IT}")
            metadata = json.loads(entry)
            if metadata.get("version") != VERSION:
                raise _Unfit(f"has format version {metadata.get('version')}, this release reads {VERSION}; {_MAKE_IT}")
            differences = [
                f"{field} {metadata.get(field)} instead of {value}"
                for field, value in model._asdict().items()
                if metadata.get(field) != value
            ]
            if differences:
                raise _Unfit(
                    f"was made for another model ({metadata.get('made_from')}), with {', '.join(differences)}; "
                    f"{_MAKE_IT} for this one"
                )
            statistics = {name: file.get_tensor(name) for name in STATISTICS}
        for name, statistic in statistics.items():
            if statistic.dtype != torch.float32 or statistic.shape != model.shape:
                raise _Unfit(
                    f"has {name} as {statistic.dtype} {list(statistic.shape)} instead of {torch.float32} "
                    f"{list(model.shape)}; {_MAKE_IT}"
                )
            if not statistic.isfinite().all() or (name != "centre" and (statistic < 0).any()):
                raise _Unfit(f"has values in {name} that are no statistics (NaN, infinite or negative); {_MAKE_IT}")
        calibration = cls.of(model, *statistics.values(), source=str(path))
        if calibration.fingerprint != metadata.get("fingerprint"):
            raise _Unfit(
                f"is damaged: its statistics have the fingerprint {calibration.fingerprint}, "
                f"not {metadata.get('fingerprint')}; {_MAKE_IT} again"
            )
        return calibration


class _Unfit(Exception):
    """Why a file cannot be the calibration of a model."""


def checked_source(source: str, model_config: Any) -> str:
    """Where ``--spark-calibration`` takes the statistics from, once a file is known to fit the model.

    Raises
    ------
    ValueError
        As `Calibration.load`, before weights are loaded.
    """
    if source == AUTO:
        return "measured at start-up"
    return f"{source} (fingerprint {Calibration.load(source, Model.of(model_config)).fingerprint})"
