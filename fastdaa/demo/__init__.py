"""`make demo`: a small world of questions, a small Llama, and its alignment, in a few minutes."""
