"""Data: named sources and own events go in; checked splits and batches (functions of a cursor) come out."""
