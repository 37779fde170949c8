"""Runs the host tests with each ComfyUI's own Python: `python -m tests.host.run`.

Hosts: COMFYUI_PATH (several joined by the path separator); else the ComfyUI whose custom_nodes holds this folder;
else every ~/ComfyUI*. pytest is put into a folder of this repository (.cache/host-tools), never into a host.
Arguments are handed to pytest. Exit status 0 only if at least one host was tested and all its tests passed; 77 when
no host was found.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SUITE = Path(__file__).resolve().parent / "suite"
TOOLS = REPO / ".cache" / "host-tools"
NO_HOST = 77


def is_host(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy" / "model_patcher.py").is_file()


def find_hosts() -> list[Path]:
    """ComfyUI folders to test.

    Raises:
        SystemExit: COMFYUI_PATH names a folder that is none.
    """
    named = [Path(part).expanduser().resolve() for part in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if part]
    for path in named:
        if not is_host(path):
            raise SystemExit(f"COMFYUI_PATH names {path}, which is not a ComfyUI folder.")
    if named:
        return named
    # Not resolved: a pack that is linked into custom_nodes belongs to that ComfyUI.
    unresolved = Path(os.path.abspath(__file__)).parents[2]
    if unresolved.parent.name == "custom_nodes" and is_host(unresolved.parent.parent):
        return [unresolved.parent.parent]
    return sorted(path for path in Path.home().glob("ComfyUI*") if is_host(path))


def host_python(host: Path) -> Path | None:
    """The Python that can run this host."""
    for folder in (".venv", "venv"):
        for tail in ("bin/python", "Scripts/python.exe"):
            if (host / folder / tail).is_file():
                return host / folder / tail
    probe = subprocess.run([sys.executable, "-c", "import torch, aiohttp, safetensors, einops"], capture_output=True)
    return Path(sys.executable) if probe.returncode == 0 else None


def tools(python: Path) -> list[Path]:
    """Folders with what `python` lacks: pytest, `render`'s websocket, and requests, which a host may leave out."""
    wanted = {
        "pytest": ["pytest", "pluggy", "iniconfig", "packaging", "pygments"],
        "websocket": ["websocket-client"],
        "requests": ["requests", "urllib3", "idna", "charset-normalizer", "certifi"],
    }
    folders = []
    for module, packages in wanted.items():
        if subprocess.run([str(python), "-c", f"import {module}"], capture_output=True).returncode == 0:
            continue
        target = TOOLS / module
        folders.append(target)
        if (target / module).is_dir():
            continue
        # Pure Python only, so that the installing Python's version does not matter.
        command = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *packages]
        if not any(subprocess.run([str(pip), *command]).returncode == 0 for pip in (sys.executable, python)):
            raise SystemExit(f"Could not install {module} into {target}: see the message above.")
    return folders


def version(host: Path) -> str:
    text = (host / "comfyui_version.py").read_text() if (host / "comfyui_version.py").is_file() else ""
    return text.partition('__version__ = "')[2].partition('"')[0] or "unknown version"


def run_module(host: Path, module: str, arguments: list[str]) -> int:
    """Runs `python -m module` from this repository with the host's own Python; its exit status.

    The environment names the host (CONCEPTSPLIT_HOST) and has `tools`, also where the host lacks them.
    """
    python = host_python(host)
    if python is None:
        print(f"{host.name} ({version(host)}): no Python found that can run it.", flush=True)
        return 1
    folders = tools(python)
    environment = dict(os.environ, CONCEPTSPLIT_HOST=str(host), PYTHONDONTWRITEBYTECODE="1")
    environment.setdefault("OMP_NUM_THREADS", "1")
    paths = [*map(str, folders), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    print(f"=== ComfyUI {version(host)} ({host.name})", flush=True)
    return subprocess.run([str(python), "-m", module, *arguments], cwd=REPO, env=environment).returncode


def test(host: Path, arguments: list[str]) -> bool:
    options = ["-p", "no:cacheprovider", "--rootdir", str(SUITE), "-c", str(SUITE / "pytest.ini")]
    return run_module(host, "pytest", [str(SUITE), *options, *arguments]) == 0


def main(arguments: list[str]) -> int:
    hosts = find_hosts()
    if not hosts:
        print("No ComfyUI found: host tests did not run. Set COMFYUI_PATH to a ComfyUI folder.")
        return NO_HOST
    failed = [host for host in hosts if not test(host, arguments)]
    told = ", ".join(f"{version(host)} {'FAILED' if host in failed else 'passed'}" for host in hosts)
    print(f"Host tests on ComfyUI: {told}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
