"""ModelNew: a depthwise (K x 1) convolution layer, in place of one held by nn.Conv2d.

The convolution is an operator of our own, written in C++ and CUDA (kernels/), compiled by
torch.utils.cpp_extension.load_inline at the first import and cached in TORCH_EXTENSIONS_DIR.

python model_new.py                  time the layer on the reference problem
python model_new.py --bundle FILE|-  write this file with the kernel sources inside it
"""
import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import logging
import operator
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time

import torch
import torch.nn as nn
from torch._appdirs import user_cache_dir as _user_cache_dir

_SOURCES = None  # {file name: text} in a bundle
_STARTED = time.perf_counter()


def _digest(*values):
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def _read_sources():
    """The kernel sources: a bundle's own, else from kernels/ beside this file, else from kernels/ in the working directory."""
    if _SOURCES:
        return _SOURCES
    own = os.path.abspath(globals().get("__file__", "model_new.py"))
    folders = list(dict.fromkeys(os.path.join(place, "kernels") for place in (os.path.dirname(own), os.getcwd())))
    for folder in folders:
        paths = [os.path.join(folder, name) for name in ("depthwise_kx1.cpp", "depthwise_kx1.cu")]
        if all(map(os.path.isfile, paths)):
            texts = [pathlib.Path(path).read_text(encoding="utf-8") for path in paths + [own] * os.path.isfile(own)]
            return dict(zip(("depthwise_kx1.cpp", "depthwise_kx1.cu", "digest of model_new.py"), texts[:2] + [_digest(texts[2:])]))
    raise FileNotFoundError(f"depthwise_kx1.cpp and .cu are not in {' or '.join(folders)}: keep model_new.py "
                            "beside its kernels/, or use the self-contained file that `python model_new.py --bundle FILE` writes")


def _find_toolkit():
    """(folder, version) of the CUDA toolkit, or (None, None). nvcc on PATH may be a wrapper that lies elsewhere: the headers decide."""
    nvcc = shutil.which("nvcc")
    beside = [os.path.dirname(os.path.dirname(path)) for path in (nvcc, os.path.realpath(nvcc))] if nvcc else []
    for home in [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *beside, "/usr/local/cuda"]:
        headers = home and [f"{home}/include/cuda.h", *glob.glob(f"{glob.escape(home)}/targets/*/include/cuda.h")]
        for header in filter(os.path.isfile, headers if home and os.path.isfile(f"{home}/bin/nvcc") else []):
            with open(header, errors="replace") as file:
                version = int(re.search(r"#define CUDA_VERSION (\d+)", file.read()).group(1))
            return home, f"{version // 1000}.{version % 1000 // 10}"
    return None, None


def _gpu_architectures():
    """nvcc flags for the GPUs of this host, asked of the driver's management library where there is one:
    to ask torch would initialise CUDA, which is slow and forbids a later fork."""
    if torch.cuda._raw_device_count_nvml() < 0:
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    else:
        nvml, device, major, minor = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        found = set()
        nvml.nvmlInit_v2()
        for i in range(torch.cuda._raw_device_count_nvml()):
            nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(device))
            nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
            found.add((major.value, minor.value))
    return [f"-gencode=arch=compute_{a}{b},code=sm_{a}{b}" for a, b in sorted(found)]


