"""Does a feature help? Arms of one configuration on the same data and seeds, to a verdict.

The first arm is the one without the feature; the last may be a placebo, whose name begins with
`placebo`. Every arm runs for the same number of steps, which is equal tokens, and once more, where
it costs more or less than the first, for as many steps as the first one's time allows: equal time.
Bits per byte are of the validation split after the last step. An arm helps when its interval lies
below 0 at equal tokens and at equal time, and also against the placebo.

    python scripts/ablate.py @profiles/quickstart.txt --ablate-steps 300 --seeds 0,1,2 \\
        --arm "off: --optimizer c3o" --arm "on: --optimizer c3o --c3o-credit-enabled" \\
        --arm "placebo: --optimizer c3o --c3o-credit-enabled --c3o-credit-shuffled"

Own options end at the flags of train_sigma.py, which follow or come in an @file. Give every arm the
same probe text (--probe-held-out), or their data differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.ablation import CLOCKS, Arm, Outcome, run_side_by_side
from scripts.bench_common import cpu_name, load_average
from scripts.paired import Comparison, compare, overall_verdict
from training.config.cli import parse_args
from training.runtime.environment import versions

SAME_COST = 0.02  # two arms whose time per step differs by less share their equal-time run
PLACEBO = "placebo"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--arm", action="append", required=True, type=_arm, metavar="NAME:FLAGS")
    parser.add_argument("--seeds", required=True, type=_seeds, help="such as 0,1,2")
    parser.add_argument("--ablate-steps", required=True, type=int, help="steps of every arm")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--turn-steps", type=int, default=5, help="steps of an arm in a row")
    parser.add_argument("--tokens-only", action="store_true", help="leave out equal time")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options, common = parser.parse_known_args(argv)
    names = [arm.name for arm in options.arm]
    if len(set(names)) != len(names) or len(names) < 2:
        parser.error("--arm: give two or more arms with different names")
    if len(set(options.seeds)) < 2:
        parser.error("--seeds: give two or more different ones")
    for arm in options.arm:
        try:
            parse_args([*common, *arm.flags])
        except ValueError as error:
            parser.error(f"arm {arm.name}: {error}")
    about = {
        "flags": common,
        "arms": {arm.name: list(arm.flags) for arm in options.arm},
        "clock": options.clock,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": cpu_name(), "load": load_average()},
        "versions": versions(),
    }
    with tempfile.TemporaryDirectory() as directory:
        run = partial(
            run_side_by_side,
            common,
            directory=Path(directory),
            clock=CLOCKS[options.clock],
            turn_steps=options.turn_steps,
        )
        result = ablate(
            run,
            options.arm,
            seeds=options.seeds,
            steps=options.ablate_steps,
            tokens_only=options.tokens_only,
            save=lambda found: write_result(about | found, options.output),
        )
    print(table(result))
    return 0


def ablate(
    run: Callable[..., dict[str, Outcome]],
    arms: Sequence[Arm],
    *,
    seeds: Sequence[int],
    steps: int,
    save: Callable[[dict[str, Any]], object],
    tokens_only: bool = False,
) -> dict[str, Any]:
    """All runs, their comparisons with the first arm and the placebo, and a verdict per arm.

    `run` is `run_side_by_side` with all but arms, seed and steps given. `save` gets what is known
    after every seed from the second on, so that an interrupted ablation leaves its finished part;
    `is_complete` tells.
    """
    tokens: dict[int, dict[str, Outcome]] = {}
    timed: dict[int, dict[str, Outcome]] = {}
    allowed: dict[str, int] = {}

    def result(*, is_complete: bool) -> dict[str, Any]:
        return {
            "steps": steps,
            "equal_time_steps": allowed,
            "is_complete": is_complete,
            "equal_tokens": _runs(tokens),
            "equal_time": _runs(timed),
            "comparisons": comparisons(tokens, timed, names=[arm.name for arm in arms]),
        }

    for seed in seeds:
        tokens[seed] = run(arms, seed=seed, steps={arm.name: steps for arm in arms})
        print(f"seed {seed}: " + _brief(tokens[seed]), flush=True)
        if len(tokens) > 1:
            save(result(is_complete=tokens_only and len(tokens) == len(seeds)))
    if tokens_only:
        return result(is_complete=True)
    allowed = equal_time_steps(tokens, steps=steps)
    others = [arm for arm in arms if allowed[arm.name] != steps]
    for seed in seeds:
        timed[seed] = dict(tokens[seed])
        if not others:
            continue
        timed[seed] |= run(others, seed=seed, steps=allowed)
        print(f"seed {seed}, equal time: " + _brief(timed[seed]), flush=True)
    found = result(is_complete=True)
    save(found)
    return found


def write_result(result: dict[str, Any], path: Path | None) -> None:
    """The result as JSON where a path is given, in place of an earlier one."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")


def equal_time_steps(tokens: dict[int, dict[str, Outcome]], *, steps: int) -> dict[str, int]:
    """Steps that each arm can make in the first arm's time; `steps` where the cost is the same."""
    names = list(next(iter(tokens.values())))
    allowed = {}
    for name in names:
        cost = statistics.median(
            outcomes[name].seconds / outcomes[names[0]].seconds for outcomes in tokens.values()
        )
        allowed[name] = steps if abs(cost - 1.0) < SAME_COST else max(1, round(steps / cost))
    return allowed


def comparisons(
    tokens: dict[int, dict[str, Outcome]],
    timed: dict[int, dict[str, Outcome]],
    *,
    names: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Every arm against the first one and the placebo, and its overall verdict."""
    placebo = next((name for name in names if name.startswith(PLACEBO)), None)
    found: dict[str, dict[str, Any]] = {}
    for name in names[1:]:
        rivals = [names[0]] if placebo in (None, name) else [names[0], placebo]
        parts: dict[str, Comparison] = {}
        for rival in rivals:
            for label, runs in (("equal tokens", tokens), ("equal time", timed)):
                if len(runs) < 2:
                    continue
                parts[f"{label}, against {rival}"] = compare(
                    [outcomes[name].bpb for outcomes in runs.values()],
                    [outcomes[rival].bpb for outcomes in runs.values()],
                )
        found[name] = {label: part.to_dict() for label, part in parts.items()}
        found[name]["verdict"] = overall_verdict(list(parts.values()))
    return found


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table; differences in bits per byte, negative is better."""
    lines = ["| arm | comparison | difference | 95 % interval | verdict |", "|---|---|---|---|---|"]
    for name, parts in result["comparisons"].items():
        for label, part in parts.items():
            if label == "verdict":
                continue
            low, high = part["interval"]
            lines.append(
                f"| {name} | {label} | {part['mean']:+.4f} | {low:+.4f} to {high:+.4f} | "
                f"{part['verdict']} |"
            )
        lines.append(f"| {name} | all | | | **{parts['verdict']}** |")
    return "\n".join(lines)


def _runs(runs: dict[int, dict[str, Outcome]]) -> dict[str, dict[str, Any]]:
    return {
        str(seed): {
            name: {
                "bpb": outcome.bpb,
                "steps": outcome.steps,
                "seconds": round(outcome.seconds, 2),
            }
            for name, outcome in outcomes.items()
        }
        for seed, outcomes in runs.items()
    }


def _brief(outcomes: dict[str, Outcome]) -> str:
    return ", ".join(
        f"{name} {outcome.bpb:.4f} ({outcome.steps} steps, {outcome.seconds:.0f} s)"
        for name, outcome in outcomes.items()
    )


def _arm(text: str) -> Arm:
    try:
        return Arm.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seeds(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
