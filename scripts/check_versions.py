#!/usr/bin/env python3
"""Serve with every SGLang release that sglang-spark supports, each in its own environment.

Makes ``.versions/RELEASE`` with ``setup_env.py`` and runs ``smoke_server.py`` there: dense, lossless rows (must equal
dense) and compressed rows (must answer, also from a shared prefix). Exits with an error if any release fails.

    python scripts/check_versions.py                                  # all
    python scripts/check_versions.py 0.5.20 0.5.24                    # these; the second has not been run before
    python scripts/check_versions.py 0.5.20=/path/of/environment      # with an environment that is there
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sglang_spark.releases import RUN_WITH  # noqa: E402

ENVIRONMENTS = ROOT / ".versions"
SCRIPTS = ROOT / "scripts"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=RUN_WITH, metavar="RELEASE[=ENVIRONMENT]")
    parser.add_argument("--json", type=Path, help="write what was installed and answered to this file")
    options = parser.parse_args()
    reports, failed = {}, []
    for request in options.releases:
        release, _, environment = request.partition("=")
        report = check(release, Path(environment) if environment else None)
        if report is None:
            failed.append(release)
        else:
            reports[release] = report
    if options.json:
        options.json.write_text(json.dumps(reports, indent=1) + "\n")
    for release, report in reports.items():
        print(f"{release}: " + ", ".join(f"{name} {number}" for name, number in report["packages"].items()))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def check(release: str, environment: Path | None) -> dict | None:
    """Run the smoke test with a release; its report, or None if it or its installation failed."""
    if environment is None:
        environment = ENVIRONMENTS / release
        setup = [sys.executable, str(SCRIPTS / "setup_env.py"), "--venv", str(environment), "--sglang", release]
        if subprocess.run(setup).returncode != 0:
            return None
    report = ENVIRONMENTS / f"{release}.json"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    smoke = [str(environment / "bin" / "python"), str(SCRIPTS / "smoke_server.py"), "--json", str(report)]
    if subprocess.run(smoke).returncode != 0:
        return None
    found = json.loads(report.read_text())
    if found["packages"]["sglang"] != release:
        print(f"{environment} has SGLang {found['packages']['sglang']}, not {release}", file=sys.stderr)
        return None
    return found


if __name__ == "__main__":
    sys.exit(main())
