"""What a block's jaxpr says about it."""
