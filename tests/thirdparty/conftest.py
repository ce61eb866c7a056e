"""The packages here are not installed: `test_third_party.py` installs them and runs their tests where they are."""

collect_ignore_glob = ["*"]
