"""The bundled model with its output matrix apart from its embeddings; SGLang cannot split it into stages otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from local_server import RECALL_MODEL


def write_untied_model(folder: Path) -> Path:
    """Write the model, which says what the bundled one says, and return its folder."""
    shutil.copytree(RECALL_MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder
