"""A GPU that is none: torch's own CUDA code over a stub runtime, for tests on any Linux machine with gcc.

    python tests/gpu/stub.py SCRIPT [ARGUMENTS]      or: stub.py -m MODULE [ARGUMENTS]

runs a program with a GPU whose values are computed. stub.c takes the place of libcudart, libcublas and libcuda by
LD_PRELOAD. Dispatch, autograd's threads, autocast, GradScaler, the caching allocator, `set_sync_debug_mode` and every
check of device and dtype are torch's own; emulation.py computes the values. Not covered: NCCL, cuDNN, kernels of
Triton, speed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
STARTUP = HERE / "startup"  # its sitecustomize installs the stub in every Python process that imports torch
# Symbols of the driver, which torch looks up by name; those of the runtime are found by nm.
DRIVER = (
    rb"\0(cu(?:Device|Mem|Ctx|Module|Launch|Get|Stream|Func|Link|Multicast|Tensor|Graph|Green|Init|Event|Occup|Pointer)"
    rb"\w*)\0"
)

CONTEXT = """
long cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
long cuCtxGetCurrent(void **context) { static int one; *context = &one; return 0; }
"""


# --- building


def missing() -> str | None:
    """Why the stub cannot be built here; None where it can."""
    for program in ("gcc", "nm"):
        if shutil.which(program) is None:
            return f"the stub GPU needs {program}"
    if not (_package("torch") / "lib" / "libtorch_cuda.so").is_file():
        return f"torch {version('torch')} was built without CUDA: the stub GPU needs pip's build for CUDA"
    if importlib.util.find_spec("triton") is None or not (_headers() / "cuda_runtime_api.h").is_file():
        return "the stub GPU needs the CUDA headers that triton brings"
    return None


def build() -> Path:
    """The folder of the built stub: made once for each version of torch and of stub.c, complete or not at all."""
    sources = (HERE / "stub.c").read_bytes() + Path(__file__).read_bytes() + version("torch").encode()
    name = f"bksdm-stub-gpu-{os.getuid()}-{hashlib.sha256(sources).hexdigest()[:12]}"
    folder = Path(tempfile.gettempdir()) / name
    if not folder.is_dir():
        part = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        _compile(part)
        try:
            part.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(part)
    return folder


def _package(name: str) -> Path:
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


def _headers() -> Path:
    return _package("triton") / "backends" / "nvidia" / "include"


def _compile(folder: Path) -> None:
    """stub.c as libstub.so, a libcuda.so.1; whatever else torch wants returns 0."""
    libraries = [p for p in (_package("torch") / "lib").glob("lib*.so") if re.search("cuda|python|nvshmem", p.name)]
    command = ["nm", "-D", "--undefined-only", *map(str, libraries)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wanted = set(re.findall(r" U ((?:cuda[A-Z]|__cuda|cublas|cuFile|cusolver)\w*)", listed))
    written = set(re.findall(r"\b((?:cuda[A-Z]|__cuda|cublas)\w*)\(", (HERE / "stub.c").read_text()))
    content = b"".join(p.read_bytes().replace(b"\0", b"\0\0") for p in libraries)
    driver = {name.decode() for name in re.findall(DRIVER, content)}
    (folder / "rest.c").write_text(_returning_0(wanted - written))
    (folder / "driver.c").write_text(CONTEXT + _returning_0(driver - {"cuDevicePrimaryCtxGetState", "cuCtxGetCurrent"}))
    gcc = ["gcc", "-O1", "-fPIC", "-shared", "-w", "-I", str(_headers())]
    runtime = [str(HERE / "stub.c"), "rest.c", "-o", "libstub.so", "-lpthread"]
    subprocess.run([*gcc, *runtime], cwd=folder, check=True)
    subprocess.run([*gcc, "driver.c", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1"], cwd=folder, check=True)


def _returning_0(names: set[str]) -> str:
    return "".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(names))


def environment(gpus: int = 1, capability: str = "9.0", memory_gb: float = 80, start: bool = True) -> dict[str, str]:
    """The environment of processes on the stub.

    Args:
        start: also install the stub in each of them when it imports torch, values computed; with False the process
            calls `emulation.install` and `emulation.emulating` itself.
    """
    folder, old = build(), os.environ
    paths = [str(STARTUP)] * start + [str(HERE.parent), str(HERE.parents[1]), old.get("PYTHONPATH", "")]
    return {
        **old, "LD_PRELOAD": str(folder / "libstub.so"), "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), old.get("LD_LIBRARY_PATH", "")])),
        "STUB_GPU_COUNT": str(gpus), "STUB_GPU_CAPABILITY": capability, "STUB_GPU_MEMORY": str(memory_gb),
        "STUB_GPU_START": str(int(start)), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def main() -> None:
    """Runs a script or module with a GPU."""
    if len(sys.argv) < 2 or (reason := missing()):
        sys.exit(__doc__ if len(sys.argv) < 2 else reason)
    os.execvpe(sys.executable, [sys.executable, *sys.argv[1:]], environment())


if __name__ == "__main__":
    main()
