"""The SGLang releases that ``scripts/check_versions.py`` has served with; docs/versions.md says how."""

RUN_WITH = ("0.5.20", "0.5.21", "0.5.22", "0.5.23")
# What `make` installs and the tests run with.
MAIN = "0.5.21"
