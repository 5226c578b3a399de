"""A bundle is written all or nothing: whatever goes wrong, what was there before stays byte for byte."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from safetensors import SafetensorError

from dllm_export.errors import ResourceError, UsageError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pack import require_space
from dllm_export.exporter.pipeline import export
from dllm_export.runtime.bundle import Bundle, open_bundle
from dllm_export.runtime.manifest import FORMAT

FORCE = ExportOptions(force=True)
STEPS = 6
"""Progress reports of an export of three layers."""


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def old_bundle(bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle of an earlier export, alone in its directory."""
    shutil.copytree(bundle.path, tmp_path / "output" / "bundle")
    (tmp_path / "output" / "bundle" / "probe.safetensors").write_bytes(b"old")
    return tmp_path / "output" / "bundle"


def stop_at(number: int, error: BaseException) -> Callable[[str, int, int], None]:
    """A progress callback that raises at one of its reports."""

    def report(what: str, step: int, steps: int) -> None:
        if step == number:
            raise error

    return report


# -- targets
@pytest.mark.parametrize("kind", ["file", "directory", "model directory"])
def test_a_target_that_is_no_bundle_is_refused_and_untouched(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    target = output / "thesis"
    if kind == "file":
        target.write_text("five years of work")
    elif kind == "directory":
        (target / "chapter").mkdir(parents=True)
        (target / "chapter" / "1.tex").write_text("five years of work")
    else:
        shutil.copytree(checkpoint, target)
    before = snapshot(output)
    for options in (ExportOptions(), FORCE):
        with pytest.raises(UsageError, match=r"exists and is not a bundle; choose another"):
            export(checkpoint, target, options)
    assert snapshot(output) == before
    assert list(output.iterdir()) == [target]


def test_an_existing_bundle_is_kept_unless_forced(old_bundle: Path, checkpoint: Path) -> None:
    before = snapshot(old_bundle.parent)
    with pytest.raises(UsageError, match="already holds a bundle; pass --force to replace it"):
        export(checkpoint, old_bundle)
    assert snapshot(old_bundle.parent) == before


def test_a_forced_export_replaces_the_bundle_and_leaves_nothing_of_it(old_bundle: Path, checkpoint: Path) -> None:
    (old_bundle / "leftover.txt").write_text("from an older version")
    export(checkpoint, old_bundle, FORCE)
    assert not (old_bundle / "leftover.txt").exists()
    assert list(old_bundle.parent.iterdir()) == [old_bundle]


def test_an_empty_directory_is_a_fine_target(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "output" / "bundle").mkdir(parents=True)
    assert export(checkpoint, tmp_path / "output" / "bundle").path == tmp_path / "output" / "bundle"
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["bundle"]


def test_missing_parents_and_relative_targets_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export(checkpoint, Path("a/b/bundle"))
    assert open_bundle(tmp_path / "a/b/bundle").manifest.format == FORMAT


def test_a_parent_that_is_a_file_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(UsageError, match="cannot write to"):
        export(checkpoint, tmp_path / "file" / "bundle")


def test_a_link_to_a_bundle_is_replaced_without_a_trace(old_bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "current"
    link.symlink_to(old_bundle)
    export(checkpoint, link, FORCE)
    open_bundle(link)
    assert list(link.parent.iterdir()) == [link]
    assert list(old_bundle.parent.iterdir()) == [old_bundle]


# -- failures
@pytest.mark.parametrize("number", range(1, STEPS + 1))
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("boom")], ids=type)
def test_a_failure_at_any_step_keeps_the_old_bundle_and_leaves_no_temporary_files(
    error: BaseException, number: int, old_bundle: Path, checkpoint: Path
) -> None:
    before = snapshot(old_bundle.parent)
    with pytest.raises(type(error)):
        export(checkpoint, old_bundle, FORCE, stop_at(number, error))
    assert snapshot(old_bundle.parent) == before
    assert list(old_bundle.parent.iterdir()) == [old_bundle]


@pytest.mark.parametrize("number", range(1, STEPS))
def test_an_unfinished_bundle_cannot_be_opened(number: int, checkpoint: Path, tmp_path: Path) -> None:
    refused = []

    def report(what: str, step: int, steps: int) -> None:
        if step == number:
            for path in tmp_path.iterdir():
                with pytest.raises(UsageError, match="is not a bundle"):
                    open_bundle(path)
                refused.append(path)

    export(checkpoint, tmp_path / "bundle", progress=report)
    assert len(refused) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")], ids=type)
