"""Data sets as their authors publish them, turned into BEIR folders; one file per source."""
