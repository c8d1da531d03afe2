"""Which kernels a source declares, and which of a built library have run."""

import ctypes
import re
import subprocess
from pathlib import Path

MANY = 10_000


def declared_kernels(source: Path) -> set[str]:
    """The names of the `__global__` functions of a file, which all start as ours do."""
    code = re.sub(r"//.*|/\*.*?\*/", "", source.read_text())
    code = re.sub(r"__launch_bounds__\([^()]*\)", "", code)
    names = re.findall(r"__global__\s+void\s+(\w+)\s*\(", code)
    assert len(names) == code.count("__global__"), f"{source.name} has a kernel of another form"
    return set(names)


def launched_kernels(library: Path) -> set[str]:
    """The names, without template arguments, of the kernels that this process ran so far."""
    loaded = ctypes.CDLL(str(library))
    addresses = (ctypes.c_void_p * MANY)()
    count = loaded.emulator_launched_kernels(addresses, MANY)
    symbols = {}
    for line in subprocess.check_output(["nm", "-C", library], text=True).splitlines():
        if match := re.match(r"([0-9a-f]+) [tTwW] (.*)", line):
            symbols[int(match[1], 16)] = match[2]
    # Where the library was loaded to, by a symbol that both sides know.
    places = {name: place for place, name in symbols.items()}
    known = ctypes.cast(loaded.emulator_set_order, ctypes.c_void_p).value
    base = known - places["emulator_set_order"]
    found = [symbols[address - base] for address in addresses[:count]]
    # Such as `void space::(anonymous namespace)::name<arguments>(parameters)`.
    plain = [name.replace("(anonymous namespace)", "") for name in found]
    return {re.search(r"(\w+)(<.*>)?\(", name)[1] for name in plain}
