"""One decoder for many published language models, its weights in and out, and its cache for sampling."""
