"""Kernels for rolling-cache attention and mixture-of-experts, and the models they serve."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mistral_kernels")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

_MODEL_NAMES = {
    "ModelConfig": "mistral_kernels.model.config",
    "Transformer": "mistral_kernels.model.transformer",
    "generate": "mistral_kernels.model.generate",
    "stream": "mistral_kernels.model.generate",
}

__all__ = ["ModelConfig", "Transformer", "__version__", "generate", "ops", "stream"]


def __getattr__(name: str):
    # Loaded at first use, so that `import mistral_kernels.ops` needs nothing but torch.
    from importlib import import_module

    if name == "ops":
        return import_module("mistral_kernels.ops")
    if name in _MODEL_NAMES:
        return getattr(import_module(_MODEL_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
