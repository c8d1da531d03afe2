"""Whether a peer's package is here, and why it cannot be used."""

import importlib
import importlib.util

# What compiled parts raise that do not load, or do not compile when they are first used; and what
# Python raises where a package and its torch, or its signatures and ours, are of other versions, or
# a package refuses a call.
FAILURES: tuple[type[Exception], ...] = (
    *(ImportError, OSError, RuntimeError, AttributeError, NameError, TypeError, ValueError),
    *(AssertionError, LookupError),
)
if importlib.util.find_spec("triton"):
    from triton.errors import TritonError  # a kernel that does not compile, or does not fit

    FAILURES += (TritonError,)


def first_line(error: BaseException) -> str:
    """Of its text, or its name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def missing(package: str, *wanted: str, needs_cuda: bool, device: str) -> str | None:
    """None if a package can be used on a device, else the reason in one line.

    A package that is absent is not looked for any further, and nothing is imported for a device
    that it does not serve.

    Args:
        package: what pip installed, as it is imported.
        wanted: "module:name" for each name that the adapter takes from it.
        needs_cuda: it has no other kernels.
        device: "cpu" or "cuda".
    """
    if importlib.util.find_spec(package) is None:
        return "not installed"
    if needs_cuda and device != "cuda":
        return "needs CUDA"
    for place in wanted:
        module, name = place.split(":")
        try:
            loaded = importlib.import_module(module)
        except FAILURES as error:
            return f"does not import: {first_line(error)}"
        if not hasattr(loaded, name):
            version = getattr(importlib.import_module(package), "__version__", "installed")
            return f"version {version} lacks {name}"
    return None
