"""A stand-in for torchvision on hosts where it has no build.

SGLang and transformers import image processors at start-up, whatever the model is, and torchvision's wheels link
CUDA and fail to load beside a CPU build of torch. Here every import they make succeeds, and the first use of
anything imported raises, by name. Text models never get that far.
"""

import sys
from enum import Enum
from types import ModuleType

__version__ = "0.0.0+stub"
__path__: list[str] = []

_SUBMODULES = (
    "io",
    "ops",
    "ops.boxes",
    "transforms",
    "transforms.functional",
    "transforms.v2",
    "transforms.v2.functional",
)


class InterpolationMode(Enum):
    """Image processors use these as default arguments, so the members must exist."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Missing:
    """What a stubbed name evaluates to: importable and usable in annotations, an error when used."""

    def __init__(self, name: str):
        self._name = name

    def _fail(self):
        raise RuntimeError(
            f"{self._name} is not available: this environment has the torchvision stand-in of sglang-cpu-host, "
            "which is enough for text models only"
        )

    def __call__(self, *args, **kwargs):
        self._fail()

    def __getattr__(self, attribute: str):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        self._fail()

    def __or__(self, other):
        return self

    __ror__ = __or__


def _stub_attribute(module_name: str):
    def getattr_(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{module_name}.{name}")

    return getattr_


def _install_submodules() -> None:
    for path in _SUBMODULES:
        full_name = f"{__name__}.{path}"
        module = ModuleType(full_name)
        module.__path__ = []
        module.__getattr__ = _stub_attribute(full_name)
        module.InterpolationMode = InterpolationMode
        sys.modules[full_name] = module
        parent, _, leaf = full_name.rpartition(".")
        setattr(sys.modules[parent], leaf, module)


__getattr__ = _stub_attribute(__name__)
_install_submodules()
