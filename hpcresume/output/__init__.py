"""What a run produced: its rows, parts and files, and how they are collected."""
