"""What a fair user would write without this project, to compare with."""
