"""Devices, precision, memory."""

import platform
import subprocess
import sys

import pytest
import torch

from image_to_prompts.run import devices


def test_more_processes_than_gpus_share_them(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        devices.local_device()
    assert [one.index for one in chosen] == [0, 1, 0, 1]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide by themselves")
def test_freed_memory_is_kept_for_the_next_tensor():
    program = """
import ctypes, resource, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of 4 KB
from image_to_prompts.run import devices
devices.keep_memory()
faults = []
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(20_000_000)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    faults = [int(word) for word in run.stdout.split()]
    assert faults[0] > 10_000  # 80 MB in pages of 4 KB are 19,531
    assert max(faults[-10:]) < 1_000  # once the first blocks lie where they can be used again
