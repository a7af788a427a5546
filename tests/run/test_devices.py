"""Devices, precision, memory."""

import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide by themselves")
def test_freed_memory_is_kept_for_the_next_tensor():
    program = """
import resource, torch
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