def test_a_failed_swap_brings_the_old_bundle_back(
    error: BaseException, old_bundle: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = snapshot(old_bundle.parent), Path.rename

    def fail_on_the_new_one(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_on_the_new_one)
    with pytest.raises(type(error)):
        export(checkpoint, old_bundle, FORCE)
    monkeypatch.undo()
    assert snapshot(old_bundle.parent) == before
    assert list(old_bundle.parent.iterdir()) == [old_bundle]


# -- space
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_resource_error_that_names_the_place(number: int, old_bundle: Path, checkpoint: Path) -> None:
    before = snapshot(old_bundle.parent)
    with pytest.raises(ResourceError, match=r"no space left in .*output.*free some") as refused:
        export(checkpoint, old_bundle, FORCE, stop_at(2, OSError(number, os.strerror(number))))
    assert refused.value.exit_code == 6
    assert snapshot(old_bundle.parent) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_reported_by_the_safetensors_library_is_the_same_error(
    number: int, old_bundle: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(old_bundle.parent)

    def fail(*_: object, **__: object) -> None:
        # Its own words; the class is no OSError.
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    monkeypatch.setattr(safetensors.torch, "serialize_file", fail)
    with pytest.raises(ResourceError, match="no space left"):
        export(checkpoint, old_bundle, FORCE)
    assert snapshot(old_bundle.parent) == before


FILL_AND_EXPORT = """
import sys
from pathlib import Path
from dllm_export.errors import DllmExportError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export

model, disk = map(Path, sys.argv[1:])

def fill(what, step, steps):
    if step != 1:
        return
    try:
        with (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        pass

try:
    export(model, disk / "bundle", ExportOptions(), fill)
except DllmExportError as error:
    print(type(error).__name__, error.exit_code, error)
print(sorted(path.name for path in disk.iterdir()))
"""


def private_mount() -> list[str]:
    """A command prefix under which a small disk may be mounted, or skip."""
    for prefix in (["unshare", "--user", "--map-root-user", "--mount"], ["unshare", "--mount"]):
        script = 'mount -t tmpfs -o size=64k tmpfs "$1"'
        if (
            shutil.which("unshare")
            and not subprocess.run([*prefix, "sh", "-c", script, "sh", os.curdir], capture_output=True).returncode
        ):
            return prefix
    pytest.skip("needs leave to mount a small disk in a private namespace")


def test_a_disk_that_really_fills_up_while_weights_are_written(checkpoint: Path, tmp_path: Path) -> None:
    prefix = private_mount()
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=4m tmpfs "$3" && exec "$0" -c "$1" "$2" "$3"'
    command = [*prefix, "sh", "-c", script, sys.executable, FILL_AND_EXPORT, str(checkpoint), str(tmp_path / "disk")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.startswith("ResourceError 6 no space left in "), result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "['filler']"


def test_too_little_space_is_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    seen: list[str] = []
    with pytest.raises(ResourceError, match=r"needs about .* GB and .* has 0\.00 GB free; .*-o"):
        export(checkpoint, tmp_path / "a" / "bundle", progress=lambda what, step, steps: seen.append(what))
    assert not seen
    assert not list(tmp_path.iterdir())


def test_space_is_measured_on_the_disk_of_the_target(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(ResourceError):
        require_space(tmp_path / "not" / "there" / "yet", 2**62)


def test_an_export_that_is_told_to_end_cleans_up(old_bundle: Path, checkpoint: Path) -> None:
    """SIGTERM, as a scheduler or `kill` sends it, in the middle of an export of the command line."""
    before = snapshot(old_bundle.parent)
    script = (
        "import os, signal, sys\n"
        "from dllm_export.exporter import weights\n"
        "save = weights.save_tensors\n"
        "weights.save_tensors = lambda *values: (save(*values), os.kill(os.getpid(), signal.SIGTERM))\n"
        "from dllm_export.tools.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, "export", str(checkpoint), "-o", str(old_bundle), "--force"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr.strip()) == (130, "error: interrupted")
    assert snapshot(old_bundle.parent) == before
