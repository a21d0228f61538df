"""`make demo`: three losses over-optimise a known reward, in a few minutes on a laptop."""
