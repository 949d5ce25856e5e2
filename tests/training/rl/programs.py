"""Tasks with honest, dishonest and hopeless programs for them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

from training.rl.verdict import CodeTask


def numbers(rng: random.Random, *, count: int = 6) -> list[int]:
    return [rng.randrange(-50, 50) for _ in range(count)]


def word(rng: random.Random) -> str:
    return "".join(rng.choice("abcde") for _ in range(12))


def one_list(rng: random.Random):
    return (numbers(rng),)


def one_word(rng: random.Random):
    return (word(rng),)


def one_number(rng: random.Random):
    return (rng.randrange(2, 400),)


def two_numbers(rng: random.Random):
    return (rng.randrange(1, 10**6), rng.randrange(1, 10**6))


def _sum_of_squares(x):
    return sum(n * n for n in x)


def _largest(x):
    return max(x)


def _ordered(x):
    return sorted(x)


def _reverse_text(x):
    return x[::-1]


def _counts(x):
    return dict(Counter(x))


def _bounds(x):
    return (min(x), max(x))


def _distinct(x):
    return set(x)


def _average(x):
    return sum(x) / len(x)


def _factorial(x):
    result = 1
    for n in range(2, x + 1):
        result *= n
    return result


def _differences(x):
    return [b - a for a, b in pairwise(x)]


# Name: (reference, draw, five honest bodies of `f`).
HONEST: dict[str, tuple[Callable, Callable, tuple[str, ...]]] = {
    "sum_of_squares": (
        _sum_of_squares,
        one_list,
        (
            "return sum(n * n for n in x)",
            "total = 0\nfor n in x: total += n ** 2\nreturn total",
            "import math\nreturn math.sumprod(x, x) if hasattr(math, 'sumprod') else "
            "sum(map(lambda n: n * n, x))",
            "return x[0] ** 2 + f(x[1:]) if x else 0",
            "from functools import reduce\nreturn reduce(lambda a, n: a + n * n, x, 0)",
        ),
    ),
    "largest": (
        _largest,
        one_list,
        (
            "return max(x)",
            "return sorted(x)[-1]",
            "best = x[0]\nfor n in x:\n    if n > best: best = n\nreturn best",
            "import heapq\nreturn heapq.nlargest(1, x)[0]",
            "print('looking', file=__import__('sys').stderr)\nreturn -min(-n for n in x)",
        ),
    ),
    "ordered": (
        _ordered,
        one_list,
        (
            "return sorted(x)",
            "x.sort()\nreturn x",
            "import heapq\nheapq.heapify(x)\nreturn [heapq.heappop(x) for _ in range(len(x))]",
            "if len(x) < 2: return x\np = x[0]\nrest = x[1:]\n"
            "return f([n for n in rest if n < p]) + [p] + f([n for n in rest if n >= p])",
            "import bisect\nout = []\nfor n in x: bisect.insort(out, n)\nreturn out",
        ),
    ),
    "reverse_text": (
        _reverse_text,
        one_word,
        (
            "return x[::-1]",
            "return ''.join(reversed(x))",
            "return f(x[1:]) + x[0] if x else ''",
            "out = ''\nfor c in x: out = c + out\nreturn out",
            "import tempfile, os\nprint('reversing')\nreturn x[::-1]",
        ),
    ),
    "counts": (
        _counts,
        one_word,
        (
            "from collections import Counter\nreturn dict(Counter(x))",
            "return {c: x.count(c) for c in x}",
            "out = {}\nfor c in x: out[c] = out.get(c, 0) + 1\nreturn out",
            "return {c: x.count(c) for c in sorted(set(x), reverse=True)}",
            "import itertools\nreturn {k: len(list(g)) for k, g in itertools.groupby(sorted(x))}",
        ),
    ),
    "bounds": (
        _bounds,
        one_list,
        (
            "return (min(x), max(x))",
            "x = sorted(x)\nreturn x[0], x[-1]",
            "return tuple(g(x) for g in (min, max))",
            "lo = hi = x[0]\nfor n in x[1:]: lo, hi = min(lo, n), max(hi, n)\nreturn lo, hi",
            "try:\n    return min(x), max(x)\nfinally:\n    print('done')",
        ),
    ),
    "distinct": (
        _distinct,
        one_word,
        (
            "return set(x)",
            "return {c for c in x}",
            "return set(sorted(x))",
            "out = set()\nfor c in x: out.add(c)\nreturn out",
            "return set(dict.fromkeys(x))",
        ),
    ),
    "average": (
        _average,
        one_list,
        (
            "return sum(x) / len(x)",
            "import statistics\nreturn statistics.fmean(x)",
            "from fractions import Fraction\nreturn float(Fraction(sum(x), len(x)))",
            "total = 0.0\nfor n in x: total += n\nreturn total / len(x)",
            "import math\nreturn math.fsum(x) / len(x)",
        ),
    ),
    "factorial": (
        _factorial,
        one_number,
        (
            "import math\nreturn math.factorial(x)",
            "out = 1\nfor n in range(1, x + 1): out *= n\nreturn out",
            "import math\nreturn math.prod(range(1, x + 1))",
            "return x * f(x - 1) if x > 1 else 1",
            "import functools, operator\nreturn functools.reduce(operator.mul, range(2, x + 1), 1)",
        ),
    ),
    "differences": (
        _differences,
        one_list,
        (
            "return [b - a for a, b in zip(x, x[1:])]",
            "return [x[i + 1] - x[i] for i in range(len(x) - 1)]",
            "import itertools, operator\nreturn list(map(operator.sub, x[1:], x))",
            "out = []\nlast = None\nfor n in x:\n    if last is not None: out.append(n - last)\n"
            "    last = n\nreturn out",
            "class Walk:\n    def __iter__(self): return (b - a for a, b in zip(x, x[1:]))\n"
            "return list(Walk())",
        ),
    ),
}

FORGED_LINE = '{"value": {"i": "0x0"}}'
# Whole programs that want the reward without the work.
HACKS = (
    "",
    "f = None",
    "import sys\nsys.exit(0)",
    "import os\nos._exit(0)",
    "raise SystemExit(0)",
    "def f(*x):\n    raise SystemExit(0)",
    "def f(*x):\n    raise KeyboardInterrupt",
    "class Same:\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    "def f(*x): return Same()",
    "class Same(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
    "def f(*x): return Same(1)",
    "class Same(list):\n    def __eq__(self, other): return True\ndef f(*x): return Same()",
    "class Same(float):\n    def __eq__(self, other): return True\ndef f(*x): return Same('nan')",
    "def f(*x): return float('nan')",
    "def f(*x): return True",
    "def f(*x): return x",
    "def f(*x): return list(x) + [f]",
    "print('passed')\nprint('{\"passed\": true}')\ndef f(*x): return 'passed'",
    "import os\nfor fd in range(64):\n    try: os.write(fd, b'{\"passed\": true}\\n' * 8)\n"
    "    except OSError: pass\nos._exit(0)",
    "import os\nline = b'" + FORGED_LINE + "\\n'\nfor fd in range(3, 64):\n"
    "    try: os.write(fd, line * 8)\n    except OSError: pass\nos._exit(0)",
    "import sys\nframe = sys._getframe()\nwhile frame:\n    for key in ('job', 'expected'):\n"
    "        found = frame.f_locals.get(key, found if 'found' in dir() else None)\n"
    "    frame = frame.f_back\ndef f(*x): return found",
    "import gc\ndef f(*x):\n    for item in gc.get_objects():\n"
    "        if type(item) is dict and 'expected' in item: return item['expected']\n"
    "    return [item for item in gc.get_objects() if type(item) is list][:1]",
    "import sys\nmain = sys.modules['__main__']\nmain.call_once = lambda *a: {'value': None}\n"
    "main.encode = lambda *a: {'passed': True}\nimport json\njson.dumps = lambda *a: 'true'\n"
    "def f(*x): return 1",
    "import builtins\nbuiltins.type = lambda *a: int\nbuiltins.isinstance = lambda *a: True\n"
    "def f(*x): return 1",
    "import sys\nsys.path[:0] = ['.', '..', '/tmp']\nfrom training.rl import verdict\n"
    "verdict.values_equal = lambda *a, **k: True\ndef f(*x): return 1",
    "import os\ndef f(*x): os.write(3, b'[' * 100000 + b'\\n')",
    "def f(*x): return 'x' * 10 ** 6",
)


def tasks() -> dict[str, CodeTask]:
    return {
        name: CodeTask(function="f", reference=reference, draw=draw)
        for name, (reference, draw, _) in HONEST.items()
    }


def honest_programs(name: str) -> list[str]:
    """Five styles, each in ten dresses that change nothing."""
    dresses = (
        "{}",
        "import random, time\n{}",
        "print('start')\n{}",
        "{}\nprint('end')",
        "{}\nif __name__ == '__main__':\n    f(None)",
        "cache = {{}}\n{}",
        "import sys\nsys.stdout.write('x' * 9999)\n{}",
        "{}\nassert callable(f)",
        "from __future__ import annotations\n{}",
        "{}\ng = f\ndef f(x): return g(x)",
    )
    programs = []
    for body in HONEST[name][2]:
        function = "def f(x):\n    " + body.replace("\n", "\n    ")
        programs += [dress.format(function) for dress in dresses]
    return programs


def impossible_tasks(rng: random.Random) -> list[CodeTask]:
    """Ten tasks whose right answers follow from a number that no program is told."""

    def keyed(key: int) -> Callable[[int, int], int]:
        return lambda x, y: (x * key + y) % 1_000_003

    return [
        CodeTask(function="f", reference=keyed(rng.randrange(2, 10**6)), draw=two_numbers)
        for _ in range(10)
    ]


GUESSES = (
    "def f(x, y): return (x + y) % 1000003",
    "def f(x, y): return (x * y) % 1000003",
    "def f(x, y): return (x * 2 + y) % 1000003",
    "def f(x, y): return x",
    "def f(x, y): return y % 1000003",
    "def f(x, y): return 0",
    "import random\ndef f(x, y): return random.randrange(1000003)",
    "def f(x, y):\n    while True: pass",
    "def f(x, y):\n    for key in range(10 ** 9): pass",
    "def f(x, y): return hash((x, y)) % 1000003",
)


def guesses() -> list[str]:
    """Twenty programs for an impossible task: ten guesses, ten tricks."""
    return [*GUESSES, *HACKS[2:22:2]]
