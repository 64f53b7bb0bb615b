"""Programs that use fusedrnn, each run from the checkout."""
