"""A call, traced apart from where it is made, with copies of the NNX objects that its function holds and is given."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxckpt._leaves import is_array, replaced
from jaxckpt._setting import Setting
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.engine import check, refs
from jaxckpt.engine.planned import as_one, by_itself
from jaxckpt.engine.single import run_under
from jaxckpt.flax.objects import Objects, update_static, update_variables, written_apart


class Call(NamedTuple):
    """A traced call.

    Fields:
        closed: its jaxpr.
        arrays: what the jaxpr is given.
        returned: what the call returns, of the jaxpr's outputs; what it changed in objects is written back.
    """

    closed: Any
    arrays: list[Any]
    returned: Callable[[list[Any]], Any]


def traced_call(run: Callable[[list[Any], Any], Any], fns: Sequence[Callable[..., Any]], args: Any, who: str) -> Call:
    """`run(fns, args)`, traced once; leaves of arguments and results that are not arrays pass through untouched.

    Arguments:
        who: makes the call, for errors.
    Raises:
        TypeError: a function closes over a `jax.Ref`.
        ValueError: a function changes an NNX object that it hides.
    """
    objects = Objects(fns, args)
    out: dict[str, Any] = {}

    def on_arrays(arrays: list[Any]) -> list[Any]:
        copied, given, copies = objects.copied(arrays)
        with written_apart(who):
            results = run(copied, given)
        changed = copies.changed()
        leaves, tree = jax.tree.flatten((copies.marked(results), list(changed.values())))
        kept, rebuild = _split(leaves)
        out.update(paths=list(changed), tree=tree, rebuild=rebuild, static=copies.changed_static())
        return kept

    closed = jx.trace(on_arrays, objects.arrays)
    refs.check_closed_over(who, closed)

    def returned(arrays: list[Any]) -> Any:
        results, variables = jax.tree.unflatten(out["tree"], out["rebuild"](arrays))
        update_variables(objects.originals, dict(zip(out["paths"], variables, strict=True)))
        update_static(objects.originals, out["static"])
        return objects.returned(results)

    return Call(closed, objects.arrays, returned)


def run_call(
    run: Callable[[list[Any], Any], Any], fns: Sequence[Callable[..., Any]], args: Any, setting: Setting, names: check.Names
) -> Any:
    """`run(fns, args)`, checkpointed as `setting` says."""
    refs.check_given(names.block, [("an argument", leaf) for leaf in jax.tree.leaves(args)])
    with by_itself() if setting.plan is not None else as_one():
        call = traced_call(run, fns, args, names.block)
    return call.returned(run_under(setting, call.closed, call.arrays, names))


def run_function(fn: Callable[..., Any], args: tuple, keywords: dict[str, Any], setting: Setting, names: check.Names) -> Any:
    """`fn(*args, **keywords)`, checkpointed as `setting` says."""
    return run_call(lambda fns, given: fns[0](*given[0], **given[1]), [fn], (args, keywords), setting, names)


def _split(leaves: list[Any]) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
    """The array leaves, and a function that puts arrays back among the others."""
    where = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    others = [None if is_array(leaf) else leaf for leaf in leaves]
    return [leaves[i] for i in where], lambda arrays: replaced(others, where, arrays)
