"""Does `plan` find the same on a busy machine as on an idle one, and is more memory never slower?

Plans one training step of a Llama (24 blocks of 2048 channels, adamw) for an H200 that need not be in the machine, under ten
budgets, each in a process of its own, with and without gradient accumulation. A run has a name, such as "loaded" or "idle",
and is kept; what was planned before is not planned again, and runs are compared.

    JAX_PLATFORMS=cpu python benchmarks/plan_is_repeatable.py --run loaded    # go on with it, as often as it is called
    JAX_PLATFORMS=cpu python benchmarks/plan_is_repeatable.py                 # compare, and write the section
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _results import RESULTS, in_a_child, load, save, write_section

from jaxckpt import checkpoint_scan, plan
from jaxckpt.models import TransformerBlock

GIB = 2**30
LAYERS, BATCH, TOKENS, CHANNELS, VOCABULARY = 24, 8, 2048, 2048, 32_000
TARGET = "h200"
BUDGETS = [100 + 40 * i / 9 for i in range(10)]  # GiB
ACCUMULATED = (1, 4)  # batches in a step
KEYS = ("run", "jax", "accumulated", "budget")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="the name of the run to go on with; without it nothing is planned")
    parser.add_argument("--accumulated", type=int, nargs="+", default=ACCUMULATED)
    parser.add_argument("--minutes", type=float, default=9, help="start no plan after them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, metavar=("ACCUMULATED", "BUDGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(planned(int(options.child[0]), float(options.child[1]))))
        return
    path = options.out / "plan_is_repeatable.json"
    rows = {tuple(row[key] for key in KEYS): row for row in load(path, "plans")}
    begin = time.monotonic()
    for accumulated in options.accumulated if options.run else ():
        for budget in map(lambda budget: round(budget, 1), BUDGETS):
            key = options.run, jax.__version__, accumulated, budget
            if key in rows or time.monotonic() > begin + 60 * options.minutes:
                continue
            found = in_a_child(__file__, str(accumulated), str(budget), seconds=3600)
            print(*key, found, file=sys.stderr)
            if "error" not in found:
                rows[key] = {**dict(zip(KEYS, key, strict=True)), **found}
                save(path, "plans", [rows[k] for k in sorted(rows)])
    text = "\n\n".join([INTRODUCTION, *tables(list(rows.values()))])
    write_section("plan_is_repeatable", text, options.out)
    print(text)


def step_of(accumulated: int) -> tuple[Any, tuple[Any, ...]]:
    """The step, and shapes of what it is called with."""
    stack = checkpoint_scan(TransformerBlock, LAYERS, plan="auto")(
        d_model=CHANNELS, num_heads=16, d_ff=4 * CHANNELS, dtype=jnp.bfloat16
    )
    optimizer = optax.adamw(1e-4)

    def loss(params: Any, tokens: Any) -> Any:
        embedding = params["embedding"].astype(jnp.bfloat16)
        logits = (stack.apply(params["stack"], embedding[tokens]) @ embedding.T).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    def gradients_of(params: Any, tokens: Any) -> Any:
        if accumulated == 1:
            return jax.grad(loss)(params, tokens)

        def add(total: Any, tokens: Any) -> Any:
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, tokens)), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, tokens.reshape(accumulated, BATCH, TOKENS))[0]

    def step(params: Any, state: Any, tokens: Any) -> Any:
        updates, state = optimizer.update(gradients_of(params, tokens), state, params)
        return optax.apply_updates(params, updates), state

    x = jax.ShapeDtypeStruct((BATCH, TOKENS, CHANNELS), jnp.bfloat16)
    params = {
        "embedding": jax.ShapeDtypeStruct((VOCABULARY, CHANNELS), jnp.float32),
        "stack": jax.eval_shape(stack.init, jax.random.key(0), x),
    }
    tokens = jax.ShapeDtypeStruct((accumulated * BATCH, TOKENS), jnp.int32)
    return jax.jit(step, donate_argnums=(0, 1)), (params, jax.eval_shape(optimizer.init, params), tokens)


def planned(accumulated: int, budget: float) -> dict[str, Any]:
    step, args = step_of(accumulated)
    begin = time.monotonic()
    found = plan(step, *args, budget=f"{budget}GiB", target=TARGET, progress=False)
    return {
        "knobs": {**found.to_json()["stacks"][""]["knobs"]},
        "setting": found.chosen.setting,
        "peak_bytes": found.peak_bytes,
        "runs": found.chosen.forward_runs,
        "model_seconds": found.chosen.seconds,
        "compiled": [row.setting for row in found.candidates],
        "untried": [row.setting for row in found.untried],
        "plan_seconds": round(time.monotonic() - begin, 1),
        "load_average": round(os.getloadavg()[1], 1),
    }


INTRODUCTION = f"""## Plans are repeatable

