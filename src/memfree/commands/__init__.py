"""Commands of ``memfree``: one file a verb."""
