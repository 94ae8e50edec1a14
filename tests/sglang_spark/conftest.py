"""SGLang in this process, with the plugin loaded as a server loads it."""

from __future__ import annotations

import pytest
from model_configs import write_model


@pytest.fixture(scope="session", autouse=True)
def plugins():
    """Load SGLang's plugins, as launch_server does before it parses arguments."""
    from sglang.srt.plugins import load_plugins

    load_plugins()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A function from a name in ``model_configs.CONFIGS`` to the folder of that model."""
    folder = tmp_path_factory.mktemp("models")
    written = {}

    def of(name: str):
        if name not in written:
            written[name] = write_model(folder, name)
        return written[name]

    return of


@pytest.fixture
def resolve(model_folder):
    """A function from a model and flags to SGLang's resolved arguments."""
    from sglang.srt import server_args

    def resolved(*flags: str, model: str = "llama"):
        arguments = server_args.prepare_server_args(["--model-path", str(model_folder(model)), *flags])
        arguments.resolve_once()
        return arguments.resolved_dict()

    return resolved
