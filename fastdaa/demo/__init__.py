"""`make demo`: three losses over-optimise a known reward, in a minute and a half on two cores."""
