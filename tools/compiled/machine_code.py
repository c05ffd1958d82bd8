"""Resources and instructions of a compiled kernel, read by the ``cuobjdump`` of Triton."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

__all__ = ["MachineCode", "read_machine_code"]

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# "/*0080*/  @!P0 LDG.E.128 R4, ..."
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class MachineCode:
    """Resources and instruction counts. Instructions in loops count once.

    Args:
        registers: registers per thread.
        stack: spilled bytes per thread.
        products: tensor-core instructions by name.
        loads: loads from global memory by width in bits.
        atomics: atomics on global memory by number of values.
    """

    registers: int
    stack: int
    products: dict[str, int]
    loads: dict[int, int]
    atomics: dict[int, int]


def read_machine_code(cubin: bytes) -> MachineCode:
    """Read a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _dump("--dump-resource-usage", file.name)
        instructions = INSTRUCTION.findall(_dump("--dump-sass", file.name))
    return MachineCode(
        int(re.search(r"REG:(\d+)", usage)[1]),
        int(re.search(r"STACK:(\d+)", usage)[1]),
        dict(Counter(i for i in instructions if re.match(r"[HIQ]G?MMA\.", i))),
        dict(Counter(_bits(i) for i in instructions if re.match(r"(LDG|LDGSTS)\.", i))),
        dict(Counter(_numbers(i) for i in instructions if re.match(r"(REDG?|ATOMG?)\.", i))),
    )


def _dump(option: str, file: str) -> str:
    command = [CUOBJDUMP, option, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _bits(load: str) -> int:
    """LDG.E.128 reads 128 bits, LDG.E.U16 16, LDG.E 32."""
    widths = [int(part) for part in re.findall(r"\.[SU]?(8|16|64|128)(?=\.|$)", load)]
    return widths[-1] if widths else 32


def _numbers(atomic: str) -> int:
    """REDG.E.ADD.F32x4 adds four numbers to four, REDG.E.ADD.F32 one to one."""
    several = re.search(r"x(\d)", atomic)
    return int(several[1]) if several else 1
