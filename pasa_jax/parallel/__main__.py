"""`python -m pasa_jax.parallel`: which scheme is the fastest on paper, by length and devices."""

from __future__ import annotations

import argparse

from pasa_jax.parallel._cost import CHIPS, Plan, plan

LENGTHS = tuple(2**i for i in range(16, 23))  # 64k to 4M
DEVICES = tuple(4**i for i in range(1, 7))  # 4 to 4,096
SHORT = {"all_gather": "gather", "ulysses": "ulysses", "ring": "ring", "ring_ulysses": "groups"}


def plans(arguments: argparse.Namespace, chip: str, length: int) -> list[Plan]:
    """The plan of each number of devices."""
    a = arguments
    sizes = (1, length, length, a.heads, a.key_heads, a.head_size)
    return [plan(c, *sizes, chip=chip, balanced=a.balanced) for c in DEVICES]


def cell(found: Plan) -> str:
    """The scheme and its time; a star where no chip's memory holds it."""
    cost = found.chosen
    group = "" if cost.ulysses_devices is None else f" {cost.ulysses_devices}"
    star = "*" if "none fits" in found.reason else ""
    return f"{SHORT[cost.scheme]}{group} {_time(cost.seconds)}{star}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def crossovers(found: list[Plan]) -> str:
    """From which number of devices on which scheme is the fastest."""
    said: list[str] = []
    for devices, one in zip(DEVICES, found, strict=True):
        name = SHORT[one.chosen.scheme]
        if not said or not said[-1].startswith(name):
            said.append(f"{name} from {devices}")
    return ", ".join(said)


def main(arguments: list[str] | None = None) -> None:
    """Prints one table for each chip."""
    parser = argparse.ArgumentParser(prog="python -m pasa_jax.parallel", description=__doc__)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--balanced", action="store_true", help="tokens in zigzag or striped")
    parser.add_argument("--chip", choices=[x for x in CHIPS if x != "cpu"], action="append")
    given = parser.parse_args(arguments)
    print(
        "On paper, from formulas, with links as in one slice however many chips there are: causal "
        "attention in bfloat16 and its gradient, one sequence, "
        f"{given.heads} heads, {given.key_heads} key heads of {given.head_size}."
    )
    for chip in given.chip or [x for x in CHIPS if x != "cpu"]:
        print(f"\n{chip}: the fastest scheme (groups u: a ring of groups of u; *: too much memory)")
        print("".join(f"{x:>19}" for x in ("tokens", *DEVICES)))
        rows = {length: plans(given, chip, length) for length in LENGTHS}
        for length, found in rows.items():
            print(f"{length // 1024:>18}k" + "".join(f"{cell(x):>19}" for x in found))
        for length, found in rows.items():
            print(f"  {length // 1024}k: {crossovers(found)}")


if __name__ == "__main__":
    main()
