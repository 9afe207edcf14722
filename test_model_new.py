"""Self-test and benchmark of model_new.py; needs torch and ninja only.

python test_model_new.py                               every test, on every device present (runs under pytest, too)
python test_model_new.py --faults                      first imports that are killed, crowded or short of something
python test_model_new.py --fuzz SECONDS                random cases; a failure prints the line that repeats it
python test_model_new.py --bench [forward|backward]    times against a plain copy, nn.Conv2d and torch.compile
"""
import argparse, concurrent.futures, contextlib, copy, fnmatch, functools, gc, inspect, io, itertools, json, math, os, random
import re, runpy, shutil, signal, statistics, subprocess, sys, tempfile, time, timeit, traceback, unittest, warnings
from collections import namedtuple
from pathlib import Path
from unittest.mock import patch

warnings.filterwarnings("ignore", "Failed to initialize NumPy|Using padding='same'")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # of torch.profiler, which would say when it starts
import torch
from torch import nn
from torch.autograd import grad
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import l1_unstructured

import model_new
from model_new import ModelNew

HERE = Path(__file__).resolve().parent
SEED = random.SystemRandom().randrange(2**31)  # fresh each run; --seed N repeats one
DTYPES = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # and the error allowed
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GRADIENTS = "x", "weight", "bias"
SANITIZED = "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ  # as compute-sanitizer is run, to see each allocation
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() and model_new._has_cuda else ["cpu"]

# What ModelNew stands in for, as a benchmark would state it: a module, its inputs and its globals.
PROBLEM = """
import torch
import torch.nn as nn

class Model(nn.Module):
    def __init__(self, in_channels, kernel_size, stride=1, padding=0, dilation=1, bias=False):
        super().__init__()
        self.conv2d = nn.Conv2d(in_channels, in_channels, kernel_size=(kernel_size, 1), stride=stride, padding=padding,
                                dilation=dilation, groups=in_channels, bias=bias)

    def forward(self, x):
        return self.conv2d(x)

batch_size, in_channels, height, width = 4, 8, 64, 48
kernel_size, stride, padding, dilation = 3, 1, 0, 1

def get_inputs():
    return [torch.rand(batch_size, in_channels, height, width)]

def get_init_inputs():
    return [in_channels, kernel_size, stride, padding, dilation]
"""


def execute(text):
    """The namespace that it leaves."""
    namespace = {}
    exec(text, namespace)
    return namespace


Model = execute(PROBLEM)["Model"]


# ---- cases ----------------------------------------------------------------------------------------------------------

