"""What a GPU is asked about the head, the processes that ask, and the tables of the answers."""
