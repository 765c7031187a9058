"""One self-contained HTML page from run folders: a study's story, or runs side by side."""
