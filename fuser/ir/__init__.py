"""Values that everyone speaks: operators, schemes, masks, targets. Imports nothing else of fuser."""
