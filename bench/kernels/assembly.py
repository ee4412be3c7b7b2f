"""Registers, spills, instructions and widths of a compiled kernel, read from its assembly, and counts of its loops."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

from erniem_fast.kernels.device import is_amd

MATRIX_PRODUCTS = re.compile(r"(?:HGMMA|HMMA|UTCHMMA|UTCQMMA)\b")
MEMORY = re.compile(r"(?:LDG|STG|LDGSTS|UTMALDG|UBLKCP)\b")
COPIES = re.compile(r"(?:LDGSTS|UTMALDG|UBLKCP)\b")
MASKS = re.compile(r"(?:FSEL|ISETP)\b")


def of_kernel(arch: str, kernel) -> dict[str, int | str]:
    """A row's figures of a kernel that Triton has compiled for an architecture."""
    return of_amdgcn(kernel.asm["amdgcn"]) if is_amd(arch) else of_ptx(kernel.asm["ptx"], kernel.asm["cubin"])


def of_ttgir(ttgir: str) -> dict[str, int]:
    """A row's figures of Triton's intermediate form, of the first loop that waits for copies, or else the first of all.

    `in_flight` is the least number of copies that are still on their way when the loop goes on after a wait.
    `exchanges` are changes of a tensor's layout, most of which go through shared memory; those of operands of matrix
    products do not count.
    """
    loops, around = [], []
    for line in ttgir.splitlines():
        text = line.lstrip()
        indent = len(line) - len(text)
        while around and text.startswith("}") and indent <= around[-1][0]:
            around.pop()
        if "scf.for" in text:
            loops.append({"waits": [], "exchanges": 0})
            around.append((indent, loops[-1]))
        elif around and (wait := re.search(r"ttg\.async_wait.*num = (\d+)", text)):
            around[-1][1]["waits"].append(int(wait[1]))
        elif around and "ttg.convert_layout" in text:
            around[-1][1]["exchanges"] += "ttg.dot_op" not in text.rpartition("->")[2]
    main = next((loop for loop in loops if loop["waits"]), loops[0] if loops else {"waits": [], "exchanges": 0})
    return {"in_flight": min(main["waits"], default=0), "exchanges": main["exchanges"]}


def of_sass(cubin: bytes) -> dict[str, int]:
    """A row's figures of the instructions of the main loop; all 0 if there is no loop.

    Of the loops that contain no other one, the main loop has the most matrix products; of several such loops, it is
    the one that copies ahead, or accesses memory most; then the shortest, because the others have masks at the ends of
    a sequence.
    """
    sass = instructions(cubin)
    loops = [
        (int(target[1], 16), address)
        for address, text in sass
        if (target := re.match(r"(?:@!?U?P\w+ )?BRA\b.* 0x([0-9a-f]+)$", text)) and int(target[1], 16) < address
    ]
    innermost = [
        [without_predicate(text) for address, text in sass if first <= address <= last]
        for first, last in loops
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in loops)
    ]
    kinds = (MATRIX_PRODUCTS, COPIES, MEMORY)
    counts = [(*(count(kind, loop) for kind in kinds), -len(loop), loop) for loop in innermost]
    *_, loop = max(counts, default=([],))
    return {"loop": len(loop), "masks": count(MASKS, loop)}


def instructions(cubin: bytes) -> list[tuple[int, str]]:
    """The address and text of each instruction."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", cuobjdump("-sass", cubin), re.MULTILINE)
    return [(int(address, 16), text) for address, text in lines]


def without_predicate(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction)


def count(kind: re.Pattern, loop: list[str]) -> int:
    return sum(kind.match(instruction) is not None for instruction in loop)


def of_ptx(ptx: str, cubin: bytes) -> dict[str, int | str]:
    """A row's figures of what was compiled for one of NVIDIA's."""
    registers, stack, local = resource_usage(cubin)
    return {
        **of_sass(cubin),
        "registers": registers,
        "spills": stack + local,
        "products": next((name for name in ("wgmma", "tcgen05", "mma.sync") if name + "." in ptx), "-"),
        "loads": 16 if "cp.async.cg" in ptx else widest(r"ld\.global[\w:.]*?(?:\.v(\d))?\.b(\d+)", ptx),
        "stores": widest(r"st\.global[\w:.]*?(?:\.v(\d))?\.b(\d+)", ptx),
    }


def resource_usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, and bytes of stack and of local memory, of a thread."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump("-res-usage", cubin))
    return int(found[1]), int(found[2]), int(found[3])


def cuobjdump(option: str, cubin: bytes) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], capture_output=True, text=True, check=True).stdout


def of_amdgcn(assembly: str) -> dict[str, int | str]:
    """A row's figures of what was compiled for one of AMD's."""

    def figure(name: str) -> int:
        return int(re.search(rf"{name}: +(\d+)", assembly)[1])

    width = r"(?:dword(?:x(\d))?|b(\d+))\b"  # as gfx9 and gfx11 call it
    return {
        "loop": 0,  # counted on NVIDIA's alone, like the next one
        "masks": 0,
        "registers": figure(".vgpr_count"),
        "spills": max(figure("ScratchSize"), 4 * figure(".vgpr_spill_count")),
        "products": next((name for name in ("v_mfma", "v_wmma") if name in assembly), "-"),
        "loads": widest(rf"(?:buffer|global)_load_{width}", assembly),
        "stores": widest(rf"(?:buffer|global)_store_{width}", assembly),
    }


def widest(instruction: str, assembly: str) -> int:
    """The bytes that the widest of these instructions moves; a match has a count of elements and the bits of one."""
    found = re.findall(instruction, assembly)
    return max((int(count or 1) * int(bits or 32) // 8 for count, bits in found), default=0)
