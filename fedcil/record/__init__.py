"""What a run leaves behind: its folder, checkpoints, tables, figures and the report."""
