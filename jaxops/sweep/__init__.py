"""Many runs from one file: their plan, the processes that run them, what they came to, and a page of it."""
