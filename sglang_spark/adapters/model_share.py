"""What a process holds of the model, whoever builds its pool."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class ModelShare(NamedTuple):
    """What a process's pool is made for.

    Parameters
    ----------
    model_config
        SGLang's ``ModelConfig`` of the model.
    layers
        Global ids of the layers that the process holds.
    model_dtype
        What a dense cache would store.
    """

    model_config: Any
    layers: range
    model_dtype: torch.dtype
