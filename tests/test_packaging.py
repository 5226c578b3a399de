"""The wheel holds what the repository holds, under one name."""

from __future__ import annotations

import configparser
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("graphs", "runtime", "exporter", "tools")

REPOSITORY_ONLY = {"tools/check", "tools/gpu_check"}
"""Files of the four folders that serve the repository and stay out of the wheel. All others must be in it."""


def repository_files() -> list[Path]:
    """Files that git tracks or would track, relative to ROOT; links count as files."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a git checkout to know which files belong to the repository: {error}")
    paths = (Path(name) for name in sorted(set(listing.split("\0"))) if name)
    return [path for path in paths if (ROOT / path).is_symlink() or (ROOT / path).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a clean copy of the repository, so that no stale build output gets in."""
    source = tmp_path_factory.mktemp("source")
    for path in repository_files():
        if path.parts[0] in {*FOLDERS, "src"} or len(path.parts) == 1:
            target = source / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, target, follow_symlinks=False)
    output = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output), str(source)]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    (path,) = output.glob("*.whl")
    return path


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_holds_exactly_the_files_of_the_repository(wheel: Path) -> None:
    expected = set()
    for path in repository_files():
        if path.parts[0] in FOLDERS and path.as_posix() not in REPOSITORY_ONLY:
            expected.add(f"dllm_export/{path.as_posix()}")
        elif path.parts[0] == "src" and not (ROOT / path).is_symlink():
            expected.add(path.relative_to("src").as_posix())
    names = names_in(wheel)
    missing, extra = sorted(expected - names), sorted(names - expected)
    assert not missing, f"not in the wheel: {missing}; add an __init__.py, package-data, or REPOSITORY_ONLY here"
    assert not extra, f"in the wheel and not in the repository: {extra}"


def test_wheel_adds_one_top_level_name(wheel: Path) -> None:
    assert {name.split("/")[0] for name in names_in(wheel)} == {"dllm_export"}


def test_wheel_installs_one_command_and_it_is_not_called_dllm(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(entry).decode())
    commands = dict(parser["console_scripts"])
    assert commands == {"dllm-export": "dllm_export.tools.cli:main"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_package_is_its_top_level_folder(folder: str) -> None:
    link = ROOT / "src" / "dllm_export" / folder
    assert link.is_symlink(), f"{link} is no link: clone again with 'git clone -c core.symlinks=true'"
    assert not link.readlink().is_absolute()
    spec = importlib.util.find_spec(f"dllm_export.{folder}")
    assert spec is not None
    assert spec.origin is not None, f"{folder}/__init__.py is missing"
    assert Path(spec.origin).resolve() == ROOT / folder / "__init__.py"
