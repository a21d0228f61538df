"""``fastdaa bench KIND --compare REF``: two versions of this project in one run."""