Case = namedtuple("Case", "name shape K stride padding dilation bias")
CASES = [Case(*row) for row in [
    # name                         (N, C, H, W)        K  stride  padding  dilation bias
    ("plain",                      (2, 8, 32, 32),     3, 1,      0,       1,       False),
    ("one element",                (1, 1, 1, 1),       1, 1,      0,       1,       True),
    ("one tap, padded",            (3, 5, 7, 6),       1, 1,      (1, 2),  1,       True),
    ("1x1 planes",                 (3, 5, 1, 1),       3, 1,      1,       1,       True),
    ("one channel",                (2, 1, 17, 13),     5, 1,      (2, 0),  1,       True),
    ("one column",                 (2, 3, 40, 1),      7, 1,      (3, 0),  1,       False),
    ("one row",                    (2, 3, 1, 40),      5, 1,      (2, 0),  1,       True),
    ("odd sizes",                  (3, 7, 33, 29),     5, 1,      (2, 0),  1,       True),
    ("aligned rows",               (2, 4, 64, 64),     7, 1,      (3, 0),  1,       False),
    ("wide",                       (1, 2, 5, 1031),    3, 1,      1,       1,       True),
    ("tall",                       (1, 2, 1031, 5),    3, 1,      1,       1,       True),
    ("2048 channels",              (1, 2048, 7, 7),    7, 1,      (3, 0),  1,       True),
    ("1001 channels",              (1, 1001, 3, 3),    3, 1,      (1, 0),  1,       True),
    ("70,000 planes",              (700, 100, 3, 2),   3, 1,      (1, 0),  1,       True),
    ("stride 2",                   (2, 6, 30, 31),     3, 2,      1,       1,       True),
    ("stride 4, rows left over",   (2, 3, 34, 8),      3, 4,      0,       1,       False),
    ("stride 5 past the kernel",   (2, 3, 33, 9),      2, 5,      (1, 0),  1,       True),
    ("stride along H",             (2, 8, 31, 16),     4, (2, 1), (1, 0),  1,       True),
    ("stride along W",             (2, 8, 31, 16),     4, (1, 2), (1, 0),  1,       True),
    ("stride 3 and 2",             (2, 5, 31, 17),     4, (3, 2), (2, 3),  1,       True),
    ("dilation 2",                 (2, 8, 32, 16),     3, 1,      (2, 0),  2,       True),
    ("dilation 3",                 (2, 4, 40, 16),     7, 1,      (9, 0),  3,       False),
    ("dilation a pair",            (2, 4, 40, 16),     3, 1,      (4, 0),  (4, 7),  True),
    ("dilation past the plane",    (1, 4, 6, 8),       3, 1,      (9, 0),  9,       True),
    ("dilated K=35",               (1, 2, 70, 16),     35, 1,     (51, 0), 3,       False),
    ("stride 2, dilation 2",       (2, 4, 31, 16),     3, 2,      (2, 0),  2,       True),
    ("stride 4, dilation 6",       (2, 4, 50, 16),     5, 4,      (7, 0),  6,       True),
    ("stride 2, dilation 3",       (2, 4, 31, 16),     5, 2,      (6, 0),  3,       True),
    ("stride 3, dilation 2",       (2, 4, 31, 15),     4, 3,      (3, 1),  2,       True),
    ("same, odd K",                (2, 4, 20, 12),     5, 1,      "same",  1,       True),
    ("same, even K",               (2, 4, 20, 12),     4, 1,      "same",  1,       True),
    ("same, even K, dilation 3",   (2, 4, 20, 12),     4, 1,      "same",  3,       False),
    ("same, K=16",                 (2, 4, 40, 16),     16, 1,     "same",  1,       True),
    ("valid",                      (2, 4, 20, 12),     4, 2,      "valid", 1,       True),
    ("padding past the kernel",    (2, 4, 9, 8),       3, 1,      (7, 0),  1,       True),
    ("padding in W",               (2, 4, 12, 16),     3, 1,      (0, 2),  1,       True),
    ("padding in W, no bias",      (2, 4, 12, 16),     3, 1,      (1, 5),  1,       False),
    ("padding in W, W=109",        (2, 3, 20, 109),    32, 1,     6,       1,       True),
    ("padding in W of 60",         (2, 3, 20, 70),     17, 1,     (8, 60), 1,       True),
    ("padding past strides",       (2, 4, 12, 16),     3, (4, 3), (6, 5),  1,       True),
    ("planes lower than K",        (2, 4, 5, 6),       11, 1,     (5, 0),  1,       True),
    ("6 channels",                 (2, 6, 20, 10),     7, 1,      (3, 0),  1,       True),
    ("64 channels",                (2, 64, 20, 9),     7, 1,      (3, 0),  1,       True),
    ("72 channels, 33 taps",       (2, 72, 70, 11),    33, 1,     (16, 0), 1,       True),
    ("40 channels, dilation 2",    (3, 40, 50, 19),    9, 1,      (8, 2),  2,       True),
    ("small planes",               (5, 70, 7, 7),      7, 1,      (3, 0),  1,       True),
    ("7 rows, 136 channels",       (3, 136, 7, 5),     5, 1,      (2, 0),  1,       True),
    ("low planes, many taps",      (2, 3, 5, 211),     15, 1,     (7, 0),  1,       True),
    ("low planes, more taps",      (1, 2, 2, 2377),    35, 1,     (17, 0), 1,       True),
    ("low planes, 700 taps",       (3, 20, 6, 5),      700, 1,    (349, 0), 1,      True),
    ("small planes, many taps",    (3, 5, 28, 27),     27, 1,     (13, 0), 1,       True),
    ("small aligned planes",       (3, 5, 24, 16),     21, 1,     (10, 0), 1,       True),
    ("16 rows, 70 channels",       (3, 70, 16, 5),     11, 1,     (5, 0),  1,       True),
    ("9 rows, 68 channels",        (5, 68, 9, 6),      7, 1,      (3, 0),  1,       False),
    ("16 rows, 21 taps",           (3, 70, 16, 5),     21, 1,     (10, 0), 1,       True),
    ("14 rows, dilation 3",        (5, 68, 14, 6),     9, 1,      (12, 0), 3,       True),
    ("14 rows, dilation 2",        (5, 20, 14, 9),     4, 1,      (3, 0),  2,       True),
    ("7 rows, dilation 2",         (3, 136, 7, 5),     4, 1,      (3, 0),  2,       True),
    ("8 rows, same, even K",       (9, 40, 8, 5),      10, 1,     "same",  1,       True),
    ("16 rows, 9 channels",        (9, 9, 16, 16),     4, 1,      (2, 0),  1,       True),
    ("14 rows, 99 channels",       (40, 99, 14, 5),    7, 1,      (3, 0),  1,       True),
    ("13 rows, 11 taps",           (5, 20, 13, 9),     11, 1,     (5, 0),  1,       True),
    ("10 rows, valid",             (5, 20, 10, 9),     3, 1,      0,       1,       True),
    ("12 rows, padding of 4",      (5, 20, 12, 8),     5, 1,      (4, 0),  1,       True),
    ("20 rows, padding in W",      (300, 3, 20, 12),   5, 1,      (1, 3),  1,       True),
    ("20 rows, padding of W alone", (30, 3, 20, 12),   3, 1,      (0, 1),  1,       True),
    ("many images, 16 rows",       (1700, 2, 16, 4),   5, 1,      (2, 0),  1,       True),
    ("many images, 14 rows",       (2100, 2, 14, 3),   5, 1,      (2, 0),  1,       True),
    ("131 rows, 21 taps",          (1, 24, 131, 8),    21, 1,     (10, 0), 1,       True),
    ("bands of odd rows",          (2, 3, 333, 51),    5, 1,      (2, 0),  1,       True),
    ("bands, padded",              (2, 3, 100, 130),   12, 1,     (5, 1),  1,       True),
    ("full tiles, 15 taps",        (2, 3, 128, 64),    15, 1,     (7, 0),  1,       True),
    ("97 taps, dilation 2",        (3, 3, 150, 128),   97, 1,     (96, 0), 2,       True),
    ("255 taps",                   (1, 2, 260, 200),   255, 1,    (127, 0), 1,      True),
    ("a column of padding alone",  (5, 11, 40, 1),     3, (1, 3), (3, 1),  1,       True),
    ("images of one row",          (50, 6, 1, 9),      3, (2, 1), (1, 0),  1,       True),
    ("one row, one tap meets it",  (40, 20, 1, 24),    5, (1, 2), (4, 0),  2,       True),
    ("one column, stride 2",       (9, 20, 33, 1),     5, 2,      (2, 0),  1,       True),
    ("33 channels, stride 2",      (3, 33, 21, 12),    5, 2,      (2, 1),  1,       True),
    ("131 columns, stride 2",      (2, 3, 45, 131),    5, 2,      (2, 1),  1,       True),
    ("24 channels, stride 3 in W", (2, 24, 20, 31),    3, (2, 3), (1, 4),  1,       True),
    ("6 channels, stride 4 in W",  (2, 6, 19, 130),    5, (1, 4), (2, 3),  1,       True),
    ("small images, stride 2",     (9, 6, 2, 12),      11, 2,     (5, 2),  1,       True),
    ("short rows, padded",         (9, 2, 2, 6),       7, (2, 1), (3, 1),  1,       True),
    ("padding beside few pixels",  (9, 29, 2, 7),      31, 1,     (15, 7), 1,       True),
    ("tiny planes, many images",   (90, 50, 3, 4),     4, (2, 1), (2, 0),  1,       True),
    ("unbatched",                  (8, 20, 11),        3, 1,      1,       1,       True),
    ("unbatched, strided",         (3, 21, 12),        5, 2,      (2, 0),  1,       False),
    ("N = 0",                      (0, 4, 12, 8),      3, 1,      1,       1,       True),
]] + [Case(f"K={K}", (2, 3, 40, 9), K, 1, (K // 2, 0), 1, K % 2 == 0) for K in [*range(1, 36), 47, 48, 49, 50]] \
   + [Case(f"K={K}, aligned", (1, 2, 72, 64), K, 1, (K // 2, 0), 1, False) for K in (16, 17, 18, 31, 33, 63, 64, 65, 128)] \
   + [Case(f"K={K}, 1024 numbers in a row", (2, 64, 45, 16), K, 1, (K // 2, 0), 1, K % 2 == 0) for K in (*range(1, 13), 21, 22, 31)] \
   + [Case(f"bands, dilation {d}", (3, 24, 117, 24), K, 1, (K * d // 2, 2), (d, 1), True) for K, d in ((3, 1), (6, 2), (11, 3))] \
   + [Case(f"{H} rows, padding in W of 16, K={K}, dilation {d}", (2, 3, H, 40), K, 1, (K * d // 2, 16), d, True)
      for H in (70, 203) for K, d in ((3, 1), (3, 2), (5, 1), (7, 3), (11, 1))] \
   + [Case(f"{H} x {H}, K={K}", (11, 5, H, H), K, 1, (K // 2, 0), 1, K == 7) for H in (28, 40, 56) for K in (3, 7, 11)] \
   + [Case(f"{C} planes of W={W} side by side, K={K}, dilation {d}", (2, C, H, W), K, 1, (K * d // 2, padding), d, C != 16)
      for C, H, W, K, padding, d in ((9, 64, 64, 5, 0, 1), (12, 150, 48, 10, 16, 1), (16, 129, 64, 7, 0, 3), (12, 60, 64, 8, 0, 2),
                                     (7, 101, 80, 21, 8, 1), (2, 50, 1040, 13, 4, 1), (2, 50, 1040, 6, 8, 1), (16, 100, 64, 19, 0, 1),
                                     (7, 61, 57, 9, 0, 1), (5, 101, 51, 25, 3, 2), (3, 80, 42, 17, 1, 1))] \
   + [Case("shared memory of nearly 48 KB", (1, 24, 200, 56), 4, 1, 2, 1, True)] \
   + [Case(f"W={W}, K={K}, dilation {d}", (2, 3, 90, W), K, 1, (K * d // 2, padding), d, K % 2 == 0)
      for W, K, padding, d in ((251, 31, 0, 1), (300, 18, 3, 1), (601, 20, 0, 1), (125, 10, 1, 3))] \
   + [Case(f"few rows meet, {C} channels, W={W}, stride {stride}", (7, C, 10, W), 5, stride, (6, padding), 3, True)
      for C, W, padding, stride in ((3, 16, 0, 1), (12, 10, 1, 1), (40, 9, 2, 1), (5, 31, 0, (2, 1)), (12, 14, 1, 2), (3, 12, 2, (1, 3)),
                                    (16, 300, 0, 1), (600, 5, 0, 1), (7, 1, 0, 1))] \
   + [Case(f"{C} channels of W={W} do not line up, K={K}, dilation {d}", (2, C, H, W), K, 1, (K * d // 2, padding), d, C != 5)
      for C, H, W, K, padding, d in ((5, 61, 37, 3, 0, 2), (4, 90, 50, 2, 1, 3), (6, 61, 5, 9, 0, 2), (33, 40, 27, 7, 0, 1), (33, 61, 27, 4, 2, 2),
                                     (3, 203, 225, 3, 1, 1), (100, 30, 5, 3, 0, 1), (9, 61, 300, 1, 3, 2), (2, 30, 9, 3, 0, 40))] \
   + [Case(f"{H} x {W}, K={K}, dilation {d}", (3, 5, H, W), K, 1, (K * d // 2, 0), d, K % 2 == 0)
      for H, W, K, d in ((90, 16, 13, 1), (70, 24, 30, 1), (90, 21, 12, 1), (60, 8, 17, 1), (90, 3, 13, 1), (112, 1, 8, 1), (18, 1, 3, 1), (18, 4, 6, 1),
                         (20, 40, 7, 3), (25, 43, 11, 3), (19, 64, 15, 2), (90, 51, 20, 2), (90, 45, 40, 1),
                         (7, 7, 3, 3), (14, 14, 7, 3), (28, 28, 3, 3), (28, 24, 7, 3), (31, 16, 11, 2), (13, 9, 21, 4))] \
   + [Case(f"{C} channels, K={K}", (3, C, 90, 10), K, 1, (K // 2, 0), 1, C != 24) for C, K in ((40, 40), (16, 66), (24, 97), (8, 128), (16, 200))] \
   + [Case(f"{H} rows of 200 channels, K={K}, dilation {d}", (2, 200, H, 5), K, 1, "same", d, True) for H, K, d in ((7, 9, 1), (7, 12, 1), (7, 35, 1), (7, 64, 1), (14, 7, 2))] \
   + [Case(f"many images, {K} taps", (600, 8, 20, 8), K, 1, (K // 2, 0), 1, True) for K in (17, 40)] \
   + [Case("190 taps, W=499", (1, 2, 90, 499), 190, 1, (95, 0), 1, True)] \
   + [Case(f"W={W}", (2, 4, 19, W), 5, 1, (2, 0), 1, True) for W in (2, 3, 4, 7, 8, 15, 31, 33, 65, 129, 257)]

VIEWS = {  # a random tensor of the shape and dtype, stored in unusual ways
    "misaligned": lambda shape, **to: torch.randn(math.prod(shape) + 1, **to)[1:].view(shape),
    "rows of a larger one": lambda shape, **to: torch.randn(*shape[:2], shape[2] + 3, shape[3], **to)[:, :, 2:-1],
    "columns of a larger one": lambda shape, **to: torch.randn(*shape[:3], shape[3] + 2, **to)[..., 1:-1],
    "every second column": lambda shape, **to: torch.randn(*shape[:3], shape[3] * 2, **to)[..., ::2],
    "transposed": lambda shape, **to: torch.randn(*shape[:2], shape[3], shape[2], **to).transpose(2, 3),
    "expanded batch": lambda shape, **to: torch.randn(1, *shape[1:], **to).expand(shape),
    "expanded everything": lambda shape, **to: torch.randn((), **to).expand(shape),  # as the grad_output of a sum is
    "expanded channels": lambda shape, **to: torch.randn(shape[0], 1, *shape[2:], **to).expand(shape),
    "channels of a channels_last one": lambda shape, **to: torch.randn(
        shape[0], shape[1] + 1, *shape[2:], **to).to(memory_format=torch.channels_last)[:, 1:],
    "misaligned channels_last": lambda shape, **to: torch.randn(math.prod(shape) + 1, **to)[1:].view(
        shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2),
}


def dense(layout):
    formats = {3: torch.contiguous_format, 4: LAYOUTS[layout]}
    return lambda shape, **to: torch.randn(shape, **to).contiguous(memory_format=formats[len(shape)])


def modules(case, dtype=torch.float32, device="cpu"):
    """ModelNew, its Model, and that in float64: the same parameters in all three."""
    ours, theirs = (module(case.shape[-3], *case[2:]).to(device, dtype) for module in (ModelNew, Model))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, copy.deepcopy(theirs).double()


def each(device, cases=CASES, dtype=torch.float32):
    """(case, ModelNew, input) for every case and layout"""
    for case, layout in itertools.product(cases, LAYOUTS):
        yield case, modules(case, dtype, device)[0], dense(layout)(case.shape, dtype=dtype, device=device)


def error(result, exact, least):
    """Relative to the norm of exact, or to least if that is larger: where a sum cancels, any rounding is large beside it.
    Of many numbers also the largest error of a single one, beside the root mean square of those that are not zero. Beyond the
    type's range infinity is exact. Under compute-sanitizer on the CPU: what it watches is slow on a GPU, and initcheck, which
    does not see what the bulk copy engine stores, would report any kernel that reads it."""
    where, most = "cpu" if SANITIZED else exact.device, torch.finfo(result.dtype).max
    exact = exact.to(where).clamp(-most, most)
    difference, norm = result.to(where).double().clamp(-most, most) - exact, max(exact.norm().item(), least)
    single = (difference.abs() / (exact.abs() + norm / math.sqrt(exact.count_nonzero()))).max().item() if exact.numel() > 1000 and exact.any() else 0.0
    difference = difference.norm().item()
    return difference if difference == 0 else max(difference / norm, single) if norm > 0 else math.inf


def with_many_images(case, device):
    """(case, gradients to ask for): the case, and on a GPU its forward alone with so many images that it is not left to the kernels
    for small problems: with these the table launches every instance of every kernel, on an H200."""
    yield case, GRADIENTS
    if device == "cuda" and len(case.shape) == 4 and 0 not in case.shape:
        y = ModelNew(case.shape[1], *case[2:]).to("meta")(torch.empty(case.shape, device="meta"))
        copies = min(2_000_000 // y.numel(), 2**25 // math.prod(case.shape)) + 1
        yield case._replace(shape=(copies * case.shape[0], *case.shape[1:])), ()


def used_strides(tensor):
    return [stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1]  # the others mean nothing


def poison(module, x, grad_output):
    """Leaves NaN in the free memory that the allocator, if it keeps any, will hand out next, to ModelNew."""
    if type(module) is ModelNew and not SANITIZED:
        most = max(x.numel(), grad_output.numel())
        [x.new_full((n,), math.nan) for n in (most, *(1 << i for i in range(min(most.bit_length() + 1, 25))))]


def run(module, x, grad_output, gradients=GRADIENTS):
    """{"output": y}, with the gradients of x, weight and bias that are asked for; ModelNew's in memory full of NaN."""
    inputs = {"x": x.detach(), **dict(module.conv2d.named_parameters())}
    asked = {name: t for name, t in inputs.items() if t.requires_grad_(name in gradients).requires_grad}
    poison(module, x, grad_output)
    results = {"output": module(inputs["x"])}
    if asked:
        poison(module, x, grad_output)
        results |= zip(asked, grad(results["output"], asked.values(), grad_output.to(x.dtype)))
    return results


def compare(case, dtype, device, make, gradients=GRADIENTS, weights=torch.contiguous_format, by=run):
    """Forward and backward of ModelNew against nn.Conv2d in float64, and its layout, or against the formula; returns what is wrong."""
    ours, theirs, exact = (module.to(memory_format=weights) for module in modules(case, dtype, device))
    x = make(case.shape, dtype=dtype, device=device)
    y = (theirs if by is run else ours)(x)
    grad_output, wrong = make(y.shape, dtype=dtype, device=device), []
    allowed = DTYPES[dtype] * (1 if by is run else 4)  # random cases include sums of equal numbers, all rounded the same way
    norm = 0.3 * grad_output.cpu().double().norm().item()  # gradients are commonly larger
    repeats = math.prod(n for n, stride in zip(grad_output.shape, grad_output.stride()) if stride == 0)  # of terms, with their rounding
    least = {"output": 0.3 * math.sqrt(grad_output.numel()), "x": norm, "weight": norm * math.sqrt(repeats), "bias": norm * math.sqrt(repeats)}
    results = run(ours, x, grad_output, gradients)
    for name, expected in by(exact, x.double(), grad_output.double(), gradients).items():
        result = results[name]
        found = error(result, expected, least[name]) if result.shape == expected.shape else math.inf
        good = found <= allowed or found <= error(run(theirs, x, grad_output, gradients)[name], expected, least[name])
        if not good or result.dtype != dtype:
            wrong.append(f"{case}, {dtype}, {name}: error {found:.1e}, shape {tuple(result.shape)}, {result.dtype}")
    if used_strides(results["output"]) != used_strides(y):
        wrong.append(f"{case}, {dtype}: output strides {results['output'].stride()}, nn.Conv2d's {y.stride()}")
    return wrong


def formula(module, x, grad_output, gradients=GRADIENTS):
    """As run(), from the definition in float64: each tap adds x where it is inside the plane, and nothing where it is not."""
    conv2d, shape = module.conv2d, x.shape
    x, g = (t.double() if t.dim() == 4 else t.double().unsqueeze(0) for t in (x, grad_output))
    weight, (left, _, top, _) = conv2d.weight.detach().double(), conv2d._reversed_padding_repeated_twice
    y, grad_x, grad_weight = torch.zeros_like(g), torch.zeros_like(x), torch.zeros_like(weight)

    def inside(size, size_out, stride, offset):  # outputs from...to read inputs from, from + stride, ...
        start, stop = max(0, -(offset // stride)), min(size_out, (size - 1 - offset) // stride + 1)
        return slice(start, max(start, stop)), slice(start * stride + offset, max(stop, start) * stride + offset, stride)

    columns_out, columns_in = inside(x.shape[3], g.shape[3], conv2d.stride[1], -left)
    for k in range(weight.shape[2]):
        rows_out, rows_in = inside(x.shape[2], g.shape[2], conv2d.stride[0], k * conv2d.dilation[0] - top)
        if rows_out.start < rows_out.stop:
            tap, x_k, g_k = weight[:, 0, k:k + 1], x[:, :, rows_in, columns_in], g[:, :, rows_out, columns_out]
            y[:, :, rows_out, columns_out] += tap * x_k
            grad_x[:, :, rows_in, columns_in] += tap * g_k
            grad_weight[:, 0, k, 0] = (g_k * x_k).sum((0, 2, 3))
    results = {"output": y.view_as(grad_output), "x": grad_x.view(shape), "weight": grad_weight}
    if conv2d.bias is not None:
        y += conv2d.bias.detach().double().view(-1, 1, 1)
        results["bias"] = g.sum((0, 2, 3))
    return {name: t for name, t in results.items() if name in ("output", *gradients)}


# ---- running the tests ----------------------------------------------------------------------------------------------

def on(*devices, gpus=1):
    """Makes of check(device) or check(device, dtype) a test for each device (and each dtype)."""
    def register(check):
        dtypes = [DTYPES] if "dtype" in inspect.signature(check).parameters else []
        for arguments in itertools.product(devices, *dtypes):
            def test(arguments=arguments):
                found = torch.cuda.device_count()
                if arguments[0] == "cuda" and found < gpus:
                    raise unittest.SkipTest(f"needs {gpus} GPU{'s' * (gpus > 1)}, found {found}")  # pytest knows it too
                if arguments[0] == "cuda" and not model_new._has_cuda:
                    raise unittest.SkipTest("a GPU is here, but this build has no CUDA kernels")
                check(*arguments)
            test.__name__ = "_".join(["test", check.__name__, *(str(a).removeprefix("torch.") for a in reversed(arguments))])
            globals()[test.__name__] = test
        return check
    return register


def setup_function(_=None):
    """Before each test, called by pytest, too. More threads would wait for one another longer than they take for small tensors."""
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    print("seed", SEED)
    random.seed(SEED)
    torch.manual_seed(SEED)


def no_failures(wrong):
    assert not wrong, "\n".join([f"{len(wrong)} wrong:", *wrong[:12]])


@contextlib.contextmanager
def temporary_folder():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def python(*arguments, folder=HERE, **variables):
    """What a fresh interpreter started in folder prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", *arguments], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **variables})
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def net(module):
    """A small network of the layer; one seed gives every module the same parameters."""
    torch.manual_seed(7)
    return nn.Sequential(module(4, 3, padding=1, bias=True), nn.ReLU(), module(4, 4, 2, (2, 0), bias=True))


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- what it replaces -----------------------------------------------------------------------------------------------

@on("cpu", "cuda")
def table(device, dtype):
    no_failures([w for small in CASES for case, gradients in with_many_images(small, device) for layout in LAYOUTS
                 for w in compare(case, dtype, device, dense(layout), gradients)])


@on("cpu", "cuda")
def views(device):
    cases = [Case("view", (3, 8, 20, 16), 5, 1, (2, 0), 1, True), Case("view", (2, 7, 19, 33), 3, 2, 1, 1, True)]
    no_failures([f"{name}: {w}" for small in cases for case, gradients in with_many_images(small, device) for name, make in VIEWS.items() for dtype in DTYPES
                 for w in compare(case, dtype, device, make, gradients)])


@on("cpu", "cuda")
def only_the_gradients_asked_for(device):
    """With weights in either layout."""
    cases = [Case("some gradients", shape, K, 1, padding, 1, True)
             for shape, K, padding in (((2, 8, 33, 18), 5, (2, 1)), ((3, 5, 14, 9), 7, (3, 0)), ((3, 66, 10, 4), 5, (2, 0)), ((3, 5, 28, 16), 5, (2, 1)),
                                       ((1, 2, 200, 16), 3, (1, 8)), ((1, 2, 70, 16), 7, (3, 8)))]
    subsets = [subset for n in (1, 2, 3) for subset in itertools.combinations(GRADIENTS, n)]
    no_failures([f"{subset}, weight {weights}: {w}" for case in cases for subset in subsets for dtype in DTYPES for layout in LAYOUTS for weights in LAYOUTS
                 for w in compare(case, dtype, device, dense(layout), subset, LAYOUTS[weights])])


@on("cpu", "cuda")
def long_weight_gradient(device):
    """Sums over millions of terms lose nothing."""
    cases = [Case(f"{N} x {H} x {H} terms, K={K}", (N, 1, H, H), K, 1, (K // 2, 0), 1, True) for N, H, K in ((64, 512, 3), (8, 512, 31), (30000, 14, 7))]
    no_failures([w for case in cases for dtype in (torch.float32, torch.bfloat16)
                 for w in compare(case, dtype, device, dense("contiguous"), ["weight", "bias"])])


@on("cpu", "cuda")
def bitwise_reproducible(device):
    for dtype in DTYPES:
        for case, ours, x in each(device, CASES[::3], dtype):
            grad_output = torch.randn_like(ours(x))
            first, second = (run(ours, x, grad_output).values() for _ in range(2))
            assert all(map(torch.equal, first, second)), (case, dtype)


@on("cpu", "cuda")
def inf_and_nan(device, dtype):
    """They reach just the outputs and gradients whose taps touch them; padding adds nothing, whatever the weight."""
    shape = 2, 8, 40, 48
    geometries = ((shape, 3, 1, 1, 1), (shape, 4, (3, 2), (2, 3), 2), (shape, 21, 1, (10, 0), 1), (shape, 33, 1, (16, 0), 1),
                  ((2, 136, 7, 5), 5, 1, (2, 0), 1), ((2, 70, 12, 5), 9, 1, (4, 0), 1), ((2, 8, 14, 12), 5, 1, (2, 0), 1), ((2, 8, 28, 16), 11, 1, (5, 3), 1),
                  ((2, 8, 24, 16), 18, 1, (9, 0), 1), ((2, 8, 10, 16), 5, 1, (6, 0), 3), ((2, 6, 10, 9), 5, 2, (6, 1), 3), ((2, 6, 40, 19), 3, 1, (2, 1), 2), *(((2, 8, 200, 48), K, 1, (K // 2, 0), 1) for K in (3, 5, 7)),
                  *(((2, 16, 129, 64), K, 1, (K * d // 2, 0), d) for K, d in ((6, 3), (9, 1), (19, 1))))
    wrong = []
    cases = [case for geometry in geometries for case, _ in with_many_images(Case("inf and nan", *geometry, True), device)]
    for case, kind, where, layout in itertools.product(cases, (math.inf, math.nan), ("x", "weight"), LAYOUTS):
        value = random.choice((-1, 1)) * kind
        ours, x = modules(case, dtype, device)[0], dense(layout)(case.shape, dtype=dtype, device=device)
        (x if where == "x" else ours.conv2d.weight.detach())[1, :, random.randrange(case.K)] = value  # a row of x, a tap of weight
        grad_output = torch.randn_like(ours(x))
        results = run(ours, x, grad_output)
        wrong += [f"{case}, {layout}, {value} in {where}: {name}" for name, exact in formula(ours, x, grad_output).items()
                  if not torch.allclose(results[name].double(), exact, rtol=5e-2, atol=5e-2, equal_nan=True)]
    no_failures(wrong)


@on("cpu", "cuda")
def changes_of_conv2d(device):
    """Its geometry, hooks (by which pruning works), parametrization, forward or all of it changed, it does as an nn.Conv2d would."""
    x, called = torch.randn(2, 8, 20, 12, dtype=torch.float64, device=device, requires_grad=True), []

    def attributes(**to):
        return lambda conv2d: [setattr(conv2d, name, value) for name, value in to.items()]

    def hooks(conv2d):
        conv2d.register_forward_pre_hook(lambda *_: called.append("before"))
        conv2d.register_forward_hook(lambda _, args, y: called.append("after") or 2 * y)
        conv2d.register_full_backward_hook(lambda *_: called.append("backward"))

    def prune(conv2d):
        l1_unstructured(conv2d, "weight", 0.5)
        conv2d.weight_orig.data.mul_(3)

    geometries = [attributes(dilation=(2, 1), padding=(4, 0)), attributes(stride=(3, 2)), attributes(stride=2, padding=1), attributes(padding="same")]
    for change in [*geometries, hooks, prune, weight_norm, attributes(forward=torch.neg)]:
        results = []
        for module in ModelNew, Model:
            torch.manual_seed(SEED)
            layer = module(8, 4, bias=True).to(x)
            layer(x)
            change(layer.conv2d)
            y = layer(x)
            results.append([y, *grad(y.square().sum(), [x, *layer.parameters()], allow_unused=True)])
            if change in geometries:
                results[-1].append(torch.compile(layer, fullgraph=True, backend="eager")(x))
        same(*results)
    assert called == ["before", "after", "backward"] * 2
    layer = ModelNew(8, 4).to(x)
    layer.conv2d = Model(8, 5, padding=(2, 0)).conv2d.to(x)
    assert layer(x).shape == x.shape
    for wrong in attributes(padding_mode="reflect"), attributes(stride=0), attributes(padding="some"):
        try:
            wrong(ModelNew(8, 4).conv2d)
        except (ValueError, RuntimeError, TypeError):
            continue
        raise AssertionError("accepted")


def test_parameters_and_generator():
    """One seed draws the same parameters as Model, of the same names, and leaves the generator the same."""
    for arguments in (8, 3), (8, 3, 1, 0, 1, True), (5, 7, 2, (3, 1), 2, False), (64, 31, 1, "same", 1, True):
        drawn = []
        for module in Model, ModelNew:
            torch.manual_seed(SEED)
            drawn.append({**module(*arguments).state_dict(), "generator": torch.get_rng_state()})
        assert list(drawn[0]) == list(drawn[1])
        same(*drawn, tolerance=0)


@on("cpu", "cuda")
def conversions(device):
    x = torch.randn(2, 4, 9, 6, device=device)
    ours = ModelNew(4, 3, 2, 1, bias=True).to(device)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    for other in copy.deepcopy(ours), torch.load(saved, weights_only=False), copy.deepcopy(ours).to("cpu").to(device):
        assert torch.equal(other(x), ours(x))
    for name, dtype in ("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64):
        module = getattr(copy.deepcopy(ours), name)()
        assert module(x.to(dtype)).dtype == dtype and module.conv2d.weight.dtype == dtype


def test_repr():
    for arguments in (8, 3), (8, 3, 2, 1, 2, True), (8, 4, 1, "same"):
        assert Model(*arguments).conv2d.extra_repr() in repr(ModelNew(*arguments))


@on("cpu", "cuda")
def no_builtin_convolution(device):
    """Neither in place of the operator nor within it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _, ours, x in each(device):
            ours(x.requires_grad_()).sum().backward()
    called = {event.name for event in profile.events()}
    assert {f"{model_new._ops.name}::forward", f"{model_new._ops.name}::backward"} < called, called
    forbidden = [name for name in called if re.search(r"aten.*(conv|mm|matmul|unfold|im2col|einsum|fft|linear)", name)]
    assert not forbidden, forbidden


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD_INPUT = [  # what is wrong, the constructor's arguments, the input, what the message must name
    ("2 dimensions",        {}, lambda x: x[0, 0],                        ["3D", "4D", r"\[8, 8\]"]),
    ("5 dimensions",        {}, lambda x: x[None],                        ["3D", "4D", r"\[1, 2, 4, 8, 8\]"]),
    ("channels",            {}, lambda x: x[:, :3],                       ["3 channels", "4 channels"]),
    ("channels, unbatched", {}, lambda x: x[0, :3],                       ["3 channels", "4 channels"]),
    ("float16",             {}, lambda x: x.to(torch.float16),            ["weight", "Half|float16", "Float|float32"]),
    ("float64",             {}, lambda x: x.double(),                     ["weight", "Double|float64", "Float|float32"]),
    ("integer",             {}, lambda x: x.int(),                        ["Int|int32"]),
    ("complex",             {}, lambda x: x + 1j,                         ["ComplexFloat|complex64"]),
    ("low plane",           {}, lambda x: x[:, :, :2],                    ["[Kk]ernel", "2", "3"]),
    ("low padded plane",    {"dilation": 5, "padding": 1}, lambda x: x,   ["[Kk]ernel", "10", "11"]),
    ("empty H",             {"padding": 3}, lambda x: x[:, :, :0],        [r"\[2, 4, 0, 8\]"]),
    ("empty W",             {"padding": 3}, lambda x: x[:, :, :, :0],     [r"\[2, 4, 8, 0\]"]),
    ("empty W, no padding", {}, lambda x: x[:, :, :, :0],                 [r"\[2, 4, 8, 0\]"]),
]
BAD_ARGUMENTS = [({name: value}, [re.escape(f"{name}={value}")]) for name, values in {  # the constructor's, what the message must name
    "kernel_size": [0, -1], "in_channels": [0, -2], "stride": [0, (1, -1), (1, 1, 1)], "dilation": [0, (-2, 1), (1, 1, 1)],
    "padding": [-1, (0, -3), (1, 1, 1)],
}.items() for value in values] + [
    ({"padding": "full"}, ["padding", "full", "same", "valid"]),
    ({"padding": "same", "stride": 2}, ["padding", "same", "stride"]),
]


def raised(call):
    try:
        call()
    except Exception as e:
        return e


def badly_raised(name, theirs, ours, words):
    """What is wrong with the exception of ours where nn.Conv2d raises theirs."""
    if type(ours) is not type(theirs):
        return [f"{name}: {type(ours).__name__} ({ours}), nn.Conv2d's is {type(theirs).__name__} ({theirs})"]
    return [f"{name}: no {word!r} in: {ours}" for word in words if not re.search(word, str(ours))]


@on("cpu", "cuda")
def bad_input(device):
    good, wrong = torch.randn(2, 4, 8, 8, device=device), []
    for name, arguments, spoil, words in BAD_INPUT:
        theirs, ours = (module(4, 3, **arguments).to(device) for module in (Model, ModelNew))
        bad = spoil(good)
        wrong += badly_raised(name, raised(lambda: theirs(bad)), raised(lambda: ours(bad)), words)
    if device == "cuda":
        for where, other in ("input", good.cpu()), ("weight", good):
            theirs, ours = (module(4, 3).to(device if where == "input" else "cpu") for module in (Model, ModelNew))
            wrong += badly_raised(where, raised(lambda: theirs(other)), raised(lambda: ours(other)), ["cpu", "cuda"])
    ours, theirs, _ = modules(Case("good", good.shape, 3, 1, 0, 1, False), device=device)
    same(ours(good), theirs(good))  # the next good call works
    no_failures(wrong)


def test_bad_arguments():
    wrong = []
    for bad, words in BAD_ARGUMENTS:
        arguments = {"in_channels": 4, "kernel_size": 3, **bad}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty kernel
            theirs = raised(lambda: Model(**arguments)(torch.randn(2, 4, 8, 8)))  # nn.Conv2d leaves some to the call
        wrong += badly_raised(bad, theirs, raised(lambda: ModelNew(**arguments)), words)
    no_failures(wrong)


# ---- builds, copies and pasting -------------------------------------------------------------------------------------

def edited(old="struct Problem {", new="struct Problem {{  // {}"):
    """The bundle with kernels never built before, and quick to build."""
    text = model_new._bundle().replace('"-O1"', '"-O0"').replace('optimize("O3")', 'optimize("O0")')
    assert old in text
    return text.replace(old, new.format(random.SystemRandom().random()))


def toolkit(folder, version):
    """Something that looks like a CUDA toolkit of that version, at the CUDA_HOME that is returned."""
    for file, text in ("bin/nvcc", "#!/bin/sh"), ("include/cuda.h", f"#define CUDA_VERSION {version}"):
        path = folder / str(version) / file
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    return str(folder / str(version))


def test_copies_in_one_process():
    """Each runs its own code: one of the same sources, one whose kernels were edited; this one, with a toolkit of another
    CUDA version, has been built for the CPU, and a CUDA tensor is told what is wrong."""
    ours, x = ModelNew(4, 3), torch.randn(2, 4, 9, 6)
    second = runpy.run_path(str(HERE / "model_new.py"))["ModelNew"](4, 3)
    with temporary_folder() as folder, patch.dict(os.environ, TORCH_EXTENSIONS_DIR=str(folder), CUDA_HOME=toolkit(folder, 9000)):
        edited_one = execute(edited("Expected x to be 3D", "Edited {}"))["ModelNew"](4, 3)
    assert str(raised(lambda: edited_one(x[0, 0]))).startswith("Edited") and str(raised(lambda: ours(x[0, 0]))).startswith("Expected")
    for module in second, edited_one:
        module.load_state_dict(ours.state_dict())
        same(module(x), ours(x))
    if "cuda" in DEVICES:
        assert re.search(r"without CUDA kernels.* is 9\.0 .*CUDA_HOME", str(raised(lambda: edited_one.cuda()(x.cuda()))))


def test_warm_import():
    """At most 100 ms above import torch, and prints nothing."""
    code = "import time, torch; print('torch'); start = time.perf_counter(); import model_new; print(time.perf_counter() - start)"
    took = []
    while len(took) < 3 and min(took, default=1) > 0.1:  # the fastest of three
        run = python("-c", code)
        assert re.fullmatch(r"torch\n[\d.e-]+\n", run.stdout) and "model_new" not in run.stderr, run.stdout + run.stderr
        took.append(float(run.stdout.split()[1]))
    print(f"warm import: {1000 * min(took):.0f} ms")
    assert min(took) <= 0.1, took


def test_import_without():
    """What the first import lacks is named at once, with what to do about it; a compiler's message is shown."""
    own, kernels, wrong = (HERE / "model_new.py").read_text(), edited(), []
    with temporary_folder() as folder, patch.object(torch.version, "cuda", None), patch.object(sys, "executable", ""), \
            contextlib.ExitStack() as after:
        after.callback(os.chdir, os.getcwd())
        os.chdir(folder)
        for name in "c++", "ninja":
            (folder / name).mkdir()
            (folder / name / name).symlink_to(shutil.which(name))
        (folder / "file").touch()
        for what, text, variables, words in [
            ("ninja", kernels, {"PATH": f"{folder}/c++"}, ["ninja", "pip install"]),
            ("a compiler", kernels, {"PATH": f"{folder}/ninja"}, [r"compiler.*'c\+\+'", "install", "CXX"]),
            ("the CXX named", kernels, {"CXX": "no-such"}, ["compiler.*'no-such'", "install", "CXX"]),
            ("a folder", kernels, {"TORCH_EXTENSIONS_DIR": f"{folder}/file"}, ["TORCH_EXTENSIONS_DIR", f"{folder}/file"]),
            ("a folder that can be made", kernels, {"TORCH_EXTENSIONS_DIR": "/proc/none"}, ["TORCH_EXTENSIONS_DIR", "/proc/none"]),
            ("a folder that can be written", kernels, {"TORCH_EXTENSIONS_DIR": "/proc"}, ["TORCH_EXTENSIONS_DIR", "/proc"]),
            ("correct kernels", edited(new="#error broken {}"), {}, ["#error broken"]),
            ("kernels", own, {}, [str(folder), "--bundle"]),
        ]:
            with patch.dict(os.environ, {"TORCH_EXTENSIONS_DIR": f"{folder}/built", "CXX": "c++", **variables}):
                start = time.perf_counter()
                error = raised(lambda: execute(text))
                wrong += badly_raised(what, FileNotFoundError() if what == "kernels" else RuntimeError(), error, words)
                if time.perf_counter() - start > 2 and what != "correct kernels":
                    wrong.append(f"{what}: took {time.perf_counter() - start:.1f} s")
        os.chdir(HERE)
        execute(own)  # in the working directory there are kernels
    no_failures(wrong)


def test_what_cuda_kernels_need():
    with temporary_folder() as folder, patch.dict(os.environ):
        homes = {version: toolkit(folder, version) for version in (12080, 13010)}
        for cuda, gpus, listed, version, words in [  # torch's CUDA, GPUs, TORCH_CUDA_ARCH_LIST, the toolkit's version
            (None,   1, "9.0", 13010, "not a CUDA build: install"),
            ("13.0", 0, "",    13010, "no GPU was visible.*TORCH_CUDA_ARCH_LIST"),
            ("13.0", 1, "",    None,  "bin/nvcc.*install.*13.0.*CUDA_HOME"),
            ("13.0", 1, "9.0", 12080, "12080 is 12.8.*13.0.*install.*CUDA_HOME"),
            ("13.0", 0, "9.0", 13010, "^None$"),
        ]:
            os.environ.update(TORCH_CUDA_ARCH_LIST=listed, CUDA_HOME=homes.get(version, "none"))
            with patch.object(torch.version, "cuda", cuda), patch.object(torch.cuda, "device_count", lambda: gpus), \
                    patch.object(model_new, "_find_toolkit", model_new._find_toolkit if version else lambda: (None, None)):
                assert re.search(words, str(model_new._plan_cuda()[3])), (words, model_new._plan_cuda())


def test_builds_are_told_apart():
    """Another torch, toolkit, list of architectures or edit has a build of its own; the same again has not."""
    definitions, built = edited().split("\n_ops = _load()")[0], []
    with temporary_folder() as folder, patch.dict(os.environ, TORCH_EXTENSIONS_DIR=str(folder)):
        homes = {version: toolkit(folder, version) for version in (13000, 13010)}
        for version, listed, home, edit in [
            ("2.12.0", "9.0", 13000, ("", "")), ("2.12.1", "9.0", 13000, ("", "")), ("2.12.0", "8.0;9.0", 13000, ("", "")),
            ("2.12.0", "9.0", 13010, ("", "")), ("2.12.0", "9.0", 13000, ("void cpu_forward", "void  cpu_forward")),
            ("2.12.0", "9.0", 13000, ("__global__", " __global__")), ("2.12.0", "9.0", 13000, ('"-O0"', '"-O1"')),
        ] * 2:
            os.environ.update(TORCH_CUDA_ARCH_LIST=listed, CUDA_HOME=homes[home])
            with patch.object(torch, "__version__", version), patch.object(torch.version, "cuda", "13.0"):
                namespace = execute(definitions.replace(*edit))
                namespace["_build"] = lambda library, **_: built.append(library) or 1 / 0
                assert type(raised(namespace["_load"])) is ZeroDivisionError
    assert built[:7] == built[7:] and len(set(built)) == 7, built


# What such harnesses reject anywhere in the text, Python comments stripped.
REJECTED = [r"\btry\s*:", r"\bexcept\b", r"\bpass\b", r"\bnn\.functional\b", r"\bF\.\w+\(", r"\btorch\.conv\w*",
            r"\baten\W+conv", r"\btorch\.(matmul|mm|bmm|einsum|clamp|relu)\b", r"\bthreading\b", r"\bmultiprocessing\b",
            r"\bconcurrent\b",
            r"PoolExecutor", r"\bcuda\.[Ss]tream\b", r"\bwait_stream\b", r"\brecord_stream\b", r"_make_subclass",
            r"class\s+\w+.*\((torch\.)?Tensor\)", r"Tensor\.__new__", r"__float2half\w*\s*\(", r"\(\s*__half\s*\)\s*\w",
            r"static_cast\s*<\s*(__half|half)\s*>", r"\.half\s*\(", r"\.to\s*\(\s*(dtype\s*=\s*)?torch\.(float16|half)\b"]


def harness(text, extensions, dtype, device):
    """Executes text as such a harness would, checks it over five random trials, returns its ModelNew."""
    stripped = "\n".join(line.split("#")[0] for line in text.splitlines())
    found = [match.group() for pattern in REJECTED for match in re.finditer(pattern, stripped)]
    assert not found, f"rejected: {found}"
    assert "__global__" in stripped and "load_inline" in stripped
    namespace = execute(PROBLEM)
    before = dict(namespace)
    exec(f"import os\nos.environ['TORCH_EXTENSIONS_DIR'] = {str(extensions)!r}\n" + text, namespace)
    assert all(namespace[name] is value for name, value in before.items()), "changes the problem's globals"
    strangers = [name for name, value in namespace.items() if not (
        name in before or name == "ModelNew" or name.startswith("_") or isinstance(value, type(sys)))]
    assert not strangers, f"leaves {strangers} in the namespace"
    for seed in random.sample(range(2**31), 5):
        torch.manual_seed(seed)
        inputs, results = [t.to(device, dtype) for t in namespace["get_inputs"]()], []
        for name in "Model", "ModelNew":
            torch.manual_seed(seed)
            results.append(namespace[name](*namespace["get_init_inputs"]()).to(device, dtype)(*inputs))
        same(*results, tolerance=1e-4 if dtype == torch.float32 else 1e-2)
    return namespace["ModelNew"]


@on("cpu", "cuda")
def pasted_into_a_harness(device):
    """Thrice in one process, the extensions folder changed each time; the second paste has kernels of its own to build."""
    text, x = model_new._bundle(), torch.randn(4, 8, 64, 48, device=device)
    other = text.replace("struct Problem {", "struct Problem {  // pasted", 1)
    with temporary_folder() as folder, patch.dict(os.environ):
        for i, text, dtype in (1, text, torch.float32), (2, other, torch.float16), (3, text, torch.bfloat16):
            pasted, ours = (module(8, 3).to(device, dtype) for module in (harness(text, folder / f"{i}", dtype, device), ModelNew))
            pasted.load_state_dict(ours.state_dict())
            assert torch.equal(pasted(x.to(dtype)), ours(x.to(dtype)))


def test_bundle_command():
    bundle = python(HERE / "model_new.py", "--bundle", "-").stdout
    assert bundle == model_new._bundle()
    with temporary_folder() as folder:
        model_new._main(["--bundle", str(folder / "bundle.py")])
        assert (folder / "bundle.py").read_text() == bundle


# ---- a first-class operator -----------------------------------------------------------------------------------------

@on("cpu", "cuda")
def gradcheck(device):
    """First and second derivatives over the table's small cases, the smallest of them in every direction."""
    for case in CASES:
        if 0 < math.prod(case.shape) <= 2048 and case.K <= 20:
            ours = modules(case, torch.float64, device)[0]
            names, parameters = zip(*ours.named_parameters())
            inputs = torch.randn(case.shape, dtype=torch.float64, device=device, requires_grad=True), *parameters
            call = lambda x, *values: torch.func.functional_call(ours, dict(zip(names, values)), (x,))
            torch.autograd.gradcheck(call, inputs, fast_mode=inputs[0].numel() > 60)
            torch.autograd.gradgradcheck(call, inputs, fast_mode=inputs[0].numel() > 20)


@on("cpu", "cuda")
def opcheck(device):
    for layout in LAYOUTS:
        for with_bias, stride, padding, dilation in (True, [1, 1], [0, 0, 1, 2], 1), (False, [2, 3], [1, 1, 2, 2], 2):
            x = dense(layout)((2, 4, 9, 6), device=device).requires_grad_()
            weight = torch.randn(4, 1, 3, 1, device=device, requires_grad=True)
            bias = torch.randn(4, device=device, requires_grad=True) if with_bias else None
            torch.library.opcheck(model_new._ops.forward.default, (x, weight, bias, stride, padding, dilation))
            y = model_new._ops.forward(x, weight, bias, stride, padding, dilation)
            for mask in [True, True, True], [True, False, False], [False, True, False]:
                torch.library.opcheck(model_new._ops.backward.default, (
                    torch.randn_like(y), x.detach(), weight.detach(), stride, padding, dilation, mask))


@on("cpu", "cuda")
def compile_fullgraph(device):
    """Forward and backward equal eager: compiled for one size, and, traced alone, for all with no recompilation."""
    inductor = "inductor" if device == DEVICES[-1] else "aot_eager"  # where there is a GPU not for the CPU, too: a minute
    for dynamic, layout, backend in (False, "channels_last", inductor), (True, "contiguous", "aot_eager"):
        torch._dynamo.reset()
        eager = net(ModelNew).to(device)
        compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, dynamic=dynamic, backend=backend)
        for shape in ((2, 4, 16, 12), (3, 4, 21, 10), (5, 4, 33, 7))[:3 if dynamic else 1]:
            x = dense(layout)(shape, device=device).requires_grad_()
            with torch.compiler.set_stance("default" if shape == (2, 4, 16, 12) else "fail_on_recompile"):
                results = [[y := m(x), *grad(y, [x, *m.parameters()], y.detach().cos())] for m in (eager, compiled)]
            same(*results)
            assert used_strides(results[0][0]) == used_strides(results[1][0])


def test_export_and_reload():
    """Programs exported with a dynamic batch and height, run in a fresh process that imports model_new."""
    inputs = [torch.randn(3, 4, 26, 12, device=device) for device in DEVICES]
    with temporary_folder() as folder:
        for i, x in enumerate(inputs):
            module, sizes = net(ModelNew).to(x.device), {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
            program = torch.export.export(module, (torch.randn(2, 4, 16, 12, device=x.device),), dynamic_shapes=(sizes,))
            torch.export.save(program, folder / f"{i}.pt2")
        torch.save(inputs, folder / "x")
        python("-c", "import torch, model_new\n"
               "torch.save([torch.export.load(f'{i}.pt2').module()(x) for i, x in enumerate(torch.load('x'))], 'y')",
               folder=folder, PYTHONPATH=str(HERE))
        for x, y in zip(inputs, torch.load(folder / "y")):
            same(y, net(ModelNew).to(x.device)(x))


@on("cpu", "cuda")
def func_transforms(device):
    """functional_call, grad, jvp, vmap over inputs and parameters, and gradients per sample, are those of nn.Conv2d."""
    from torch.func import functional_call, grad, hessian, jacfwd, jvp, vmap
    ours, theirs = (net(module).to(device, torch.float64) for module in (ModelNew, Model))
    x = torch.randn(3, 2, 4, 9, 6, dtype=torch.float64, device=device)
    many = {k: torch.randn(3, *v.shape, dtype=v.dtype, device=device) for k, v in ours.named_parameters()}
    one, tangent = ({k: v[i] for k, v in many.items()} for i in range(2))

    def results(module):
        call = lambda parameters, x: functional_call(module, parameters, (x,))
        squares, cubes = lambda parameters, x: call(parameters, x).square().sum(), lambda x: module(x).pow(3).sum()
        return {
            "functional_call": call(one, x[0]),
            "grad": grad(squares)(one, x[0]),
            "jvp in x": jvp(module, (x[0],), (x[1],)),
            "jvp in all": jvp(call, (one, x[0]), (tangent, x[1])),
            "vmap": vmap(module)(x),
            "vmap, other dimensions": vmap(module, in_dims=1, out_dims=2)(x.transpose(0, 1)),
            "vmap, unbatched": vmap(module)(x[:, 0]),
            "vmap of vmap": vmap(vmap(module))(x),
            "vmap over parameters": vmap(call, (0, None))(many, x[0]),
            "vmap over both": vmap(call)(many, x),
            "gradient a sample": vmap(grad(squares), (None, 0))(one, x),
            "gradient a model": vmap(grad(squares))(many, x),
            "hessian": hessian(cubes)(x[0, :1]),
            "jacfwd of grad": jacfwd(grad(cubes))(x[0, :1]),
        }
    same(results(ours), results(theirs), tolerance=1e-10)


@on("cpu", "cuda")
def autocast(device):
    """Casts what nn.Conv2d casts, and raises where it raises."""
    for to, input, weight in itertools.product((torch.bfloat16, torch.float16), DTYPES, DTYPES):
        x, results = torch.randn(2, 4, 9, 6).to(device, input).requires_grad_(), []
        for module in modules(Case("autocast", (2, 4, 9, 6), 3, 1, 0, 1, True), weight, device)[:2]:
            with torch.autocast(device, dtype=to):
                error = raised(lambda: results.append([y := module(x), *grad(y.sum(), [x, *module.parameters()])]))
            results += [type(error)] if error else []
        if type in map(type, results):
            assert results[0] == results[1], (to, input, weight, *results)
        else:
            same(*results, tolerance=5e-2)  # dtypes, too


@on("cpu", "cuda")
def grad_scaler(device):
    batches, models = torch.randn(3, 2, 4, 9, 6, device=device), [net(module).to(device) for module in (Model, ModelNew)]
    for model in models:
        scaler = torch.amp.GradScaler(device, init_scale=256.0)
        three_steps(model, batches, scaler)
        assert scaler.get_scale() == 256.0
    same(*(list(model.parameters()) for model in models), tolerance=1e-2)


@on("cpu", "cuda")
def checkpoint(device):
    from torch.utils.checkpoint import checkpoint
    model, x = net(ModelNew).to(device), torch.randn(2, 4, 9, 6, device=device, requires_grad=True)
    expected = grad(model(x).square().sum(), [x, *model.parameters()])
    for reentrant in False, True:
        for t in x, *model.parameters():
            t.grad = None
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        same([t.grad for t in (x, *model.parameters())], list(expected))


def test_meta():
    """On the meta device: shapes, strides and dtype, by construction there and by a call."""
    for case, ours, x in each("cpu"):
        with torch.device("meta"):
            meta = ModelNew(case.shape[-3], *case[2:])
        assert meta.conv2d.weight.is_meta
        real, y = ours(x), meta(x.to("meta").requires_grad_())
        assert y.is_meta and (y.shape, y.dtype) == (real.shape, real.dtype), case
        assert case.shape[0] == 0 or used_strides(y) == used_strides(real), (case, y.stride(), real.stride())
        y.sum().backward()
        assert meta.conv2d.weight.grad.shape == meta.conv2d.weight.shape


def train(rank, world, folder, device):
    """One process of two distributed trainings of three steps; the first writes the parameters. It leaves by os._exit: a
    thread of gloo may still be dropping its last tensor, which aborts an interpreter on its way out (pytorch/pytorch#179291)."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    replicated = nn.parallel.DistributedDataParallel(net(ModelNew).to(device))
    sharded, mesh = net(ModelNew).to(device), dist.init_device_mesh(device, (world,))
    for layer in sharded[0].conv2d, sharded[2], sharded:
        fully_shard(layer, mesh=mesh)
    for model in replicated, sharded:
        three_steps(model, torch.load(folder / "batches").chunk(world, dim=1)[rank].to(device))
    ends = [[getattr(p, "full_tensor", lambda: p)().detach().cpu() for p in model.parameters()] for model in (replicated, sharded)]
    if rank == 0:
        torch.save(ends, folder / "ends")
    dist.destroy_process_group()
    os._exit(0)


def three_steps(model, batches, scaler=torch.amp.GradScaler(enabled=False)):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in batches:
        with torch.autocast(batch.device.type, torch.float16, enabled=scaler.is_enabled()):
            loss = model(batch).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


@on("cpu", "cuda", gpus=2)
def ddp_and_fsdp(device):
    """Two processes (gloo, or NCCL on two GPUs) end where nn.Conv2d, trained by one, does."""
    if not torch.distributed.is_available():
        raise unittest.SkipTest("this torch has no torch.distributed")
    with temporary_folder() as folder:
        batches = torch.randn(3, 4, 4, 9, 6)
        torch.save(batches, folder / "batches")
        torch.multiprocessing.spawn(train, (2, folder, device), nprocs=2)
        model = net(Model)
        three_steps(model, batches)
        for ends in torch.load(folder / "ends"):
            same(ends, [p.detach() for p in model.parameters()])


# ---- CUDA alone -----------------------------------------------------------------------------------------------------

@on("cuda")
def cuda_graph(device):
    """A whole training step, captured once and replayed, equals the eager steps."""
    batches = torch.randn(4, 2, 4, 33, 20, device="cuda")
    eager, captured = net(ModelNew).cuda(), net(ModelNew).cuda()
    optimizer, x = torch.optim.SGD(captured.parameters(), 0.1), batches[0].clone()

    def step():
        captured(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    captured.load_state_dict(eager.state_dict())
    for batch in batches:
        x.copy_(batch)
        graph.replay()
        three_steps(eager, batch[None])
    same(list(captured.parameters()), list(eager.parameters()))


@on("cuda")
def current_stream(device):
    """Runs behind what the current stream still has to do, and does not wait for it."""
    ours, theirs, _ = modules(Case("stream", (8, 8, 256, 256), 5, 1, (2, 0), 1, True), device="cuda")
    x, late = torch.zeros(8, 8, 256, 256, device="cuda", requires_grad=True), torch.randn(8, 8, 256, 256, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        grad(ours(x), [x, *ours.parameters()], late)  # leaves its memory in the cache
        stream.synchronize()
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            x.copy_(late)
        y = ours(x)
        gradients = grad(y, [x, *ours.parameters()], late)
        assert not stream.query(), "the call waited for the stream"
    stream.synchronize()
    expected = theirs(x)
    same([y, *gradients], [expected, *grad(expected, [x, *theirs.parameters()], late)], tolerance=1e-3)


@on("cuda")
def never_synchronizes(device):
    for case, ours, x in each(device):
        torch.cuda.set_sync_debug_mode("error")
        wrong = raised(lambda: ours(x.requires_grad_()).sum().backward())
        torch.cuda.set_sync_debug_mode("default")
        assert wrong is None, (case, wrong)


@on("cuda")
def allocates_only_its_output(device):
    for case, ours, x in itertools.chain(each(device), each(device, dtype=torch.float64)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()
        y = ours(x)
        after = torch.cuda.memory_stats()
        assert after["allocation.all.allocated"] - before["allocation.all.allocated"] == (y.numel() > 0), case
        assert after["requested_bytes.all.peak"] - before["requested_bytes.all.current"] == y.nbytes, case


@on("cpu", "cuda")
def threads_and_streams(device):
    """8 threads, each with a module of its own, on a GPU a stream, too, make many calls: the first is right, all are alike."""
    def work(i):
        # half of them with more shared memory than a kernel has unasked
        K, layout = (33 + i, "channels_last") if i % 2 else (2 + i, "contiguous")
        case = Case(f"thread {i}", (2, 4 + 4 * i, 20 + i, 12 + i), K, 1 + i % 2, (K // 2, 0), 1, True)
        with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext():
            ours, _, exact = modules(case, device=device)
            x = dense(layout)(case.shape, device=device).requires_grad_()
            grad_output, wrong = torch.randn_like(ours(x)), torch.zeros((), device=device)
            first, expected = (list(run(*arguments, grad_output).values()) for arguments in ((ours, x), (exact, x.double())))
            same(first, [e.float() for e in expected], 1e-4)
            for _ in range(1000 if device == "cuda" else 100):
                y = ours(x)
                for a, b in zip([y, *grad(y, [x, *ours.parameters()], grad_output)], first):
                    wrong += (a != b).any()
            return wrong.item()
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(8))) == [0] * 8


@on("cuda", gpus=2)
def on_another_gpu(device):
    """Runs where its tensor is, and leaves the current device what it was."""
    case = Case("another GPU", (2, 8, 20, 16), 5, 1, (2, 0), 1, True)
    no_failures([w for dtype in DTYPES for layout in LAYOUTS for w in compare(case, dtype, "cuda:1", dense(layout))])
    assert torch.cuda.current_device() == 0


HUGE = [  # (N, C, H, W), K, dtype
    ((1, 4, 33000, 17001),      5, torch.float16),  # more than 2^31 numbers in x and in y
    ((1, 4, 33000, 17001),      5, torch.float32),
    ((1, 1, 46400, 46400),      5, torch.float16),  # in one plane
    ((3000, 1000, 3, 2),        3, torch.float32),  # 3 million planes
    ((1, 3_000_000, 3, 2),      3, torch.float32),
    ((1, 1, 1, 70_000_000),     3, torch.float32),
    ((1, 1, 70_000_000, 1),     3, torch.float32),
    ((1, 8, 5003, 1000),        21, torch.bfloat16),  # enough for blocks of a single short band
]


@on("cpu", "cuda")
def huge(device):
    """Outputs and input gradients at random positions, weight and bias gradients whole; on a CPU two of them, and what its caches do not hold."""
    beyond_caches = [((32 // dtype.itemsize, 9, 333, W), 5, dtype) for dtype, W in zip(DTYPES, random.sample((251, 256, 251, 256), 4))]
    for (shape, K, dtype), layout in itertools.product(HUGE, LAYOUTS) if device == "cuda" else [
            *zip(HUGE[3:6:2], LAYOUTS), *itertools.product(beyond_caches, LAYOUTS)]:
        (N, C, H, W), bytes = shape, 5 * math.prod(shape) * dtype.itemsize + 10e9
        torch.cuda.empty_cache()
        if device == "cuda" and torch.cuda.mem_get_info()[0] < bytes:
            print("skipped:", shape, dtype, layout)
            continue
        ours = modules(Case("huge", shape, K, 1, (K // 2, 0), 1, True), dtype, device)[0]
        weight, bias = (p.detach().double() for p in ours.parameters())
        x = torch.empty(shape, dtype=dtype, device=device).to(memory_format=LAYOUTS[layout]).normal_()
        g = torch.empty_like(x).normal_(std=1 / 16)  # so that sums do not overflow in float16
        y, grad_x, grad_weight, grad_bias = run(ours, x, g).values()
        n, c, h, w = (torch.randint(size, (100_000 if device == "cuda" else 10_000,), device=device).index_fill_(0, torch.arange(9, device=device), size - 1)
                      for size in shape)
        exact_y, exact_x, exact_weight = bias[c], torch.zeros_like(bias[c]), torch.zeros_like(weight)
        exact_bias = g.sum((0, 2, 3), dtype=torch.float64)
        for k, up in enumerate(range(-(K // 2), K - K // 2)):  # tap k meets rows `up` below
            for t, row, results in (x, h + up, exact_y), (g, h - up, exact_x):
                results += weight[c, 0, k, 0] * torch.where((row >= 0) & (row < H), t[n, c, row.clamp(0, H - 1), w].double(), 0)
            some = max(1, 2**27 // (N * C * W))  # rows at a time
            for start in range(max(0, -up), min(H, H - up), some):
                stop = min(start + some, H - max(up, 0))
                exact_weight[:, 0, k, 0] += (g[:, :, start:stop].double() * x[:, :, start + up:stop + up]).sum((0, 2, 3))
        least = math.sqrt(N * H * W) / 16
        for name, mine, exact, least in (("y", y[n, c, h, w], exact_y, 0), ("x", grad_x[n, c, h, w], exact_x, 0),
                                         ("weight", grad_weight, exact_weight, least), ("bias", grad_bias, exact_bias, least)):
            assert error(mine, exact, least) < 2 * DTYPES[dtype], (shape, dtype, layout, name, error(mine, exact, least))
        del x, g, t, y, grad_x
    if device == "cpu":
        strided = Case("strided, beyond caches", (4, 16, 512, 512), 3, 2, 1, 1, True)
        no_failures(compare(strided, random.choice(list(DTYPES)), device, dense("contiguous"), by=formula))


# ---- first imports that are disturbed (--faults) ----------------------------------------------------------------------

IMPORT = """
import os, sys, time, torch
{before}
print("ready", flush=True)
sys.stdin.readline()
start = time.perf_counter()
from {package}model_new import ModelNew, _ops
seconds = time.perf_counter() - start
ours, x = ModelNew(4, 3), torch.randn(2, 4, 9, 6)
torch.testing.assert_close(ours(x), sum(ours.conv2d.weight[:, :, k] * x[:, :, k:k + 7] for k in range(3)))
print(seconds, flush=True)
{after}
"""

# A compiler that makes what it has made once again: asleep, so that limits of time hold on a busy machine, and half of it first.
COMPILER = """#!/bin/sh
for word; do [ "$last" = -o ] && out=$word; last=$word; done
made=$(dirname "$0")/made/$(basename "$out")
if [ -f "$made" ]; then
    sleep 1; head -c $(($(wc -c < "$made") / 2)) "$made" > "$out"; sleep 1; cat "$made" > "$out"
else
    REAL "$@" && if [ "$out" ]; then cp "$out" "$made"; fi
fi
"""

# The lock that torch's builds take, older: a file that is there, and newer: a lock of the system's on a file.
LOCK = """
import fcntl
from torch.utils import cpp_extension
class Lock:
    def __init__(self, path, *_, **__):
        self.path = path
    def try_acquire(self):
        while not {system} and os.path.exists(self.path):
            time.sleep(0.1)
        self.file = open(self.path, "w")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        return True
    def release(self):
        os.remove(self.path)
        self.file.close()
    __enter__, __exit__ = try_acquire, lambda self, *_: self.release()
cpp_extension.FileBaton = cpp_extension.FileLock = Lock
"""


class Importer:
    """A process that imports ./model_new.py when told to go; torch it has imported by now."""
    def __init__(self, folder, extensions, package="", before="", after="", within=(), **variables):
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [*within, sys.executable, "-W", "ignore", "-c", IMPORT.format(package=package, before=before, after=after)], cwd=folder,
            text=True, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_CUDA_ARCH_LIST": "",
                 "TORCH_EXTENSIONS_DIR": str(extensions), **variables})
        assert self.process.stdout.readline() == "ready\n", self.said()

    def go(self):
        print(file=self.process.stdin, flush=True)
        return self

    def said(self):
        return os.pread(self.errors.fileno(), 1 << 20, 0).decode()

    def seconds(self, returned=0):
        """How long the import took; it must have worked."""
        try:
            seconds = self.process.communicate(timeout=100)[0]
        finally:
            self.process.kill()
        assert self.process.returncode == returned, self.said()
        return float(seconds)


@contextlib.contextmanager
def importable():
    """A folder with a model_new.py that COMPILER has built, and a function that makes importers of it, given an extensions folder."""
    with temporary_folder() as root:
        (root / "made").mkdir()
        (root / "model_new.py").write_text(edited())
        (root / "c++").write_text(COMPILER.replace("REAL", os.environ.get("CXX", "c++")))
        (root / "c++").chmod(0o755)
        importer = functools.partial(Importer, root, CXX=str(root / "c++"), MAX_JOBS="99")
        importer("first").go().seconds()
        yield root, importer


def working_in(folder):
    """The processes whose working directory is, or was, below this."""
    found = set()
    for working in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if os.readlink(working).startswith(os.path.realpath(folder) + "/"):
                found.add(int(working.parts[2]))
    return found


def fault_killed_while_building():
    """At 20 moments, the process alone or its compilers, too: the next import takes no longer than any; nothing is left, nor left running."""
    with importable() as (root, importer), concurrent.futures.ThreadPoolExecutor(4) as threads:
        before = importer("before").go().seconds()

        def kill(i):
            folder, lock = root / f"killed {i}", LOCK.format(system=i // 2 % 2)
            victim, heir = (importer(folder, before=lock) for _ in range(2))
            victim.go()
            time.sleep(before * (i + 0.5) / 20)
            victim.process.kill()
            left = working_in(folder)
            for pid in left if i % 2 else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            heir.go()
            time.sleep(1)
            running = left & working_in(folder)
            return heir.seconds(), running, sorted(path.suffix for path in folder.iterdir())

        imports = list(threads.map(kill, range(20)))
        alone = max(before, importer("after").go().seconds())
        print(f"alone {alone:.1f} s, then", *(f"{seconds:.1f}" for seconds, *_ in imports))
        no_failures([f"moment {i}: {seconds:.1f} s, alone {alone:.1f}, running {running}, left {left}"
                     for i, (seconds, running, left) in enumerate(imports) if seconds > 1.5 * alone or running or left != [".lock", ".so"]])


def fault_eight_at_once():
    """One builds, and one other if it is killed; all are right, and none takes longer than a build and a half."""
    with importable() as (root, importer), concurrent.futures.ThreadPoolExecutor(8) as threads:
        before = importer("before").go().seconds()
        for kill in False, True:
            eight = list(threads.map(importer, [f"eight {kill}"] * 8))
            for process in eight:
                process.go()
            if kill:
                time.sleep(before / 6)
                builder, = (process for process in eight if "building" in process.said())
                builder.process.kill()
                eight.remove(builder)
            seconds = [process.seconds() for process in eight]
            alone = max(before, importer(f"after {kill}").go().seconds())
            print(f"alone {alone:.1f} s, eight", *(f"{s:.1f}" for s in seconds))
            assert max(seconds) <= 1.5 * alone, (kill, alone, seconds)
            assert sum("building" in process.said() for process in eight) == 1


def mounted(*commands):
    """A prefix that runs a command where these mounts were made, seen by no other process."""
    within = ["unshare", "--mount", "--map-root-user", "sh", "-c", " && ".join([*commands, 'exec "$@"']), "sh"]
    if not shutil.which("unshare") or subprocess.run([*within, "true"], capture_output=True).returncode:
        raise unittest.SkipTest("needs leave to mount")
    return within


def fault_disk_full_or_read_only():
    with temporary_folder() as root:
        (root / "disk").mkdir()
        (root / "model_new.py").write_text(edited())
        for options, words in ("size=4k", "No space left"), ("size=1m", "No space left"), ("ro", "Read-only"):
            importer = Importer(root, root / "disk", within=mounted(f"mount -t tmpfs -o {options} tmpfs '{root}/disk'")).go()
            start = time.perf_counter()
            assert importer.process.wait() and "TORCH_EXTENSIONS_DIR" in importer.said().splitlines()[-1], importer.said()
            assert words in importer.said() and time.perf_counter() - start < 2, importer.said()


def fault_no_nvcc_for_a_gpu():
    """None, or one of another major version than torch's CUDA: an import that works on the CPU; a call with CUDA tensors says what to do."""
    gpu = "torch.version.cuda, torch.cuda.device_count, isfile = '13.0', lambda: 1, os.path.isfile\n"
    call = "_ops.forward.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), x, x, None, (1, 1), (0, 0, 0, 0), 1)"
    with importable() as (root, importer):
        for name, before, words in [
            ("none", "os.path.isfile = lambda path: not path.endswith('bin/nvcc') and isfile(path)", "no CUDA toolkit.*install that of CUDA 13.0"),
            ("12.8", "", "is 12.8 but torch's CUDA is 13.0: install .* set CUDA_HOME"),
        ]:
            process = importer(name, before=gpu + before, after=call, CUDA_HOME=toolkit(root / name, 12080)).go()
            process.seconds(returned=1)
            assert re.search("RuntimeError: model_new was imported without CUDA kernels, because .*" + words, process.said()), process.said()


def fault_unusual_places():
    """A submodule of a package in a read-only folder with spaces and other letters in its name, and a relative extensions folder."""
    with temporary_folder() as root:
        package = root / "un paquet été" / "pkg"
        package.mkdir(parents=True)
        shutil.copytree(HERE / "kernels", package / "kernels")
        (package / "__init__.py").touch()
        shutil.copy(HERE / "model_new.py", package)
        places = dict(within=mounted(f"mount -o bind,ro '{package}' '{package}'"), package="pkg.", LC_ALL="C")
        Importer(package.parent, "les extensions été", **places).go().seconds()
        assert [path.suffix for path in (package.parent / "les extensions été").glob("*.so")] == [".so"]


# ---- random cases ---------------------------------------------------------------------------------------------------

def random_size(most):
    n = random.randint(1, max(1, int(most)))
    return random.choice([n, next(p for p in itertools.count(max(n, 2)) if all(p % d for d in range(2, math.isqrt(p) + 1))),
                          max(1, 2 ** (n.bit_length() - 1) + random.randint(-1, 1))])


def random_case():
    """Arguments and sizes from 1 to thousands, mostly small."""
    while True:
        pair = lambda least, *most: random.choice([a := random.randint(least, random.choice(most)), (a, random.randint(least, 5))])
        K, stride, dilation = random.randint(1, random.choice([3, 9, 35, 130])), pair(1, 1, 1, 2, 5), pair(1, 1, 1, 3, 9)
        d = dilation if isinstance(dilation, int) else dilation[0]
        padding = random.choice([0, "valid", (K * d // 2, 0), pair(0, 1, 5, K * d)] + ["same"] * (stride in (1, (1, 1))))
        (p, pw), (s, sw) = (v if isinstance(v, tuple) else (v, v) for v in (padding if not isinstance(padding, str) else 0, stride))
        shape, budget = [1] * 4, 2 ** random.uniform(0, 21)
        for i in random.sample(range(4), 4):
            shape[i] = random_size(min(budget / math.prod(shape), 5000))
        N, C, H, W = shape
        H, W = random.choice([H] * 9 + [7, 14, 28]), random.choice([W, (W + 7) // 8 * 8])  # which have kernels of their own
        H = H if padding == "same" else max(H, d * (K - 1) + 1 - 2 * p)
        N = random.choice([N] * 99 + [0])
        if max(1, N) * C * max(H * W, ((H + 2 * p) // s + 1) * ((W + 2 * pw) // sw + 1)) < 2**22:
            shape = (C, H, W) if random.random() < 0.1 else (N, C, H, W)
            return Case("random", shape, K, stride, padding, dilation, random.random() < 0.5)


def fuzz_once(seed, device):
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(random.choice([1, os.cpu_count()]))
    case, dtype = random_case(), random.choice(list(DTYPES))
    makes = [*map(dense, LAYOUTS), *(VIEWS.values() if len(case.shape) == 4 and case.shape[0] else [])]
    asked, weights = [name for name in GRADIENTS if random.random() < 0.7], random.choice(list(LAYOUTS.values()))
    return [w for case, gradients in with_many_images(case, device)
            for w in compare(case, dtype, device, lambda *args, **to: random.choice(makes)(*args, **to), gradients and asked, weights, formula)]


def fuzz(seconds, seed):
    """Random cases, each of the next seed; their memory is free again when they are done."""
    device, start, failed, early = DEVICES[-1], time.perf_counter(), 0, None

    def memory():
        gc.collect()
        return torch.cuda.memory_allocated()  # 0 without a GPU

    for case in itertools.count():
        elapsed = time.perf_counter() - start
        done = case and (elapsed >= seconds or failed == 10)
        if early is None and (done or elapsed >= min(60, seconds / 2)):
            early = memory()
        if done:
            break
        try:
            wrong = fuzz_once(seed + case, device)
        except Exception as e:
            wrong = [f"{type(e).__name__}: {e}"]
        if wrong:
            failed += 1
            print(f"python test_model_new.py --fuzz 0 --seed {seed + case}  # on {device}: {wrong[0]}", flush=True)
    grown = memory() - early
    print(f"fuzz on {device}, seed {seed}: {case} cases in {elapsed:.0f} s, {failed} failed, "
          f"memory in use grew by {grown} bytes since the first minute")
    return failed or grown > 0


# ---- benchmark ------------------------------------------------------------------------------------------------------

WORKLOADS = [Case(*row, bias=False) for row in [
    # name               (N, C, H, W)         K   stride padding  dilation
    ("kernelbench",       (64, 8, 512, 512),   3,  1,     0,       1),
    ("kernelbench-padded", (64, 8, 512, 512),  3,  1,     1,       1),
    ("kernelbench-small", (10, 3, 256, 256),   3,  1,     0,       1),
    ("segnext-7",         (16, 64, 128, 128),  7,  1,     (3, 0),  1),
    ("segnext-11",        (16, 64, 128, 128),  11, 1,     (5, 0),  1),
    ("segnext-21",        (16, 64, 128, 128),  21, 1,     (10, 0), 1),
    ("inceptionnext-11",  (128, 12, 56, 56),   11, 1,     (5, 0),  1),
    ("strided",           (32, 64, 256, 256),  3,  2,     1,       1),
    ("dilated",           (32, 64, 128, 128),  7,  1,     (9, 0),  3),
    ("large-31",          (16, 64, 256, 256),  31, 1,     (15, 0), 1),
    ("odd",               (16, 32, 333, 251),  5,  1,     (2, 0),  1),
    ("late-7",            (256, 512, 7, 7),    7,  1,     (3, 0),  1),
]]
LARGE = [Case(f"k{K}", (16, 64, 256, 256), K, 1, (K // 2, 0), 1, False) for K in (3, 11, 21, 31, 51, 63, 127)] + [
    Case("k35-dilated3", (16, 64, 256, 256), 35, 1, (51, 0), 3, False),
    Case("k31-odd", (16, 32, 333, 251), 31, 1, (15, 0), 1, False)]


def shift_and_add(x, weight, padding, dilation):
    """What a user of torch.compile would write for stride 1."""
    x = nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    height = x.shape[2] - dilation * (weight.shape[2] - 1)
    return sum(weight[:, :, k] * x[:, :, k * dilation:k * dilation + height] for k in range(weight.shape[2]))


def median_ms(call, device):
    """Median time of a call. On a GPU the L2 cache is flushed before each by writing several times its size, behind a pause
    in which the host runs ahead, so that launch costs are not timed."""
    synchronize = getattr(torch, device).synchronize
    once = timeit.repeat(lambda: (call(), synchronize()), number=1, repeat=3)[-1]
    repeats = min(max(int(0.2 / (once + 1e-3)), 5), 60)
    if device == "cpu":
        return 1e3 * statistics.median(timeit.repeat(call, number=1, repeat=repeats))
    flush = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        torch.cuda._sleep(1_000_000)
        flush.zero_()
        start.record()
        call()
        end.record()
    synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def job(module, x, half):
    """(call to be timed, bytes that it must move)"""
    if half == "forward":
        with torch.no_grad():
            y = module(x)
        return torch.no_grad()(lambda: module(x)), (x.nbytes + y.nbytes)
    x = x.detach().requires_grad_()
    y = module(x)
    grad_output, inputs = torch.randn_like(y), [x, *module.parameters()]
    return lambda: grad(y, inputs, grad_output, retain_graph=True), 2 * x.nbytes + y.nbytes


def bench_rows(case, dtype, half, device):
    """Rows of the table for one workload and type."""
    ours, theirs, _ = modules(case, dtype, device)
    inputs = {layout: dense(layout)(case.shape, dtype=dtype, device=device) for layout in LAYOUTS}
    conv2d_ms = min(median_ms(job(theirs, x, half)[0], device) for x in inputs.values())
    for layout, x in inputs.items():
        call, moved = job(ours, x, half)
        ms = median_ms(call, device)
        source = torch.rand(moved // 8, device=device)  # float32: reads half of the bytes, writes half
        target = torch.empty_like(source)
        copy_ms, compiled_ms = median_ms(lambda: target.copy_(source), device), None
        if half == "forward" and case.stride == 1:
            torch._dynamo.reset()
            compiled, conv2d = torch.compile(shift_and_add, dynamic=False), ours.conv2d
            arguments = x, conv2d.weight.detach(), conv2d.padding, conv2d.dilation[0]
            same(compiled(*arguments), call(), 2e-2 if dtype.itemsize == 2 else 1e-4)
            compiled_ms = median_ms(lambda: compiled(*arguments), device)
        yield {"half": half, "workload": case.name, "shape": case.shape, "K": case.K, "dtype": str(dtype)[6:], "layout": layout,
               "ms": ms, "GB/s": moved / ms / 1e6, "copy_ms": copy_ms, "conv2d_ms": conv2d_ms, "compiled_ms": compiled_ms}


def print_table(half, rows):
    print(f"\n{half:18} {'N,C,H,W':>14} {'dtype':8} {'layout':13} {'ms':>8} {'GB/s':>5}  of copy {'':20} x conv2d  x compiled")
    for r in rows:
        fraction, conv2d = r["copy_ms"] / r["ms"], r["conv2d_ms"] / r["ms"]
        bar = ("#" * round(20 * fraction))[:20].ljust(20, ".")
        compiled = f"{r['compiled_ms'] / r['ms']:.2f}" if r["compiled_ms"] else "-"
        print(f"{r['workload']:18} {','.join(map(str, r['shape'])):>14} {r['dtype']:8} {r['layout']:13} "
              f"{r['ms']:8.3f} {r['GB/s']:5.0f}     {fraction:4.2f} {bar} {conv2d:8.2f}  {compiled:>10}")


def host_costs(device):
    """Microseconds of the host for a call on a tiny input: (what, ours, nn.Conv2d's)."""
    ours, theirs, _ = modules(Case("tiny", (1, 8, 8, 8), 3, 1, 0, 1, False), device=device)
    x = torch.randn(1, 8, 8, 8, device=device)
    leaf, grad_output = x.clone().requires_grad_(), torch.randn(1, 8, 6, 8, device=device)
    for what, make in {
        "forward, no_grad": lambda m: torch.no_grad()(lambda: m(x)),
        "forward, with grad": lambda m: lambda: m(leaf),
        "forward + backward": lambda m: lambda: grad(m(leaf), [leaf, m.conv2d.weight], grad_output),
    }.items():
        calls = make(ours), make(theirs)
        times = [[timeit.timeit(call, getattr(torch, device).synchronize, number=100) for call in calls] for _ in range(31)]
        ours_us, conv2d_us = (1e4 * statistics.median(seconds) for seconds in zip(*times))
        yield {"what": what, "ours_us": ours_us, "conv2d_us": conv2d_us}


def bench(halves, only, file):
    device = DEVICES[-1]
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads, an eighth of the batch"
    about = f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, seed {SEED}"
    print(about)
    torch.manual_seed(SEED)
    cases = [c for c in WORKLOADS + LARGE if only.match(c.name)] if only else WORKLOADS
    if not cases:
        return "no such workload"
    rows = []
    for half, case in itertools.product(halves, cases):
        if device == "cpu":
            case = case._replace(shape=(max(1, case.shape[0] // 8), *case.shape[1:]))
        for dtype in DTYPES if case.name == "kernelbench" else (torch.float32, torch.bfloat16):
            for row in bench_rows(case, dtype, half, device):
                rows.append(row)
                print(half, *(row[key] for key in ("workload", "dtype", "layout")), f"{row['ms']:.3f} ms", file=sys.stderr)
    for half in halves:
        print_table(half, [row for row in rows if row["half"] == half])
    print(f"\n{'host, us a call on (1,8,8,8)':30} ours  nn.Conv2d  ratio")
    hosts = list(host_costs(device))
    for r in hosts:
        print(f"{r['what']:28} {r['ours_us']:6.1f}  {r['conv2d_us']:9.1f}  {r['ours_us'] / r['conv2d_us']:5.2f}")
    if file:
        Path(file).write_text(json.dumps({"about": about, "rows": rows, "host": hosts}, indent=1))


def run_test(name, seed):
    """("passed", "failed" or "skipped", a line that says so)"""
    global SEED
    SEED = seed
    start, outcome, why = time.perf_counter(), "passed", ""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            setup_function()
            globals()[name]()
        except unittest.SkipTest as e:
            outcome, why = "skipped", f" ({e})"
        except Exception:
            outcome, why = "failed", "\n" + printed.getvalue() + traceback.format_exc()
    return outcome, f"{time.perf_counter() - start:6.1f} s  {outcome:7} {name}{why}"


def main():
    global SEED
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", nargs="?", const="both", choices=["forward", "backward", "both"])
    parser.add_argument("--json", metavar="FILE", help="write the benchmark's numbers to FILE")
    parser.add_argument("--only", metavar="NAME,NAME", type=lambda names: re.compile("|".join(map(fnmatch.translate, names.split(",")))),
                        help="only these tests or workloads (* and ? as in a shell); also " + ", ".join(c.name for c in LARGE))
    parser.add_argument("--faults", action="store_true", help="the tests of disturbed first imports, instead")
    parser.add_argument("--fuzz", type=float, metavar="SECONDS", help="random cases, on the GPU if there is one")
    parser.add_argument("--seed", type=int, default=SEED, help="repeat a run")
    options = parser.parse_args()
    SEED = options.seed
    if options.bench:
        return bench(["forward", "backward"] if options.bench == "both" else [options.bench], options.only, options.json)
    if options.fuzz is not None:
        return bool(fuzz(options.fuzz, SEED))
    print(f"seed {SEED}, torch {torch.__version__}, devices:", "CPU,", ", ".join(
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "no GPU", flush=True)
    names = [n for n in globals() if n.startswith("fault_" if options.faults else "test_") and (not options.only or options.only.match(n))]
    outcomes = {"passed": 0, "failed": 0, "skipped": 0}
    # Tests use two threads. Those that are named run here, where a debugger or sanitizer is.
    processes = 1 if options.only or options.faults else max(1, min(os.cpu_count() // 8, 4))
    with concurrent.futures.ProcessPoolExecutor(processes, torch.multiprocessing.get_context("spawn")) as pool:
        for outcome, line in (map if processes == 1 else pool.map)(run_test, names, itertools.repeat(SEED)):
            outcomes[outcome] += 1
            print(line, flush=True)
    print(", ".join(f"{number} {outcome}" for outcome, number in outcomes.items()))
    return bool(outcomes["failed"]) or not any(outcomes.values())


if __name__ == "__main__":
    sys.exit(main())