def _plan_cuda():
    """(toolkit folder, its version, nvcc's architecture flags, None), or what is missing for CUDA kernels as the last of the four."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    home, version = _find_toolkit()
    missing = None
    if torch.version.cuda is None:
        missing = "this torch is not a CUDA build: install one that is (https://pytorch.org)"
    elif not listed and torch.cuda.device_count() == 0:
        missing = "no GPU was visible: make one visible, or set TORCH_CUDA_ARCH_LIST to build ahead"
    elif home is None:
        missing = (f"no CUDA toolkit (bin/nvcc and include/cuda.h) was found at CUDA_HOME, around nvcc on PATH or in /usr/local/cuda: "
                   f"install that of CUDA {torch.version.cuda}, or set CUDA_HOME to it")
    elif version.split(".")[0] != torch.version.cuda.split(".")[0]:
        missing = (f"the CUDA toolkit in {home} is {version} but torch's CUDA is {torch.version.cuda}: "
                   f"install a toolkit of the same major version and set CUDA_HOME to it")
    if missing:
        return None, None, [], missing
    return home, version, [] if listed else _gpu_architectures(), None  # torch itself turns TORCH_CUDA_ARCH_LIST into flags


class _Explain:
    """Turns an OSError while building into one that says what to do."""
    def __init__(self, root):
        self.root = root

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError) and error.errno:
            raise RuntimeError(f"cannot build in the extensions directory {self.root} ({error}): "
                               "set TORCH_EXTENSIONS_DIR to a folder that can be written and has room") from error


def _build(library, **options):
    """Builds in a fresh folder, loads, and moves the result to its final name in one step, so that no half-written library
    is ever seen; false if another process has just done so. One process builds at a time; the system frees the lock of one that dies,
    the next clears what it left and ends its compilers, which would take the processors from its own."""
    root, name = os.path.dirname(library), os.path.splitext(os.path.basename(library))[0]
    with _Explain(root):
        os.makedirs(root, exist_ok=True)
        with open(f"{root}/{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.exists(library):
                return False
            for stale in glob.glob(glob.escape(f"{root}/{name}.build") + "*"):
                for working in glob.glob("/proc/[0-9]*/cwd"):
                    with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                        if os.readlink(working) == os.path.realpath(stale):
                            os.kill(int(working.split("/")[2]), signal.SIGTERM)
                shutil.rmtree(stale, ignore_errors=True)
            if shutil.disk_usage(root).free < 32 << 20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with tempfile.TemporaryDirectory(prefix=f"{name}.build", dir=root, ignore_cleanup_errors=True) as folder:
                _compile(name, folder, **options)
                os.replace(glob.glob(glob.escape(folder) + "/*.so")[0], f"{root}/{name}.built")
            os.replace(f"{root}/{name}.built", library)
    return True


def _compile(name, folder, sources, cflags, cuda_flags, cuda_home):
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])  # pip's ninja, environment not activated
    if not shutil.which("ninja", path=path):
        raise RuntimeError("building the kernels needs ninja, which is not on PATH: pip install ninja")
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler.split()[0]):
        raise RuntimeError(f"building the kernels needs a C++ compiler, and {compiler!r} is not on PATH: install g++, or set CXX")
    print(f"model_new: building {'CUDA and CPU' if cuda_home else 'CPU'} kernels in {os.path.dirname(folder)}, once", file=sys.stderr, flush=True)

    from unittest.mock import patch
    with patch.object(logging.getLogger("torch.utils.cpp_extension"), "disabled", True):  # where it finds no GPU, it says so
        from torch.utils import cpp_extension
    # load_inline makes one file of all C++ and one of all CUDA; the others, of even length, are compiled beside them, in a third of the time.
    (shared, cpu, *types, operators), (kernels, plans, launchers, first, *more) = (
        re.split("// ---- end of .* ----\n", sources[name]) for name in ("depthwise_kx1.cpp", "depthwise_kx1.cu"))
    others = {f"{i}.cu": shared + kernels + launchers + part for i, part in enumerate(more) if cuda_home}
    others |= {f"cpu{i}.cpp": shared + cpu + part for i, part in enumerate(types)}
    for file, text in others.items():
        with open(f"{folder}/{file}", "w", encoding="utf-8") as file:
            file.write(text)

    jit_compile = cpp_extension._jit_compile

    def with_others(name, files, *rest, **options):
        return jit_compile(name, [*files, *(f"{folder}/{file}" for file in others)], *rest, **options)

    with patch.dict(os.environ, PATH=path), patch.multiple(cpp_extension, CUDA_HOME=cuda_home, _jit_compile=with_others):
        cpp_extension.load_inline(name, shared + operators, shared + kernels + plans + launchers + first if cuda_home else None, extra_cflags=cflags,
                                  extra_cuda_cflags=cuda_flags, build_directory=folder, is_python_module=False, no_implicit_headers=True)


def _load():
    """The operators' namespace, built and loaded if this process has not got it yet."""
    sources = _read_sources()
    namespace = f"depthwise_kx1_{_digest(sorted(sources.items()))}"
    ops = getattr(torch.ops, namespace)
    if hasattr(ops, "forward"):  # another copy of this file came first
        return ops
    cuda_home, cuda_version, architectures, missing = _plan_cuda()
    # GCC collects its garbage later: half a second of the operators' file, for 160 MB.
    cflags = ["-O1", "--param=ggc-min-heapsize=500000", f"-DDEPTHWISE_KX1_NAMESPACE={namespace}"] + ["-DWITH_CUDA"] * bool(cuda_home)
    cuda_flags = ["-std=c++20", "-Xcompiler=-O1", *architectures]
    root = os.path.abspath(os.environ.get("TORCH_EXTENSIONS_DIR") or _user_cache_dir("torch_extensions"))
    library = os.path.join(root, namespace + "_" + _digest(
        torch.__version__, torch.version.git_version, torch.version.cuda, sys.implementation.cache_tag, os.uname().machine,
        cflags, cuda_version, cuda_flags, cuda_home and os.environ.get("TORCH_CUDA_ARCH_LIST")) + ".so")
    if os.path.exists(library) or not _build(library, sources=sources, cflags=cflags, cuda_flags=cuda_flags, cuda_home=cuda_home):
        torch.ops.load_library(library)
    _register(ops, namespace, missing)
    make = getattr(ctypes.PyDLL(library), "depthwise_kx1_eager", None)  # no Python.h, no such function
    if make:
        make.restype = ctypes.py_object
    ops._eager = make and make() or (lambda *_: None)
    return ops


