"""What test_packed_kernels.py runs in a process of its own, whose kernels are compiled.

It packs a kernel and launches it with a driver that writes down what it is asked for.
"""

import contextlib
import ctypes
import sys
from pathlib import Path

import torch

from et_moe.backends.cuda.triton.cases.launches import record_launches, replace_launches
from et_moe.backends.cuda.triton.linear.row_quantization import rms_norm
from et_moe.benchmarks import packed_kernels
from et_moe.benchmarks.packed_kernels import PackedKernels, pack_kernels
from et_moe.benchmarks.static.collect import job_of


class Driver:
    """Each call succeeds; `launched` has grid, threads, attributes and arguments of launches."""

    def __init__(self, parameters: list[type]) -> None:
        self.loaded, self.launched, self.parameters, self.error = [], [], parameters, 0

    def cuModuleLoadData(self, module, code):
        self.loaded.append(code)
        return 0

    def cuModuleGetFunction(self, function, module, name):
        self.loaded.append(name)
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        return 0

    def cuLaunchKernelEx(self, config, function, arguments, extra):
        c = ctypes.cast(config, ctypes.POINTER(packed_kernels._Config)).contents
        values = [
            ctypes.cast(arguments[i], ctypes.POINTER(kind)).contents.value
            for i, kind in enumerate(self.parameters)
        ]
        early = [c.attributes[i].id for i in range(c.attribute_count)]
        self.launched.append(((c.x, c.y, c.z), c.threads, c.stream, early, values))
        return self.error


def main(folder: Path) -> None:
    x, weight = torch.randn(3, 512).bfloat16(), torch.randn(512).bfloat16()
    with record_launches() as launches:
        out = rms_norm(x, weight, 1e-5)
    job = job_of(launches[0], "sm_90")
    broken = packed_kernels.Job(**{**vars(job), "kernel": "no_such_kernel"})
    packed = folder / "kernels.zip"
    faults = pack_kernels([job, broken, job], packed, 1)
    assert len(faults) == 1 and "no_such_kernel" in faults[0], faults

    driver = Driver([ctypes.c_void_p] * 3 + [ctypes.c_float] + [ctypes.c_void_p] * 2)
    kernels = PackedKernels(packed, driver)
    with replace_launches(lambda launch: kernels.launch(launch, "sm_90", 7)):
        results = [rms_norm(x, weight, 1e-5) for _ in range(2)]
    del out
    code, name = driver.loaded
    assert code.startswith(b"\x7fELF") and name == b"_norm_rows_kernel"
    assert len(driver.launched) == 2  # loaded once
    for (grid, threads, stream, early, values), result in zip(
        driver.launched, results, strict=True
    ):
        assert grid == (3, 1, 1) and threads == 128 and stream == 7 and early == [6]
        assert values[:3] == [t.data_ptr() for t in (x, weight, result)]
        assert abs(values[3] - 1e-5) < 1e-9 and values[4:] == [None, None]

    with contextlib.suppress(KeyError):
        kernels.launch(launches[0], "sm_80", 7)
        raise AssertionError("a kernel for another architecture was launched")
    driver.error = 719
    try:
        kernels.launch(launches[0], "sm_90", 7)
    except RuntimeError as e:
        assert "719" in str(e) and "_norm_rows_kernel" in str(e)
    else:
        raise AssertionError("the driver's error was lost")
    print("launched")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
