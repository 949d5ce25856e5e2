"""Stream a split with the `datasets` library; the argument is JSON, and so is what is printed.

A process of its own, because the library reads HF_ENDPOINT when it is imported.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    wanted = json.loads(sys.argv[1])
    import datasets

    stream = datasets.load_dataset(
        wanted["dataset"], wanted.get("config"), split=wanted["split"], streaming=True
    )
    texts = [row["text"] for row in stream]
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