def _register(ops, namespace, missing):
    """The operators but for their kernels, once per namespace. Both are bilinear: every derivative is again one of the two."""
    library = torch.library.Library(namespace, "DEF")
    arguments = "Tensor x, Tensor weight, {}int[2] stride, int[4] padding, int dilation"
    library.define("forward(" + arguments.format("Tensor? bias, ") + ") -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    library.define("backward(Tensor grad_output, " + arguments.format("") + ", bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
                   tags=torch.Tag.pt2_compliant_tag)
    forward, backward = ops.forward.default, ops.backward.default
    from torch._functorch.utils import enable_single_level_autograd_function

    # Shapes, for tensors without data. Real ones are checked by the kernels.
    def check(good, message):
        torch._check(good, lambda: message)

    def memory_format(x, weight):
        last = any(torch._prims_common.suggest_memory_format(t) == torch.channels_last for t in (x, weight))
        return torch.channels_last if last and not (x.is_cuda and x.dtype == torch.float64) else torch.contiguous_format

    def fake_forward(x, weight, bias, stride, padding, dilation):
        check(x.dim() == 4, f"Expected x to be 3D (C, H, W) or 4D (N, C, H, W), but got x of size: {list(x.shape)}")
        for name, t in ("weight", weight), ("bias", x if bias is None else bias):
            check(t.dtype == x.dtype and t.device == x.device, f"Expected x and {name} to have the same dtype and device, but got x of "
                  f"{x.dtype} on {x.device} and {name} of {t.dtype} on {t.device}")
        (N, C, H, W), K = x.shape, weight.shape[2]
        check(C == weight.shape[0], f"Given weight of size {list(weight.shape)}, expected x{list(x.shape)} to have {weight.shape[0]} channels, "
              f"but got {C} channels instead")
        reach = (K - 1) * dilation + 1
        H_out, W_out = (H + padding[2] + padding[3] - reach) // stride[0] + 1, (W + padding[0] + padding[1] - 1) // stride[1] + 1
        check(H + padding[2] + padding[3] >= reach, f"Kernel size ({reach} x 1), dilated, can't be greater than padded input size {H} + {padding[2:]}")
        return torch.empty((N, C, H_out, W_out), dtype=x.dtype, device=x.device, memory_format=memory_format(x, weight))

    def fake_backward(grad_output, x, weight, stride, padding, dilation, mask):
        return (torch.empty_like(x, memory_format=memory_format(x, weight)) if mask[0] else None,
                torch.empty_like(weight, memory_format=torch.contiguous_format) if mask[1] else None,
                weight.new_empty(weight.shape[:1]) if mask[2] else None)

    def lower(op, *arguments):
        """The operator below autograd. Where torch.func is nested, its levels below this one differentiate, too."""
        with torch._C._AutoDispatchBelowAutograd():
            if not torch._C._are_functorch_transforms_active():
                return op(*arguments)
            with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
                return op(*arguments)

    def keep(ctx, tensors, parameters):
        ctx.parameters = parameters
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    # Single-level: torch.autograd.Function would ask torch.func again, but the dispatcher comes here once for each of its levels.
    class Forward(torch.autograd.function._SingleLevelFunction):
        _compiled_autograd_key = torch.autograd.Function.__dict__["_compiled_autograd_key"]  # all that is missed of Function

        @staticmethod
        def forward(ctx, x, weight, bias, *parameters):
            keep(ctx, (x, weight), parameters)
            return lower(forward, x, weight, bias, *parameters)

        @staticmethod
        def backward(ctx, grad_output):
            if grad_output is None:
                return (None,) * 6
            again = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()  # to be differentiated itself
            arguments = grad_output, *ctx.saved_tensors, *ctx.parameters, ctx.needs_input_grad[:3]
            return *(backward(*arguments) if again else lower(backward, *arguments)), None, None, None

        @staticmethod
        def jvp(ctx, dx, dweight, dbias, *_):
            return change(*ctx.saved_tensors, dx, dweight, dbias, ctx.parameters)

    def change(x, weight, dx, dweight, dbias, parameters):
        """Of forward's result, when its arguments change so; None is zero."""
        by_x = None if dx is None else forward(dx, weight, None, *parameters)
        if dweight is None and dbias is None:
            return by_x
        by_weight = forward(x, torch.zeros_like(weight) if dweight is None else dweight, dbias, *parameters)
        return by_weight if by_x is None else by_x + by_weight

    class Backward(torch.autograd.function._SingleLevelFunction):
        _compiled_autograd_key = Forward._compiled_autograd_key

        @staticmethod
        def forward(ctx, grad_output, x, weight, *parameters):
            keep(ctx, (grad_output, x, weight), parameters)
            return lower(backward, grad_output, x, weight, *parameters)

        @staticmethod
        def backward(ctx, dx, dweight, dbias):
            (grad_output, x, weight), parameters, needs = ctx.saved_tensors, ctx.parameters[:3], ctx.needs_input_grad
            return (change(x, weight, dx, dweight, dbias, parameters) if needs[0] else None,
                    backward(grad_output, x, dweight, *parameters, (True, False, False))[0] if needs[1] and dweight is not None else None,
                    backward(grad_output, dx, weight, *parameters, (False, True, False))[1] if needs[2] and dx is not None else None,
                    None, None, None, None)

        @staticmethod
        def jvp(ctx, dg, dx, dweight, *_):
            (g, x, weight), (*parameters, mask) = ctx.saved_tensors, ctx.parameters
            changes = [None] * 3 if dg is None else list(backward(dg, x, weight, *parameters, mask))
            for i, d, arguments in (0, dweight, (g, x, dweight)), (1, dx, (g, dx, weight)):
                if mask[i] and d is not None:
                    by_d = backward(*arguments, *parameters, [k == i for k in range(3)])[i]
                    changes[i] = by_d if changes[i] is None else changes[i] + by_d
            return tuple(changes)

    def autograd(apply):
        def kernel(*arguments):
            with enable_single_level_autograd_function():
                return apply(*arguments)
        return kernel

    def autocast(x, weight, bias, *parameters):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, weight, bias))
        with torch._C._ExcludeDispatchKeyGuard(autocast_keys):
            return forward(x, weight, bias, *parameters)

    def refuse(*_):
        raise RuntimeError(f"model_new was imported without CUDA kernels, because {missing}; then import it in a new process")

    # torch.vmap
    def fold(x, dim, size, channels):
        """A tensor whose vmapped dimension (`size` copies if it has none) is folded into its channels."""
        x = x.expand(size, *x.shape).movedim(0, channels - 1) if dim is None else x.movedim(dim, channels - 1)
        return x.flatten(channels - 1, channels)

    def unfold(y, size, channels):
        return (None, None) if y is None else (y.unflatten(channels, (size, y.shape[channels] // size)), y.dim() + channels)

    def vmap_forward(info, dims, x, weight, bias, *parameters):
        size = info.batch_size
        if dims[1] is None and dims[2] is None:  # a larger batch will do
            x = x.movedim(dims[0], 0)
            return forward(x.flatten(0, 1), weight, bias, *parameters).unflatten(0, x.shape[:2]), 0
        bias = None if bias is None else fold(bias, dims[2], size, -1)
        return unfold(forward(fold(x, dims[0], size, -3), fold(weight, dims[1], size, -4), bias, *parameters), size, -3)

    def vmap_backward(info, dims, *arguments):
        size = info.batch_size
        folded = [fold(t, dim, size, at) for t, dim, at in zip(arguments, dims, (-3, -3, -4))]
        grads = backward(*folded, *arguments[3:])
        return tuple(zip(*(unfold(t, size, at) for t, at in zip(grads, (-3, -4, -1)))))

    autocast_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)
    for name, fake, vmap, function in ("forward", fake_forward, vmap_forward, Forward), ("backward", fake_backward, vmap_backward, Backward):
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        torch.library.register_vmap(f"{namespace}::{name}", vmap, lib=library)
        library.impl(name, autograd(function.apply), "Autograd")
        if missing:
            library.impl(name, refuse, "CUDA")
    for key in "AutocastCPU", "AutocastCUDA":
        library.impl("forward", autocast, key)
    ops._registered, ops._has_cuda = library, missing is None  # live as long as the namespace


_ops = _load()
_has_cuda, _eager, _is_compiling = _ops._has_cuda, _ops._eager, torch.compiler.is_dynamo_compiling


def _ints(name, value, least, length, error=RuntimeError):
    """`value`, an int or a tuple of one or `length` ints, as a tuple of `length` ints."""
    values = tuple(value) if isinstance(value, (tuple, list)) and length > 1 else (value,)
    expected = f"an int{f' or a tuple of {length} ints' if length > 1 else ''}, at least {least}"
    if not all(hasattr(v, "__index__") and not isinstance(v, bool) for v in values):
        raise TypeError(f"expected {name} to be {expected}, but got {name}={value!r}")
    if len(values) not in (1, length) or min(values) < least:
        raise error(f"expected {name} to be {expected}, but got {name}={value!r}")
    return tuple(map(operator.index, values)) * (length // len(values))


class _Conv2d(nn.Conv2d):
    """An nn.Conv2d of a (K x 1) kernel, a channel a group, computed by our operator. Its parameters, hooks, stride, padding and
    dilation may be changed as any nn.Conv2d's."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._geometry = self._read_geometry()

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name in ("stride", "padding", "dilation", "padding_mode") and "_geometry" in self.__dict__:
            self._geometry = self._read_geometry()

    def _get_name(self):
        return "Conv2d"  # for repr

    def _read_geometry(self):
        """The operator's arguments stride, padding and dilation."""
        if self.padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', but got {self.padding_mode!r}")
        dilation, padding = _ints("dilation", self.dilation, 1, 2)[0], self.padding
        rows = (self.kernel_size[0] - 1) * dilation if padding == "same" else 0  # an odd one at the end
        top, left = (rows // 2, 0) if padding in ("same", "valid") else _ints("padding", padding, 0, 2)
        return _ints("stride", self.stride, 1, 2), (left, left, top, max(top, rows - top)), dilation

    def forward(self, x):
        if not _is_compiling():
            y = _eager(x, self._parameters, self._geometry)
            if y is not None:
                return y
        if not hasattr(x, "__torch_function__"):  # torch.fx's stand-in for a Tensor has it, too
            raise TypeError(f"expected x to be a Tensor, but got {type(x).__name__}")
        if isinstance(x, torch.Tensor) and x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return _ops.forward.default(x, self.weight, self.bias, *self._geometry)


class ModelNew(nn.Module):
    """Depthwise (kernel_size x 1) convolution, y = Model(...)(x), with nn.Conv2d's arguments, parameters and results.

    x is (N, C, H, W) or (C, H, W), of float32, float64, float16 or bfloat16, on the CPU or a GPU.
    """

    def __init__(self, in_channels, kernel_size, stride=1, padding=0, dilation=1, bias=False):
        super().__init__()
        _ints("in_channels", in_channels, 1, 1, ValueError)
        _ints("kernel_size", kernel_size, 1, 1)
        _ints("stride", stride, 1, 2)  # also by _Conv2d, but these messages show what was given
        if not isinstance(padding, str):
            _ints("padding", padding, 0, 2)
        self.conv2d = _Conv2d(in_channels, in_channels, (kernel_size, 1), stride, padding, _ints("dilation", dilation, 1, 2),
                              groups=in_channels, bias=bias)

    def forward(self, x):
        conv2d = self._modules["conv2d"]
        if not _is_compiling() and type(conv2d) is _Conv2d:
            its = conv2d.__dict__
            if not (its["_forward_pre_hooks"] or its["_forward_hooks"] or its["_backward_pre_hooks"] or its["_backward_hooks"] or "forward" in its):
                y = _eager(x, its["_parameters"], its["_geometry"])  # as conv2d(x), but microseconds faster
                if y is not None:
                    return y
        return conv2d(x)


def _bundle():
    """This file's text with the kernel sources inside it."""
    text = pathlib.Path(__file__).read_text(encoding="utf-8")
    literal = "".join(f"    {name!r}: r'''{source}''',\n" for name, source in _read_sources().items())
    return text.replace("\n_SOURCES = None", "\n_SOURCES = {\n" + literal + "}", 1)


def _median_ms(function, device, repeats):
    """Median time of a call: on a GPU between events, so that the host's part is hidden as it is in real use."""
    times = []
    for i in range(repeats + 3):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(); function(); end.record(); end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start = time.perf_counter(); function()
            times.append((time.perf_counter() - start) * 1e3)
    return sorted(times[3:])[repeats // 2]


def _main(arguments):
    if arguments:
        if len(arguments) != 2 or arguments[0] != "--bundle":
            sys.exit("usage: python model_new.py [--bundle FILE|-]")
        if arguments[1] == "-":
            sys.stdout.write(_bundle())
        else:
            with open(arguments[1], "w", encoding="utf-8") as file:
                file.write(_bundle())
        return
    device = "cuda" if torch.cuda.is_available() and _has_cuda else "cpu"
    torch.manual_seed(0)
    model = ModelNew(8, 3).to(device)
    x = torch.rand(64 if device == "cuda" else 8, 8, 512, 512, device=device)
    with torch.no_grad():
        y = model(x)
        copy = torch.empty((x.numel() + y.numel()) // 2, device=device)  # reads and writes as much as the layer
        source = torch.rand_like(copy)
        ms, copy_ms = (_median_ms(f, device, 50) for f in (lambda: model(x), lambda: copy.copy_(source)))
        weight = model.conv2d.weight.double()
        error = max((sum(weight[:, :, k] * image.double()[:, k:k + y.shape[2]] for k in range(3)) - out).abs().max().item()
                    for image, out in zip(x, y))
    gigabytes = (x.numel() + y.numel()) * x.element_size() / 1e9
    for label, value in {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "build or load": f"{_READY:.2f} s",
        "problem": f"{tuple(x.shape)} -> {tuple(y.shape)}, K=3, {x.dtype}",
        "time": f"{ms:.3f} ms (median of 50)",
        "rate": f"{gigabytes / ms * 1e3:.0f} GB/s, {copy_ms / ms:.2f} of a plain copy's",
        "largest error": f"{error:.1e} against float64",
    }.items():
        print(f"{label:14} {value}")


_READY = time.perf_counter() - _STARTED
if __name__ == "__main__" and os.path.abspath(_main.__code__.co_filename) == os.path.abspath(sys.argv[0]):
    _main(sys.argv[1:])
