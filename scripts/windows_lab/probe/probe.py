"""A small program that needs what eco_train.exe needs of Triton, and nothing of torch.

Frozen once whole and once for each way of leaving something out, it shows what each part of the
recipe is for. `probe ACTION`: kernel, stub, worker, text; `probe ACTION unprepared` does the same
without prepare_frozen, in its worker too.
"""

import multiprocessing
import os
import secrets
import sys

from training.runtime.frozen import prepare_frozen

UNPREPARED = "SIGMA_PROBE_UNPREPARED"
STUB = """\
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "probe_stub", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_probe_stub(void) { return PyModule_Create(&definition); }
"""


def kernel() -> str:
    """Compile the kernel to machine code for sm_80."""
    import triton  # pyright: ignore[reportMissingImports]
    from probe_kernel import doubling_kernel  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "length": "i64", "BLOCK": "constexpr"}
    source = ASTSource(fn=doubling_kernel, signature=signature, constexprs={(3,): 128})
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    return f"cubin of {len(compiled.asm['cubin'])} bytes"


def stub() -> str:
    """Compile and load a C extension as Triton does for a kernel's launcher, never from a cache."""
    from triton.runtime.build import (  # pyright: ignore[reportMissingImports]
        compile_module_from_src,
    )

    source = f"/* {secrets.token_hex(8)} */\n{STUB}"
    return f"loaded {compile_module_from_src(source, 'probe_stub').__name__}"


def worker() -> str:
    """Have a spawned process answer."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=answers.put, args=("worker answered",), daemon=True)
    process.start()
    process.join(120)
    if process.exitcode != 0:
        raise RuntimeError(f"the worker ended with {process.exitcode}")
    return answers.get()


def text() -> str:
    """A character that few code pages have."""
    return "λ"


ACTIONS = {"kernel": kernel, "stub": stub, "worker": worker, "text": text}

if __name__ == "__main__":
    if sys.argv[-1] == "unprepared":
        os.environ[UNPREPARED] = "1"
    if UNPREPARED not in os.environ:
        prepare_frozen()
    print(ACTIONS[sys.argv[1]]())
