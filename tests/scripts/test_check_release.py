"""A wheel that lacks a module, or does not install beside SGLang, is not released."""

from __future__ import annotations

import tarfile
import zipfile

import pytest

import check_release
import sglang_spark
from check_release import PACKAGES, ReleaseError


def test_the_release_installs_and_is_discovered(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["check_release.py", "--output", str(tmp_path)])
    assert check_release.main() == 0
    version = sglang_spark.__version__
    assert {path.name for path in tmp_path.iterdir()} == {
        f"sglang_spark-{version}.tar.gz",
        f"sglang_spark-{version}-py3-none-any.whl",
    }


@pytest.mark.parametrize(
    ("leave_out", "add", "problem"),
    [
        ("spark_kernels/formats.py", None, "lacks spark_kernels/formats.py"),
        (None, "tests/test_plugin.py", "should not have tests/test_plugin.py"),
        (None, None, "the version is 0.0.0, the latest in CHANGELOG.md is"),
    ],
    ids=["a-module-too-few", "a-file-too-many", "no-changelog-entry"],
)
def test_contents_are_checked(leave_out, add, problem, tmp_path):
    wheel, sdist = tmp_path / "wheel.whl", tmp_path / "sdist.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        for package, folder in PACKAGES.items():
            for path in [*folder.rglob("*.py"), *folder.rglob("py.typed")]:
                name = f"{package}/{path.relative_to(folder)}"
                if name != leave_out:
                    archive.write(path, name)
        if add:
            archive.writestr(add, "")
        archive.writestr("x.dist-info/METADATA", "Metadata-Version: 2.4\nName: sglang-spark\nVersion: 0.0.0\n")
        archive.writestr("x.dist-info/entry_points.txt", "[sglang.srt.plugins]\nspark = sglang_spark.plugin:register\n")
    with tarfile.open(sdist, "w:gz") as archive:
        for name in ("LICENSE", "README.md", "pyproject.toml"):
            archive.add(check_release.ROOT / name, f"sglang_spark-0.0.0/{name}")
    with pytest.raises(ReleaseError, match=problem):
        check_release.check_contents(sdist, wheel)
