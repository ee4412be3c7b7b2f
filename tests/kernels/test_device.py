"""What kernels are told of a device."""

from types import SimpleNamespace

import pytest
import torch

from erniem_fast.kernels.device import Device, describe, is_amd, is_cdna, is_rdna

H100 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, warp_size=32)
B200 = SimpleNamespace(major=10, minor=0, multi_processor_count=148, warp_size=32)
MI300X = SimpleNamespace(
    gcnArchName="gfx942:sramecc+:xnack-", major=9, minor=4, multi_processor_count=304, warp_size=64
)
RX7900 = SimpleNamespace(gcnArchName="gfx1100", major=11, minor=0, multi_processor_count=48, warp_size=32)


@pytest.mark.parametrize(
    ("properties", "hip", "expected"),
    [
        (H100, None, Device("sm_90", 132, 32)),
        (B200, None, Device("sm_100", 148, 32)),
        (MI300X, "7.0", Device("gfx942", 304, 64)),
        (RX7900, "7.0", Device("gfx1100", 48, 32)),
    ],
    ids=["H100", "B200", "MI300X", "RX 7900"],
)
def test_architectures_have_their_vendors_names(properties, hip, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert describe.__wrapped__(torch.device("cuda")) == expected


def test_the_processor_is_described_as_a_small_gpu():
    assert describe(torch.device("cpu")) == Device("cpu", 2, 32)


@pytest.mark.parametrize(
    ("arch", "amd", "cdna", "rdna"),
    [
        ("cpu", False, False, False),
        ("sm_90", False, False, False),
        ("gfx90a", True, True, False),
        ("gfx942", True, True, False),
        ("gfx1100", True, False, True),
    ],
)
def test_families_of_architectures(arch, amd, cdna, rdna):
    assert (is_amd(arch), is_cdna(arch), is_rdna(arch)) == (amd, cdna, rdna)
