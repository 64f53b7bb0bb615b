"""Programs that use fusedrnn. Each runs in a checkout."""

from examples.missing_packages import say_what_is_missing

say_what_is_missing()
