"""A stand-in for SGLang's CUDA kernels on hosts without an accelerator, for SGLang 0.5.10 only.

That release imports ``sgl_kernel`` in every process, whatever the device is; later ones import it where they use it.
Here every import succeeds, of names and of submodules, and the first use of anything imported raises, by name.
"""

import importlib.abc
import importlib.machinery
import sys


class _Missing:
    """What a name of the stand-in evaluates to: importable, an error when used."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, *args, **kwargs):
        raise RuntimeError(f"{self._name} is not available: this environment has a stand-in for SGLang's CUDA kernels")

    def __getattr__(self, attribute: str):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _Missing(f"{self._name}.{attribute}")


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every submodule."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith(f"{__name__}."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__getattr__ = _names_of(module.__name__)


def _names_of(module: str):
    def getattr_(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{module}.{name}")

    return getattr_


__getattr__ = _names_of(__name__)
sys.meta_path.append(_Submodules())
