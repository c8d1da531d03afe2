"""What a kernel's machine code holds and asks for, and how much of it a multiprocessor can run.

Read from the words of ptxas and from the cubin's listing; nothing is run.
"""

import itertools
import math
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION_BYTES = 16
REGISTERS = 65536  # of a multiprocessor, in four quarters
TENSOR_COLUMNS = 512  # of a multiprocessor's tensor memory; it is there from sm_100a on


class Multiprocessor(NamedTuple):
    """What blocks that run at the same time share, from the CUDA programming guide."""

    threads: int
    blocks: int
    shared: int  # bytes, of which each block takes RESERVED for the system
    block_shared: int  # bytes that one block may ask for


RESERVED = 1024
ARCHS = {
    "sm_80": Multiprocessor(2048, 32, 164 << 10, 163 << 10),
    "sm_90a": Multiprocessor(2048, 32, 228 << 10, 227 << 10),
    "sm_100a": Multiprocessor(2048, 32, 228 << 10, 227 << 10),
    "sm_120a": Multiprocessor(1536, 24, 100 << 10, 99 << 10),
}
# The machine instructions behind each name.
INSTRUCTIONS = {
    "mma": r"\b[DHIOQ]MMA\b",
    "wgmma": r"\b[HIQ]GMMA\b",
    "tcgen05": r"\bUTC\w?MMA\b",
    "cp_async": r"\bLDGSTS\b",
    "tma": r"\b(UTMALDG|UTMASTG|UBLKCP)\b",
    # Accesses to global memory of 16 bytes and more a thread; loads also by cp_async.
    "load_16": r"\bLDG(STS)?\b\S*\.(128|256)\b",
    "store_16": r"\bSTG\b\S*\.(128|256)\b",
}
# What being due stands for: `wgmma` is a product by a whole warp group, where the arch has one.
WARP_GROUP = {"sm_90a": "wgmma", "sm_100a": "tcgen05"}
TENSOR_CORES = ("mma", "wgmma", "tcgen05")


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    language: str
    kernel: str
    case: str
    arch: str
    registers: int  # of a thread
    shared: int  # bytes of a block; what is asked for at launch included where that is known
    stack: int  # bytes of a thread
    spills: int  # bytes, stores and loads
    threads: int  # of a block
    tensor_columns: int = 0  # of a block
    counts: dict[str, int] = field(default_factory=dict)  # of INSTRUCTIONS
    load_bytes: int = 0  # that a thread's loads into registers fetch, each executed once
    copy_bytes: int = 0  # the same of asynchronous copies into shared memory
    serialised: bool = False  # a wait stands behind every wgmma
    due: tuple[str, ...] = ()

    @property
    def blocks(self) -> int:
        """Blocks that fit on a multiprocessor at the same time."""
        limits = ARCHS[self.arch]
        warps = -(-self.threads // 32)
        warp_registers = -(-self.registers * 32 // 256) * 256  # are given out in units of 256
        fits = [
            limits.blocks,
            limits.threads // (32 * warps),
            REGISTERS // 4 // max(warp_registers, 256) * 4 // warps,
            limits.shared // (self.shared + RESERVED),
        ]
        if self.tensor_columns:
            fits.append(TENSOR_COLUMNS // self.tensor_columns)
        return min(fits)

    @property
    def bytes_in_flight(self) -> int:
        """Bytes that a multiprocessor has on their way from memory, at most.

        All loads of a thread at once, but no more than fit where they go to: its registers, or the
        block's shared memory, which is what bulk copies, whose size is not in the code, count as.
        """
        loaded = self.threads * min(self.load_bytes, 4 * self.registers)
        copied = min(self.threads * self.copy_bytes, self.shared)
        return self.blocks * (loaded + (self.shared if self.counts.get("tma") else copied))

    def problems(self) -> list[str]:
        """What is wrong with the kernel, as short sentences."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if self.shared > ARCHS[self.arch].block_shared:
            found.append(f"takes {self.shared} bytes of shared memory")
        elif not self.blocks:
            found.append("does not fit on a multiprocessor")
        if self.serialised:
            found.append("waits behind every wgmma (C7515)")
        for word in self.due:
            names = TENSOR_CORES if word == "mma" else (word,)
            if word == "wgmma":
                names = (WARP_GROUP.get(self.arch, "mma"),)
            if not any(self.counts.get(name) for name in names):
                found.append(f"has no {names[0]}")
        return found


class Compiled(NamedTuple):
    """What a compiler made of a file: its words with `ptxas -v`, and the machine code."""

    said: str
    cubin: Path


def read_code(compiled: list[Compiled], arch: str) -> list[dict[str, dict]]:
    """Row fields of the kernels, by symbol, of each of the compiled files."""
    rows = [read_words(each) for each in compiled]
    codes = [code_sections(each.cubin.read_bytes()) for each in compiled]
    instructions = iter(disassemble(b"".join(b"".join(code.values()) for code in codes), arch))
    for found, code in zip(rows, codes, strict=True):
        for symbol, section in code.items():
            own = list(itertools.islice(instructions, len(section) // INSTRUCTION_BYTES))
            found[symbol] |= read_instructions("\n".join(own))
    return rows


def read_words(compiled: Compiled) -> dict[str, dict]:
    """Registers, memory, threads and waits of every kernel, by symbol."""
    rows, waiting = {}, serialised_kernels(compiled.said)
    for part in compiled.said.split("Compiling entry function '")[1:]:

        def total(pattern: str, part: str = part) -> int:
            return sum(map(int, re.findall(pattern, part)))

        symbol = part.partition("'")[0]
        rows[symbol] = {
            "registers": total(r"Used (\d+) registers"),
            "shared": total(r"(\d+) bytes smem"),
            "stack": total(r"(\d+) bytes stack frame"),
            "spills": total(r"(\d+) bytes spill"),
            "threads": 1024,  # without launch bounds it must run with that many
            "serialised": symbol in waiting,
        }
    elf = output(TOOLS / "cuobjdump", "-elf", compiled.cubin)
    for section in re.split(r"^\.nv\.info\.", elf, flags=re.M)[1:]:
        bounds = r"EIATTR_(?:REQNTID|MAX_THREADS)\n.*\n\s+Value:\s+(\w+) (\w+) (\w+)"
        if (symbol := section.split()[0]) in rows and (found := re.search(bounds, section)):
            rows[symbol]["threads"] = math.prod(int(size, 16) for size in found.groups())
    return rows


def serialised_kernels(said: str) -> set[str]:
    """Kernels of which ptxas says that a wait stands behind each wgmma: its note C7515."""
    return set(re.findall(r"\(C7515\).* function '(\w+)'", said))


def code_sections(cubin: bytes) -> dict[str, bytes]:
    """The instructions of every kernel, by symbol: the sections of an ELF file named .text.*"""
    (at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", cubin, at + i * size) for i in range(count)]
    sections = {}
    for name, *_, begin, length in heads:
        start = heads[names][4] + name
        label = cubin[start : cubin.index(b"\0", start)].decode()
        if label.startswith(".text."):
            sections[label.removeprefix(".text.")] = cubin[begin : begin + length]
    return sections


def disassemble(code: bytes, arch: str) -> list[str]:
    """The instructions as text. One call for many kernels: half a second of it is its start."""
    if not code:
        return []
    with tempfile.NamedTemporaryFile() as file:
        file.write(code)
        file.flush()
        listing = output(TOOLS / "nvdisasm", "-b", arch.replace("sm_", "SM"), file.name)
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", listing)
    assert len(lines) == len(code) // INSTRUCTION_BYTES, "nvdisasm left instructions out"
    return lines


def read_instructions(text: str) -> dict:
    """How many instructions that matter there are, and what a thread's loads fetch."""
    fields = {
        "counts": {name: len(re.findall(regex, text)) for name, regex in INSTRUCTIONS.items()}
    }
    fields |= {"load_bytes": 0, "copy_bytes": 0}
    for copied, suffixes in re.findall(r"\bLDG(STS)?\b(\S*)", text):
        bits = re.search(r"\.[SU]?(256|128|64|16|8)\b", suffixes)
        fields["copy_bytes" if copied else "load_bytes"] += int(bits[1]) // 8 if bits else 4
    return fields


def output(*command: str | Path) -> str:
    """What a program prints on both streams; raises CalledProcessError if it fails."""
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    return run.stdout.decode()
