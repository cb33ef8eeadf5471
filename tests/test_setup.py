"""A fresh clone sets itself up, from exact pins that hold on any machine."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    found = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert len(found) == len(lines), "a package is pinned twice"
    return found


@pytest.mark.parametrize("file", ["requirements.lock", "requirements-data.lock"])
def test_the_locks_hold_nothing_but_exact_versions(file: str) -> None:
    for name, version in pins(file).items():
        # No `+cpu`, no URL, no path: the same pin must be found on any index, on machines with a GPU too.
        assert re.fullmatch(r"\d+(\.\w+)*", version), (name, version)
        assert not name.startswith(("nvidia-", "cuda-", "triton")), name


def test_the_lock_meets_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    locked = pins("requirements.lock")
    for line in [*project["dependencies"], *optional["dev"], *optional["trackers"]]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), line


def test_these_tests_run_on_the_locked_versions() -> None:
    locked = pins("requirements.lock") | pins("requirements-data.lock")
    installed = {canonicalize_name(each.metadata["Name"]): each.version for each in importlib.metadata.distributions()}
    assert {name: installed[name].partition("+")[0] for name in locked} == locked


def test_a_missing_python_is_told(tmp_path: Path) -> None:
    for file in ("Makefile", "requirements.lock", "requirements-data.lock", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path)
    done = subprocess.run(["make", "setup", "PYTHON=/nowhere/python"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no Python 3.11 with venv was found (looked for /nowhere/python)" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_every_target_sets_up_first() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "serve", "test", "test-all", "lint", "bench", "docs"):
        assert re.search(rf"^{target}: \$\(READY\)", makefile, re.M), target


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_fresh_clone_sets_itself_up(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 6 * 2**30:
        pytest.skip("needs 6 GB of disk")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    (tmp_path / "home").mkdir()
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PATH", "PIP_", "SSL_", "LANG"))}
    environment = kept | {"HOME": str(tmp_path / "home")}
    try:
        subprocess.run(["make", "setup"], cwd=clone, env=environment, check=True)
        again = subprocess.run(["make", "setup"], cwd=clone, env=environment, capture_output=True, text=True)
        assert "Setting up" not in again.stdout
        check = [clone / ".venv/bin/shoal", "check", "recipes/airline.yaml"]
        done = subprocess.run(check, cwd=clone, env=environment, capture_output=True, text=True)
        assert (done.returncode, "recipes/airline.yaml is valid." in done.stdout) == (0, True), done.stderr
    finally:
        shutil.rmtree(clone, ignore_errors=True)
