"""The class of a stack: a subclass of the block's, which users may subclass in turn."""

from collections.abc import Collection
from typing import Any


def stack_class(block: type, length: int | None, body: dict[str, Any], passed_on: Collection[str] = ()) -> type:
    """The class of a stack of `length` `block`s, with the attributes `body`; its name is that of `nn.scan`, `ScanBlock`.

    A subclass of it that overrides what the blocks do is refused: they are of class `block`, and would not see it.

    Arguments:
        passed_on: attributes of the stack that it hands to its blocks.
    """

    def __init_subclass__(cls: type, **keywords: Any) -> None:
        # Before Flax adds to them, and without what a stack of stacks takes from a base: `setup`.
        own = [name for name, value in vars(cls).items() if not any(vars(b).get(name) is value for b in cls.__mro__[1:])]
        super(made, cls).__init_subclass__(**keywords)  # pyright: ignore[reportArgumentType]
        inside = [name for name in own if hasattr(block, name) and not name.startswith("__") and name not in passed_on]
        if inside:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(inside)} of {block.__name__}, and the blocks of a stack are of class "
                f"{block.__name__}, which would not see it: override it in a subclass of that, and stack the subclass"
            )

    doc = f"A checkpointed stack of {length} `{block.__name__}`s; made by `jaxckpt.checkpoint_scan`."
    body = {**body, "__init_subclass__": classmethod(__init_subclass__), "__doc__": doc, "__module__": block.__module__}
    made = type(f"Scan{block.__name__}", (block,), body)
    return made
