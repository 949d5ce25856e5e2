"""Mutants that change nothing a test could notice, each with the reason; read by mutants.py."""

_BOUND = "a bound against misuse, far above what is in use: one more, or twice it, is as good"
VERDICT, LOCKS, MANIFEST, RESTORE, ATOMIC_IO, CHECKPOINT = (
    "training.rl.verdict",
    "training.runtime.locks",
    "training.runtime.manifest",
    "training.runtime.restore",
    "training.runtime.atomic_io",
    "training.runtime.checkpoint",
)
SNAPSHOT = "training.runtime.snapshot"
_READ_LOOP = (
    "while size < limit and (part := ops.read(descriptor, min(CHUNK_BYTES, limit - size))):"
)
_IMPORT = "of the import: a module is loaded that only a Mac uses"
_NO_BINARY = "there is no O_BINARY here, and "
_CONSTANT = "if task.num_cases == 1 or not all(values_equal(expected[0], one) for one in expected):"
_LIMIT = "MANIFEST_LIMIT_BYTES = 4 * 2**20"

# (module, line, change): reason
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (VERDICT, "DRAWS = 16", "16 plus 1"): _BOUND,
    (
        VERDICT,
        "LENGTH_FACTOR = 4  # the encodings of two floats that are nearly equal differ by a factor "
        "of 3",
        "4 plus 1",
    ): _BOUND,
    (VERDICT, "SHORT_LINE_BYTES = 256", "256 plus 1"): _BOUND,
    (
        VERDICT,
        "if len(line) > LENGTH_FACTOR * len(json.dumps(encode(expected))) + SHORT_LINE_BYTES:",
        "Gt -> GtE",
    ): _BOUND,
    (VERDICT, _CONSTANT, "0 plus 1"): "all are equal to the first if all are to the second",
    (LOCKS, "OWNER_LIMIT_BYTES = 2**16", "2 plus 1"): _BOUND,
    (LOCKS, "OWNER_LIMIT_BYTES = 2**16", "16 plus 1"): _BOUND,
    (MANIFEST, _LIMIT, "4 plus 1"): _BOUND,
    (MANIFEST, _LIMIT, "2 plus 1"): _BOUND,
    (MANIFEST, _LIMIT, "20 plus 1"): _BOUND,
    (RESTORE, "SCANS = 5", "5 plus 1"): _BOUND,
    (
        MANIFEST,
        "size, sha256 = hash_file(ops, directory / name, limit=record.size + 1)",
        "1 plus 1",
    ): "a file that is longer by one byte or more is told by its size either way",
    (
        RESTORE,
        "if found.verdict is Verdict.VALID and found.manifest is not None:",
        "and -> or",
    ): "without a fingerprint to compare, a manifest comes with VALID and with nothing else",
    (ATOMIC_IO, "CHUNK_BYTES = 4 * 2**20", "4 plus 1"): "how much is asked for at once",
    (ATOMIC_IO, "CHUNK_BYTES = 4 * 2**20", "2 plus 1"): "how much is asked for at once",
    (ATOMIC_IO, "CHUNK_BYTES = 4 * 2**20", "20 plus 1"): "how much is asked for at once",
    (ATOMIC_IO, _READ_LOOP, "Lt -> LtE"): "at the limit 0 bytes are asked for, which end the loop",
    (
        ATOMIC_IO,
        '_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)',
        "0 plus 1",
    ): f"{_NO_BINARY}1 is O_WRONLY, which is set",
    (
        ATOMIC_IO,
        '_READ_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0)',
        "BitOr -> BitAnd",
    ): f"{_NO_BINARY}O_RDONLY is 0 as well",
    (CHECKPOINT, "MAX_REVISIONS = 10_000", "10000 plus 1"): _BOUND,
    (
        RESTORE,
        "super().__init__(message)",
        "left out: super().__init__(message)",
    ): "an exception keeps its message when it is made, before that call",
    (
        ATOMIC_IO,
        'if sys.platform == "darwin":',
        "condition negated: sys.platform == 'darwin'",
    ): _IMPORT,
    (ATOMIC_IO, 'if sys.platform == "darwin":', "Eq -> NotEq"): _IMPORT,
    (
        CHECKPOINT,
        "make_dirs(self._ops, self.directory)",
        "left out: make_dirs(self._ops, self.directory)",
    ): "the lock makes its directory itself; this one lets tests see the order of calls",
    (RESTORE, "continue", "left out: continue"): "the loop's body ends there",
    (
        SNAPSHOT,
        'return json.dumps(plain, allow_nan=False, separators=(",", ":")).encode()',
        "False -> True",
    ): "split_state has put what is not finite into words already",
    (
        VERDICT,
        "if not (math.isfinite(expected) and math.isfinite(actual)):",
        "and -> or",
    ): "math.isclose says the same where one of the two is not finite",
    (
        CHECKPOINT,
        'self._executor = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")',
        "1 plus 1",
    ): "one save is under way at most",
    (CHECKPOINT, "self._last_bytes = 0", "0 plus 1"): "any state is larger than a byte",
}
