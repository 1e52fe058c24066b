"""From a model and a call to the operator graph: capture, raising, what is watched."""
