"""Matrix-vector products in 8 and 4 bits beside PyTorch's: python tests/benchmark_gemv.py [--quick] [--out FILE]

The kernels are lab 02's, called as the lab calls them, checks and all. The baseline is the fastest of torch.mv, `@` and
F.linear in float32. Contenders take turns; each turn of one is a pause, in which the threads of the one before go to
sleep, two calls that are not counted and then five that are, whose median is the turn's time. Shown are medians over the
turns, and the median and quartiles of the ratio to the baseline of the same turn (above 1: faster than float32).

"cache": one matrix again and again. "memory": as many matrices in turn as take 1.2 GB, which no cache holds. "allowed"
is the ratio of the bytes, what a product bound by bytes could reach; "level 2" has the kernels on a matrix that fits the
second-level cache, where arithmetic is what limits them. "reading" is torch.sum over as many bytes as the float32 or the
int8 matrix has, no product.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import numba
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lab_source import definitions
from tinylm.device import describe
from tinylm.files import replacing

SIDE = 4096
OUT_OF_CACHE = 1.2e9  # bytes
PAUSE = 0.01


def turns_of(contenders: dict, n: int, bar: tqdm) -> dict[str, list[float]]:
    """Seconds of a call, one figure a turn; a contender is a function of the number of the call."""
    times, call = {name: [] for name in contenders}, 0
    for function in contenders.values():
        function(0)
    for _ in range(n):
        for name, function in contenders.items():
            time.sleep(PAUSE)
            seconds = []
            for i in range(7):
                call += 1
                started = time.perf_counter()
                function(call)
                if i >= 2:
                    seconds.append(time.perf_counter() - started)
            times[name].append(statistics.median(seconds))
        bar.update()
    return times


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:5.2f} ({low:.2f}-{high:.2f})"


def ratio(baseline: list[float], times: list[float]) -> str:
    return quartiles([a / b for a, b in zip(baseline, times, strict=True)])


def nbytes(layer) -> int:
    return sum(b.nbytes for b in layer.buffers())


def torchs_own(weight: torch.Tensor, x: torch.Tensor) -> dict:
    """What PyTorch has for fewer bytes: bfloat16, and its int8 weights (bfloat16 activations)."""
    half, x_half = weight.bfloat16(), x.bfloat16()
    found = {"torch bf16": (lambda _: torch.mv(half, x_half), half.nbytes)}
    codes = torch.randint(-127, 128, weight.shape, dtype=torch.int8)
    scale = torch.rand(len(weight)).bfloat16()

    def int8(_):
        return torch._weight_int8pack_mm(x_half[None], codes, scale)

    try:
        int8(0)
        found["torch int8"] = int8, codes.nbytes
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        print("PyTorch's own int8 product does not run here:", error)
    return found


def products(lab, copies_of: int, threads: int, n: int, bar: tqdm) -> list[str]:
    """Rows of the table: SIDE x SIDE, with enough copies of each matrix to take `copies_of` bytes (0: one matrix)."""
    where = ("memory" if copies_of else "cache") + (" 1 thread" if threads == 1 else "")
    torch.set_num_threads(threads)
    layer = torch.nn.Linear(SIDE, SIDE, bias=False).requires_grad_(False)
    x = torch.randn(SIDE)
    floats = [layer.weight.clone() for _ in range(max(1, round(copies_of / layer.weight.nbytes)))]
    contenders = {
        "mv": lambda t: torch.mv(floats[t % len(floats)], x),
        "@": lambda t: floats[t % len(floats)] @ x,
        "linear": lambda t: F.linear(x[None], floats[t % len(floats)]),
        "reading 67 MB": lambda t: floats[t % len(floats)].sum(),
    }
    few = [torch.randn(SIDE * SIDE // 4) for _ in range(max(1, round(copies_of / SIDE**2)))]
    contenders["reading 17 MB"] = lambda t: few[t % len(few)].sum()
    size = {"float32": floats[0].nbytes, "reading 67 MB": floats[0].nbytes, "reading 17 MB": few[0].nbytes}
    for bits, product in ((8, lab.gemv_int8), (4, lab.gemv_int4)):
        one = lab.QuantLinear.from_linear(layer, bits)
        exact = one.dequantized().double() @ x.double()
        error = (product(one.codes, one.scale, x) - exact).abs().max() / exact.abs().max()
        assert error < 1e-6, f"int{bits} is off by {error}"
        size[f"int{bits}"] = nbytes(one)
        copies = [(one.codes.clone(), one.scale.clone()) for _ in range(max(1, round(copies_of / nbytes(one))))]
        contenders[f"int{bits}"] = lambda t, f=product, copies=copies: f(*copies[t % len(copies)], x)
    if not copies_of:
        for name, (function, bytes_) in torchs_own(layer.weight, x).items():
            contenders[name], size[name] = function, bytes_
    times = turns_of(contenders, n, bar)
    best = min(("mv", "@", "linear"), key=lambda name: statistics.median(times[name]))
    times["float32"] = times[best]
    lines = []
    for name in ("float32", "int8", "int4", "torch bf16", "torch int8", "reading 67 MB", "reading 17 MB"):
        if name in times:
            seconds, allowed = statistics.median(times[name]), size["float32"] / size[name]
            reached = statistics.median(a / b for a, b in zip(times["float32"], times[name], strict=True)) / allowed
            lines.append(
                f"{where:17}{name:15}{seconds * 1e3:8.3f}   {ratio(times['float32'], times[name]):20}"
                f"{allowed:7.2f}{reached:9.0%}{size[name] / seconds / 1e9:9.1f}"
            )
    lines.append(f"{where:17}float32 is the fastest of three, here {best}")
    return lines


def level_two(lab, n: int, bar: tqdm) -> list[str]:
    """The kernels where their bytes cost least: billions of weights a second."""
    layer = torch.nn.Linear(SIDE, 256, bias=False).requires_grad_(False)
    x, contenders = torch.randn(SIDE), {}
    torch.set_num_threads(1)  # or waking the second thread is a large part of it
    for bits, product in ((8, lab.gemv_int8), (4, lab.gemv_int4)):
        one = lab.QuantLinear.from_linear(layer, bits)
        contenders[f"int{bits}"] = lambda _, f=product, one=one: f(one.codes, one.scale, x)
    times = turns_of(contenders, n, bar)
    torch.set_num_threads(2)
    speeds = {k: 256 * SIDE / statistics.median(v) / 1e9 for k, v in times.items()}
    return [f"level 2 {name:12}{speed:8.1f} billion weights a second and thread" for name, speed in speeds.items()]


def losses(lab, n: int, bar: tqdm) -> list[str]:
    """Small matrices, and batches: ratio of QuantLinear to F.linear."""
    lines = []
    for side, batch in ((128, 1), (512, 1), (1024, 1), (2048, 1), *((SIDE, b) for b in (1, 2, 4, 8, 16, 64))):
        layer = torch.nn.Linear(side, side, bias=False).requires_grad_(False)
        x, contenders = torch.randn(batch, side), {"float32": layer}
        contenders |= {f"int{bits}": lab.QuantLinear.from_linear(layer, bits) for bits in (8, 4)}
        calls = {name: partial(lambda module, x, _: module(x), module, x) for name, module in contenders.items()}
        with torch.no_grad():
            times = turns_of(calls, n, bar)
        ratios = "   ".join(f"{ratio(times['float32'], times[name]):20}" for name in ("int8", "int4"))
        micro = statistics.median(times["float32"]) * 1e6
        lines.append(f"{side:5} x {side:<5} batch {batch:<3}{micro:12.1f}   {ratios}".rstrip())
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the turns")
    parser.add_argument("--out", type=Path, help="a file to write the table to as well")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    lab = definitions("02_quantization")
    n = 12 if arguments.quick else 60
    lines = [f"{SIDE} x {SIDE} times one vector, two threads unless said; milliseconds, medians; ratios with quartiles"]
    lines += [f"{'where':17}{'product':15}{'ms':>8}   {'times float32':20}{'allowed':>7}{'reached':>9}{'GB/s':>9}"]
    with tqdm(total=4 * n + n + 10 * (n // 3), unit="turn") as bar:
        for threads in (2, 1):
            for size in (0, int(OUT_OF_CACHE)):
                lines += products(lab, size, threads, n, bar)
        torch.set_num_threads(2)
        lines += level_two(lab, n, bar)
        lines += ["", "where it loses: QuantLinear beside nn.Linear (microseconds), ratios with quartiles"]
        lines += [f"{'matrix':14}{'batch':9}{'float32':>12}   {'int8':20}   int4"]
        lines += losses(lab, n // 3, bar)
    facts = describe() | {"numba": numba.__version__, "threading": numba.threading_layer()}
    lines.append(", ".join(f"{k} {v}" for k, v in facts.items()))
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if arguments.out:
        with replacing(arguments.out) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
