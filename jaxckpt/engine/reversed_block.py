"""One block in the reversal engine: its run, its run that keeps what its reversal wants, and its reversal."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from jaxckpt._leaves import replaced
from jaxckpt.analysis import flow
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.engine.types import zeros
from jaxckpt.policies.grammar import JaxPolicy, everything

Arrays = list[Any]
Slot = dict[int, Any]  # what the reversal of a block wants, by number


class Inputs(NamedTuple):
    """What one block is given, or all: constants of its jaxpr, a slice of `xs` (or all of it), the carry, what is shared."""

    constants: Arrays
    carry: Arrays
    xs: Arrays
    shared: Arrays

    def flat(self) -> Arrays:
        return [leaf for part in self for leaf in part]

    def like(self, flat: Sequence[Any]) -> "Inputs":
        """`flat` as parts of the same lengths."""
        rest = iter(flat)
        return Inputs(*([next(rest) for _ in part] for part in self))


Step = Callable[[Inputs], tuple[Arrays, Arrays]]


class ReversedBlock:
    """One block: its run, its run that keeps what its reversal wants, and its reversal.

    What the reversal wants is not kept where it is an input of the block, but for the carry, nor where it is a parameter in
    another dtype. What depends on no slice and no carry is the same for all blocks, and kept once. Values that are kept go
    by their number among the outputs of `_kept`.

    Attributes:
        pin: the layout of what goes into slots and snapshots.
        wanted: the inputs that have gradients.
        slot: what goes into a slot.
        in_carry, in_ys: where that is a leaf of the carry, or a `y`, which of them.
        axes: the named axes along which blocks compute together.
    """

    def __init__(
        self,
        step: Step,
        keep: JaxPolicy,
        pin: Callable[[Any], Any],
        straight: bool,
        inputs: Inputs,
        wanted: Inputs,
    ):
        types = inputs._replace(xs=jx.slice_types(inputs.xs))
        self.step, self.pin, self.wanted = step, pin, wanted
        where = _true(self.wanted.flat())
        pull_tree: Any = None

        def kept(*flat: Any) -> Arrays:
            nonlocal pull_tree

            def of_wanted(*values: Any) -> tuple[Arrays, Arrays]:
                return step(types.like(replaced(flat, where, values)))

            fn = of_wanted if keep is everything else jax.checkpoint(of_wanted, policy=keep, prevent_cse=straight)
            (carry, ys), pull = jax.vjp(fn, *(flat[i] for i in where))
            leaves, pull_tree = jax.tree.flatten(pull)
            return [*carry, *ys, *leaves]

        closed = jx.trace(kept, *types.flat())
        self._kept, self._types, self._pull_tree = jx.as_function(closed), closed.out_avals, pull_tree
        self._ys = slice(len(inputs.carry), len(closed.out_avals) - pull_tree.num_leaves)
        self.axes = jx.collective_axes(closed)
        self._find_sources(closed, types)

    def _find_sources(self, closed: Any, types: Inputs) -> None:
        """Where each leaf of the pullback is when a block is reversed: the part of what is given, and its number there."""
        invars, from_input, converted = closed.jaxpr.invars, flow.forwarded(closed.jaxpr), flow.converted(closed.jaxpr)
        values = [id(var if k is None else invars[k]) for var, k in zip(closed.jaxpr.outvars, from_input, strict=True)]
        number = types.like(range(len(invars)))
        varying = set(map(id, flow.dependent(closed.jaxpr, [*number.xs, *number.carry])))
        self._sources: list[tuple[str, int]] = []
        first: dict[int, int] = {}
        for i in range(self._ys.stop, len(values)):
            k = from_input[i]
            if k is not None and k not in number.carry:
                self._sources.append(("input", k))
            elif converted[i] in number.xs:
                self._sources.append(("converted", i))
            else:
                self._sources.append(("slot" if values[i] in varying else "same", first.setdefault(values[i], i)))
        self._converted: dict[int, Any] = {i: converted[i] for part, i in self._sources if part == "converted"}
        self.slot = list(dict.fromkeys(i for part, i in self._sources if part == "slot"))
        self._same = list(dict.fromkeys(i for part, i in self._sources if part == "same"))
        self._make_same = jx.as_function(flow.selected(closed, self._same))
        carry, ys = [id(invars[k]) for k in number.carry], values[self._ys]
        self.in_carry = {i: carry.index(values[i]) for i in self.slot if values[i] in carry}
        self.in_ys = {i: ys.index(values[i]) for i in self.slot if values[i] in ys}

    @property
    def y_types(self) -> Sequence[Any]:
        return self._types[self._ys]

    def slot_of(self, carry: Arrays, numbers: Iterable[int]) -> Slot:
        """These values of a slot, which are nothing but the carry."""
        return {i: carry[self.in_carry[i]] for i in numbers}

    def run_and_keep(self, inputs: Inputs, numbers: Iterable[int]) -> tuple[Arrays, Arrays, Slot]:
        """The next carry, the `y`s, and these values of a slot."""
        out = self._kept(*inputs.flat())
        return out[: self._ys.start], out[self._ys], {i: self.pin(out[i]) for i in numbers}

    def same(self, inputs: Inputs) -> Slot:
        """What the reversals of all blocks want alike."""
        values = self._make_same(*inputs._replace(xs=[x[0] for x in inputs.xs]).flat()) if self._same else []
        return dict(zip(self._same, values, strict=True))

    def reverse(self, inputs: Inputs, slot: Slot, same: Slot, of_carry: Arrays, of_ys: Arrays) -> Inputs:
        """Gradients of what is wanted; the carry of `inputs` is not looked at.

        Arguments:
            slot: without what nobody asks for where `of_ys` are zeros.
            of_carry: the gradients of the wanted leaves of the carry.
            of_ys: those of the `y`s; None for zeros.
        """
        slot = {i: slot[i] if i in slot else zeros(self._types[i]) for i in self.slot}
        flat = inputs.flat()
        converted = {i: lax.convert_element_type(flat[k], self._types[i].dtype) for i, k in self._converted.items()}
        given = {"input": flat, "converted": converted, "slot": slot, "same": same}
        pull = jax.tree.unflatten(self._pull_tree, [given[part][i] for part, i in self._sources])
        rest = iter(of_carry)
        cts = [*(next(rest) if yes else None for yes in self.wanted.carry), *of_ys]
        cts = [ad.Zero(t.to_tangent_aval()) if ct is None else ct for ct, t in zip(cts, self._types, strict=False)]
        gradients = iter(pull((cts[: self._ys.start], cts[self._ys])))
        return Inputs(*([next(gradients) for yes in part if yes] for part in self.wanted))


def wanted_inputs(steps: Sequence[Step], inputs: Inputs, perturbed: Inputs) -> Inputs:
    """Which inputs have gradients. A leaf of the carry that has no tangent at first may get one on its way."""
    types = inputs._replace(xs=jx.slice_types(inputs.xs))
    inexact = types.like([is_inexact(t) for t in types.flat()])
    wanted = types.like([p and yes for p, yes in zip(perturbed.flat(), inexact.flat(), strict=True)])
    while wanted.carry != inexact.carry:
        carry = list(wanted.carry)
        for step in steps:
            moved = flow.perturbed(lambda *flat: step(types.like(flat))[0], types.flat(), _true(wanted.flat()))  # noqa: B023
            carry = [a or b for a, b in zip(carry, moved, strict=True)]
        if carry == wanted.carry:
            break
        wanted = wanted._replace(carry=carry)
    return wanted


def is_inexact(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _true(flags: Sequence[bool]) -> list[int]:
    return [i for i, yes in enumerate(flags) if yes]
