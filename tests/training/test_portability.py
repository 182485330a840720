# SPDX-License-Identifier: Apache-2.0
"""What would fail on another system than the one that the tests run on."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import anomalib_intra
from anomalib_intra.training import processes

PACKAGE = Path(anomalib_intra.__file__).parent

#: Modules and functions that Windows lacks; a module may be imported where it is needed, after a look at the system.
ELSEWHERE = {"resource", "fcntl", "pwd", "grp", "termios"}
MISSING = {
    *("os.fork", "os.kill", "os.killpg", "os.setsid", "os.getpgid", "os.statvfs", "os.sched_getaffinity"),
    *("signal.alarm", "signal.pause", "signal.SIGKILL", "signal.SIGUSR1", "signal.SIGALRM", "signal.SIGHUP"),
}


def nodes() -> list[tuple[Path, ast.AST]]:
    return [
        (path, node) for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_text_is_read_and_written_in_one_encoding() -> None:
    for path, node in nodes():
        called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
        if called in ("read_text", "write_text"):
            assert "encoding" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"


def test_nothing_is_used_that_windows_lacks() -> None:
    for path, node in nodes():
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in MISSING, f"{path}:{node.lineno}"
        if isinstance(node, ast.Import) and node.col_offset == 0:
            assert not ELSEWHERE & {name.name for name in node.names}, f"{path}:{node.lineno}"


def test_where_links_are_not_allowed_processes_still_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("v0", "v1"):
        (tmp_path / version).mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "v0", target_is_directory=True)

    def refused(*_: object, **__: object) -> None:
        raise OSError("A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refused)
    strategy = SimpleNamespace(broadcast=lambda value: value, barrier=lambda name: None)
    trainer = SimpleNamespace(default_root_dir=str(tmp_path / "v1"), strategy=strategy, is_global_zero=True)
    processes.share_run_folder(trainer)
    assert trainer.default_root_dir == str(tmp_path / "v1")


_SPAWNED = """
import sys
from pathlib import Path
from tests.conftest import tiny_engine, tiny_intra
from anomalib_intra import TextureDemo
if __name__ == "__main__":
    import torch.multiprocessing
    torch.multiprocessing.set_start_method("spawn", force=True)
    model = tiny_intra(windows_per_image=1)
    data = TextureDemo(sys.argv[1], num_workers=1)
    print(tiny_engine(Path(sys.argv[2]), max_epochs=1, logger=False).train(model, datamodule=data))
"""


def test_workers_that_are_spawned_load_the_images(demo_root: Path, tmp_path: Path) -> None:
    """As on Windows and macOS, where nothing is inherited from the process that trains."""
    (tmp_path / "spawned.py").write_text(_SPAWNED, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, tmp_path / "spawned.py", demo_root, tmp_path / "results"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[2], PACKAGE.parent)))},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "image_AUROC" in done.stdout
