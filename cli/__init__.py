"""The radqueue command."""
