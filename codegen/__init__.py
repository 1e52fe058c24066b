"""From a fusion scheme to a program: lower groups to kernel specs, render templates, plan buffers, assemble."""
