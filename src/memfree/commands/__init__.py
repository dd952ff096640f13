"""Commands of ``memfree``, one file per verb."""
