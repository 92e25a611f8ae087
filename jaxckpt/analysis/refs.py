"""What keeps its own derivative while the Refs of a block become values.

JAX makes values of Refs when it compiles, after differentiation: in loops, branches and calls it drops custom derivatives
(and, under `jax_remat3`, tags). So they are put aside as one opaque operation each, and put back afterwards.
"""

from collections.abc import Callable
from typing import Any

from jax.extend import core

_PUT_ASIDE = ("custom_jvp_call", "custom_vjp_call", "call_hi_primitive")


def put_aside(closed: Any) -> Any:
    """The jaxpr with an opaque equation for each that has a derivative of its own.

    Raises:
        ValueError: one of them is given a Ref.
    """

    def opaque(eqn: Any) -> Any:
        if not eqn.primitive.name.startswith(_PUT_ASIDE):
            return None
        if any(type(var.aval).__name__ == "AbstractRef" for var in eqn.invars):
            kind = eqn.primitive.name.removesuffix("_call")
            raise ValueError(
                f"a block passes a jax.Ref to a function with a derivative of its own ({kind}), which says nothing of what "
                "is written there: pass the value, ref[...], and write into the Ref what the function returns"
            )
        return eqn.replace(primitive=opaque_p, params={"call": _Call(eqn)}, effects=frozenset())

    return _mapped(closed, opaque)


def put_back(closed: Any) -> Any:
    """The jaxpr with the equations that were put aside."""

    def call(eqn: Any) -> Any:
        if eqn.primitive is not opaque_p:
            return None
        return eqn.params["call"].eqn.replace(invars=eqn.invars, outvars=eqn.outvars, source_info=eqn.source_info)

    return _mapped(closed, call)


class _Call:
    """An equation as a parameter of another: compared by identity."""

    def __init__(self, eqn: Any):
        self.eqn = eqn

    def __repr__(self) -> str:
        return str(self.eqn.primitive)


opaque_p = core.Primitive("jaxckpt_put_aside")
opaque_p.multiple_results = True
opaque_p.def_abstract_eval(lambda *_, call: [var.aval for var in call.eqn.outvars])


def _mapped(closed: Any, change: Callable[[Any], Any]) -> Any:
    """A jaxpr, closed or not, in which `change` has replaced equations at every depth; None leaves one as it is."""
    jaxpr = getattr(closed, "jaxpr", closed)
    eqns = [change(eqn) or eqn.replace(params=_mapped_params(eqn.params, change)) for eqn in jaxpr.eqns]
    jaxpr = jaxpr.replace(eqns=eqns)
    return core.ClosedJaxpr(jaxpr, closed.consts) if isinstance(closed, core.ClosedJaxpr) else jaxpr


def _mapped_params(params: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    def mapped(value: Any) -> Any:
        if isinstance(value, (core.ClosedJaxpr, core.Jaxpr)):
            return _mapped(value, change)
        return type(value)(map(mapped, value)) if type(value) in (tuple, list) else value

    return {name: mapped(value) for name, value in params.items()}
