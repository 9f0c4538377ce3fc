"""What a fair user would write, to compare with."""
