"""Executors: a pure block function, a setting and stacked inputs in, the stack's result out."""
