"""Installs the stub GPU when a process imports torch: notebooks' kernels, launched processes, scripts."""

import importlib.abc
import importlib.util
import os
import sys


class _AfterTorch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads torch as ever, then installs the stub; values are computed until the process ends."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        self.exec_plain, spec.loader.exec_module = spec.loader.exec_module, self.exec_module
        return spec

    def exec_module(self, module):
        self.exec_plain(module)
        from gpu import emulation

        emulation.install()
        self.emulation = emulation.emulating()
        self.emulation.__enter__()


if os.environ.get("STUB_GPU_START") == "1":
    sys.meta_path.insert(0, _AfterTorch())