`plan_is_repeatable.py` plans a training step of a Llama ({LAYERS} blocks of {CHANNELS} channels, {BATCH} x {TOKENS} tokens,
adamw, a vocabulary of {VOCABULARY}) for {TARGET} under ten budgets, each in a fresh process, on a machine of two cores with
nothing else to do and with much else. Same: the knobs and the compiled peak are. Compiled: whole steps for one plan. Load:
how many processes wanted a core in the last five minutes."""


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """For each version of JAX and number of batches, what the runs found."""
    made = []
    for version, accumulated in sorted({(row["jax"], row["accumulated"]) for row in rows}):
        mine = [row for row in rows if (row["jax"], row["accumulated"]) == (version, accumulated)]
        runs = sorted({row["run"] for row in mine})
        by_key = {(row["run"], row["budget"]): row for row in mine}
        batches = "one batch in a step" if accumulated == 1 else f"gradients of {accumulated} batches accumulated"
        lines = [f"### JAX {version}, {batches}", "", "| budget GiB | peak GiB | forward runs | setting | compiled "]
        lines[-1] += "".join(f"| seconds {run} | load " for run in runs) + "| same |"
        lines.append("|--:|--:|--:|---|--:" + "|--:|--:" * len(runs) + "|---|")
        verdicts = []
        for budget in sorted({row["budget"] for row in mine}):
            found = [by_key.get((run, budget)) for run in runs]
            there = [row for row in found if row is not None]
            verdicts.append(same(there) if len(there) > 1 else "")
            first = there[0]
            cells = [f"{budget}", f"{first['peak_bytes'] / GIB:.2f}", f"{first['runs']:.2f}", first["setting"]]
            cells += [f"{len(first['compiled'])}"]
            cells += [text for row in found for text in (("", "") if row is None else timing(row))]
            lines.append("| " + " | ".join([*cells, verdicts[-1]]) + " |")
        said = [f"{run}: {monotone([by_key[run, b] for r, b in sorted(by_key) if r == run])}" for run in runs]
        said += [f"the same under {verdicts.count('same')} of {sum(map(bool, verdicts))} budgets that two runs have"]
        made.append("\n".join([*lines, "", "; ".join(said) + "."]))
    return made


def timing(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['plan_seconds']:.0f}", f"{row['load_average']}"


def same(rows: list[dict[str, Any]]) -> str:
    found = {json.dumps([row["knobs"], row["peak_bytes"]], sort_keys=True) for row in rows}
    return "same" if len(found) == 1 else "**not same**"


def monotone(rows: list[dict[str, Any]]) -> str:
    """Of one run, by budget."""
    seconds = [row["model_seconds"] for row in rows]
    within = all(row["peak_bytes"] <= row["budget"] * GIB for row in rows)
    more = "more memory is never slower" if seconds == sorted(seconds, reverse=True) else "**more memory is slower once**"
    return f"{len(rows)} plans{'' if within else ', **not all within the budget**'}, {more}"


if __name__ == "__main__":
    main()
