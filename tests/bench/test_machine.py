"""What is recorded of the machine."""

import platform

import pytest

from bench.machine import cpu_name, product_instructions

INTEL = """processor\t: 0
model name\t: Intel(R) Xeon(R) Processor
flags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni amx_bf16 amx_tile amx_int8
bugs\t\t: avx_vnni
"""
ARM = """processor\t: 0
Features\t: fp asimd asimddp sve i8mm bf16
"""


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (INTEL, ["AVX512_VNNI", "AVX512_BF16", "AMX_INT8", "AMX_BF16"]),
        (INTEL.replace("avx512_vnni", "avx512_vnnix").replace("amx", "max"), ["AVX512_BF16"]),
        ("flags\t\t: fpu avx2\n", []),
        (ARM, ["ASIMDDP", "I8MM", "BF16"]),
        ("cpu\t: POWER9\n", None),
    ],
)
def test_instructions_for_products_are_read_from_the_flags(cpuinfo, expected):
    assert product_instructions(cpuinfo) == expected


AMD = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: {}
model\t\t: {}
model name\t: AMD EPYC
"""


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (INTEL, "Intel(R) Xeon(R) Processor"),
        (AMD.format(25, 1), "AMD EPYC (Zen 3)"),
        (AMD.format(25, 17), "AMD EPYC (Zen 4)"),
        (AMD.format(25, 0x21), "AMD EPYC (Zen 3)"),
        (AMD.format(25, 0x61), "AMD EPYC (Zen 4)"),
        (AMD.format(25, 0xA0), "AMD EPYC (Zen 4)"),
        (AMD.format(26, 2), "AMD EPYC (Zen 5)"),
        (AMD.format(26, 0x44), "AMD EPYC (Zen 5)"),
        (AMD.format(26, 0x50), "AMD EPYC (Zen 6)"),
        (AMD.format(23, 49), "AMD EPYC"),
        (ARM, platform.machine()),
    ],
)
def test_the_processor_of_a_virtual_machine_is_named_by_its_family(cpuinfo, expected):
    assert cpu_name(cpuinfo) == expected
