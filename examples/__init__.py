"""Programs that use fusedrnn. Each runs in a checkout."""
