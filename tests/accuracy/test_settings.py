"""The settings of servers: one label each, simulated under the same label, started by the flags it says."""

import pytest

from accuracy.outcomes import DENSE
from accuracy.settings import SETTINGS
from baselines import METHODS

BYTES = {str(method.label): method.bytes_per_token_head(128) for method in METHODS}


def test_labels_are_unique():
    assert len({str(setting.label) for setting in SETTINGS}) == len(SETTINGS)
    assert SETTINGS[0].label == DENSE


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: str(setting.label))
def test_what_a_server_is_asked_is_simulated_too(setting):
    size = BYTES[str(setting.label)]
    if setting.label.method != "spark":
        assert size == 2 * 128 * setting.channel_bytes
        return
    flags = dict(zip(setting.flags[::2], setting.flags[1::2], strict=True))
    assert flags["--kv-compress"] == "spark"
    assert float(flags["--spark-key-ratio"]) == setting.label.key_ratio
    assert int(flags["--spark-restore-bits"]) == setting.label.restore_bits
    assert size < 512
