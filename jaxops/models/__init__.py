"""Models as plain objects whose parameters are dicts and whose methods are pure."""
